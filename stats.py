"""
What ablate.py, bench.py and plot.py share: tables of rows, paired differences and their intervals.

Knows none of the other files.
"""

import csv
import math
import os
import statistics
from collections import defaultdict
from pathlib import Path

from scipy.special import stdtrit


def read_csv(path):
    """Rows of a CSV as dicts, without one that a kill cut in the middle; [] where there is no file."""
    try:
        with open(path, newline="", encoding="utf-8") as f:
            return [row for row in csv.DictReader(f) if None not in row.values()]
    except FileNotFoundError:
        return []


def write_csv(path, rows):
    """Write dicts of equal keys, whole or not at all; without rows, nothing."""
    if rows:
        lines = [list(rows[0]), *([row[c] for c in rows[0]] for row in rows)]
        tmp = Path(f"{path}.tmp")
        with open(tmp, "w", newline="", encoding="utf-8") as f:
            csv.writer(f, lineterminator="\n").writerows(lines)
        os.replace(tmp, path)


def mean_and_half_width(values):
    """The mean and half of its 95% interval; the half is None for one value."""
    mean, n = statistics.mean(values), len(values)
    if n == 1:
        return mean, None
    return mean, float(stdtrit(n - 1, 0.975)) * statistics.stdev(values) / math.sqrt(n)


def summarise(rows, lr_of=None):
    """
    From rows of results.csv to {arm: dict}, each arm at its best learning rate, or at lr_of[arm].

    Only learning rates with all the seeds that any cell has count. The dict: lr, edge (the best one is the grid's
    end), losses {seed: nats}, mean, params, tokens, flops, reference; and where the reference counts too: delta and
    half (mean paired difference and half of its 95% interval), noise (how far two sets of as many reference runs
    with nothing in common lie apart, 95%), same (they are the same runs), beyond: whether 0 is outside the interval
    and the difference outside the noise.
    """
    seeds = {int(row["seed"]) for row in rows}
    cells = defaultdict(dict)
    for row in rows:
        cells[row["arm"], float(row["lr"])][int(row["seed"])] = row
    arms = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        means = {lr: statistics.mean(float(r["val_loss"]) for r in by_seed.values())
                 for (a, lr), by_seed in cells.items() if a == arm and by_seed.keys() == seeds}
        lr = lr_of[arm] if lr_of else min(means, key=means.get, default=None)
        if lr not in means or math.isinf(means[lr]):
            continue
        by_seed = cells[arm, lr]
        first = by_seed[min(seeds)]
        grid = [other for a, other in cells if a == arm]
        arms[arm] = {"lr": lr, "edge": not lr_of and len(grid) > 1 and lr in (min(grid), max(grid)), "mean": means[lr],
                     "losses": {seed: float(by_seed[seed]["val_loss"]) for seed in sorted(seeds)},
                     "runs": [by_seed[seed]["cell"] for seed in sorted(seeds)], "reference": first["reference"],
                     **{name: float(first[name]) for name in ("params", "tokens", "flops")}}
    for a in arms.values():
        ref = arms.get(a["reference"])
        if ref is None:
            continue
        a["delta"], a["half"] = mean_and_half_width([a["losses"][s] - ref["losses"][s] for s in a["losses"]])
        a["added"], a["same"] = a["params"] - ref["params"], a["runs"] == ref["runs"]
        half = mean_and_half_width(list(ref["losses"].values()))[1]
        a["noise"] = half and half * math.sqrt(2)
        a["beyond"] = a["half"] is not None and abs(a["delta"]) > max(a["half"], a["noise"])
    return arms
