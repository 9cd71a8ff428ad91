"""
The tables and the statistics that ablate.py, bench.py and plot.py share. Knows configurator.py alone.
"""

import csv
import io
import math
import os
import statistics
from collections import defaultdict

import numpy as np
from scipy.special import nctdtrinc, stdtr, stdtrit

from configurator import ConfigError, open_file

LEVEL = 0.05  # how often a suite in which nothing differs may call something a difference
POWER = 0.8  # how often the effect that `sees` names would be called one


def read_csv(path):
    """
    Rows of a CSV as dicts, without one that a kill cut in the middle; [] where there is no file. Raises ConfigError for
    what is none.
    """
    if not os.path.exists(path):
        return []
    with open_file(path) as f:
        try:
            rows = csv.DictReader(io.TextIOWrapper(f, encoding="utf-8", errors="replace", newline=""))
            return [row for row in rows if None not in row.values()]
        except csv.Error as e:
            raise ConfigError(f"{path}: not a table ({e})") from None


# ---------------------------------------------------------------------------------------------------------------
# pairs


def mean_and_half_width(values):
    """The mean and half of its 95% interval by Student's t; the half is None for one value."""
    mean, n = statistics.mean(values), len(values)
    if n == 1:
        return mean, None
    return mean, float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)


def paired_p(differences):
    """Two-sided p of the paired t test that the differences, two or more, have mean 0."""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = abs(statistics.mean(differences))
    t = mean / error if error else math.inf if mean else 0.0
    return 2 * float(stdtr(len(differences) - 1, -t))


def holm(p):
    """{key: p} corrected by Holm: were nothing different, any is below 0.05 in a twentieth of all suites at most."""
    corrected, largest = {}, 0.0
    for rank, key in enumerate(sorted(p, key=p.get)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[key]))
        corrected[key] = largest
    return corrected


def smallest_seen(differences, tests):
    """
    The true difference that the paired t test finds with probability POWER at level LEVEL / tests, which is what Holm
    asks of the smallest of so many p, if pairs scatter as these two or more differences do.
    """
    n = len(differences)
    t = stdtrit(n - 1, 1 - LEVEL / tests / 2)
    return float(nctdtrinc(n - 1, 1 - POWER, t)) * statistics.stdev(differences) / math.sqrt(n)


def summarise(rows):
    """
    From rows of results.csv to {arm: dict}, of the runs whose `use` is 'report'.

    The dict: lr, reference, losses {seed: nats}, runs {seed: cell}, mean, params, tokens, flops; an arm that diverged
    with any seed is left out. Where the reference counts too and they share seeds: pairs (how many), added
    (parameters), same (they are the same runs), delta and half (mean paired difference and half of its 95% interval),
    and with two pairs or more p (Holm's, over the distinct comparisons), tests (how many these are), sees
    (smallest_seen) and verdict, 'better', 'worse' or 'open'. half, p and sees are None for a single pair.
    """
    found = defaultdict(dict)
    for row in rows:
        if row["use"] == "report":
            found[row["arm"]][int(row["seed"])] = row
    arms = {}
    for arm, by_seed in found.items():
        losses = {seed: float(row["val_loss"]) for seed, row in sorted(by_seed.items())}
        first = next(iter(by_seed.values()))
        if all(map(math.isfinite, losses.values())):
            arms[arm] = {"lr": float(first["lr"]), "reference": first["reference"], "losses": losses,
                         "runs": {seed: row["cell"] for seed, row in by_seed.items()},
                         "mean": statistics.mean(losses.values()),
                         **{name: float(first[name]) for name in ("params", "tokens", "flops")}}
    tested = {}
    for a in arms.values():
        ref = arms.get(a["reference"], {"losses": {}})
        seeds = [s for s in a["losses"] if s in ref["losses"]]
        if not seeds:
            continue
        differences = [a["losses"][s] - ref["losses"][s] for s in seeds]
        a["pairs"], a["added"] = len(seeds), a["params"] - ref["params"]
        a["same"] = a["runs"] == ref["runs"]
        a["delta"], a["half"] = mean_and_half_width(differences)
        a["p"], a["sees"], a["verdict"] = None, None, "open"
        if len(seeds) > 1 and not a["same"]:
            # the same runs under two names, or compared both ways, are one comparison
            key = frozenset(frozenset(x["runs"][s] for s in seeds) for x in (a, ref))
            tested.setdefault(key, (paired_p(differences), []))[1].append((a, differences))
    corrected = holm({key: p for key, (p, _) in tested.items()})
    for key, (_, comparisons) in tested.items():
        for a, differences in comparisons:
            a["p"], a["tests"], a["sees"] = corrected[key], len(tested), smallest_seen(differences, len(tested))
            if a["p"] < LEVEL:
                a["verdict"] = "better" if a["delta"] < 0 else "worse"
    return arms


