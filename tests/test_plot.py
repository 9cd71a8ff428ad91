"""plot.py: what it reads off, and that it draws all of it from CSVs alone."""

import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import plot
from configurator import ConfigError
from stats import write_csv


def write_run(folder, seeds=3):
    """The CSVs as ablate.py leaves them: four sizes of two strategies, unified doing with C what takes 1.25 C."""
    rng = np.random.default_rng(0)
    results, curves, scales = [], [], []
    for size, flops in (("S", 1e12), ("M", 1e13), ("L", 1e14), ("XL", 1e15)):
        noise = rng.normal(0, 0.002, seeds)
        for name, gain in (("baseline", 1.0), ("unified", 1.25)):
            arm = f"{name} at {size}"
            final = 1.5 + 20 * (gain * flops) ** -0.1 + noise
            for seed, loss in enumerate(final):
                results.append({"suite": "scaling", "arm": arm, "reference": f"baseline at {size}" * (gain > 1),
                                "lr": 1e-3, "seed": seed, "val_loss": loss, "params": 10, "scale_params": int(9 * gain),
                                "tokens": 4000, "flops": flops, "cell": f"{arm}{seed}"})
                curves += [{"arm": arm, "lr": 1e-3, "seed": seed, "step": t // 10, "tokens": t, "train_loss": "",
                            "val_loss": loss + (4000 - t) / 4000} for t in range(0, 4001, 500)]
            for step in (0, 50, 100):
                for vector in ("blocks.0.attn.qkv.v.q", "blocks.0.attn.qkv.v.k", "blocks.0.attn.qkv.u.q",
                               "blocks.1.attn.qkv.v.q", "blocks.1.ffn.gate_up.v.up", "lm_head.v.shared"):
                    scales.append({"arm": arm, "lr": 1e-3, "step": step, "name": vector, "role": "input",
                                   "mean": 1 + step / 100, "std": 0.1, "min": 0, "max": 2, "norm": 4 + step / 25,
                                   "cosine": 1 - step / 200})
    for name, rows in (("results", results), ("curves", curves), ("scales", scales)):
        write_csv(folder / f"{name}.csv", rows)


def test_every_plot_from_csvs_alone_in_one_command(tmp_path):
    write_run(tmp_path)
    command = [sys.executable, str(ROOT / "plot.py"), str(tmp_path)]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = ["ablation", "curves", "directions", "gammas", "scaling", "tokens"]
    made = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".csv"}
    assert sorted(made) == sorted(f"{n}.{kind}" for n in names for kind in ("png", "svg"))
    for name in names:
        assert int.from_bytes(made[f"{name}.png"][16:20], "big") == 1660  # twice a README's column
        # a background of its own, for light pages and dark ones
        assert f"fill: {plot.PAPER}" in made[f"{name}.svg"].decode()
        assert len(made[f"{name}.svg"]) < 500_000
    plot.plot_folder(tmp_path)
    assert made == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.suffix != ".csv"}


def test_one_seed_and_nothing_else_still_plots(tmp_path):
    write_run(tmp_path, seeds=1)
    (tmp_path / "scales.csv").unlink()
    plot.plot_folder(tmp_path)
    assert not (tmp_path / "gammas.png").exists() and (tmp_path / "ablation.png").exists()


def test_only_the_best_rate_and_the_seeds_that_all_arms_have(tmp_path, monkeypatch):
    write_run(tmp_path)
    drawn = {}
    monkeypatch.setattr(plot, "save", lambda figure, folder, name: drawn.setdefault(name, []).append(figure))
    plot.plot_folder(tmp_path)
    for name in ("results", "curves", "scales"):
        rows = plot.read_csv(tmp_path / f"{name}.csv")
        worse = {"lr": 4e-3, "val_loss": 9.0, "mean": 9.0}
        rows += [{k: worse.get(k, v) for k, v in row.items()} for row in rows]
        if name == "curves":
            rows = [row for row in rows if (row["arm"], str(row["seed"])) != ("unified at S", "2")]
        write_csv(tmp_path / f"{name}.csv", rows)
    plot.plot_folder(tmp_path)
    lines = lambda figure: [line.get_xydata().tolist() for ax in figure.axes for line in ax.get_lines()]
    for name in ("ablation", "gammas", "directions", "scaling"):
        assert lines(drawn[name][0]) == lines(drawn[name][1])
    mean, = (line.get_ydata()[-1] for line in drawn["curves"][1].axes[0].get_lines()
             if line.get_label() == "baseline at S")
    losses = [float(r["val_loss"]) for r in plot.read_csv(tmp_path / "results.csv") if r["arm"] == "baseline at S"]
    assert mean == pytest.approx((losses[0] + losses[1]) / 2)


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="has no results.csv"):
        plot.main([str(tmp_path)])
    write_run(tmp_path)
    with pytest.raises(ConfigError, match="has no arm 'nope'"):
        plot.main([str(tmp_path), "--gamma=nope"])
    with pytest.raises(ConfigError, match="--gama=x: the one flag"):
        plot.main([str(tmp_path), "--gama=x"])


@pytest.mark.parametrize("a, b, c", [(1.7, 30.0, 0.12), (0.5, 8.0, 0.05), (2.0, 1e4, 0.35)])
def test_the_fit_finds_the_law(a, b, c):
    compute = np.geomspace(1e12, 1e17, 6)
    found = plot.fit_power_law(compute, a + b * compute**-c)
    assert found == pytest.approx((a, b, c), rel=2e-3)


def test_the_compute_ratio():
    # the arm does with C what the reference does with 1.25 C
    a, b, c = 1.5, 20.0, 0.1
    assert plot.compute_ratio((a, b, c), (a, b * 1.25**-c, c), 1e15) == pytest.approx(1.25)
    assert math.isnan(plot.compute_ratio((a, b, c), (a - 1, b / 10, c), 1e15))  # below what the reference can reach


def test_the_token_saving():
    tokens = np.array([0, 100, 200, 300])
    worse = tokens, np.array([[4.0, 3.0, 2.5, 2.25], [4.0, 3.0, 2.5, 2.25]])
    better = tokens, np.array([[4.0, 2.5, 2.0, 1.5]] * 2)  # at 2.25 half way from 100 to 200
    assert plot.saving(better, worse) == pytest.approx((2.0, 2.25, 150.0))
    assert plot.saving(worse, better) == pytest.approx((0.5, 2.25, 150.0))
    assert plot.tokens_to_reach(tokens, worse[1][0], 2.0) is None


def test_scale_vectors_by_layer_and_branch():
    assert plot.place("blocks.11.attn.qkv.u.q") == (11, "attn.qkv.u", "q")
    assert plot.place("blocks.0.attn.q_scale") == (0, "attn", "q_scale")
    assert plot.place("blocks.2.ffn_post") == (2, "", "ffn_post")
    assert plot.place("lm_head.v.shared") == (None, "lm_head.v", "shared")


def test_curves_take_the_evaluations_that_all_seeds_have():
    row = lambda seed, tokens, loss: {"arm": "a", "seed": seed, "tokens": str(tokens), "val_loss": str(loss)}
    tokens, losses = plot.by_seed([row(1, 0, 4), row(1, 10, 3), row(2, 0, 5), row(2, 10, 2), row(2, 20, 1)])["a"]
    assert tokens.tolist() == [0, 10] and losses.tolist() == [[4, 3], [5, 2]]
