"""
Kill a run with SIGKILL again and again, resume it each time, and compare its end with a run that nobody disturbed:

    python tests/faults.py --kills 100
    python tests/faults.py --kills 100 --steps 40

A run that was killed seven times goes on to its end, is compared bit for bit, and another one begins, until all kills
are spent. A kill falls at one of three moments, in turn: at any time since the process started, at any time after its
first checkpoint, and after that as soon as the temporary file of a checkpoint is seen.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, UNIFIED, flags, read_log, small, write_bin  # puts the project on sys.path
from tqdm import tqdm

from configurator import Parser
from runs import load_checkpoint


def command(out, data, steps):
    s = small(data, out_dir=str(out), max_steps=steps, n_embd=64, micro_batch=2, eval_interval=7, eval_tokens=64,
              save_interval=1, resume="auto", **UNIFIED)
    return [sys.executable, str(ROOT / "train.py"), *flags(s)]


def outcome(out):
    """What must not depend on how a run went: every tensor of its last checkpoint, and every row of its logs."""
    ckpt = load_checkpoint(out / "ckpt.pt")
    tensors = dict(ckpt["model"])
    for i, optimizer in enumerate(ckpt["optimizers"]):
        for index, state in optimizer["state"].items():
            tensors.update({f"optimizer {i}, {index}, {name}": value for name, value in state.items()})
    return tensors, read_log(out) + (out / "scales.csv").read_text().splitlines()


def same(a, b):
    return a[1] == b[1] and a[0].keys() == b[0].keys() and all(torch.equal(a[0][k], b[0][k]) for k in a[0])


def attempt(args, out, moment, rng):
    """Run args and kill it at the moment. Returns whether it was writing a checkpoint, or None if it had ended."""
    tmp, ckpt = out / "ckpt.pt.tmp", out / "ckpt.pt"
    seen = ckpt.stat().st_mtime_ns if ckpt.exists() else 0
    process = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if moment == 0:
        wait_until = time.monotonic() + rng.uniform(0, 4)
        trigger = lambda: time.monotonic() > wait_until
    else:
        began = lambda: ckpt.exists() and ckpt.stat().st_mtime_ns > seen
        while process.poll() is None and not began():
            time.sleep(0.002)
        wait_until = time.monotonic() + rng.uniform(0, 0.5)
        trigger = lambda: time.monotonic() > wait_until and (moment == 1 or tmp.exists())
    while process.poll() is None and not trigger():
        time.sleep(0.0002)
    process.kill()
    error = process.communicate()[1]
    if process.returncode == 0:
        return None
    if process.returncode != -9:
        raise AssertionError(f"exit code {process.returncode} instead of a kill: {error}")
    return tmp.exists()


def torment(folder, kills, steps):
    """Spend `kills` kills on runs in folder. Returns what was done, a dict. Raises AssertionError on any difference."""
    rng = random.Random(0)
    data = folder / "data"
    data.mkdir(parents=True)
    for split in ("train", "val"):
        write_bin(data / f"{split}.bin", np.random.default_rng(0).integers(0, 256, 5000))
    subprocess.run(command(folder / "undisturbed", data, steps), check=True, stdout=subprocess.DEVNULL)
    expected = outcome(folder / "undisturbed")
    done = {"kills": 0, "while writing": 0, "before the first checkpoint": 0, "runs compared": 0}
    bar = tqdm(total=kills, unit="kill")
    while done["kills"] < kills or not done["runs compared"]:
        out, most = folder / f"run{done['runs compared']}", min(kills, done["kills"] + 7)
        args = command(out, data, steps)
        while done["kills"] < most:
            writing = attempt(args, out, done["kills"] % 3, rng)
            if writing is None:
                break
            done["kills"] += 1
            done["while writing"] += writing
            done["before the first checkpoint"] += not (out / "ckpt.pt").exists()
            bar.update()
        subprocess.run(args, check=True, stdout=subprocess.DEVNULL)  # to its end, if it is not there yet
        assert same(outcome(out), expected), f"{out} ended differently from {folder / 'undisturbed'}"
        shutil.rmtree(out)
        done["runs compared"] += 1
    bar.close()
    return done


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=400, help="of a run; default: 400")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = torment(Path(folder) / "faults", a.kills, a.steps)
    print(", ".join(f"{what}: {count}" for what, count in done.items()))
