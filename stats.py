"""
Statistics of paired runs, and the tables that ablate.py writes.

Imports configurator.py.
"""

import csv
import io
import math
import os
import re
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.special import stdtr, stdtrit

from configurator import ConfigError, open_file

LEVEL = 0.05  # how often a suite in which nothing differs may call something a difference


def read_csv(path):
    """
    Rows of a CSV as dicts, without a last row that a kill cut off; [] if there is no file. Raises ConfigError if it is
    not a table.
    """
    if not os.path.exists(path):
        return []
    with open_file(path) as f:
        try:
            rows = csv.DictReader(io.TextIOWrapper(f, encoding="utf-8", errors="replace", newline=""))
            return [row for row in rows if None not in row.values()]
        except csv.Error as e:
            raise ConfigError(f"{path}: not a table ({e})") from None


def paper_numbers():
    """{(figure, arm, reference): (panel, nats)}: the paper's differences of losses, of its smallest model."""
    found = {}
    for row in read_csv(Path(__file__).parent / "results" / "paper.csv"):
        if row["unit"] == "loss difference":
            found.setdefault((row["figure"], row["arm"], row["reference"]), (row["panel"], float(row["number"])))
    return found


# ---------------------------------------------------------------------------------------------------------------
# pairs


def mean_and_half_width(values, level=LEVEL):
    """The mean and half of its interval at 1 - level by Student's t; the half is None for one value."""
    mean, n = statistics.mean(values), len(values)
    if n == 1:
        return mean, None
    return mean, float(stdtrit(n - 1, 1 - level / 2)) * statistics.stdev(values) / math.sqrt(n)


def paired_p(differences):
    """Two-sided p of the paired t test that the differences, two or more, have mean 0."""
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    mean = abs(statistics.mean(differences))
    t = mean / error if error else math.inf if mean else 0.0
    return 2 * float(stdtr(len(differences) - 1, -t))


def holm(p):
    """
    {key: (p corrected by Holm, the level at which his procedure tests it)} from {key: p}. If nothing differs, any
    corrected p is below LEVEL in at most that share of suites.

    The k-th smallest of m is tested at LEVEL / (m - k + 1), until one is not significant; those after it keep its
    level. So an interval at an arm's level excludes 0 exactly if the arm's corrected p is below LEVEL.
    """
    corrected, largest, level = {}, 0.0, LEVEL / max(1, len(p))
    for rank, key in enumerate(sorted(p, key=p.get)):
        if largest < LEVEL:
            level = LEVEL / (len(p) - rank)
        largest = max(largest, min(1.0, (len(p) - rank) * p[key]))
        corrected[key] = largest, level
    return corrected


def summarise(rows):
    """
    From rows of results.csv to {arm: dict}, of the runs whose `use` is 'report'.

    The dict: lr, reference, losses {seed: nats}, runs {seed: cell}, mean, params, tokens, flops; an arm that diverged
    with any seed is left out. Where the reference counts too and they share seeds: pairs (how many), added
    (parameters), delta and half (mean paired difference and half of its interval), p and verdict. With two pairs or
    more, p is Holm's, the interval is at the level at which Holm tests the arm, and the verdict is 'better' or 'worse'
    if the interval excludes 0, else 'not significant'. With one pair, half and p are None.
    """
    found = defaultdict(dict)
    for row in rows:
        if row.get("use") == "report":
            found[row["arm"]][int(row["seed"])] = row
    arms, differences = {}, {}
    for arm, by_seed in found.items():
        losses = {seed: float(row["val_loss"]) for seed, row in sorted(by_seed.items())}
        first = next(iter(by_seed.values()))
        if all(map(math.isfinite, losses.values())):
            arms[arm] = {"lr": float(first["lr"]), "reference": first["reference"], "losses": losses,
                         "runs": {seed: row["cell"] for seed, row in by_seed.items()},
                         "mean": statistics.mean(losses.values()),
                         **{name: float(first[name]) for name in ("params", "tokens", "flops")}}
    for arm, a in arms.items():
        ref = arms.get(a["reference"], {"losses": {}})
        if pairs := [loss - ref["losses"][seed] for seed, loss in a["losses"].items() if seed in ref["losses"]]:
            differences[arm] = pairs
            a["delta"], a["half"] = mean_and_half_width(pairs)
            a |= {"pairs": len(pairs), "added": a["params"] - ref["params"], "p": None, "verdict": "not significant"}
    corrected = holm({arm: paired_p(pairs) for arm, pairs in differences.items() if len(pairs) > 1})
    for arm, (p, level) in corrected.items():
        a = arms[arm]
        a["p"], a["half"] = p, mean_and_half_width(differences[arm], level)[1]
        if abs(a["delta"]) > a["half"]:
            a["verdict"] = "better" if a["delta"] < 0 else "worse"
    return arms


