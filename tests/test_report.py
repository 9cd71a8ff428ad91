"""results/report.py: the first table of results/README.md says what the CSVs say."""

import shutil
import sys

from conftest import ROOT

from ablate import COLUMNS, write_csv
from suites import SUITES

sys.path.insert(0, str(ROOT / "results"))
import report


def write_suite(folder, suite, deltas, seeds=3):
    """results/SUITE with pairs of each of these arms: {arm: its difference to its reference}."""
    losses, rows = {}, []
    for arm in SUITES[suite]:
        if arm.name in deltas or arm.reference is None:
            base = losses.get(arm.reference, 2.0)
            losses[arm.name] = base + deltas.get(arm.name, 0.0)
            rows += [dict.fromkeys(COLUMNS, "") | {
                "suite": suite, "arm": arm.name, "reference": arm.reference or "", "use": "report", "lr": 1e-3,
                "seed": seed, "val_loss": losses[arm.name] + 0.0001 * (seed * len(arm.name) % 7), "params": 1,
                "tokens": 1, "flops": 1, "seconds": 1200, "cell": f"{arm.name}{seed}"} for seed in range(seeds)]
    (folder / suite).mkdir()
    write_csv(folder / suite / "results.csv", rows)
    (folder / suite / "results.md").write_text(f"- Command: `python ablate.py {suite}`\n")


def rows_of(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_what_has_not_run_says_so(tmp_path):
    text = report.tables(tmp_path)
    rows = rows_of(text)[2:]
    assert all(row[2] and not any(row[3:]) for row in rows), "a statement of the paper keeps its row"
    line, = (line for line in text.splitlines() if line.startswith("- Not run yet"))
    missing = dict(part.split(" of ")[::-1] for part in line.rstrip(".").split(": ")[1].split(", "))
    named = {row[0] for row in rows} | set(missing)
    assert named == set(SUITES), "each suite has a row or is named"
    # a comparison that an earlier suite makes is not missing here
    assert missing["readings"] == str(len(SUITES["readings"]) - 1) and missing["figure5"] == "1"


def test_our_difference_next_to_the_papers_with_interval_verdict_and_direction(tmp_path):
    write_suite(tmp_path, "figure5", {"HG": 0.01, "HG+AP": 0.02, "HG+DNP": 0.0002, "HG+DP": -0.03,
                                      "HG+DNP+OR": -0.02, "HG+DNP+OR+IWD": 0.03, "HG+DNP+ER+IWD": 0.0001})
    text = report.tables(tmp_path)
    rows = {row[1]: row for row in rows_of(text)}
    assert rows["HG vs baseline"][0] == "[figure5](figure5/results.md)"
    assert rows["HG vs baseline"][2] == "-0.0044 (0.12B, heterogeneity)"
    _, _, _, ours, _, same = rows["HG vs baseline"]
    assert ours.startswith("+0.01") and "…" in ours and ours.endswith(", worse") and same == "no"
    assert rows["HG+AP vs HG"][5] == rows["HG+DNP+OR vs HG+DP"][5] == "yes"
    assert rows["HG+DNP vs HG"][3].endswith("not significant") and rows["HG+DNP vs HG"][5] == "yes, not significant"
    # the paper's differences here are smaller than its noise: it says that there is none
    assert rows["HG+DNP+OR+IWD vs HG+DNP+OR"][5] == "no" and rows["HG+DNP+ER+IWD vs HG+DNP+OR"][5] == "yes"
    assert rows["HG+DP+OR vs HG+DP"][3] == ""
    # 8 arms of 3 runs of 20 minutes
    assert ["[figure5](figure5/results.md)", "3", "4.0, two cores"] in rows_of(text)


def test_each_pair_of_strategies_is_quoted_once(tmp_path):
    for suite in {*SUITES} - {"figure6", "figure7", "figure8", "figure9"}:  # other sizes, optimizers and schedules
        write_suite(tmp_path, suite, {arm.name: -0.01 for arm in SUITES[suite] if arm.reference})
    pairs = [row[1] for row in rows_of(report.tables(tmp_path)) if len(row) == 6 and row[0][0] == "["]
    assert len(set(pairs)) == len(pairs) > 30


def test_two_pairs_of_seeds_are_no_result_yet(tmp_path):
    write_suite(tmp_path, "figure5", {"HG": -0.02, "HG+AP": 0.02}, seeds=2)
    row, = (row for row in rows_of(report.tables(tmp_path)) if row[1] == "HG+AP vs HG")
    assert row[0] == "[figure5](figure5/results.md)" and row[3:] == ["", "", ""]


def test_the_larger_size_has_a_column(tmp_path):
    write_suite(tmp_path, "primary", {"unified": -0.02})
    (tmp_path / "primary").rename(tmp_path / "primary_0.86M")
    row = rows_of(report.tables(tmp_path))[2]
    assert row[:4] == ["[primary](primary_0.86M/results.md)", "unified vs baseline", "-0.0331 (0.12B)", ""]
    assert row[4].startswith("-0.0") and row[5] == "yes"


def test_the_readme_and_each_results_md_are_what_the_script_makes(tmp_path):
    committed = {path.relative_to(ROOT / "results"): path for path in (ROOT / "results").rglob("*.md")}
    shutil.copytree(ROOT / "results", tmp_path, dirs_exist_ok=True)
    report.main(tmp_path)
    for name, path in committed.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8"), name


def test_the_papers_number_is_the_end_of_its_run_and_its_arms_are_ours():
    paper = report.paper_numbers()
    assert paper["figure5", "HG+DP", "HG"][1] == -0.0032 and paper["figure10", "unified", "baseline"][1] == -0.0331
    names = {(arm.name, arm.reference) for suite in SUITES.values() for arm in suite}
    assert {key[1:] for key in paper} <= names, "an arm of the paper is misspelt"
