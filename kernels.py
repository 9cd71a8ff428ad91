"""
The work between the GEMMs: in plain PyTorch, for a CPU and for torch.compile, and as Triton kernels for a GPU.

    rms_norm       the norm, with its γ and with the residual added before it
    scaled_cast    fp32 weights and their scale vectors to one low-precision matrix for a GEMM
    qk_norm_rope   what stands between the q, k, v GEMM and attention
    swiglu         what stands between the gate, up GEMM and down

Each function stands alone and picks one of its two ways itself; nothing here knows about models.

All of these move bytes and hardly compute, so a kernel is as good as the share of the memory's bandwidth that it
reaches with every input read once and every output written once. Four rules hold for each:
- Loads are turned to fp32 at once, results are rounded once, when they are stored.
- A row is an int64: an activation of a large batch has more than 2³¹ elements.
- No atomics. What is summed over rows, such as dγ, is summed by each program over rows of its own, always the same
  ones, and these partial sums then in a fixed order. So a run repeats bit for bit.
- Widths and strides are constants of the compiled kernel: knowing them, Triton sees which rows begin at multiples of
  16 bytes and reads 16 bytes at a time. A model has few.

The operations are opaque to torch.compile (torch.library.custom_op). triton_op would let inductor see the kernels, but
it passes Python floats, ε, as fp64, and then a GPU computes in fp64 where it is 32 times slower.
"""

import os
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # as on a Mac: the kernels are not compiled and the twins do all the work
    triton, tl = None, SimpleNamespace(constexpr=None)
    jit = lambda kernel: kernel

# Triton can run its kernels in Python, which is how a machine without a GPU tests them. It reads this as @jit runs.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
_backend = "auto"


@contextmanager
def backend(name):
    """Which way all functions here go inside `with backend(name):`, for tests and bench.py: auto, torch or triton."""
    global _backend
    if name not in ("auto", "torch", "triton"):
        raise ValueError(f"no backend {name!r}; there are: auto, torch, triton")
    if name == "triton" and triton is None:
        raise RuntimeError("backend 'triton': Triton is not installed")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def _use_triton(x):
    """Whether x goes to a kernel: on a GPU, in fp32, bf16 or fp16. fp64 is for checks, and always goes to the twin."""
    if _backend == "torch" or triton is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if _backend == "triton" and not x.is_cuda and not INTERPRETED:
        raise RuntimeError("backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 set before kernels is imported")
    return x.is_cuda or _backend == "triton"


def _launch(kernel, grid, *args, **constants):
    """Run a kernel on the GPU that its first argument is on. An empty grid, which CUDA refuses, does nothing."""
    if all(grid):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **constants)


def _rows(x):
    """
    x as (rows, n), n contiguous. The rows may lie apart, as those of a slice of a wider buffer do: kernels take the
    distance, x.stride(0). Only what cannot be seen so is copied.
    """
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(-1) == 1 else x.contiguous()