# ---------------------------------------------------------------------------------------------------------------
# scaling

PF_DAY = 1e15 * 86400  # FLOPs


def fit_power_law(compute, loss):
    """(a, b) of L = a C^(-b), the paper's form, by least squares of the logarithms. compute, loss: (k,), k ≥ 2."""
    slope, intercept = np.polyfit(np.log(compute), np.log(loss), 1)
    return math.exp(intercept), -float(slope)


def compute_ratio(reference, arm, at):
    """How many times `at` a reference of fit (a, b) needs for the loss that the arm has there."""
    level = arm[0] * at ** -arm[1]
    return (level / reference[0]) ** (-1 / reference[1]) / at


def scaling_fits(arms):
    """
    {strategy: dict} from arms of summarise() that are named 'strategy at size', for three sizes or more; those with a
    budget of their own, 'strategy at size, ...', take no part.

    The dict: members (its arms), fit (a, b; C in PFLOP/s-days), ratio (compute_ratio to the first strategy at the
    largest size, the geometric mean over seeds with a fit each, and its 95% interval; or None) and text.
    """
    families, fits, first = defaultdict(list), {}, None
    for name, a in arms.items():
        strategy, at, size = name.partition(" at ")
        if at and "," not in size:
            families[strategy].append(a)
    for name, members in families.items():
        if len(members) < 3:
            continue
        compute = np.array([a["flops"] for a in members]) / PF_DAY
        a, b = fit_power_law(compute, [m["mean"] for m in members])
        seeds = set.intersection(*(set(m["losses"]) for m in members))
        by_seed = {s: fit_power_law(compute, [m["losses"][s] for m in members]) for s in sorted(seeds)}
        first, ratio, text = first or by_seed, None, f"L = {a:.4f} C^(−{b:.4f}), C in PFLOP/s-days"
        if len(by_seed) > 1:
            text += f"; exponent over seeds ±{mean_and_half_width([b for _, b in by_seed.values()])[1]:.4f}"
        logs = [math.log(compute_ratio(first[s], by_seed[s], compute.max())) for s in by_seed if s in first]
        if fits and len(logs) > 1:
            mean, half = mean_and_half_width(logs)
            ratio = tuple(math.exp(x) for x in (mean, mean - half, mean + half))
            text += "; the reference needs {:.3f} times the largest C (95%: {:.3f} … {:.3f})".format(*ratio)
        fits[name] = {"members": members, "fit": (a, b), "ratio": ratio, "text": text}
    return fits


# ---------------------------------------------------------------------------------------------------------------
# the tables


def escaped(name):
    """A name with Markdown's special characters escaped."""
    return re.sub(r"([\\|*_<`])", r"\\\1", name)


