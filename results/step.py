"""
Other ways to make a training step, compared with the step of train.py: results/bench/step_SIZE_STRATEGY.md.

    python results/step.py --size=llama_0.12b --seconds=60        on a GPU
    python results/step.py --strategy=unified                     of another strategy
    python results/step.py --liger                                with Liger's fused linear cross-entropy

waiting: the CPU waits for every step before it launches the next one. CUDA graphs: no gaps between launches; memory_mb
does not count what they keep between steps. combo kernels: torch.compile joins kernels that do not depend on each
other. The loss: the LM head's matrix product and the cross-entropy, forward and backward.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configurator import Parser


def arguments(args=None):
    parser = Parser(__doc__)
    parser.add_argument("--size", default="llama_0.12b", help="in config/size, or a file; default: %(default)s")
    parser.add_argument("--strategy", default="baseline", help="as in bench.py's --strategies; default: %(default)s")
    parser.add_argument("--seconds", default=60.0, type=float)
    parser.add_argument("--rounds", default=10, type=int, help="default: %(default)s")
    parser.add_argument("--block", default=10, type=int, help="steps of an arm per turn; default: %(default)s")
    parser.add_argument("--liger", action="store_true", help="compare with pip's liger-kernel")
    parser.add_argument("--out", default=Path(__file__).resolve().parent / "bench", type=Path)
    return parser.parse_args(args)


if __name__ == "__main__":
    asked = arguments()  # before torch is loaded

import torch
import torch.nn.functional as F

import bench


class Waits(bench.Arm):
    """A training step after which the CPU waits for the device."""

    def step(self):
        super().step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def losses(s, a):
    """{name: (a function, its peak memory in MB)}: the LM head and the loss of a micro-batch, and all gradients."""
    tokens = s.micro_batch * s.block_size
    dtype = getattr(torch, a.dtype)
    h = torch.randn(tokens, s.n_embd, device=a.device, dtype=dtype).requires_grad_()
    W = (0.02 * torch.randn(s.vocab_size, s.n_embd, device=a.device)).to(dtype).requires_grad_()
    y = torch.randint(0, s.vocab_size, (tokens,), device=a.device)
    loss = lambda: F.cross_entropy(F.linear(h, W).float(), y)
    found = {"linear and cross-entropy, compiled": torch.compile(loss),
             "the same, softmax in two passes": torch.compile(loss, options={"online_softmax": False})}
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
    step = bench.make_arm(a.strategy, "compiled", a)
    arms = {"as train.py has it": step, "waiting": Waits(step.model, "compiled", step.optimizers, step.batches)}
    for name, option in {"CUDA graphs": "triton.cudagraphs", "combo kernels": "combo_kernels"}.items():
        if a.device.type == "cuda":
            arms[name] = arm = bench.make_arm(a.strategy, "eager", a)
            # options, since under inductor's global setting it would reuse the code that was compiled for `step`
            arm.run = torch.compile(arm.model, dynamic=False, options={option: True})
            arm.step()
    memory = {name: arm.memory_mb() for name, arm in arms.items()}
    timed = {name: lambda arm=arm: arm.seconds(a.block) for name, arm in arms.items()}
    for name, (f, mb) in losses(bench.settings_of(a.size), a).items():
        memory[name], timed[name] = mb, lambda f=f: a.ceilings.seconds(f)
    times, rows = bench.alternate(timed, a.rounds, a.until), []
    for name in timed:
        base = next(iter(arms if name in arms else (n for n in timed if n not in arms)))
        rows.append({"what": name, "ms": f"{1e3 * statistics.median(times[name]):.2f}",
                     "time": bench.over(times[name], times[base]), "memory_mb": f"{memory[name]:.0f}"})
    bench.report(f"step_{bench.size_name(a.size)}_{a.strategy}", rows, a, [
        f"{a.strategy}, compiled, {a.dtype}, {len(times[next(iter(times))])} rounds. time: over the step's as train.py "
        f"has it, and over the compiled loss's, with its 95% interval."])


if __name__ == "__main__":
    bench.run(main, asked)
