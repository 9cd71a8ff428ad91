"""
Measurements of whole runs, each a table on stdout and a CSV in results/bench:

    python bench.py train        tokens per second, MFU and peak memory of sizes × strategies
    python bench.py checkpoint   seconds to save and to load a checkpoint
    python bench.py all          both

On a GPU: the quickstart, llama_0.12b and llama_1b, in bf16 and compiled. On a CPU: the quickstart, and llama_0.12b's
checkpoint; its absolute times say little about any other machine.
"""

import argparse
import csv
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from configurator import configure
from model import GPT
from optim import make_optimizers, param_groups
from runs import git_commit, load_checkpoint, save_checkpoint, versions
from train import Settings, gpt_config, pick_device

HERE = Path(__file__).resolve().parent
STRATEGIES = ["no_scale", "baseline", "unified"]


def machine():
    """What a row must say of where it was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})"
    return {"device": device, "threads": torch.get_num_threads(), **versions(), "commit": git_commit()}


def report(name, rows):
    """Print rows as a table and write them, with the machine, to results/bench/NAME.csv."""
    columns = list(rows[0])
    widths = [max(len(str(row[c])) for row in [dict(zip(columns, columns)), *rows]) for c in columns]
    for row in [dict(zip(columns, columns)), *rows]:
        print("  ".join(str(row[c]).rjust(w) for c, w in zip(columns, widths)))
    path = HERE / "results" / "bench" / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, [*columns, *machine()], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **machine()} for row in rows)


def bench_train(sizes, steps):
    """Run train.py for each size and strategy; on the embedded corpus, since speed does not depend on the text."""
    rows = []
    for size, strategy in tqdm([(size, strategy) for size in sizes for strategy in STRATEGIES], unit="run"):
        with tempfile.TemporaryDirectory() as out:
            run = subprocess.run(
                [sys.executable, str(HERE / "train.py"), f"{HERE}/config/size/{size}.py",
                 f"{HERE}/config/{strategy}.py", "--dataset=pysrc", f"--max_steps={steps}", "--eval_tokens=65536",
                 f"--eval_interval={steps}", "--save_interval=1000000", "--sample_tokens=0", "--warmup_steps=10",
                 f"--out_dir={out}/run"], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"bench.py: {size} {strategy}: {run.stderr.strip().splitlines()[-1]}")
        said = dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)
        rows.append({"size": size, "strategy": strategy, **{key: said.get(key, "") for key in (
            "params", "scale_params", "val_loss", "tokens", "tokens_per_second", "mfu", "peak_memory_mb")}})
    report("train", rows)


def bench_checkpoint(sizes):
    """Save and load the model and the AdamW state of each size, as train.py does."""
    rows = []
    for size in tqdm(sizes, unit="checkpoint"):
        s, _ = configure(Settings, [str(HERE / "config" / "size" / f"{size}.py")])
        device, _ = pick_device(s)
        model = GPT(gpt_config(s)).to(device)
        optimizers = make_optimizers(param_groups(model.named_roles(), 0.1, "all"), "adamw", (0.9, 0.95))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers[0].step()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ckpt.pt"
            started = time.perf_counter()
            save_checkpoint(path, model, optimizers, 1, s, "bytes", {})
            saved = time.perf_counter()
            load_checkpoint(path)
            loaded = time.perf_counter()
            rows.append({"size": size, "gigabytes": f"{path.stat().st_size / 1e9:.2f}",
                         "save_seconds": f"{saved - started:.1f}", "load_seconds": f"{loaded - saved:.1f}"})
        del model, optimizers
    report("checkpoint", rows)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "checkpoint", "all"])
    parser.add_argument("--sizes", help="names in config/size, with commas; default: by the device")
    parser.add_argument("--steps", type=int, default=100, help="of each run of train; default: 100")
    a = parser.parse_args(args)
    gpu = torch.cuda.is_available()
    named = a.sizes.split(",") if a.sizes else None
    if a.what in ("train", "all"):
        bench_train(named or (["quickstart", "llama_0.12b", "llama_1b"] if gpu else ["quickstart"]), a.steps)
    if a.what in ("checkpoint", "all"):
        bench_checkpoint(named or (["llama_1b"] if gpu else ["llama_0.12b"]))


if __name__ == "__main__":
    main()