def markdown_table(columns, rows):
    """The lines of a Markdown table: its first column is words, the others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def results_table(arms):
    """The table of summarise()'s arms."""
    rows = []
    for name, a in arms.items():
        compared = [""] * 4
        if "delta" in a:
            compared = [f"{a['delta']:+.4f}", "", "", "one pair"]
            if a["p"] is not None:
                interval = f"{a['delta'] - a['half']:+.4f} … {a['delta'] + a['half']:+.4f}"
                compared[1:] = interval, f"{a['p']:.2g}", a["verdict"]
        rows.append([escaped(name), escaped(a["reference"]), f"{a['lr']:g}", f"{a['mean']:.4f}", *compared,
                     str(len(a["losses"])), f"{a['added']:+,.0f}" if "added" in a else "", f"{a['tokens']:,.0f}"])
    return markdown_table(["arm", "reference", "lr", "val loss", "difference", "interval", "p", "verdict", "seeds",
                           "parameters added", "tokens"], rows)


def tuning_table(rows):
    """The mean loss of each arm at each rate over tuning seeds, the best in bold."""
    losses = defaultdict(lambda: defaultdict(list))
    for row in rows:
        losses[row["arm"]][float(row["lr"])].append(float(row["val_loss"]))
    grid, lines = sorted({float(row["lr"]) for row in rows}), []
    for arm, by_rate in losses.items():
        means = {lr: statistics.mean(by_rate[lr]) for lr in by_rate}
        best = min(means, key=means.get)
        cells = {lr: f"**{mean:.4f}**" if lr == best else f"{mean:.4f}" for lr, mean in means.items()}
        lines.append([escaped(arm), *(cells.get(lr, "") for lr in grid)])
    return markdown_table(["arm", *(f"{lr:g}" for lr in grid)], lines)


def report_text(rows, command, bad):
    """results.md from the rows of results.csv: the tables, how to read them, what is left out and why, what ran."""
    if not rows:
        return "No cell is finished yet.\n"
    arms, tuning = summarise(rows), [row for row in rows if row["use"] == "tuning"]
    tests = sum(a.get("p") is not None for a in arms.values())
    lines = [f"# {rows[0]['suite']}", "", *results_table(arms), ""]
    tuned = "with a fixed learning rate"
    if tuning:
        seeds = ", ".join(sorted({str(row["seed"]) for row in tuning}))
        rate = ("all at the learning rate that is best for the reference" if "--tune=reference" in command else
                "each at its own best learning rate")
        if any(a["lr"] != arms.get(a["reference"], a)["lr"] for a in arms.values()) and "--tune=reference" in command:
            rate += ", or at its own where lr differs,"
        tuned = f"{rate} on seeds that are not reported ({seeds})"
    if tests:
        lines.append(
            f"Difference: an arm's validation loss (nats) minus its reference's, {tuned}, in pairs with the same seed "
            f"and data order. p: paired t test, corrected by Holm for the suite's {tests} "
            f"comparison{'s' * (tests > 1)}; below {LEVEL} an arm is better or worse. Interval: Student's t over the "
            "pairs, at the level at which Holm's procedure tests that arm, so it excludes 0 exactly where the verdict "
            "is better or worse.")
    if tuning:
        lines += ["", "Tuning: mean loss over the tuning seeds, the best in bold.", "", *tuning_table(tuning)]
    lines.append("")
    for name, fit in scaling_fits(arms).items():
        lines.append(f"- {escaped(name)}: {fit['text']}")
    for name, why in bad.items():
        lines.append(f"- Not tuned: `{name}`: {why}.")
    if diverged := [f"{escaped(r['arm'])} at lr {r['lr']}, seed {r['seed']}" for r in rows
                    if float(r["val_loss"]) == math.inf]:
        lines.append(f"- Diverged: {'; '.join(diverged)}. An arm is left out if one of its reported runs did.")
    lines.append(f"- Command: `{command}`")
    lines.append(f"- Hours of processes: {sum(float(row['seconds']) for row in rows) / 3600:.1f}")
    for name in ("code", "commit", "torch", "device"):
        lines.append(f"- {name}: {'; '.join(dict.fromkeys(str(row[name]) for row in rows))}")
    return "\n".join(lines) + "\n"
