"""plot.py: that it draws all of it from CSVs alone, a suite's or a run's, and what it picks from them."""

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT

import plot
from ablate import write_csv
from configurator import ConfigError

VECTORS = ("blocks.0.attn.qkv.v.q", "blocks.0.attn.qkv.v.k", "blocks.0.attn.qkv.u.q", "blocks.1.attn.qkv.v.q",
           "blocks.1.ffn.gate_up.v.up", "lm_head.v.shared")


def curve(final):
    return [{"step": t // 10, "tokens": t, "train_loss": "" if t == 0 else final + (4000 - t) / 4000,
             "val_loss": final + (4000 - t) / 4000} for t in range(0, 4001, 500)]


def gammas(vectors=VECTORS):
    return [{"step": step, "name": vector, "role": "input", "mean": 1 + step / 100, "std": 0.1, "min": 0, "max": 2,
             "norm": 4 + step / 25, "cosine": 1 - step / 200} for step in (0, 50, 100) for vector in vectors]


def write_suite(folder, seeds=3):
    """The CSVs as ablate.py leaves them: four sizes of two strategies, unified doing with C what takes 1.25 C."""
    rng = np.random.default_rng(0)
    results, curves, scales = [], [], []
    for size, flops in (("S", 1e12), ("M", 1e13), ("L", 1e14), ("XL", 1e15)):
        noise = rng.normal(0, 0.002, seeds)
        for name, gain in (("baseline", 1.0), ("unified", 1.25)):
            arm = f"{name} at {size}"
            for seed, loss in enumerate(1.5 + 20 * (gain * flops) ** -0.1 + noise):
                cell = f"{arm}{seed}"
                results.append({"suite": "scaling", "arm": arm, "reference": f"baseline at {size}" * (gain > 1),
                                "use": "report", "lr": 1e-3, "seed": seed, "val_loss": loss, "params": 10,
                                "tokens": 4000, "flops": flops, "cell": cell})
                curves += [{"cell": cell, **row} for row in curve(loss)]
            scales += [{"cell": f"{arm}0", **row} for row in gammas(VECTORS[:4 if gain == 1 else 6])]
    for name, rows in (("results", results), ("curves", curves), ("scales", scales)):
        write_csv(folder / f"{name}.csv", rows)


def write_run(folder, final):
    folder.mkdir(parents=True)
    write_csv(folder / "log.csv", curve(final))
    write_csv(folder / "scales.csv", gammas())


def pictures(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".svg")}


