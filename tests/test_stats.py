"""stats.py: what is called a difference, how often wrongly, and how small a one could have been seen."""

import math
import os

import numpy as np
import pytest
from scipy import stats as scipy_stats

import stats
from configurator import ConfigError


def rows(losses, reference="base", use="report", lr=1e-3, of=None):
    """Rows of results.csv from {arm: losses by seed}; of: {arm: whose runs it has}."""
    return [{"arm": arm, "reference": reference if arm != reference else "", "use": use, "lr": lr, "seed": seed,
             "val_loss": loss, "params": 100 + (arm != reference), "tokens": 5, "flops": 1,
             "cell": f"{(of or {}).get(arm, arm)}{lr}{seed}"}
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
    assert (arm["verdict"], arm["pairs"], arm["tests"], arm["added"]) == ("better", 3, 1, 1)


def test_seeds_that_move_both_arms_do_not_hide_a_difference():
    # all pairs agree on −0.01 to a hair, while seeds move the reference by ±0.1
    arms = stats.summarise(rows({"base": [2.0, 2.1, 2.2], "arm": [1.99, 2.0901, 2.1899]}))
    assert arms["arm"]["verdict"] == "better"
    arms = stats.summarise(rows({"base": [1.99, 2.0901, 2.1899], "arm": [2.0, 2.1, 2.2]}))
    assert arms["arm"]["verdict"] == "worse"


def test_one_pair_says_nothing():
    arm = stats.summarise(rows({"base": [2.0], "arm": [1.0]}))["arm"]
    assert (arm["half"], arm["p"], arm["sees"], arm["verdict"]) == (None, None, None, "open")


def test_arms_that_diverged_or_lack_seeds():
    arms = stats.summarise(rows({"base": [2.0, 2.1, 2.2], "some": [1.9, None, 2.0], "gone": [1.0, math.inf, 1.0]})
                           + rows({"tuned": [1.0, 1.0]}, use="tuning") + rows({"old": [1.0, 1.0]}, use="kept"))
    assert list(arms) == ["base", "some"]
    assert arms["some"]["pairs"] == 2 and arms["some"]["delta"] == pytest.approx(-0.15)  # of seeds 0 and 2


# ---------------------------------------------------------------------------------------------------------------
# many comparisons


def test_holm_by_hand():
    assert stats.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert stats.holm({"a": 0.6, "b": 0.5}) == {"a": 1.0, "b": 1.0}
    assert stats.holm({}) == {}


def test_every_distinct_set_of_runs_counts_once():
    losses = {"base": [2.0, 2.1, 2.2], "arm": [1.9, 2.02, 2.08], "other": [2.01, 2.1, 2.18]}
    alone = stats.summarise(rows(losses))
    again = stats.summarise(rows({**losses, "arm, again": losses["arm"], "base, again": losses["base"]},
                                 of={"arm, again": "arm", "base, again": "base"})
                            + rows({"turned": losses["base"]}, reference="arm", of={"turned": "base"}))
    assert again["arm"]["tests"] == alone["arm"]["tests"] == 2
    assert again["arm, again"]["p"] == again["turned"]["p"] == again["arm"]["p"] == alone["arm"]["p"]
    assert again["turned"]["verdict"] == "worse"
    assert again["base, again"]["same"] and again["base, again"]["p"] is None and not again["arm"]["same"]


@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("shared, own", [(0.05, 0.005), (0.0, 0.02)], ids=["paired noise", "unpaired noise"])
def test_false_alarms_in_a_suite_where_nothing_differs(n, shared, own):
    rng, suites = np.random.default_rng(0), 800
    called = sum(any(a.get("verdict", "open") != "open" for a in
                     stats.summarise(rows(noisy(rng, n, shared=shared, own=own))).values()) for _ in range(suites))
    # 0.05 of all suites at most, and little less although arms share their reference; three standard errors of 800
    assert 0.025 * suites < called < (0.05 + 3 * math.sqrt(0.05 * 0.95 / suites)) * suites


@pytest.mark.parametrize("gains", [(1.0,), (1.0, 0.0, 0.0, 0.0)])
def test_what_could_be_seen_is_seen_with_the_power_that_is_stated(gains):
    n, own, rng = 5, 0.01, np.random.default_rng(1)
    spread = math.sqrt(2) * own  # of a difference
    pairs = spread * np.array([-1, -0.5, 0, 0.5, 1]) / math.sqrt(0.625)  # of just that standard deviation
    effect = stats.smallest_seen(pairs.tolist(), len(gains))
    t = scipy_stats.t(n - 1).isf(stats.LEVEL / len(gains) / 2)
    assert scipy_stats.nct(n - 1, effect / spread * math.sqrt(n)).sf(t) == pytest.approx(stats.POWER, abs=1e-3)
    found = [stats.summarise(rows(noisy(rng, n, [effect * gain for gain in gains], own=own)))["arm0"]["verdict"]
             for _ in range(400)]
    assert found.count("better") / 400 == pytest.approx(stats.POWER, abs=0.05)  # more than two standard errors
    half = [stats.summarise(rows(noisy(rng, n, [effect * gain / 3 for gain in gains], own=own)))["arm0"]["verdict"]
            for _ in range(400)]
    assert half.count("better") / 400 < 0.35


# ---------------------------------------------------------------------------------------------------------------
# scaling


@pytest.mark.parametrize("a, b, c", [(1.7, 30.0, 0.12), (0.5, 8.0, 0.05), (2.0, 1e4, 0.35)])
def test_the_fit_finds_the_law(a, b, c):
    compute = np.geomspace(1e12, 1e17, 6)
    found = stats.fit_power_law(compute, a + b * compute**-c)
    assert found == pytest.approx((a, b, c), rel=2e-3)


def test_the_compute_ratio():
    # the arm does with C what the reference does with 1.25 C
    a, b, c = 1.5, 20.0, 0.1
    assert stats.compute_ratio((a, b, c), (a, b * 1.25**-c, c), 1e15) == pytest.approx(1.25)
    assert math.isnan(stats.compute_ratio((a, b, c), (a - 1, b / 10, c), 1e15))  # below what the reference can reach


def sized(rng, seeds, noise):
    """summarise()'s arms of a baseline and of one that does with C what takes it 1.25 C, at four sizes."""
    arms = {}
    for size, flops in enumerate((2e10, 4e11, 3e12, 2e13)):
        shared = rng.normal(0, noise, seeds)
        for name, gain in (("base", 1.0), ("arm", 1.25)):
            loss = 1.1 + 20 * (gain * flops) ** -0.13 + shared + rng.normal(0, noise / 2, seeds)
            arms[f"{name} at {size}"] = {"flops": flops, "losses": dict(enumerate(loss)), "mean": loss.mean()}
    return arms


def test_the_ratios_interval_holds_the_truth():
    rng, inside = np.random.default_rng(0), 0
    for _ in range(150):
        arms = sized(rng, 4, 0.004)
        arms["arm at 0, 100 tokens a parameter"] = {"flops": 1e11, "losses": dict.fromkeys(range(4), 9.0), "mean": 9.0}
        fits = stats.scaling_fits(arms)
        assert list(fits) == ["base", "arm"] and fits["base"][2] is None
        ratio, low, high = fits["arm"][2]
        inside += low < 1.25 < high
    assert 0.9 * 150 < inside
    exact = stats.scaling_fits(sized(rng, 3, 1e-7))["arm"]
    assert exact[2] == pytest.approx((1.25, 1.25, 1.25), rel=0.01) and len(exact[0]) == 4


def test_two_sizes_make_no_law():
    arms = {name: a for name, a in sized(np.random.default_rng(0), 2, 0.01).items() if name[-1] in "01"}
    assert stats.scaling_fits(arms) == {}


def test_what_is_no_table_is_refused_in_one_line(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "long").write_text("step\n" + "9" * 200_000 + "\n")
    (tmp_path / "cut").write_bytes("step,name\n1,γ\n2,γ".encode()[:-1])
    for name, message in (("fifo", "not a regular file"), ("long", "not a table")):
        with pytest.raises(ConfigError, match=f"{name}: {message}"):
            stats.read_csv(tmp_path / name)
    assert stats.read_csv(tmp_path / "cut")[0] == {"step": "1", "name": "γ"} and not stats.read_csv(tmp_path / "none")
