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
it passes Python floats, ε, as fp64, and a whole kernel may then compute in fp64 behind it.
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


WIDEST = 16384  # channels that a program holds of one row; a wider one goes to the twin


def _tile(n, per_thread):
    """
    The tile of a program that takes whole rows: (rows, columns, warps) with `per_thread` numbers for each thread.

    Columns are a power of two, which Triton asks for. Narrow rows come several at a time, so that each of 128 threads
    has two or more 16-byte loads to wait for at once; for wide ones there are more threads. Per thread it's 32 numbers
    where registers allow it, and 16 where a kernel holds several inputs and sums for each.
    """
    columns = max(16, triton.next_power_of_2(n))
    return max(1, 128 * per_thread // columns), columns, max(4, columns // (32 * per_thread))


def _programs(tiles, warps, device):
    """
    How many programs share the tiles where each sums over its rows: as many as run at once, 16 warps a processor.

    Each leaves a row of partial sums, so more of them would write more. The number depends on shape and GPU alone, and
    with it the order of the sums.
    """
    return min(tiles, _processors(device) * max(1, 16 // warps))


def _is_vector(gamma, n):
    """Whether kernels take this γ: none, or one fp32 number for each channel."""
    return gamma is None or (gamma.shape == (n,) and gamma.dtype == torch.float32)


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


@jit
def _norm(x, eps, N: tl.constexpr):
    """N(x) of each row of a tile, zeros behind channel N, and 1 / sqrt(mean(x²) + ε) of each row."""
    r = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)[:, None]
    return x * r, r


@jit
def _norm_backward(dy, y, r, N: tl.constexpr):
    """
    The gradient of x, where y = N(x) = r x: r (dy − y · mean(y ⊙ dy)). The second term takes out of dy what it has
    along y, since N(x) doesn't change with x's length.
    """
    return r * (dy - y * (tl.sum(y * dy, axis=1) / N)[:, None])


@jit
def _rms_norm_kernel(x, residual, gamma, y, total, rows, eps, X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
                     N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """
    y = γ ⊙ N(x), or total = x + residual and y = γ ⊙ N(total). γ and residual may be None.

    Bytes for a bf16 number: 2 read and 2 written; with the residual 4 and 4. Added separately, the sum would be read
    once more.
    A program holds whole rows, so that x is read once: the mean needs all of a row before any of y is known. Nothing
    is kept for the backward pass but x: r is a number a row, and cheaper to compute again than to store.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    here = (row < rows) & (column < N)
    x_ = tl.load(x + row * X_STRIDE + column, mask=here, other=0.0).to(tl.float32)
    if residual is not None:
        x_ += tl.load(residual + row * RESIDUAL_STRIDE + column, mask=here, other=0.0).to(tl.float32)
        rounded = x_.to(total.dtype.element_ty)
        tl.store(total + row * N + column, rounded, mask=here)
        x_ = rounded.to(tl.float32)  # the norm of what all others will see, the backward pass among them
    y_, _ = _norm(x_, eps, N)
    if gamma is not None:
        y_ *= tl.load(gamma + column, mask=column < N, other=0.0)
    tl.store(y + row * N + column, y_.to(y.dtype.element_ty), mask=here)


@jit
def _rms_norm_backward_kernel(dy, x, gamma, dtotal, dx, dgamma, rows, steps, eps, DY_STRIDE: tl.constexpr,
                              X_STRIDE: tl.constexpr, DTOTAL_STRIDE: tl.constexpr, N: tl.constexpr,
                              ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """
    dx of y = γ ⊙ N(x), plus dtotal, the gradient that x, the residual stream, gets from elsewhere; and for each
    program a row of dγ, the sum over its rows of dy ⊙ N(x). gamma and dtotal may be None.

    Bytes for a bf16 number: 4 read and 2 written; with dtotal 6 and 2. Autograd alone would write dx and then read it
    again to add dtotal.
    With γ, programs are few and long: of P programs, each takes every P-th tile and sums dγ in registers over all of
    its rows, so that it leaves one row and not a row for each tile. Without γ each tile has a program.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    if gamma is not None:
        gamma_ = tl.load(gamma + column, mask=column < N, other=0.0)
        dgamma_ = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for i in range(steps):
        row = (first + i * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)[:, None]
        here = (row < rows) & (column < N)
        x_ = tl.load(x + row * X_STRIDE + column, mask=here, other=0.0).to(tl.float32)
        dy_ = tl.load(dy + row * DY_STRIDE + column, mask=here, other=0.0).to(tl.float32)
        y_, r = _norm(x_, eps, N)
        if gamma is not None:
            dgamma_ += tl.where(here, dy_ * y_, 0.0)  # behind the last row, 0 · r is NaN where ε is 0
            dy_ *= gamma_
        dx_ = _norm_backward(dy_, y_, r, N)
        if dtotal is not None:
            dx_ += tl.load(dtotal + row * DTOTAL_STRIDE + column, mask=here, other=0.0).to(tl.float32)
        tl.store(dx + row * N + column, dx_.to(dx.dtype.element_ty), mask=here)
    if gamma is not None:
        partial = tl.sum(dgamma_, axis=0)[None, :]
        tl.store(dgamma + tl.program_id(0) * N + column, partial, mask=column < N)


@torch.library.custom_op("nanoscale::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, residual: Optional[Tensor], gamma: Optional[Tensor], eps: float) -> Tuple[Tensor, Tensor]:
    # An operation always returns the same number of tensors: without a residual, total has no elements.
    n = x.size(-1)
    y, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    x, gamma = _rows(x), None if gamma is None else gamma.contiguous()
    residual = None if residual is None else _rows(residual)
    tile, columns, warps = _tile(n, 32)
    _launch(_rms_norm_kernel, (triton.cdiv(x.size(0), tile),), x, residual, gamma, y, total, x.size(0), eps,
            X_STRIDE=x.stride(0), RESIDUAL_STRIDE=0 if residual is None else residual.stride(0), N=n, ROWS=tile,
            COLUMNS=columns, num_warps=warps)
    return y, total


@_rms_norm.register_fake
def _(x, residual, gamma, eps):
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


@torch.library.custom_op("nanoscale::rms_norm_backward", mutates_args=())
def _rms_norm_backward(dy: Tensor, x: Tensor, gamma: Optional[Tensor], dtotal: Optional[Tensor],
                       eps: float) -> Tuple[Tensor, Tensor]:
    n = x.size(-1)
    dx = x.new_empty(x.shape)  # never dy's own memory, which others may still read
    dy, x, dtotal = _rows(dy), _rows(x), None if dtotal is None else _rows(dtotal)
    tile, columns, warps = _tile(n, 16)
    tiles = triton.cdiv(x.size(0), tile)
    programs = tiles if gamma is None else _programs(tiles, warps, x.device)
    dgamma = None if gamma is None else gamma.new_empty(programs, n)
    _launch(_rms_norm_backward_kernel, (programs,), dy, x, None if gamma is None else gamma.contiguous(), dtotal, dx,
            dgamma, x.size(0), triton.cdiv(tiles, max(1, programs)), eps, DY_STRIDE=dy.stride(0),
            X_STRIDE=x.stride(0), DTOTAL_STRIDE=0 if dtotal is None else dtotal.stride(0), N=n, ROWS=tile,
            COLUMNS=columns, num_warps=warps)
    return dx, x.new_empty(0) if gamma is None else dgamma.sum(0)


@_rms_norm_backward.register_fake
def _(dy, x, gamma, dtotal, eps):
    return x.new_empty(x.shape), x.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)


def _rms_norm_context(ctx, inputs, output):
    x, residual, gamma, ctx.eps = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, gamma)
    ctx.set_materialize_grads(False)  # so that no one reads zeros for a sum that goes nowhere else


def _rms_norm_gradients(ctx, dy, dtotal):
    x, gamma = ctx.saved_tensors
    if dy is None:
        return dtotal, dtotal, None, None
    dx, dgamma = _rms_norm_backward(dy, x, gamma, dtotal if ctx.has_residual else None, ctx.eps)
    return dx, dx if ctx.has_residual else None, None if gamma is None else dgamma, None


_rms_norm.register_autograd(_rms_norm_gradients, setup_context=_rms_norm_context)


def rms_norm(x, eps, gamma=None, residual=None, group=None):
    """
    γ ⊙ x / sqrt(mean(x²) + ε) over the last axis (RMSNorm, arXiv 1910.07467); without gamma, N(x).

    x: (..., n) of any float dtype. eps: passed always, since F.rms_norm's default depends on the dtype.
    gamma: None or (n,), or what broadcasts against x, in fp32. The result has x's dtype and is rounded once.
    residual: None, or of x's shape. The norm is then of x + residual, and (norm, sum) is returned.
    group: the mean is taken over each `group` of channels, such as a head's, not over all n. gamma may then be
        (group,) too, which all groups share.
    """
    if group not in (None, x.size(-1)):  # each group is a row
        x, residual = (None if t is None else t.unflatten(-1, (-1, group)) for t in (x, residual))
        if gamma is not None and gamma.shape != (group,):
            gamma = gamma.unflatten(-1, (-1, group))
        y = rms_norm(x, eps, gamma, residual)
        return y.flatten(-2) if residual is None else tuple(t.flatten(-2) for t in y)
    n, alike = x.size(-1), residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if _use_triton(x) and alike and 0 < n <= WIDEST and _is_vector(gamma, n):
        y, total = _rms_norm(x, residual, gamma, eps)
    else:
        total = x if residual is None else x + residual
        y = _RMSNorm.apply(total, gamma, eps)
    return y if residual is None else (y, total)


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


@jit
def _swiglu_kernel(y, gamma_gate, gamma_up, h, rows, eps, Y_STRIDE: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                   NORMED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """
    h = silu(a) ⊙ b, where (a, b) = (gate, up), or (γ_gate ⊙ N(gate), γ_up ⊙ N(up)) where NORMED. Each γ may be None.

    Bytes for a bf16 number of h: 4 read and 2 written; the norms add none to them. One after the other, two norms,
    SiLU and product would move 18.
    A program holds whole rows of both halves where it has to know their means, otherwise a piece of the columns.
    Everything is read and written up to M, γ too, and cut at N in registers. M is a multiple of 8, so all accesses are
    16 bytes wide; a mask that ends at 4778 numbers would make them 4, and one that ends at 3413 only 2.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here, used = (row < rows) & (column < M), column < N
    a = tl.where(used, tl.load(y + row * Y_STRIDE + column, mask=here, other=0.0).to(tl.float32), 0.0)
    b = tl.where(used, tl.load(y + row * Y_STRIDE + M + column, mask=here, other=0.0).to(tl.float32), 0.0)
    if NORMED:
        a, _ = _norm(a, eps, N)
        b, _ = _norm(b, eps, N)
        if gamma_gate is not None:
            a *= tl.load(gamma_gate + column, mask=column < M, other=0.0)
        if gamma_up is not None:
            b *= tl.load(gamma_up + column, mask=column < M, other=0.0)
    h_ = tl.where(used, a / (1.0 + tl.exp(-a)) * b, 0.0)  # again, since 0 · r is NaN in a row of NaN
    tl.store(h + row * M + column, h_.to(h.dtype.element_ty), mask=here)


@jit
def _swiglu_backward_kernel(dh, y, gamma_gate, gamma_up, dy, dgamma_gate, dgamma_up, rows, steps, eps,
                            DH_STRIDE: tl.constexpr, Y_STRIDE: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                            NORMED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """
    dy, the gradients of gate and up in y's layout, and for each program a row of dγ_gate and dγ_up, from dh and y.

    Bytes for a bf16 number of h: 6 read and 4 written. Everything between y and h is computed again: to keep N(gate)
    and N(up) would cost the forward pass 4 more, and memory.
    With a γ, programs are few and long as in _rms_norm_backward_kernel. With three inputs and two sums for each
    column, registers are scarce. So γ is loaded again for each row, from the L1 cache, where it stays; and the launch
    asks for at most 128 registers a thread, of which a processor's 65,536 are enough for the 16 warps that _programs
    counts on. Left alone, the compiler takes 170, and a quarter of the programs would wait until the others end.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if gamma_gate is not None:
        dgamma_gate_ = tl.zeros((ROWS, COLUMNS), tl.float32)
    if gamma_up is not None:
        dgamma_up_ = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for i in range(steps):
        row = (first + i * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)[:, None]
        here, used = (row < rows) & (column < M), (row < rows) & (column < N)
        a = tl.where(used, tl.load(y + row * Y_STRIDE + column, mask=here, other=0.0).to(tl.float32), 0.0)
        b = tl.where(used, tl.load(y + row * Y_STRIDE + M + column, mask=here, other=0.0).to(tl.float32), 0.0)
        dh_ = tl.where(used, tl.load(dh + row * DH_STRIDE + column, mask=here, other=0.0).to(tl.float32), 0.0)
        if NORMED:
            gate, r_gate = _norm(a, eps, N)
            up, r_up = _norm(b, eps, N)
            a, b = gate, up
            if gamma_gate is not None:
                gamma_gate_ = tl.load(gamma_gate + column, mask=column < M, other=0.0)
                a = gate * gamma_gate_
            if gamma_up is not None:
                gamma_up_ = tl.load(gamma_up + column, mask=column < M, other=0.0)
                b = up * gamma_up_
        s = 1.0 / (1.0 + tl.exp(-a))
        da = dh_ * b * s * (1.0 + a * (1.0 - s))
        db = dh_ * a * s
        if NORMED:
            if gamma_gate is not None:
                dgamma_gate_ += tl.where(used, da * gate, 0.0)
                da *= gamma_gate_
            if gamma_up is not None:
                dgamma_up_ += tl.where(used, db * up, 0.0)
                db *= gamma_up_
            da, db = _norm_backward(da, gate, r_gate, N), _norm_backward(db, up, r_up, N)
        da, db = tl.where(used, da, 0.0), tl.where(used, db, 0.0)
        tl.store(dy + row * (2 * M) + column, da.to(dy.dtype.element_ty), mask=here)
        tl.store(dy + row * (2 * M) + M + column, db.to(dy.dtype.element_ty), mask=here)
    if gamma_gate is not None:
        tl.store(dgamma_gate + tl.program_id(0) * M + column, tl.sum(dgamma_gate_, axis=0)[None, :], mask=column < M)
    if gamma_up is not None:
        tl.store(dgamma_up + tl.program_id(0) * M + column, tl.sum(dgamma_up_, axis=0)[None, :], mask=column < M)


def _filled(gamma, m):
    """γ with zeros up to m, contiguous; None stays."""
    return gamma if gamma is None else F.pad(gamma, (0, m - gamma.size(0))).contiguous()


def _swiglu_tile(m, normed):
    """(rows, columns, warps, tiles side by side): all m columns in one where the means need them, else 1024."""
    tile, columns, warps = _tile(m if normed else min(m, 1024), 16)
    return tile, columns, warps, triton.cdiv(m, columns)


@torch.library.custom_op("nanoscale::swiglu", mutates_args=())
def _swiglu(y: Tensor, n: int, eps: float, normed: bool, gamma_gate: Optional[Tensor],
            gamma_up: Optional[Tensor]) -> Tensor:
    m = y.size(-1) // 2
    h = y.new_empty(*y.shape[:-1], m)
    y = _rows(y)
    gammas = [_filled(gamma, m) for gamma in (gamma_gate, gamma_up)]
    tile, columns, warps, across = _swiglu_tile(m, normed)
    _launch(_swiglu_kernel, (triton.cdiv(y.size(0), tile), across), y, *gammas, h, y.size(0), eps,
            Y_STRIDE=y.stride(0), N=n, M=m, NORMED=normed, ROWS=tile, COLUMNS=columns, num_warps=warps)
    return h


@_swiglu.register_fake
def _(y, n, eps, normed, gamma_gate, gamma_up):
    return y.new_empty(*y.shape[:-1], y.size(-1) // 2)


@torch.library.custom_op("nanoscale::swiglu_backward", mutates_args=())
def _swiglu_backward(dh: Tensor, y: Tensor, n: int, eps: float, normed: bool, gamma_gate: Optional[Tensor],
                     gamma_up: Optional[Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
    m = y.size(-1) // 2
    dy = y.new_empty(y.shape)
    dh, y = _rows(dh), _rows(y)
    gammas = [_filled(gamma, m) for gamma in (gamma_gate, gamma_up)]
    tile, columns, warps, across = _swiglu_tile(m, normed)
    tiles = programs = triton.cdiv(y.size(0), tile)
    if gamma_gate is not None or gamma_up is not None:
        programs = _programs(tiles, warps, y.device)
    dgammas = [None if gamma is None else gamma.new_empty(programs, m) for gamma in gammas]
    _launch(_swiglu_backward_kernel, (programs, across), dh, y, *gammas, dy, *dgammas, y.size(0),
            triton.cdiv(tiles, max(1, programs)), eps, DH_STRIDE=dh.stride(0), Y_STRIDE=y.stride(0), N=n, M=m,
            NORMED=normed, ROWS=tile, COLUMNS=columns, num_warps=warps, maxnreg=128 if warps <= 16 else None)
    return dy, *(y.new_empty(0) if dgamma is None else dgamma[:, :n].sum(0) for dgamma in dgammas)


@_swiglu_backward.register_fake
def _(dh, y, n, eps, normed, gamma_gate, gamma_up):
    dgammas = (y.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape) for gamma in (gamma_gate, gamma_up))
    return y.new_empty(y.shape), *dgammas


def _swiglu_context(ctx, inputs, output):
    y, ctx.n, ctx.eps, ctx.normed, gamma_gate, gamma_up = inputs
    ctx.save_for_backward(y, gamma_gate, gamma_up)


def _swiglu_gradients(ctx, dh):
    y, *gammas = ctx.saved_tensors
    dy, *dgammas = _swiglu_backward(dh, y, ctx.n, ctx.eps, ctx.normed, *gammas)
    return dy, None, None, None, *(None if g is None else dg for g, dg in zip(gammas, dgammas))


_swiglu.register_autograd(_swiglu_gradients, setup_context=_swiglu_context)


def swiglu(y, n, eps=0.0, normed=False, gammas=(None, None)):
    """
    silu(gate) ⊙ up (SwiGLU, arXiv 2002.05202), each with a norm and its γ before where `normed`, as DNP has it.

    y: (..., 2 m), a GEMM's rows: gate in the first n of m ≥ n channels, up in the first n of the other m. gammas: of
    gate and up, None, (n,) or a row for each row of y, in fp32. Returns (..., m), with zeros behind the first n.
    """
    m = y.size(-1) // 2
    gammas = gammas if normed else (None, None)
    if _use_triton(y) and 0 < m and (m <= WIDEST or not normed) and all(_is_vector(gamma, n) for gamma in gammas):
        return _swiglu(y, n, eps, normed, *gammas)
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