def test_every_plot_from_csvs_alone_in_one_command(tmp_path):
    write_suite(tmp_path)
    command = [sys.executable, str(ROOT / "plot.py"), str(tmp_path)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["ablation", "curves", "directions", "gammas", "scaling"]
    made = pictures(tmp_path)
    assert sorted(made) == sorted(f"{n}.{kind}" for n in names for kind in ("png", "svg"))
    for name in names:
        assert int.from_bytes(made[f"{name}.png"][16:20], "big") == 1660  # twice a README's column
        # a background of its own, for light pages and dark ones
        assert f"fill: {plot.PAPER}" in made[f"{name}.svg"].decode()
        assert len(made[f"{name}.svg"]) < 500_000
    plot.plot_suite(tmp_path)
    assert made == pictures(tmp_path)


def test_runs_beside_each_other_and_one_alone(tmp_path, monkeypatch):
    write_run(tmp_path / "baseline", 2.0)
    write_run(tmp_path / "unified", 1.75)
    command = [sys.executable, str(ROOT / "plot.py"), "baseline", "unified"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ("curves", "gammas-baseline", "gammas-unified")
    assert sorted(pictures(tmp_path / "baseline")) == sorted(f"{n}.{kind}" for n in names for kind in ("png", "svg"))
    assert not pictures(tmp_path / "unified")
    monkeypatch.setenv("HOME", str(tmp_path))
    plot.main([str(tmp_path / "unified"), "--out=~/elsewhere"])
    assert sorted(pictures(tmp_path / "elsewhere")) == ["curves.png", "curves.svg", "gammas.png", "gammas.svg"]

    drawn = drawings(monkeypatch)
    plot.main([str(tmp_path / "baseline"), str(tmp_path / "unified")])
    above, below = drawn["curves"][0].axes
    assert above.get_lines()[1].get_ydata()[-1] == 1.75
    assert below.get_lines()[0].get_ydata().tolist() == [-0.25] * 9
    write_run(tmp_path / "other" / "unified", 3.0)
    plot.main([str(tmp_path / name) for name in ("unified", "other/unified")])  # of one name
    assert drawn["curves"][1].axes[1].get_lines()[0].get_ydata().tolist() == [1.25] * 9


def drawings(monkeypatch):
    """{picture: figures} that the test makes from here on."""
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, folder, name: drawn.setdefault(name, []).append(figure))
    return drawn


def test_one_seed_and_nothing_else_still_plots(tmp_path):
    write_suite(tmp_path, seeds=1)
    (tmp_path / "scales.csv").unlink()
    plot.plot_suite(tmp_path)
    assert not (tmp_path / "gammas.png").exists() and (tmp_path / "ablation.png").exists()


def test_only_reported_runs_and_curves_of_the_seeds_that_all_arms_have(tmp_path, monkeypatch):
    write_suite(tmp_path)
    drawn = drawings(monkeypatch)
    plot.plot_suite(tmp_path)
    for name in ("results", "curves", "scales"):
        rows = plot.read_csv(tmp_path / f"{name}.csv")
        worse = {"lr": 4e-3, "val_loss": 9.0, "mean": 9.0}
        for use in ("tuning", "kept"):
            rows += [{k: worse.get(k, use if k == "use" else use + v if k == "cell" else v) for k, v in row.items()}
                     for row in rows if row["cell"][:4] in ("base", "unif")]
        write_csv(tmp_path / f"{name}.csv", rows)
    plot.plot_suite(tmp_path)
    lines = lambda figure: [line.get_xydata().tolist() for ax in figure.axes for line in ax.get_lines()]
    for name in ("ablation", "gammas", "directions", "scaling", "curves"):
        assert lines(drawn[name][0]) == lines(drawn[name][1])
    rows = [row for row in plot.read_csv(tmp_path / "results.csv") if row["cell"] != "unified at S2"]
    write_csv(tmp_path / "results.csv", rows)
    plot.plot_suite(tmp_path)
    mean, = (line.get_ydata()[-1] for line in drawn["curves"][2].axes[0].get_lines()
             if line.get_label() == "baseline at S")
    losses = [float(r["val_loss"]) for r in rows if r["arm"] == "baseline at S" and r["use"] == "report"]
    assert mean == pytest.approx((losses[0] + losses[1]) / 2)


def test_filled_is_what_the_corrected_test_calls_a_difference(tmp_path, monkeypatch):
    write_suite(tmp_path)
    rows = plot.read_csv(tmp_path / "results.csv")
    for row in rows:  # at M no seed agrees with another on which is better
        if row["arm"] == "unified at M":
            row["val_loss"] = float(row["val_loss"]) + (int(row["seed"]) - 1)
    write_csv(tmp_path / "results.csv", rows)
    drawn = drawings(monkeypatch)
    plot.plot_suite(tmp_path)
    ax, = drawn["ablation"][0].axes
    filled = [line.get_markerfacecolor() != plot.PAPER for line in ax.get_lines() if line.get_marker() == "o"]
    assert filled == [True, False, True, True] and len(ax.patches) == 4  # a grey bar each: four references


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="has neither a run's log.csv nor finished cells"):
        plot.main([str(tmp_path)])
    write_suite(tmp_path)
    with pytest.raises(ConfigError, match="has no arm 'nope'"):
        plot.main([str(tmp_path), "--gamma=nope"])
    with pytest.raises(ConfigError, match="--gama=x: the flags are"):
        plot.main([str(tmp_path), "--gama=x"])
    (tmp_path / "log.csv").write_text("step,tokens,train_loss,val_loss\n")
    with pytest.raises(ConfigError, match="log.csv holds no evaluation yet"):
        plot.main([str(tmp_path)])


def test_scale_vectors_by_layer_and_branch():
    assert plot.place("blocks.11.attn.qkv.u.q") == (11, "attn.qkv.u", "q")
    assert plot.place("blocks.0.attn.q_scale") == (0, "attn", "q_scale")
    assert plot.place("blocks.2.ffn_post") == (2, "", "ffn_post")
    assert plot.place("lm_head.v.shared") == (None, "lm_head.v", "shared")


def test_curves_take_the_evaluations_that_all_seeds_have():
    row = lambda seed, tokens, loss: {"arm": "a", "seed": seed, "tokens": str(tokens), "val_loss": str(loss)}
    tokens, losses = plot.by_seed([row(1, 0, 4), row(1, 10, 3), row(2, 0, 5), row(2, 10, 2), row(2, 20, 1)])["a"]
    assert tokens.tolist() == [0, 10] and losses.tolist() == [[4, 3], [5, 2]]


def test_the_diagram_is_what_its_script_draws():
    sys.path.insert(0, str(ROOT / "results"))
    import diagram
    for theme, colours in diagram.THEMES.items():
        drawn = diagram.draw(colours)
        assert drawn == (ROOT / "results" / f"block_{theme}.svg").read_text(encoding="utf-8")
        words = [e.text for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("text")]
        for name in ("baseline", "HG", "DP", "DNP", "unified", "RoPE"):
            assert name in words
