"""stats.py: what counts as a difference, how often wrongly, and the tables."""

import math
import os
import re

import numpy as np
import pytest
from scipy import stats as scipy_stats

import stats
from configurator import ConfigError


def rows(losses, reference="base", use="report", lr=1e-3):
    """Rows of results.csv from {arm: losses by seed}."""
    return [{"arm": arm, "reference": reference if arm != reference else "", "use": use, "lr": lr, "seed": seed,
             "val_loss": loss, "params": 100 + (arm != reference), "tokens": 5, "flops": 1,
             "cell": f"{arm}{lr}{seed}"}
            for arm, by_seed in losses.items() for seed, loss in enumerate(by_seed) if loss is not None]


def noisy(rng, n, gains=(0.0,) * 6, shared=0.01, own=0.01):
    """{arm: losses} of `base` and arms with these gains, over n seeds that move all arms alike and each by itself."""
    seeds = rng.normal(2.0, shared, n)
    return {name: seeds - gain + rng.normal(0, own, n)
            for name, gain in [("base", 0.0), *((f"arm{i}", gain) for i, gain in enumerate(gains))]}


# ---------------------------------------------------------------------------------------------------------------
# one comparison


def test_paired_difference_with_its_interval_and_p():
    arm = stats.summarise(rows({"base": [2.0, 2.1, 2.2], "arm": [1.9, 2.02, 2.08]}))["arm"]
    # differences −0.10, −0.08, −0.12: mean −0.1, sd 0.02, half width 4.303 · 0.02 / √3
    assert arm["delta"] == pytest.approx(-0.1)
    assert arm["half"] == pytest.approx(4.302653 * 0.02 / math.sqrt(3))
    assert arm["p"] == pytest.approx(scipy_stats.ttest_rel([1.9, 2.02, 2.08], [2.0, 2.1, 2.2]).pvalue)
    assert (arm["verdict"], arm["pairs"], arm["added"]) == ("better", 3, 1)
    same = stats.summarise(rows({"base": [2.0, 2.1], "arm": [2.0, 2.1]}))["arm"]
    assert (same["delta"], same["half"], same["p"], same["verdict"]) == (0, 0, 1, "not significant")


def test_arms_that_diverged_or_lack_seeds():
    arms = stats.summarise(rows({"base": [2.0, 2.1, 2.2], "some": [1.9, None, 2.0], "gone": [1.0, math.inf, 1.0]})
                           + rows({"tuned": [1.0, 1.0]}, use="tuning"))
    assert list(arms) == ["base", "some"]
    assert arms["some"]["pairs"] == 2 and arms["some"]["delta"] == pytest.approx(-0.15)  # of seeds 0 and 2


# ---------------------------------------------------------------------------------------------------------------
# many comparisons


def test_holm_by_hand():
    for p, corrected, levels in (([0.01, 0.04, 0.03], [0.03, 0.06, 0.06], [0.05 / 3, 0.05 / 2, 0.05 / 2]),
                                 ([0.001, 0.04, 0.02], [0.003, 0.04, 0.04], [0.05 / 3, 0.05, 0.05 / 2]),
                                 ([0.6, 0.5], [1.0, 1.0], [0.025, 0.025]), ([], [], [])):
        found = stats.holm(dict(enumerate(p)))
        assert [found[i][0] for i in range(len(p))] == pytest.approx(corrected)
        assert [found[i][1] for i in range(len(p))] == pytest.approx(levels)


def test_intervals_exclude_0_exactly_where_the_verdict_names_a_difference():
    rng, seen = np.random.default_rng(0), set()
    for _ in range(200):
        for a in stats.summarise(rows(noisy(rng, 4, rng.normal(0, 0.02, 6)))).values():
            if "delta" in a:
                excludes = abs(a["delta"]) > a["half"]
                assert excludes == (a["p"] < stats.LEVEL) == (a["verdict"] in ("better", "worse"))
                seen.add(excludes)
    assert len(seen) == 2


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("shared, own", [(0.05, 0.005), (0.0, 0.02)], ids=["paired noise", "unpaired noise"])
def test_false_alarms_in_a_suite_where_nothing_differs(n, shared, own):
    rng, suites = np.random.default_rng(0), 800
    called = sum(any(a.get("verdict") in ("better", "worse") for a in
                     stats.summarise(rows(noisy(rng, n, shared=shared, own=own))).values()) for _ in range(suites))
    # 0.05 of all suites at most, and little less although arms share their reference; three standard errors of 800
    assert 0.025 * suites < called < (0.05 + 3 * math.sqrt(0.05 * 0.95 / suites)) * suites


# ---------------------------------------------------------------------------------------------------------------
# scaling


def test_the_fit_finds_the_law_and_the_compute_that_the_reference_needs():
    compute = np.geomspace(1e-6, 1e2, 6)
    assert stats.fit_power_law(compute, 2.6 * compute**-0.055) == pytest.approx((2.6, 0.055))
    # the arm does with C what the reference does with 1.25 C
    assert stats.compute_ratio((2.6, 0.05), (2.6 * 1.25**-0.05, 0.05), 40.0) == pytest.approx(1.25)


