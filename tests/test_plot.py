"""plot.py: what it draws from the CSVs of a suite or of a run."""

import os
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT

import plot
from ablate import write_csv
from configurator import ConfigError

VECTORS = ("blocks.0.attn.qkv.v.q", "blocks.0.attn.qkv.u.q", "blocks.1.attn.qkv.v.q", "lm_head.v.shared")


def curve(final, bad=""):
    return [{"step": t // 10, "tokens": t, "train_loss": bad or final + (4000 - t) / 4000,
             "val_loss": bad or final + (4000 - t) / 4000} for t in range(0, 4001, 500)]


def vectors():
    return [{"step": step, "name": vector, "mean": 1 + step / 100, "std": 0.1, "norm": 4 + step / 25, "cosine": 1}
            for step in (0, 50, 100) for vector in VECTORS]


def write_suite(folder, deltas, suite="figure5", seeds=3):
    """The CSVs as ablate.py leaves them, of {(arm, reference): its difference to the first arm's 1.5 nats}."""
    rng = np.random.default_rng(0)
    shared, tables = rng.normal(0, 0.01, seeds), {"results": [], "curves": [], "scales": []}
    for i, ((arm, reference), delta) in enumerate(deltas.items()):
        for seed in range(seeds):
            loss, cell = 1.5 + delta + shared[seed] + rng.normal(0, 0.0005), f"{arm}{seed}"
            tables["results"].append({
                "suite": suite, "arm": arm, "reference": reference, "use": "report", "lr": 1e-3, "seed": seed,
                "val_loss": loss, "params": 10, "tokens": 4000, "flops": 10.0 ** (12 + i // 2), "cell": cell})
            tables["curves"] += [{"cell": cell, **row} for row in curve(loss)]
        tables["scales"] += [{"cell": f"{arm}0", **row} for row in vectors()]
    folder.mkdir(exist_ok=True)
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", rows)


def write_run(folder, final, bad=""):
    folder.mkdir(parents=True)
    write_csv(folder / "log.csv", curve(final, bad))
    write_csv(folder / "scales.csv", vectors())


@pytest.fixture(autouse=True)
def light():
    with plot.rc_context(plot.style("light")):
        yield


FIGURE5 = {("baseline", ""): 0.0, ("HG", "baseline"): -0.01, ("HG+AP", "HG"): 0.02, ("HG+DNP", "HG"): -0.0102,
           ("unified", "baseline"): -0.01}


def words(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_every_picture_in_both_themes_and_the_same_bytes_each_time(tmp_path, capsys):
    write_suite(tmp_path, FIGURE5)
    drawn = []
    for _ in range(2):
        plot.main([str(tmp_path)])
        drawn.append({path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".csv"})
    made = drawn[0]
    assert made == drawn[1]
    said, names = capsys.readouterr().out, ("ablation", "curves", "gammas", "magnitudes")
    assert sorted(made) == sorted(f"{name}{end}" for name in names for end in (".png", "_light.svg", "_dark.svg"))
    for name in names:
        assert f"{tmp_path}/{name}.png, {name}_light.svg and {name}_dark.svg" in said
        assert int.from_bytes(made[f"{name}.png"][16:20], "big") == 1660  # twice a README's column
        for theme, (paper, *_) in plot.THEMES.items():
            assert f"fill: {paper}" in made[f"{name}_{theme}.svg"].decode()


def test_the_papers_panels_with_lines_labelled_and_the_papers_end_points(tmp_path):
    write_suite(tmp_path, FIGURE5)
    figures = plot.suite_figures(tmp_path)
    for name, unit in (("curves", ", nats"), ("ablation", "")):
        assert [ax.get_title(loc="left") for ax in figures[name].axes][:3] == [
            f"{title}{unit}" for title in ("heterogeneity: minus baseline", "placement: minus HG", "minus baseline")]
        assert figures[name].get_suptitle() == "Better: HG; unified. Worse: HG+AP. Not significant: HG+DNP"
        assert figures[name].get_supxlabel().endswith("Rings: the paper's numbers, 0.12B.")
        rings = [line.get_xydata()[0] for line in figures[name].axes[1].get_lines()
                 if line.get_markerfacecolor() == "none"]
        assert sorted(ring[int(name == "curves")] for ring in rings) == [0.0099, 0.0341]
    assert words(figures["curves"]) == ["HG", "HG+DNP", "HG+AP", "unified"]
    _, _, line = figures["curves"].axes[0].get_lines()  # after the ring and zero
    assert line.get_xdata()[0] == 1000 and line.get_ydata() == pytest.approx(-0.01, abs=1e-3)  # from a fifth on
    assert [label.get_text() for label in figures["ablation"].axes[1].get_yticklabels()] == ["HG+DNP", "HG+AP"]
    low, high = figures["curves"].axes[1].get_ylim()
    assert -0.01 < low < 0 and 0.0341 < high < 0.05


def test_filled_is_significant_and_grey_is_the_spread_of_the_reference(tmp_path):
    write_suite(tmp_path, FIGURE5)
    figure, filled = plot.suite_figures(tmp_path)["ablation"], {}
    for ax in figure.axes:
        names = [label.get_text() for label in ax.get_yticklabels()]
        squares = [line for line in ax.get_lines() if line.get_marker() == "s"]
        filled |= {name: s.get_markerfacecolor() == s.get_color() for name, s in zip(names, squares)}
    assert filled == {"HG": True, "HG+DNP": False, "HG+AP": True, "unified": True}
    losses = [float(row["val_loss"]) for row in plot.read_csv(tmp_path / "results.csv") if row["arm"] == "baseline"]
    grey = figure.axes[0].patches[0]
    assert grey.get_width() == pytest.approx(2 * 2**0.5 * plot.mean_and_half_width(losses)[1])


def test_scaling_draws_differences_and_says_what_the_fits_do(tmp_path):
    sizes = {(f"{name} at {size}", f"baseline at {size}" * (gain > 0)): 0.3 - 0.1 * i - gain
             for i, size in enumerate("SML") for name, gain in (("baseline", 0), ("unified", 0.02))}
    write_suite(tmp_path, sizes, "figure6")
    figure = plot.suite_figures(tmp_path)["scaling"]
    ax, = figure.axes
    points = [line.get_xydata()[0] for line in ax.get_lines() if line.get_marker() == "o"]
    assert [x for x, _ in points] == [1e12, 1e13, 1e14]
    assert [y for _, y in points] == pytest.approx([-0.02] * 3, abs=2e-3)
    assert "Fits: the baseline needs 1." in figure.get_suptitle() and words(figure) == ["unified"]


def test_an_arm_with_more_steps_than_its_reference_has_no_curve(tmp_path):
    write_suite(tmp_path, FIGURE5)
    rows = plot.read_csv(tmp_path / "results.csv")
    write_csv(tmp_path / "results.csv", [{**row, "tokens": 5600} if row["arm"] == "HG+AP" else row for row in rows])
    assert words(plot.suite_figures(tmp_path)["curves"]) == ["HG", "HG+DNP", "unified"]


def test_one_seed_without_scale_vectors_still_plots(tmp_path):
    write_suite(tmp_path, FIGURE5, seeds=1)
    (tmp_path / "scales.csv").unlink()
    figures = plot.suite_figures(tmp_path)
    assert set(figures) == {"ablation", "curves"} and "One pair of runs each" in figures["curves"].get_suptitle()


def test_runs_against_the_first_and_a_single_run(tmp_path):
    first, second, third = (tmp_path / name for name in ("baseline", "unified", "other/unified"))
    for folder, loss in ((first, 2.0), (second, 1.75), (third, 3.0)):
        write_run(folder, loss)
    figures = plot.run_figures([first, second])
    assert set(figures) == {"curves", "gammas-baseline", "gammas-unified"} and words(figures["curves"]) == ["unified"]
    zero, line = figures["curves"].axes[0].get_lines()
    assert line.get_ydata().tolist() == [-0.25] * 7
    figures = plot.run_figures([second, third])  # of one name
    zero, line = figures["curves"].axes[0].get_lines()
    assert len(figures) == 3
    assert line.get_ydata().tolist() == [1.25] * 7
    figure = plot.run_figures([second])["curves"]
    assert figure.get_suptitle() == "unified ends at 1.7500 nats"
    assert set(words(figure)) == {"val_loss", "train_loss"} and figure.axes[0].get_ylim()[1] < 2.75


def test_out_is_another_folder(tmp_path, monkeypatch):
    write_run(tmp_path / "run", 2.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(plot, "THEMES", {"light": plot.THEMES["light"]})
    plot.main([str(tmp_path / "run"), "--out=~/elsewhere"])
    assert {path.name for path in (tmp_path / "elsewhere").glob("*.png")} == {"curves.png", "gammas.png"}


def test_any_name_of_a_folder_is_shown_as_it_is(tmp_path):
    names = ["first", "_base", "$x_1$", "$$", os.fsdecode(b"\xff"), "a\\b"]
    for name in names:
        write_run(tmp_path / name, 2.0)
    figure = plot.run_figures([tmp_path / name for name in names])["curves"]
    figure.savefig(tmp_path / "x.svg")  # fails if a name is read as mathematics
    assert set(words(figure)) == {*names[1:4], "\ufffd", "a\\b"}


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_run_that_diverged(bad, tmp_path):
    write_run(tmp_path / "bad", 2.0, bad)
    with pytest.raises(ConfigError, match="holds no evaluation after step 0 with a finite loss"):
        plot.run_figures([tmp_path / "bad"])
    write_run(tmp_path / "good", 2.0)
    log = curve(2.0)
    log[-1]["val_loss"] = bad
    write_csv(tmp_path / "bad/log.csv", log)
    zero, line = plot.run_figures([tmp_path / "good", tmp_path / "bad"])["curves"].axes[0].get_lines()
    assert len(line.get_ydata()) == 6


def test_refusals(tmp_path):
    with pytest.raises(ConfigError, match="has neither a run's log.csv nor finished cells"):
        plot.main([str(tmp_path)])
    write_suite(tmp_path, FIGURE5)
    with pytest.raises(ConfigError, match="has no arm 'nope'"):
        plot.main([str(tmp_path), "--gamma=nope"])
    (tmp_path / "log.csv").write_text("step,tokens,train_loss,val_loss\n")
    with pytest.raises(ConfigError, match="log.csv holds no evaluation"):
        plot.main([str(tmp_path)])


def test_scale_vectors_by_layer_and_branch():
    names = "blocks.11.attn.qkv.u.q", "blocks.0.attn.q_scale", "blocks.2.ffn_post", "lm_head.v.shared", *(
        f"blocks.0.ffn.{name}" for name in ("experts.gate_up.u.gate.3", "shared.gate_up.u.up"))
    rows = [{"name": name, "step": step, "mean": 1, "std": 2, "norm": 3} for step in (0, 10) for name in names]
    series = plot.gamma_series(rows)
    assert list(series) == [("11", "attn.qkv.u", "q"), ("0", "attn", "q_scale"), ("2", "", "ffn_post"),
                            ("", "lm_head.v", "shared"), ("0", "ffn.experts.gate_up.u", "gate.3"),
                            ("0", "ffn.shared.gate_up.u", "up")]
    assert len(plot.magnitudes({"arm": series}).axes) == 6
    for found in series.values():
        assert [x.tolist() for x in found.values()] == [[0, 10], [1, 1], [2, 2], [3, 3]]


def test_differences_are_those_of_pairs_at_the_evaluations_that_all_of_them_have():
    runs = {"base": {1: {10: 3.0, 20: 2.0}, 2: {10: 4.0, 20: 3.0}, 3: {}},
            "arm": {1: {10: 2.0}, 2: {10: 2.0, 20: 1.0}, 3: {10: 9.0}, 4: {10: 9.0}}}
    found = plot.differences({"base": {"reference": ""}, "arm": {"reference": "base"}}, runs)
    (tokens, mean, sd), = found.values()
    assert tokens.tolist() == [10] and mean.tolist() == [-1.5] and sd == pytest.approx(0.5**0.5)


def test_the_diagram_is_what_its_script_draws():
    sys.path.insert(0, str(ROOT / "results"))
    import diagram
    for theme, colours in diagram.THEMES.items():
        drawn = diagram.draw(colours)
        assert drawn == (ROOT / "results" / f"block_{theme}.svg").read_text(encoding="utf-8")
        words = [e.text for e in ElementTree.fromstring(drawn).iter() if e.tag.endswith("text")]
        for name in ("baseline", "HG", "DP", "DNP", "unified", "RoPE"):
            assert name in words
