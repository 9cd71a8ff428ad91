"""
Make the first tables of results/README.md from the committed results and the paper's numbers:

    python results/report.py

It also rewrites each results.md from its results.csv.
results/SUITE holds the results of ablate.py's SUITE at the lab size, results/SUITE_0.86M those at 0.86M parameters.
"""

import re
import statistics
import sys
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from stats import escaped, markdown_table, paper_numbers, read_csv, report_text, scaling_fits, summarise
from suites import SIZES, SUITES

START, END = "<!-- made by results/report.py -->", "<!-- end of what results/report.py made -->"
ORDER = ["primary", *(name for name in SUITES if name != "primary")]
LARGER = "_0.86M"


def noise():
    """How far two plots of one run of the paper differ."""
    rows = read_csv(HERE / "paper.csv")
    return max(float(row["number"]) for row in rows if row["unit"].startswith("loss difference, "))


def compared(arms, name):
    """
    The arm of summarise(), or None with fewer than three pairs of seeds: a suite runs seed by seed, and its results are
    committed while it is unfinished.
    """
    return arms[name] if arms.get(name, {}).get("pairs", 0) >= 3 else None


def ours(arm):
    """The table cell of an arm of compared()."""
    if arm is None:
        return ""
    low, high = arm["delta"] - arm["half"], arm["delta"] + arm["half"]
    return f"{arm['delta']:+.4f} ({low:+.4f} … {high:+.4f}), {arm['verdict']}"


def agrees(number, arm):
    """Whether our difference has the direction of the paper's number, None or nats."""
    if number is None or arm is None:
        return ""
    significant = arm["verdict"] != "not significant"
    if abs(number) <= noise():  # the paper says that there is no difference
        return "no" if significant else "yes"
    same = (number < 0) == (arm["delta"] < 0)
    return ("yes" if same else "no") + (", not significant" if not significant else "")


def statements(folder, paper):
    """
    Return (the rows of the table, {suite: number of comparisons that have not run and that the paper does not make}).

    A row is a comparison of a suite. One that several suites make is quoted from the first of them, so that it has one
    verdict.
    """
    rows, missing, seen = [], Counter(), set()
    for suite in ORDER:
        lab, larger = (summarise(read_csv(folder / f"{suite}{size}" / "results.csv")) for size in ("", LARGER))
        planned = {arm.name: arm for arm in SUITES[suite]}
        pairs = [(name, arm.reference) for name, arm in planned.items() if arm.reference]
        if suite in SIZES:  # the arms are named by size, which the results know
            pairs = [(name, a["reference"]) for name, a in lab.items() if a["reference"]] or pairs
        for name, reference in pairs:
            if name.endswith(" at lab"):  # the primary's
                continue
            if name in planned:
                words = frozenset((planned[x].words, planned[x].rate, planned[x].steps, suite if suite in SIZES else "")
                                  for x in (name, reference))
                if words in seen:
                    continue
                seen.add(words)
            figure = "figure10" if suite == "primary" else suite  # where the paper compares the two at one size
            panel, number = paper.get((figure, name, reference), ("", None))
            arms = [compared(results, name) for results in (lab, larger)]
            if number is None and not any(arms):
                missing[suite] += 1
                continue
            theirs = "" if number is None else "no difference" if number == 0 else f"{number:+.4f} ({panel})"
            what = name if " vs " in name else f"{name} vs {reference}"
            link = f"[{suite}]({suite}{'' if lab else LARGER}/results.md)" if lab or larger else suite
            rows.append([link, escaped(what), theirs, *map(ours, arms), agrees(number, arms[0] or arms[1])])
    return rows, missing


def fit_lines(folder):
    """The paper's cost of a step, and its fits of loss over compute and ours, one line per strategy."""
    paper = read_csv(HERE / "paper.csv")
    costs = ", ".join(f"{row['number']} {row['unit']}" for row in paper if row["figure"] == "table3")
    lines = [f"- table3, unified vs baseline. Paper: {costs} (1B, torch.compile). Ours: [bench](bench)."]
    for suite in SIZES:
        theirs = {(row["arm"], row["unit"]): row["number"] for row in paper
                  if row["figure"] == suite and row["panel"].startswith("fit")}
        found = scaling_fits(summarise(read_csv(folder / suite / "results.csv")))
        for strategy in ("baseline", "unified"):
            a, b = theirs[strategy, "a"], theirs[strategy, "b"]
            times = theirs.get((strategy, "times the compute"))
            said = f"L = {a} C^(−{b})" + (f"; the baseline needs {times} times the compute" if times else "")
            mine = found[strategy]["text"] if strategy in found else "not run yet"
            lines.append(f"- {suite}, {strategy}. Paper: {said}. Ours: {mine}.")
    return lines


def durations(folder):
    """Rows of the table of suites: name, seeds, hours. 16 cells share a GPU, and one cell takes a core."""
    rows = []
    for suite in [f"{suite}{size}" for suite in ORDER for size in ("", LARGER)]:
        if results := read_csv(folder / suite / "results.csv"):
            seeds = Counter(row["arm"] for row in results if row["use"] == "report")
            cells = {row["cell"]: float(row["seconds"]) for row in results}
            gpu = any("NVIDIA" in row["device"] for row in results)
            hours = sum(cells.values()) / 3600 / (16 if gpu else 2)
            rows.append([f"[{suite}]({suite}/results.md)", f"{statistics.median(seeds.values() or [0]):.0f}",
                         f"{hours:.1f}, {'an H200' if gpu else 'two cores'}"])
    return rows


def tables(folder=HERE):
    """The text between the two marks: the paper's numbers and ours, and how long each suite took."""
    head = ["suite", "comparison", "paper", "lab size (0.27M), interval, verdict", "0.86M", "same direction"]
    rows, missing = statements(folder, paper_numbers())
    lines = [*markdown_table(head, rows), "", *fit_lines(folder)]
    if missing:
        lines.append(f"- Not run yet, and not in the paper: {', '.join(f'{n} of {s}' for s, n in missing.items())}.")
    lines.append("")
    if ran := durations(folder):
        lines += markdown_table(["suite and its command", "seeds", "hours"], ran)
    return "\n".join(lines)


def main(folder=HERE):
    for path in folder.glob("*/results.md"):  # with the current wording
        said = path.read_text(encoding="utf-8")
        bad = dict(re.findall(r"- Not tuned: `(.*?)`: (.*)\.\n", said))
        if command := re.search("- Command: `(python ablate.py .*)`", said):
            path.write_text(report_text(read_csv(path.with_suffix(".csv")), command[1], bad), encoding="utf-8")
    readme = folder / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    readme.write_text(f"{before}{START}\n\n{tables(folder)}\n\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