def sized(rng, seeds, noise):
    """summarise()'s arms of a baseline and of one that does with C what takes it 1.25 C, at four sizes."""
    arms = {}
    for size, flops in enumerate((2e10, 4e11, 3e12, 2e13)):
        shared = rng.normal(0, noise, seeds)
        for name, gain in (("base", 1.0), ("arm", 1.25)):
            loss = 2.6 * (gain * flops / stats.PF_DAY) ** -0.055 + shared + rng.normal(0, noise / 2, seeds)
            arms[f"{name} at {size}"] = {"flops": flops, "losses": dict(enumerate(loss)), "mean": loss.mean()}
    return arms


def test_the_ratios_interval_holds_the_truth():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(150):
        arms = sized(rng, 4, 0.004)
        arms["arm at 0, 100 tokens per parameter"] = {"flops": 1e11, "losses": dict.fromkeys(range(4), 9.0), "mean": 9.}
        fits = stats.scaling_fits(arms)
        assert list(fits) == ["base", "arm"] and fits["base"]["ratio"] is None and len(fits["arm"]["members"]) == 4
        _, low, high = fits["arm"]["ratio"]
        inside += low < 1.25 < high
    assert 0.9 * 150 < inside
    exact = stats.scaling_fits(sized(rng, 3, 1e-7))["arm"]
    assert exact["ratio"] == pytest.approx((1.25, 1.25, 1.25), rel=0.01)
    assert exact["fit"][1] == pytest.approx(0.055, rel=0.01) and "PFLOP/s-days; exponent over" in exact["text"]
    assert stats.scaling_fits({name: a for name, a in arms.items() if name[-1] in "01"}) == {}  # two sizes are no law


# ---------------------------------------------------------------------------------------------------------------
# tables


def text_of(found, command="python ablate.py x", bad=()):
    extra = {"suite": "x", "seconds": 3600, "code": "c", "commit": "h", "torch": "t", "device": "d"}
    return stats.report_text([{**row, **extra} for row in found], command, dict(bad))


def line_of(text, start):
    return [word.strip() for word in next(line for line in text.splitlines() if line.startswith(start)).split("|")]


def test_the_table_names_difference_interval_p_and_verdict():
    text = text_of(rows({"base": [2.0, 2.1, 2.2], "arm": [1.9, 2.02, 2.08], "other": [2.0, 2.3, 2.1]}))
    _, name, reference, lr, loss, difference, interval, p, verdict, seeds, *_ = line_of(text, "| arm | base")
    assert (name, reference, lr, loss, difference) == ("arm", "base", "0.001", "2.0000", "-0.1000")
    # at 0.05 / 2, since it is the smaller p of two
    assert (interval, p, verdict, seeds) == ("-0.1717 … -0.0283", "0.026", "better", "3")
    assert line_of(text, "| other")[8] == "not significant"
    assert "corrected by Holm for the suite's 2 comparisons" in text
    assert "with a fixed learning rate" in text and "Tuning" not in text and "Hours of processes: 9.0" in text
    assert line_of(text_of(rows({"base": [2.0], "arm": [1.0]})), "| arm | b")[6:9] == ["", "", "one pair"]
    assert text_of([]) == "No cell is finished yet.\n"


def test_the_grid_says_which_rate_was_best_and_whose_tuning_it_was():
    both = rows({"base": [2.0, 2.1], "arm": [1.9, 2.0]}, lr=2e-3)
    for lr, base, arm in ((1e-3, 2.2, 2.2), (2e-3, 2.1, 2.1), (4e-3, 2.35, 2.0)):
        both += rows({"base": [base, base], "arm": [arm, arm]}, use="tuning", lr=lr)
    text = text_of(both, bad={"arm": "at the end"})
    assert line_of(text, "| base | 2.2")[2:5] == ["2.2000", "**2.1000**", "2.3500"]
    assert line_of(text, "| arm | 2.2")[2:5] == ["2.2000", "2.1000", "**2.0000**"]
    assert "- Not tuned: `arm`: at the end." in text and "each at its own best learning rate on seeds" in text
    assert "all at the learning rate that is best for the reference on" in text_of(both, "x --tune=reference")
    both[-1]["lr"] = both[0]["lr"] = 3e-3
    assert "best for the reference, or at its own where lr differs, on" in text_of(both, "x --tune=reference")


def test_names_cannot_break_the_table():
    line = next(line for line in text_of(rows({"x|b*_<`": [1.0]}, "?")).splitlines() if line.startswith("| x"))
    assert len(re.split(r"(?<!\\)\|", line)) == 13 and r"x\|b\*\_\<\`" in line


def test_a_file_that_is_not_a_table_is_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_text("step\n" + "9" * 200_000 + "\n")
    (tmp_path / "cut").write_bytes("step,name\n1,γ\n2,γ".encode()[:-1])
    for name, message in (("fifo", "not a regular file"), ("long", "not a table")):
        with pytest.raises(ConfigError, match=f"{name}: {message}"):
            stats.read_csv(tmp_path / name)
    assert stats.read_csv(tmp_path / "cut")[0] == {"step": "1", "name": "γ"} and not stats.read_csv(tmp_path / "none")
