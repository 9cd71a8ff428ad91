"""
What else a training step could be made of, each beside the step as train.py has it: results/bench/step_SIZE.md.

    python results/step.py --sizes=llama_0.12b --seconds=60        on a GPU
    python results/step.py --sizes=llama_0.12b --liger             with Liger's fused linear cross-entropy

attention by cuDNN: torch picks another backend by itself. CUDA graphs: no gaps between launches. no wait: the CPU does
not wait for the loss after each step, so it launches the next one at once. The loss: the LM head's matrix product and
the cross-entropy, forward and backward.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import Parser


def arguments(args=None):
    parser = Parser(__doc__)
    parser.add_argument("--sizes", default="llama_0.12b", help="a name in config/size, or a file; default: %(default)s")
    parser.add_argument("--seconds", default=60.0, type=float)
    parser.add_argument("--rounds", default=10, type=int, help="default: %(default)s")
    parser.add_argument("--block", default=10, type=int, help="steps of an arm per turn; default: %(default)s")
    parser.add_argument("--micro_batch", default=0, type=int, help="sequences per step; default: the size's")
    parser.add_argument("--liger", action="store_true", help="compare with pip's liger-kernel")
    parser.add_argument("--out", default=Path(__file__).resolve().parent / "bench", type=Path)
    return parser.parse_args(args)


if __name__ == "__main__":
    asked = arguments()  # before torch is loaded

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import bench


class NoWait(bench.Arm):
    def step(self):
        self.loss(*next(self.batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def per_step(arm, steps):
    """Seconds per step of some steps, the last of which is waited for."""
    wait(arm.device)
    began = time.perf_counter()
    for _ in range(steps):
        arm.step()
    wait(arm.device)
    return (time.perf_counter() - began) / steps


def losses(s, a):
    """{name: (a function, its peak memory in MB)}: the LM head and the loss of a micro-batch, and all gradients."""
    tokens = (a.micro_batch or s.micro_batch) * s.block_size
    dtype = getattr(torch, a.dtype)
    h = torch.randn(tokens, s.n_embd, device=a.device, dtype=dtype).requires_grad_()
    W = (0.02 * torch.randn(s.vocab_size, s.n_embd, device=a.device)).to(dtype).requires_grad_()
    y = torch.randint(0, s.vocab_size, (tokens,), device=a.device)
    found = {"linear and cross-entropy, compiled": torch.compile(lambda: F.cross_entropy(F.linear(h, W).float(), y))}
    if a.liger:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as liger
        found["Liger's fused linear cross-entropy"] = lambda: liger.apply(h, W, y)[0]
    arms = {}
    for name, f in found.items():
        run = lambda f=f: torch.autograd.grad(f(), (h, W))
        run()
        memory = 0.0
        if a.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            memory = (torch.cuda.max_memory_allocated() - before) / 2**20
        arms[name] = run, memory
    return arms


def main(a, command):
    bench.prepare(a, ["results/step.py", *command])
    size, shared, arms = a.sizes, {}, {}
    make = lambda: bench.make_arm(size, "baseline", a, "compiled", shared)
    arms["as train.py has it"] = step = make()
    arms["no wait"] = NoWait(step.model, step.loss, step.optimizers, shared["batches"])
    if a.device.type == "cuda":
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            arms["attention by cuDNN"] = make()
        with inductor.patch({"triton.cudagraphs": True}):
            arms["CUDA graphs"] = make()
    memory = {name: arm.memory_mb() for name, arm in arms.items()}
    timed = {name: lambda arm=arm: per_step(arm, a.block) for name, arm in arms.items()}
    for name, (f, mb) in losses(bench.settings_of(size), a).items():
        memory[name], timed[name] = mb, lambda f=f: a.ceilings.seconds(f)
    times, rows = bench.alternate(timed, a.rounds, a.until), []
    for name in timed:
        base = next(iter(arms if name in arms else (n for n in timed if n not in arms)))
        rows.append({"what": name, "ms": f"{1e3 * sorted(times[name])[len(times[name]) // 2]:.2f}",
                     "time": "{:.3f} ({:.3f}–{:.3f})".format(*bench.paired_ratio(times[name], times[base])),
                     "memory_mb": f"{memory[name]:.0f}"})
    bench.report(f"step_{bench.size_name(size)}", rows, a, [
        f"The baseline, compiled, {a.dtype}, {len(times[next(iter(times))])} rounds. time: over the step's as train.py "
        f"has it, and over the compiled loss's, with its 95% interval."])


if __name__ == "__main__":
    main(asked, sys.argv[1:])
