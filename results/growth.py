"""
How a training step's time and memory grow with the model, the batch and the processes: results/bench/growth.md.

    python results/growth.py --rounds=5            on a CPU core, some minutes
    python results/growth.py --what processes      1, 2 and 4 processes of train.py, a core each if there are as many

Each row changes one number of the quickstart and keeps the rest. exponent: the slope of log(time) over log(FLOPs) from
the row before; 1 is proportional. Time below it (0.9, say) is overhead that large models do not notice; time above it
is work that nobody asked for. Arms take turns, as in bench.py.
"""

import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configurator import Parser

# one line of a table: name -> values of train.py's flags
CHANGES = {"width": [f"--n_embd={n} --n_head={n // 32}" for n in (64, 128, 256, 512)],
           "depth": [f"--n_layer={n}" for n in (2, 4, 8, 16)],
           "batch": [f"--micro_batch={n}" for n in (2, 4, 8, 16)],
           "block": [f"--block_size={n} --micro_batch={2048 // n}" for n in (128, 256, 512, 1024)],
           "experts": [f"--n_experts={n} --experts_per_token=4 --expert_dim=85" for n in (4, 8, 16, 32)]}


def arguments(args=None):
    parser = Parser(__doc__)
    parser.add_argument("--what", nargs="*", choices=[*CHANGES, "processes"], default=[*CHANGES, "processes"],
                        help="default: all")
    parser.add_argument("--rounds", default=5, type=int, help="default: %(default)s")
    parser.add_argument("--steps", default=60, type=int, help="of a run with processes; default: %(default)s")
    parser.add_argument("--out", default=Path(__file__).resolve().parent / "bench", type=Path)
    return parser.parse_args(args)


if __name__ == "__main__":
    asked = arguments()  # before torch is loaded

import bench

STRATEGIES = "baseline", "unified"


def grown(change, a):
    """Rows of one table: time, memory and their exponents of the baseline, and unified over it."""
    rows, before = [], None
    for flags in CHANGES[change]:
        arms, work = {}, {}
        for name in STRATEGIES:
            arms[name] = bench.make_arm(f"{name} --micro_batch=8 {flags}", "eager", a)
            work[name] = arms[name].model.flops_per_token() * next(arms[name].batches)[0].numel()
        memory = {name: arm.memory_mb() for name, arm in arms.items()}
        times = bench.alternate({name: lambda arm=arm: arm.seconds(1) for name, arm in arms.items()}, a.rounds)
        took, flops = statistics.median(times["baseline"]), work["baseline"]
        ratio, low, high = bench.paired_ratio(times["unified"], times["baseline"])
        before = before or {"took": took, "mb": memory["baseline"], "flops": flops}
        grew = flops > 1.1 * before["flops"]  # with experts they hardly grow
        slope = lambda now, then: f"{math.log(now / then) / math.log(flops / before['flops']):.2f}" if grew else ""
        rows.append({"what": change, "flags": flags.replace("--", ""), "gflops": f"{flops / 1e9:.1f}",
                     "ms": f"{1e3 * took:.0f}", "exponent": slope(took, before["took"]),
                     "mb": f"{memory['baseline']:.0f}", "mb_exponent": slope(memory["baseline"], before["mb"]),
                     "unified_time": f"{ratio:.2f} ({low:.2f}–{high:.2f})",
                     "unified_memory": f"{memory['unified'] / memory['baseline']:.2f}"})
        before = {"took": took, "mb": memory["baseline"], "flops": flops}
    return rows


def processes(a):
    """Rows of train.py's tokens per second on 1, 2 and 4 processes, each with a thread."""
    rows, single = [], None
    flags = ["--device=cpu", f"--max_steps={a.steps}", "--batch_tokens=8192", "--micro_batch=8", "--eval_tokens=2048",
             "--sample_tokens=0"]
    for n in (1, 2, 4):
        rates, torchrun = {}, [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        for name in STRATEGIES:
            with tempfile.TemporaryDirectory() as out:
                command = [*torchrun, str(ROOT / "train.py"), str(ROOT / f"config/{name}.py"), *flags,
                           f"--out_dir={out}/run"]
                done = subprocess.run(command, text=True, capture_output=True, check=True,
                                      env={**os.environ, "OMP_NUM_THREADS": "1"})
            rates[name] = float(re.search(r"^tokens_per_second: (\d+)", done.stdout, re.M)[1])
        single = single or rates["baseline"]
        rows.append({"processes": n, "tokens_per_second": f"{rates['baseline']:.0f}",
                     "over_1_process": f"{rates['baseline'] / single:.2f}",
                     "unified_time": f"{rates['baseline'] / rates['unified']:.2f}"})
    return rows


def main(a, command):
    a.size, a.seconds = "quickstart", math.inf
    bench.prepare(a, ["results/growth.py", *command])
    rows = [row for change in a.what if change in CHANGES for row in grown(change, a)]
    if rows:
        bench.report("growth", rows, a, [f"The quickstart with 8 sequences per step, eager, {a.dtype}; the median of "
                                         f"{a.rounds} steps. unified_time, unified_memory: over the baseline's."])
    if "processes" in a.what:
        bench.report("growth_processes", processes(a), a, [
            f"train.py, {a.steps} steps of 8,192 tokens, one thread per process, {os.cpu_count()} cores."])


if __name__ == "__main__":
    bench.run(main, asked)