@cache
def _processors(device):
    """The GPU's number of streaming multiprocessors; in the interpreter 2, so that each program has much to do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _statistics_dtype(x):
    """Sums over a row are taken in fp32 at least: bf16 has 8 bits, and a mean over 2048 squares needs more."""
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    # Written out because autograd's own backward of these operations makes a pass over the rows for each, and keeps
    # three copies of them; this one keeps x. On 2 CPU cores that is most of the norm's cost.

    @staticmethod
    def forward(ctx, x, gamma, eps):
        ctx.save_for_backward(x, gamma)
        ctx.eps = eps
        x_ = x.to(_statistics_dtype(x))
        r = torch.linalg.vector_norm(x_, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        y = x_ * r
        return (y if gamma is None else y.mul_(gamma)).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        # y = r x with r = (mean(x²) + ε)^(-1/2), so dx = r (dy − y · mean(y ⊙ dy)), with γ ⊙ dy for dy. Every step is
        # differentiable from x and γ, so that second derivatives (a Hessian's top eigenvalue, say) come out right too.
        x, gamma = ctx.saved_tensors
        x_, dy_ = x.to(_statistics_dtype(x)), dy.to(_statistics_dtype(x))
        r = (x_.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        dgamma = None
        if gamma is not None:
            dgamma = (dy_ * x_ * r).sum_to_size(gamma.shape).to(gamma.dtype)
            dy_ = dy_ * gamma
        c = (x_ * dy_).mean(-1, keepdim=True) * r.square()
        return (r * (dy_ - c * x_)).to(x.dtype), dgamma, None


def rms_norm(x, eps, gamma=None, residual=None, group=None):
    """
    γ ⊙ x / sqrt(mean(x²) + ε) over the last axis (RMSNorm, arXiv 1910.07467); without gamma, N(x).

    x: (..., n) of any float dtype. eps: passed always, since F.rms_norm's default depends on the dtype.
    gamma: None or (n,), or what broadcasts against x, in fp32. The result has x's dtype and is rounded once.
    residual: None, or of x's shape. The norm is then of x + residual, and (norm, sum) is returned.
    group: the mean is taken over each `group` of channels, such as a head's, not over all n. gamma may then be
        (group,) too, which all groups share.
    """
    if residual is not None:
        x = x + residual
        return rms_norm(x, eps, gamma, group=group), x
    if group in (None, x.size(-1)):
        return _RMSNorm.apply(x, gamma, eps)
    gamma = None if gamma is None else gamma.unflatten(-1, (-1, group))
    return _RMSNorm.apply(x.unflatten(-1, (-1, group)), gamma, eps).flatten(-2)


def scaled_cast(weights, us, vs, dtype, align=1, align_columns=1):
    """
    dtype(u ⊙ W ⊙ v) of each branch, one below the other: the matrix that a GEMM reads, scale vectors included.

    weights: a list of (..., N_c, K) in fp32. us: for each, None or (..., N_c), which scales rows (outputs). vs: None
    or (..., K), which scales columns (inputs). Scaled in fp32 and rounded once: mixed precision casts every weight for
    every step anyway, and the vectors ride along in that pass.
    align: every branch begins at a row that is a multiple of it, with rows of zeros before. align_columns: K is filled
        up to a multiple with zeros. GEMMs want rows that begin at multiples of 16 bytes, and the pass is the place to
        give them that for nothing.
    Returns (..., sum of N_c filled up, K filled up); the weight itself where there is nothing to do.
    """
    parts = []
    for weight, u, v in zip(weights, us, vs):
        fill = -weight.size(-1) % align_columns, -weight.size(-2) % align
        if v is not None:
            weight = weight * v.unsqueeze(-2)
        if u is not None:
            weight = weight * u.unsqueeze(-1)
        weight = weight.to(dtype)
        parts.append(F.pad(weight, (0, fill[0], 0, fill[1])) if any(fill) else weight)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def apply_rope(x, cos, sin):
    """Turn each pair of channels of x, (B, T, n_head, d_head), by its position's angle; cos, sin: (T, d_head/2)."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)  # (T, 1, d_head/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def qk_norm_rope(y, cos, sin, n_head, n_kv_head, eps=0.0, normed="", gammas=(None, None, None), group=None):
    """
    q, k and v for attention, from a GEMM's rows that hold all three: a norm with its γ, then RoPE on q and k.

    y: (B, T, (n_head + 2 n_kv_head) d_head), q beside k beside v. cos, sin: (T, d_head/2).
    normed: which of 'q', 'k', 'v' get a norm, as one word. gammas: for each, None, (d_head,) or one number for every
    channel, in fp32. group: channels that a norm's mean is over; None is the whole width of q, k or v.
    Returns q (B, T, n_head, d_head), k and v (B, T, n_kv_head, d_head).
    """
    d = 2 * cos.size(-1)
    heads = []
    for name, x, gamma in zip("qkv", y.split([n_head * d, n_kv_head * d, n_kv_head * d], dim=-1), gammas):
        if name in normed:
            x = rms_norm(x, eps, gamma, group=group)
        x = x.unflatten(-1, (-1, d))
        heads.append(x if name == "v" else apply_rope(x, cos, sin))
    return tuple(heads)


def swiglu(y, n, eps=0.0, normed=False, gammas=(None, None)):
    """
    silu(gate) ⊙ up (SwiGLU, arXiv 2002.05202), each with a norm and its γ before where `normed`, as DNP has it.

    y: (..., 2 m), a GEMM's rows: gate in the first n of m ≥ n channels, up in the first n of the other m. gammas: of
    gate and up, None, (n,) or a row for each row of y, in fp32. Returns (..., m), with zeros behind the first n.
    """
    m = y.size(-1) // 2
    gate, _, up, _ = y.split([n, m - n, n, m - n], dim=-1)
    if normed:
        gate, up = rms_norm(gate, eps, gammas[0]), rms_norm(up, eps, gammas[1])
    h = F.silu(gate) * up
    return F.pad(h, (0, m - n)) if m > n else h


def can_group(x, *widths):
    """
    Whether grouped_linear is for these experts: bf16 on a GPU, where rows `widths` wide begin at multiples of 16 bytes.

    A CPU has grouped_mm too, in torch 2.13 in fp32, bf16 and fp16, but not in every version, and no faster.
    """
    has = hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")
    return has and x.is_cuda and x.dtype == torch.bfloat16 and not any(n % 8 for n in widths)


def grouped_linear(x, weight, ends):
    """
    Row i of x times the transpose of its expert's matrix, as one grouped GEMM: (M, K) and (E, N, K) make (M, N).

    ends: (E,) int32, where each expert's rows end; they lie in the experts' order, and ends[-1] is M: rows behind it
    would stay uninitialised. An expert may have no rows; its weight's gradient is then zeros, and not missing.
    """
    grouped_mm = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def looped_linear(x, weight, sizes):
    """grouped_linear's twin, a GEMM for each expert. sizes: a list of their numbers of rows."""
    # unbind, since the gradient of weight[e] would be as large as all of weight, for each e
    return torch.cat([F.linear(x_e, w_e) for x_e, w_e in zip(x.split(sizes), weight.unbind())])