# ---------------------------------------------------------------------------------------------------------------
# scaling


def fit_power_law(compute, loss):
    """
    Least squares of L = a + b C^(-c). compute, loss: (k,), k ≥ 3. Returns (a, b, c), b in units of compute^c.

    For each c the rest is a straight line, so c alone is searched, on grids that get finer around the best.
    """
    unit = np.exp(np.log(compute).mean())
    centre, width = math.log(0.2), math.log(20)
    for _ in range(5):
        c = np.exp(np.linspace(centre - width, centre + width, 81))  # (81,)
        x = (compute / unit) ** -c[:, None]  # (81, k)
        from_mean, y = x - x.mean(1, keepdims=True), loss - loss.mean()
        slope = (from_mean @ y) / (from_mean**2).sum(1)  # (81,)
        best = ((slope[:, None] * from_mean - y) ** 2).sum(1).argmin()
        centre, width = math.log(c[best]), width / 8
    a, b, c = loss.mean() - slope[best] * x[best].mean(), slope[best], c[best]
    return float(a), float(b * unit**c), float(c)


def compute_ratio(reference, arm, at):
    """How many times `at` a reference of fit (a, b, c) needs for the arm's loss there; nan if no compute is enough."""
    a, b, c = reference
    level = (arm[0] + arm[1] * at ** -arm[2] - a) / b
    return level ** (-1 / c) / at if level > 0 else math.nan


def scaling_fits(arms):
    """
    {strategy: (its arms, (a, b, c), (ratio, low, high) or None)} from arms of summarise() that are named 'strategy at
    size', where there are three or more; those with a budget of their own, 'strategy at size, ...', take no part.

    The ratio is compute_ratio to the first strategy at the largest size: the geometric mean over seeds, each with two
    fits of its own, and its 95% interval. In simulations of four sizes and three to five seeds that held the truth in
    93 to 98% of all cases, and the percentiles of a bootstrap over seeds in 71 to 85%.
    """
    families = defaultdict(list)
    for name, a in arms.items():
        strategy, at, size = name.partition(" at ")
        if at and "," not in size:
            families[strategy].append(a)
    fits, by_seed = {}, {}
    for name, members in families.items():
        if len(members) < 3:
            continue
        compute = np.array([a["flops"] for a in members])
        fits[name] = members, fit_power_law(compute, np.array([a["mean"] for a in members])), None
        seeds = set.intersection(*(set(a["losses"]) for a in members))
        by_seed[name] = {s: fit_power_law(compute, np.array([a["losses"][s] for a in members])) for s in seeds}
        first = next(iter(by_seed.values()))
        ratios = [compute_ratio(first[s], by_seed[name][s], compute.max()) for s in sorted(seeds & first.keys())]
        if len(by_seed) > 1 and ratios and not any(map(math.isnan, ratios)):
            mean, half = mean_and_half_width([math.log(ratio) for ratio in ratios])
            half = math.nan if half is None else half
            fits[name] = *fits[name][:2], (math.exp(mean), math.exp(mean - half), math.exp(mean + half))
    return fits
