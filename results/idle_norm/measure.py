"""
What leaving out an idle Pre-Norm changes, which is what ε acts on: unified at the lab size for 300 steps, with N before
the branches and without it, from the default start and from N(0, 0.02), where the residual stream is small at first.

    python results/idle_norm/measure.py        writes results.csv and results.md beside it
"""

import csv
import statistics
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch

from configurator import configure
from devices import device_name
from norms import Branches
from runs import git_commit, versions
from settings import Settings
from train import main

ROOT, STEPS = HERE.parents[1], 300
STARTS = {"1/√fan_in, table 1": (0.0, 0.0), "N(0, 0.02)": (0.02, 0.02)}


def final_losses(keep_norm, seed, init_std, embedding_std):
    """(training loss of step 10, validation loss at the end) of one run, in nats."""
    files = [str(ROOT / "config" / "size" / "lab.py"), str(ROOT / "config" / "unified.py")]
    with tempfile.TemporaryDirectory() as folder:
        s, _ = configure(Settings, [*files, f"--seed={seed}", f"--max_steps={STEPS}", "--sample_tokens=0",
                                    "--device=cpu", "--compile=False", f"--out_dir={folder}/run",
                                    f"--eval_interval={STEPS}"])
        s.init_std, s.embedding_std = init_std, embedding_std
        Branches.idle_norm = property(lambda b: not keep_norm and len(b.normed) == len(b.n_out))
        main(s)
        with open(f"{folder}/run/log.csv", newline="") as f:
            rows = list(csv.DictReader(f))
    return float(rows[1]["train_loss"]), float(rows[-1]["val_loss"])


if __name__ == "__main__":
    rows = []
    for start, stds in STARTS.items():
        for seed in (1, 2, 3):
            for norm in ("kept", "left out"):
                early, late = final_losses(norm == "kept", seed, *stds)
                rows.append({"start": start, "seed": seed, "Pre-Norm": norm, "train_loss at step 10": early,
                             "val_loss": late, "commit": git_commit(), "device": device_name(torch.device("cpu")),
                             **versions()})
    with open(HERE / "results.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    lines = ["| start | Pre-Norm kept | left out | differences, seed by seed |", "|---|---:|---:|---|"]
    for start in STARTS:
        kept, left = ([r["val_loss"] for r in rows if r["start"] == start and r["Pre-Norm"] == norm]
                      for norm in ("kept", "left out"))
        each = ", ".join(f"{b - a:+.4f}" for a, b in zip(kept, left))
        lines.append(f"| {start} | {statistics.mean(kept):.4f} | {statistics.mean(left):.4f} | {each} |")
    (HERE / "results.md").write_text("\n".join([
        "# Idle Pre-Norms: kept and left out", "", *lines, "",
        f"Validation loss in nats, unified, {STEPS} steps at the lab size, seeds 1, 2, 3. The functions differ in what "
        f"ε acts on. `python results/idle_norm/measure.py`, {rows[0]['device']}, torch {rows[0]['torch']}.", ""]),
        encoding="utf-8")
