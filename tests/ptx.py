"""
The PTX that Triton makes of kernels.py for a Hopper GPU, on any machine: what would be launched is compiled instead.

    python tests/ptx.py          prints it as JSON: [[kernel, PTX], ...]

TRITON_INTERPRET must not be set, so tests run this in a process of its own.
"""

import json
import sys
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import kernels  # noqa: E402, behind the line above

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
compiled = []


def describe(arg):
    """Type of an argument, and what Triton would assume of its value: 1 is a constant, multiples of 16 are known."""
    if arg is None or (isinstance(arg, int) and arg == 1):
        return "constexpr", []
    if isinstance(arg, float):
        return "fp32", []
    value = arg.data_ptr() if isinstance(arg, torch.Tensor) else arg
    kind = TYPES[arg.dtype] if isinstance(arg, torch.Tensor) else "i32" if arg < 2 ** 31 else "i64"
    return kind, [] if value % 16 else [["tt.divisibility", 16]]


def compile_instead(kernel, grid, *args, num_warps=4, maxnreg=None, **constants):
    described = {name: describe(arg) for name, arg in zip(kernel.arg_names, args)}
    constants = {**{n: a for n, a in zip(kernel.arg_names, args) if described[n][0] == "constexpr"}, **constants}
    signature = {name: described.get(name, ("constexpr",))[0] for name in kernel.arg_names}
    attributes = {(i,): described[name][1] for i, name in enumerate(kernel.arg_names) if name in described}
    result = triton.compile(ASTSource(kernel, signature, constants, attributes), target=GPUTarget("cuda", 90, 32),
                            options={"num_warps": num_warps, "maxnreg": maxnreg})
    compiled.append([kernel.__name__, result.asm["ptx"]])


def run():
    """Every kernel once, in bf16, at widths of a model of 1B."""
    def bf16(*shape):
        return torch.randn(shape).to(torch.bfloat16).requires_grad_()
    x, residual, g = bf16(32, 1792), bf16(32, 1792), torch.ones(1792, requires_grad=True)
    sum(t.sum() for t in kernels.rms_norm(x, 1e-6, g, residual)).backward()
    g = torch.ones(4778, requires_grad=True)
    kernels.swiglu(bf16(32, 2 * 4784), 4778, 1e-6, True, g).backward(bf16(32, 4784))
    kernels.swiglu(bf16(32, 2 * 4784), 4778).backward(bf16(32, 4784))
    w, u, v = torch.zeros(4778, 1792, requires_grad=True), g, torch.ones(1792, requires_grad=True)
    kernels.scaled_cast([w], [u], [v], torch.bfloat16, 8).backward(bf16(4784, 1792))
    angles, g = torch.zeros(16, 32), torch.ones(64, requires_grad=True)
    for normed, gammas in (("", (None, None)), ("qkv", (g, g))):
        q, k, v = kernels.qk_norm_rope(bf16(2, 16, 84 * 64), angles, angles, 28, 28, 1e-6, normed, gammas, 64)
        (q + k + v).backward(bf16(2, 16, 28, 64))


if __name__ == "__main__":
    kernels._use_triton, kernels._launch = lambda x: True, compile_instead
    run()
    print(json.dumps(compiled))
