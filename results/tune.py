"""
Which constants the Triton kernels should have, by width: results/bench/tune.md, and tune.json for kernels.TUNED.

    python results/tune.py --seconds=80                        on a GPU
    python bench.py kernels --tuned=results/bench/tune.json    whether they beat torch.compile with them

For each kernel: the fastest tile, then, with it, the fastest of each other constant in turn. Every width gets its share
of the time; what there was no time to try stays as it is.
"""

import itertools
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import Parser

EVICT = [dict(evict="evict_first")]
STAGES = [dict(stages=stages) for stages in (1, 2, 3)]
PROGRAMS = [dict(programs=programs) for programs in (1, 2, 3, 4, 8, 16)]
HEADS = [dict(heads=heads, warps=warps) for heads, warps in
         ((4, 1), (8, 1), (8, 2), (16, 1), (16, 2), (16, 4), (32, 2), (32, 4), (64, 4), (64, 8))]


def arguments(args=None):
    parser = Parser(__doc__)
    parser.add_argument("--seconds", default=80.0, type=float)
    parser.add_argument("--widths", default="768,1024,1536,1792,2048", help="of models; default: %(default)s")
    parser.add_argument("--elements", default=2**25, type=int, help="of x; default: %(default)s")
    parser.add_argument("--rounds", default=15, type=int, help="of a timing; default: %(default)s")
    parser.add_argument("--out", default=Path(__file__).resolve().parent / "bench", type=Path)
    return parser.parse_args(args)


if __name__ == "__main__":
    asked = arguments()  # before torch is loaded

import torch

import bench
import kernels


def rows_of(n):
    """rms_norm's tiles with 8 to 32 numbers per thread."""
    columns = kernels.triton.next_power_of_2(n)
    return [dict(rows=rows, warps=warps) for rows, warps in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16))
            if 8 <= rows * columns / (32 * warps) <= 32]


def operations(n, elements, device, dtype):
    """
    {part of kernels.TUNED: (a function that runs it as a model of width n does, the bytes that it moves, lists of
    choices)}
    """
    new = partial(torch.randn, device=device, dtype=dtype)
    x, r, dy, dtotal = new(4, elements // n, n).unbind()
    gamma = torch.ones(n, device=device)
    T, m, d, heads = min(1024, len(x)), 8 * -(-int(8 * n / 3) // 8), 64, max(1, n // 64)
    h, gate_up, y = new(len(x), m), new(len(x), 2 * m), new(len(x) // T, T, 3 * heads * d)
    douts = new(3, len(x) // T, T, heads, d).unbind()
    cos, sin = torch.randn(2, T, d // 2, device=device)
    ones, per_head = torch.ones(m, device=device), torch.ones(2 * heads, d, device=device)
    backward = kernels._qk_norm_rope_backward
    return {
        f"swiglu backward γ {m}": (lambda: kernels._swiglu_backward(h, gate_up, m, 1e-16, True, ones), 5 * h.nbytes,
                                   [[dict(warps=4), dict(warps=8), dict(warps=16)], STAGES, PROGRAMS]),
        f"qk_norm_rope backward γ {d}": (lambda: backward(*douts, y, cos, sin, per_head, 3 * heads, 1e-16),
                                         3 * y.nbytes, [HEADS, STAGES, PROGRAMS]),
        f"qk_norm_rope backward {d}": (lambda: backward(*douts, None, cos, sin, None, 0, 0.0), 2 * y.nbytes, [HEADS]),
        f"qk_norm_rope forward {d}": (
            lambda: kernels._qk_norm_rope(y, cos, sin, per_head, heads, heads, 3 * heads, 1e-16), 2 * y.nbytes,
            [HEADS]),
        f"rms_norm forward {n}": (lambda: kernels._rms_norm(x, r, None, 1e-6), 4 * x.nbytes, [rows_of(n), EVICT]),
        f"rms_norm backward {n}": (lambda: kernels._rms_norm_backward(dy, x, None, dtotal, 1e-6), 4 * x.nbytes,
                                   [rows_of(n), EVICT]),
        f"rms_norm backward γ {n}": (lambda: kernels._rms_norm_backward(dy, x, gamma, None, 1e-6), 3 * x.nbytes,
                                     [rows_of(n), EVICT, STAGES, PROGRAMS])}


def main(a, command):
    bench.prepare(a, ["results/tune.py", *command])
    widths, rows = [int(n) for n in a.widths.split(",")], []
    kernels.TUNED = tuned = {}
    for n, until in bench.in_time(widths, a):
        todo = operations(n, a.elements, a.device, getattr(torch, a.dtype))
        todo = [(part, rest) for part, rest in todo.items() if part not in tuned]  # a wider model's heads are as wide
        for (part, (f, moved, steps)), until in bench.in_time(todo, SimpleNamespace(until=until)):

            def seconds(constants):
                tuned[part] = constants
                with kernels.backend("triton"):
                    f()  # compiles
                    return statistics.median(a.ceilings.seconds(f) for _ in range(a.rounds))
            best, tried = {}, 0
            before = least = seconds(best)
            for choice in itertools.chain(*steps):
                if time.monotonic() < until:
                    took, tried = seconds({**best, **choice}), tried + 1
                    if took < 0.99 * least:  # a change that is no faster than the noise is none
                        best, least = tuned[part], took
            tuned[part] = best
            copy = a.ceilings.bytes / statistics.median(a.ceilings.copy() for _ in range(a.rounds))
            rows.append({"part": part, "tried": tried, "before_us": f"{1e6 * before:.1f}",
                         "best_us": f"{1e6 * least:.1f}", "before_copy_%": f"{100 * moved / before / copy:.0f}",
                         "best_copy_%": f"{100 * moved / least / copy:.0f}", "best": best or "as before"})
            bench.report("tune", rows, a, [f"{a.elements} elements, {a.dtype}, the median of {a.rounds}."], say=False)
            changed = {key: value for key, value in tuned.items() if value}
            (a.out / "tune.json").write_text(json.dumps(changed, indent=1, ensure_ascii=False), encoding="utf-8")
    print((a.out / "tune.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    bench.run(main, asked)
