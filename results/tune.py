"""
Which constants rms_norm's Triton kernels should have, by width: results/bench/tune.md, and tune.json for kernels.TUNED.

    python results/tune.py --seconds=80                        on a GPU
    python bench.py kernels --tuned=results/bench/tune.json    whether they beat torch.compile with them

For each width and kernel: the fastest (rows per program, warps), then, with these, the fastest of each other constant
in turn. Every width gets its share of the time; what there was no time to try stays as it is.
"""

import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import Parser

CHOICES = {"evict": ("", "evict_first"), "stages": (1, 2, 3), "programs": (2, 4, 8)}
PARTS = {"rms_norm forward": ("evict",), "rms_norm backward": ("evict",),
         "rms_norm backward γ": ("evict", "stages", "programs")}


def arguments(args=None):
    parser = Parser(__doc__)
    parser.add_argument("--seconds", default=80.0, type=float)
    parser.add_argument("--widths", default="768,1024,1536,1792,2048", help="values of n; default: %(default)s")
    parser.add_argument("--elements", default=2**25, type=int, help="of x; default: %(default)s")
    parser.add_argument("--rounds", default=15, type=int, help="of a timing; default: %(default)s")
    parser.add_argument("--out", default=Path(__file__).resolve().parent / "bench", type=Path)
    return parser.parse_args(args)


if __name__ == "__main__":
    asked = arguments()  # before torch is loaded

import torch

import bench
import kernels


def operations(n, rows, device, dtype):
    """{part of kernels.TUNED: (a function that runs it, the bytes that it moves)}, as the models call them."""
    x, r, dy, dtotal = torch.randn(4, rows, n, device=device, dtype=dtype).unbind()
    gamma = torch.ones(n, device=device)
    return {"rms_norm forward": (lambda: kernels._rms_norm(x, r, None, 1e-6), 4 * x.nbytes),
            "rms_norm backward": (lambda: kernels._rms_norm_backward(dy, x, None, dtotal, 1e-6), 4 * x.nbytes),
            "rms_norm backward γ": (lambda: kernels._rms_norm_backward(dy, x, gamma, None, 1e-6), 3 * x.nbytes)}


def tiles(n):
    """(rows, warps) with 8 to 32 numbers per thread."""
    columns = kernels.triton.next_power_of_2(n)
    return [dict(rows=rows, warps=warps) for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16))
            if 8 <= rows * columns / (32 * warps) <= 32]


def main(a, command):
    bench.prepare(a, ["results/tune.py", *command])
    widths, rows, tuned = [int(n) for n in a.widths.split(",")], [], {}
    kernels.TUNED = tuned
    for n, until in bench.in_time(widths, a):
        for part, (f, moved) in operations(n, a.elements // n, a.device, getattr(torch, a.dtype)).items():
            def seconds(constants):
                tuned[f"{part} {n}"] = constants
                with kernels.backend("triton"):
                    f()  # compiles
                    return statistics.median(a.ceilings.seconds(f) for _ in range(a.rounds))
            best, tried, rule = {}, 0, vars(kernels._rms_norm_constants(part, n)[1])
            before = least = seconds(best)
            for choices in (tiles(n), *([{name: value} for value in CHOICES[name]] for name in PARTS[part])):
                base = {**rule, **best}
                for choice in choices:
                    if {**base, **choice} != base and time.monotonic() < until:
                        took, tried = seconds({**base, **choice}), tried + 1
                        if took < 0.99 * least:  # a change that is no faster than the noise is none
                            best, least = {k: v for k, v in {**base, **choice}.items() if v != rule[k]}, took
            tuned[f"{part} {n}"] = best
            copy = a.ceilings.bytes / statistics.median(a.ceilings.copy() for _ in range(a.rounds))
            rows.append({"n": n, "part": part, "tried": tried, "before_us": f"{1e6 * before:.1f}",
                         "best_us": f"{1e6 * least:.1f}", "before_copy_%": f"{100 * moved / before / copy:.0f}",
                         "best_copy_%": f"{100 * moved / least / copy:.0f}", "best": best or "as before"})
            bench.report("tune", rows, a, [f"{a.elements} elements, {a.dtype}, the median of {a.rounds}."], say=False)
            changed = {key: value for key, value in tuned.items() if value}
            (a.out / "tune.json").write_text(json.dumps(changed, indent=1, ensure_ascii=False), encoding="utf-8")
    print((a.out / "tune.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(asked, sys.argv[1:])
