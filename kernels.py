"""
The work between the GEMMs: in plain PyTorch, for a CPU and for torch.compile, and as Triton kernels for a GPU.

    rms_norm       the norm, with its γ and with the residual added before it
    scaled_cast    fp32 weights and their scale vectors to one low-precision matrix for a GEMM
    qk_norm_rope   what stands between the q, k, v GEMM and attention
    swiglu         what stands between the gate, up GEMM and down

Each function works by itself and picks one of its two ways; nothing here knows about models. scaled_cast has only the
plain way, because torch.compile's kernel for it was the fastest (results/bench/kernels_llama_0.12b.md).

All of these move bytes and compute little, so a kernel is judged by the share of the memory bandwidth that it reaches
while reading every input once and writing every output once. Four rules hold for each:
- Loads are converted to fp32 at once; results are rounded once, when they are stored.
- Row numbers are int64: an activation of a large batch has more than 2³¹ elements.
- No atomics. For sums over rows, such as dγ, each program sums a fixed set of rows, and the partial sums are added in
  a fixed order. So kernels repeat bit for bit (what torch.compile makes of the token table's gradient may not).
- Widths and strides are compile-time constants: Triton then knows which rows begin at multiples of 16 bytes and reads
  16 bytes at a time. A model has only a few of them.

The operations are opaque to torch.compile (torch.library.custom_op). triton_op would let inductor see the kernels, but
it passes Python floats such as ε as fp64, and a whole kernel may then compute in fp64.

Imports none of the other files.
"""

import os
from contextlib import contextmanager
from functools import cache
from itertools import repeat
from types import SimpleNamespace
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:  # as on a Mac: the plain twins do all the work
    triton, tl = None, SimpleNamespace(constexpr=None)
    jit = lambda kernel: kernel

# Triton can interpret its kernels in Python; this is how they are tested without a GPU. @jit reads the variable.
INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
ROCM = torch.version.hip is not None  # AMD's GPUs, which torch calls cuda too
_backend = "auto"


@contextmanager
def backend(name):
    """
    Choose the way of all functions here inside `with backend(name)`: 'auto' is Triton on a GPU, 'torch' the plain twins
    everywhere, and 'triton', for tests and bench.py, Triton even without a GPU. A backward pass follows its forward.
    """
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


def _use_triton(x, left_to_compile=False):
    """
    Whether x goes to a Triton kernel: on a GPU, in fp32, bf16 or fp16. fp64 is for checks and always takes the twin.

    left_to_compile: what torch.compile makes of the twin is at least as fast (results/bench), so it gets the twin.
    """
    if left_to_compile and _backend == "auto" and torch.compiler.is_compiling():
        return False
    if _backend == "torch" or triton is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if _backend == "triton" and not x.is_cuda and not INTERPRETED:
        raise RuntimeError("backend 'triton' needs CUDA tensors, or TRITON_INTERPRET=1 set before kernels is imported")
    return x.is_cuda or _backend == "triton"


class KernelError(RuntimeError):
    """A kernel does not compile or launch on this machine. One line: which kernel, why, and how to run without it."""


def _launch(kernel, grid, *args, **constants):
    """Run a kernel on the GPU of its first argument. An empty grid, which CUDA refuses, does nothing."""
    if not all(grid):
        return
    try:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **constants)
    except Exception as e:  # Triton has no common class for what its passes, an assembler, gcc and a driver raise
        why = (str(getattr(e, "error_message", None) or e).strip() or "no message").splitlines()[0]
        raise KernelError(f"{kernel.__name__} failed, {type(e).__name__}: {why[:200]}; "
                          f"--kernels=torch goes on without Triton's kernels") from e


def _rows(x):
    """
    x as (rows, n), n contiguous. Rows may be apart in memory, as in a slice of a wider buffer: kernels take the stride.
    It is copied only if no such view exists.
    """
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(-1) == 1 else x.contiguous()


WIDEST = 16384  # channels of a row that one program can hold; a wider row takes the twin


def _tile(n, per_thread):
    """
    The tile of a program that takes whole rows: (rows, columns, warps), with `per_thread` numbers per thread.

    Columns are a power of two, as Triton requires. Narrow rows are taken several at a time, so that each of 128 threads
    has two or more 16-byte loads in flight; wide rows get more threads. It is 32 numbers per thread where registers
    allow it, and 16 where a kernel holds several inputs and sums. A program has at most 1024 threads: 32 warps, or 16
    on AMD, where a warp may have 64 threads.
    """
    columns = max(16, triton.next_power_of_2(n))
    warps = min(max(4, columns // (32 * per_thread)), 16 if ROCM else 32)
    return max(1, 128 * per_thread // columns), columns, warps


# Constants where others than the kernels' rules took 3% less time or better, on an H200 (results/bench/tune.md, made by
# results/tune.py), by part and width.
TUNED = {"rms_norm backward 768": {"rows": 1, "warps": 1}, "rms_norm backward 1536": {"warps": 2},
         "rms_norm backward γ 768": {"programs": 8, "evict": "evict_first"},
         "rms_norm backward γ 1024": {"rows": 4, "programs": 8},
         "rms_norm backward γ 1536": {"warps": 8, "stages": 3, "programs": 8, "evict": "evict_first"},
         "rms_norm backward γ 1792": {"warps": 8, "stages": 3, "programs": 8, "evict": "evict_first"},
         "rms_norm backward γ 2048": {"rows": 4, "warps": 8, "programs": 2, "evict": "evict_first"}}


def _constants(part, n, warps, **rule):
    """
    A kernel's constants at width n: those of its rule, or what TUNED has. stages: tiles that are on their way at the
    same time. programs: per processor, where each sums over its rows; by rule as many as make 16 warps. Each leaves a
    row of partial sums, so more would write more.
    """
    tuned = TUNED.get(f"{part} {n}", {})
    use = {**rule, "warps": warps, "stages": 1, **tuned}
    return SimpleNamespace(**{"programs": max(1, 16 // use["warps"]), **use})


def _programs(tiles, use, device):
    """How many programs share the tiles: with it, the order of the sums depends only on the shape and the GPU."""
    return min(tiles, _processors(device) * use.programs)


def _registers(use):
    """
    A launch's limit on registers, so that a processor's 65,536 suffice for all programs that _programs counts on.
    Without it the compiler may take more, and some programs would wait until others end. AMD's Triton has no such
    option.
    """
    return {} if ROCM or use.warps > 16 else {"maxnreg": 65536 // (32 * use.warps * use.programs)}


def _is_vector(gamma, n):
    """Whether kernels take this γ: None, or one fp32 number per channel."""
    return gamma is None or (gamma.shape == (n,) and gamma.dtype == torch.float32)


@cache
def _processors(device):
    """The GPU's number of streaming multiprocessors; 2 in the interpreter, so that each program has several tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _statistics_dtype(x):
    """Sums over a row are taken in fp32 at least: bf16 has 8 bits, and a mean over 2048 squares needs more."""
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    # Written out because autograd's own backward makes one pass over the rows per operation and keeps three copies of
    # them; this one keeps only x. On 2 CPU cores that is most of the norm's cost.

    @staticmethod
    def forward(ctx, x, gamma, eps):
        ctx.save_for_backward(x, gamma)
        ctx.eps = eps
        x_ = x.to(_statistics_dtype(x))
        r = torch.linalg.vector_norm(x_, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        y = x_ * r
        if gamma is not None:
            y.mul_(gamma)
        # a view, since torch 2.11 compiles a wrong gradient where the result is what an operation in place, or a cast
        # to the dtype that it has already, returned
        return y.to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        # y = r x with r = (mean(x²) + ε)^(-1/2), so dx = r (dy − y · mean(y ⊙ dy)), with γ ⊙ dy for dy. Every step is
        # differentiable from x and γ, so that second derivatives (a Hessian's top eigenvalue, say) come out right too.
        x, gamma = ctx.saved_tensors
        x_, dy_ = x.to(_statistics_dtype(x)), dy.to(_statistics_dtype(x))
        r = (x_.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        xdy, dgamma = x_ * dy_, None
        if gamma is not None:
            dgamma = (xdy * r).sum_to_size(gamma.shape).to(gamma.dtype)
            xdy, dy_ = xdy * gamma, dy_ * gamma
        dx = torch.addcmul(dy_, xdy.mean(-1, keepdim=True) * r.square(), x_, value=-1) * r
        return dx.to(x.dtype), dgamma, None


@jit
def _norm(x, eps, N: tl.constexpr):
    """N(x) of each row of a tile, zeros after channel N, and 1 / sqrt(mean(x²) + ε) of each row."""
    r = tl.rsqrt(tl.sum(x * x, axis=1) / N + eps)[:, None]
    return x * r, r


@jit
def _norm_backward(dy, y, r, N: tl.constexpr):
    """
    The gradient of x, where y = N(x) = r x: r (dy − y · mean(y ⊙ dy)). The second term removes the component of dy
    along y, since N(x) does not change with x's length.
    """
    return r * (dy - y * (tl.sum(y * dy, axis=1) / N)[:, None])


@jit
def _rms_norm_kernel(x, residual, gamma, y, total, rows, eps, X_STRIDE: tl.constexpr, RESIDUAL_STRIDE: tl.constexpr,
                     N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVICT: tl.constexpr):
    """
    y = γ ⊙ N(x), or total = x + residual and y = γ ⊙ N(total). γ and residual may be None.

    Bytes per bf16 number: 2 read and 2 written; with the residual 4 and 4. A separate addition would read the sum once
    more.
    A program holds whole rows, so that x is read once: the mean needs all of a row before any of y is known. Only x is
    kept for the backward pass: r is one number per row, and cheaper to compute again than to store.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < N)
    x_ = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if residual is not None:
        x_ += tl.load(residual + row * RESIDUAL_STRIDE + column, mask=inside, other=0.0,
                      eviction_policy=EVICT).to(tl.float32)
        rounded = x_.to(total.dtype.element_ty)
        tl.store(total + row * N + column, rounded, mask=inside)
        x_ = rounded.to(tl.float32)  # the norm of the rounded sum, which the backward pass sees too
    y_, _ = _norm(x_, eps, N)
    if gamma is not None:
        y_ *= tl.load(gamma + column, mask=column < N, other=0.0)
    tl.store(y + row * N + column, y_.to(y.dtype.element_ty), mask=inside)


@jit
def _rms_norm_backward_kernel(dy, x, gamma, dtotal, dx, dgamma, rows, steps, eps, DY_STRIDE: tl.constexpr,
                              X_STRIDE: tl.constexpr, DTOTAL_STRIDE: tl.constexpr, N: tl.constexpr,
                              ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVICT: tl.constexpr,
                              STAGES: tl.constexpr):
    """
    dx of y = γ ⊙ N(x), plus dtotal, the gradient that x, the residual stream, gets from elsewhere; and per program one
    row of dγ, the sum over its rows of dy ⊙ N(x). gamma and dtotal may be None.

    Bytes per bf16 number: 4 read and 2 written; with dtotal 6 and 2. Autograd by itself would write dx and then read it
    again to add dtotal.
    With γ, programs are few and long: each of P programs takes every P-th tile and sums dγ in registers over all of its
    rows, so that it leaves one row, not one per tile. Without γ there is one program per tile.
    """
    column = tl.arange(0, COLUMNS)[None, :]
    if gamma is not None:
        gamma_ = tl.load(gamma + column, mask=column < N, other=0.0)
        dgamma_ = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for i in tl.range(steps, num_stages=STAGES):
        row = (first + i * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (column < N)
        x_ = tl.load(x + row * X_STRIDE + column, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
        dy_ = tl.load(dy + row * DY_STRIDE + column, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
        y_, r = _norm(x_, eps, N)
        if gamma is not None:
            dgamma_ += tl.where(inside, dy_ * y_, 0.0)  # after the last row, 0 · r is NaN where ε is 0
            dy_ *= gamma_
        dx_ = _norm_backward(dy_, y_, r, N)
        if dtotal is not None:
            dx_ += tl.load(dtotal + row * DTOTAL_STRIDE + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * N + column, dx_.to(dx.dtype.element_ty), mask=inside)
    if gamma is not None:
        partial = tl.sum(dgamma_, axis=0)[None, :]
        tl.store(dgamma + tl.program_id(0) * N + column, partial, mask=column < N)


def _rms_norm_constants(part, n):
    """(columns, the constants): those of _tile, and evict, which tells the caches how to treat what is read once."""
    rows, columns, warps = _tile(n, 32 if part == "rms_norm forward" else 16)
    return columns, _constants(part, n, warps, rows=rows, evict="")


@torch.library.custom_op("nanoscale::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, residual: Optional[Tensor], gamma: Optional[Tensor], eps: float) -> Tuple[Tensor, Tensor]:
    # An operation always returns the same number of tensors: without a residual, total has no elements.
    n = x.size(-1)
    y, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    x, gamma = _rows(x), None if gamma is None else gamma.contiguous()
    residual = None if residual is None else _rows(residual)
    columns, use = _rms_norm_constants("rms_norm forward", n)
    _launch(_rms_norm_kernel, (triton.cdiv(x.size(0), use.rows),), x, residual, gamma, y, total, x.size(0), eps,
            X_STRIDE=x.stride(0), RESIDUAL_STRIDE=0 if residual is None else residual.stride(0), N=n, ROWS=use.rows,
            COLUMNS=columns, EVICT=use.evict, num_warps=use.warps)
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
    columns, use = _rms_norm_constants("rms_norm backward" + " γ" * (gamma is not None), n)
    tiles = triton.cdiv(x.size(0), use.rows)
    programs = tiles if gamma is None else _programs(tiles, use, x.device)
    dgamma = None if gamma is None else gamma.new_empty(programs, n)
    _launch(_rms_norm_backward_kernel, (programs,), dy, x, None if gamma is None else gamma.contiguous(), dtotal, dx,
            dgamma, x.size(0), triton.cdiv(tiles, max(1, programs)), eps, DY_STRIDE=dy.stride(0),
            X_STRIDE=x.stride(0), DTOTAL_STRIDE=0 if dtotal is None else dtotal.stride(0), N=n, ROWS=use.rows,
            COLUMNS=columns, EVICT=use.evict, STAGES=use.stages, num_warps=use.warps)
    return dx, x.new_empty(0) if gamma is None else dgamma.sum(0)


@_rms_norm_backward.register_fake
def _(dy, x, gamma, dtotal, eps):
    return x.new_empty(x.shape), x.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)


def _rms_norm_context(ctx, inputs, output):
    x, residual, gamma, ctx.eps = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, gamma)
    ctx.set_materialize_grads(False)  # else zeros would be read for a sum that is used nowhere else


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

    x: (..., n) of any float dtype. eps: required, since F.rms_norm's default depends on the dtype.
    gamma: None or (n,), or what broadcasts against x, in fp32. The result has x's dtype and is rounded once.
    residual: None, or of x's shape. The norm is then that of x + residual, and (norm, sum) is returned.
    group: the mean is over each `group` of channels, such as a head, instead of all n. gamma may then also be (group,),
        shared by the groups.
    """
    if group not in (None, x.size(-1)):  # each group is a row
        x, residual = (None if t is None else t.unflatten(-1, (-1, group)) for t in (x, residual))
        if gamma is not None and gamma.shape != (group,):
            gamma = gamma.unflatten(-1, (-1, group))
        y = rms_norm(x, eps, gamma, residual)
        return y.flatten(-2) if residual is None else tuple(t.flatten(-2) for t in y)
    n, alike = x.size(-1), residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
    if _use_triton(x, left_to_compile=True) and alike and 0 < n <= WIDEST and _is_vector(gamma, n):
        y, total = _rms_norm(x, residual, gamma, eps)
    else:
        total = x if residual is None else x + residual
        y = _RMSNorm.apply(total, gamma, eps)
    return y if residual is None else (y, total)


def scaled_cast(weights, us, vs, dtype, align=1, align_columns=1):
    """
    dtype(u ⊙ W ⊙ v) of each branch, stacked by rows: the matrix that a GEMM reads, scale vectors included.

    weights: a list of (..., N_c, K) in fp32. us: for each, None or (..., N_c), which scales rows (outputs). vs: None
    or (..., K), which scales columns (inputs). Scaled in fp32 and rounded once: mixed precision casts every weight at
    every step anyway, and the vectors are multiplied in during that cast.
    align: every branch begins at a row that is a multiple of it, with rows of zeros before. align_columns: K is padded
        with zeros to a multiple of it. GEMMs are faster on rows that begin at multiples of 16 bytes.
    Returns (..., sum of padded N_c, padded K); the weight itself if there is nothing to do.
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


class _RoPE(torch.autograd.Function):
    # Written out because autograd makes a pass over half of x per operation, and others to join the halves.

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        (a, b), y = x.chunk(2, dim=-1), x * torch.cat((cos, cos), dim=-1)
        y_a, y_b = y.chunk(2, dim=-1)
        y_a.addcmul_(b, sin, value=-1)
        y_b.addcmul_(a, sin)
        return y

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        return _RoPE.apply(dy, cos, -sin), None, None  # turns back


def apply_rope(x, cos, sin):
    """Turn each pair of channels of x, (B, T, n_head, d_head), by its position's angle; cos, sin: (T, d_head/2)."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)  # (T, 1, d_head/2)
    if not torch.compiler.is_compiling():
        return _RoPE.apply(x, cos, sin)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@jit
def _load_heads(x, token, head, n: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    """The two halves of some of a token's n heads, in fp32, and zeros for a head number outside 0 … n − 1."""
    channel = tl.arange(0, HALF)[None, :]
    inside = (head >= 0) & (head < n) & (channel < D // 2)
    at = x + token * (n * D) + head * D + channel
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + D // 2, mask=inside, other=0.0).to(tl.float32)
    return a, b


@jit
def _store_heads(x, token, head, a, b, n: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr):
    channel = tl.arange(0, HALF)[None, :]
    inside = (head >= 0) & (head < n) & (channel < D // 2)
    at = x + token * (n * D) + head * D + channel
    tl.store(at, a.to(x.dtype.element_ty), mask=inside)
    tl.store(at + D // 2, b.to(x.dtype.element_ty), mask=inside)


@jit
def _load_angles(cos, sin, t, D: tl.constexpr, HALF: tl.constexpr):
    channel = tl.arange(0, HALF)[None, :]
    at, inside = t * (D // 2) + channel, channel < D // 2
    cos_ = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    return cos_, tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)


@jit
def _qk_norm_rope_kernel(y, cos, sin, gamma, q, k, v, T, y_batch, eps, Y_ROW: tl.constexpr, N_Q: tl.constexpr,
                         N_KV: tl.constexpr, NORMED: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
                         HALF: tl.constexpr):
    """
    q, k and v from a token's row of heads: N(head) for the first NORMED of them, γ and RoPE for those of q and k.
    gamma, (N_Q + N_KV, D), may be None.

    Bytes per bf16 number: 2 read and 2 written. Norm, γ and RoPE one after the other would move 12. v is copied even if
    it has neither, so that y can be freed: a view would keep all three parts of y until the backward pass.
    RoPE turns channel i together with channel i + D/2, so a head is read as two halves, and no channel has its partner
    in another thread's registers. A program takes HEADS heads of one token, which share cos and sin: one head of many
    tokens would read 8 bytes of them per 4 of its own. Heads of q, k and v differ in where they are stored, and
    otherwise by a mask.
    """
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    batch, t = (tl.program_id(0) // T).to(tl.int64), tl.program_id(0) % T
    a, b = _load_heads(y + batch * y_batch + t.to(tl.int64) * Y_ROW, 0, head, N_Q + 2 * N_KV, D, HALF)
    if NORMED:
        r = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        r = tl.where(head < NORMED, r, 1.0)
        a, b = a * r, b * r
    turned = head < N_Q + N_KV
    if gamma is not None:
        gamma_a, gamma_b = _load_heads(gamma, 0, head, N_Q + N_KV, D, HALF)
        a, b = tl.where(turned, a * gamma_a, a), tl.where(turned, b * gamma_b, b)
    cos_, sin_ = _load_angles(cos, sin, t, D, HALF)
    # not cos = 1, sin = 0 for v: an infinite channel would make its partner 0 · ∞
    a, b = tl.where(turned, a * cos_ - b * sin_, a), tl.where(turned, b * cos_ + a * sin_, b)
    token = batch * T + t
    _store_heads(q, token, head, a, b, N_Q, D, HALF)
    _store_heads(k, token, head - N_Q, a, b, N_KV, D, HALF)
    _store_heads(v, token, head - N_Q - N_KV, a, b, N_KV, D, HALF)


@jit
def _qk_norm_rope_backward_kernel(dq, dk, dv, y, cos, sin, gamma, dy, dgamma, T, tokens, y_batch, eps,
                                  Y_ROW: tl.constexpr, N_Q: tl.constexpr, N_KV: tl.constexpr, NORMED: tl.constexpr,
                                  D: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, STAGES: tl.constexpr):
    """
    dy from dq, dk and dv, and per program along grid axis 0 one row of dγ, (N_Q + N_KV, D), the sum over its tokens.

    Bytes per bf16 number: 4 read and 2 written, or 2 and 2 without a norm, which does not need y. dq, dk and dv are
    read where they are: for views of one buffer autograd would join their gradients in another pass.
    RoPE's transpose turns back by the same angle. Then dn = γ ⊙ dz, and dy = r (dn − n · mean(n ⊙ dn)) for n = r y.
    With γ, programs are few and long: each of P programs takes every P-th token and keeps its heads' γ and dγ in
    registers over all of them. Without γ there is one program per token.
    """
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    turned, normed = head < N_Q + N_KV, head < NORMED
    if gamma is not None:
        gamma_a, gamma_b = _load_heads(gamma, 0, head, N_Q + N_KV, D, HALF)
        dgamma_a = tl.zeros((HEADS, HALF), tl.float32)
        dgamma_b = tl.zeros((HEADS, HALF), tl.float32)
    for i in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=STAGES):
        batch, t = (i // T).to(tl.int64), i % T
        token = batch * T + t
        q_a, q_b = _load_heads(dq, token, head, N_Q, D, HALF)
        k_a, k_b = _load_heads(dk, token, head - N_Q, N_KV, D, HALF)
        v_a, v_b = _load_heads(dv, token, head - N_Q - N_KV, N_KV, D, HALF)
        a, b = q_a + k_a + v_a, q_b + k_b + v_b  # a head is in one of them, and zeros in the others
        cos_, sin_ = _load_angles(cos, sin, t, D, HALF)
        a, b = tl.where(turned, a * cos_ + b * sin_, a), tl.where(turned, b * cos_ - a * sin_, b)
        if NORMED:
            n_a, n_b = _load_heads(y + batch * y_batch + t.to(tl.int64) * Y_ROW, 0, head, NORMED, D, HALF)
            r = tl.rsqrt((tl.sum(n_a * n_a, axis=1) + tl.sum(n_b * n_b, axis=1)) / D + eps)[:, None]
            n_a, n_b = n_a * r, n_b * r
            dn_a, dn_b = a, b
            if gamma is not None:
                dgamma_a += a * n_a
                dgamma_b += b * n_b
                dn_a, dn_b = tl.where(turned, a * gamma_a, a), tl.where(turned, b * gamma_b, b)
            c = ((tl.sum(n_a * dn_a, axis=1) + tl.sum(n_b * dn_b, axis=1)) / D)[:, None]
            a, b = tl.where(normed, r * (dn_a - c * n_a), a), tl.where(normed, r * (dn_b - c * n_b), b)
        _store_heads(dy, token, head, a, b, N_Q + 2 * N_KV, D, HALF)
    if gamma is not None:
        _store_heads(dgamma, tl.program_id(0), head, dgamma_a, dgamma_b, N_Q + N_KV, D, HALF)


def _head_tile(part, cos, n_head, n_kv_head):
    """
    (the constants of both kernels, how many programs share a token, and _constants): by rule 512 pairs of channels per
    program, on 64 threads.
    """
    heads, half = n_head + 2 * n_kv_head, triton.next_power_of_2(cos.size(-1))
    use = _constants(f"qk_norm_rope {part}", 2 * cos.size(-1), 2, heads=max(1, 512 // half))
    tile = min(use.heads, triton.next_power_of_2(heads))
    constants = dict(N_Q=n_head, N_KV=n_kv_head, D=2 * cos.size(-1), HEADS=tile, HALF=half, num_warps=use.warps)
    return constants, triton.cdiv(heads, tile), use


@torch.library.custom_op("nanoscale::qk_norm_rope", mutates_args=())
def _qk_norm_rope(y: Tensor, cos: Tensor, sin: Tensor, gamma: Optional[Tensor], n_head: int, n_kv_head: int,
                  normed: int, eps: float) -> Tuple[Tensor, Tensor, Tensor]:
    q, k, v = _empty_heads(y, cos, n_head, n_kv_head)
    y = y if y.stride(-1) == 1 else y.contiguous()
    constants, blocks, _ = _head_tile("forward", cos, n_head, n_kv_head)
    _launch(_qk_norm_rope_kernel, (y.size(0) * y.size(1), blocks), y, cos.contiguous(), sin.contiguous(), gamma, q, k,
            v, y.size(1), y.stride(0), eps, Y_ROW=y.stride(1), NORMED=normed, **constants)
    return q, k, v


@_qk_norm_rope.register_fake
def _(y, cos, sin, gamma, n_head, n_kv_head, normed, eps):
    return _empty_heads(y, cos, n_head, n_kv_head)


def _empty_heads(y, cos, n_head, n_kv_head):
    return tuple(y.new_empty((*y.shape[:2], n, 2 * cos.size(-1))) for n in (n_head, n_kv_head, n_kv_head))


@torch.library.custom_op("nanoscale::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, y: Optional[Tensor], cos: Tensor, sin: Tensor,
                           gamma: Optional[Tensor], normed: int, eps: float) -> Tuple[Tensor, Tensor]:
    (B, T, n_head, d), n_kv_head = dq.shape, dk.size(2)
    dy = dq.new_empty((B, T, (n_head + 2 * n_kv_head) * d))
    constants, blocks, use = _head_tile("backward" + " γ" * (gamma is not None), cos, n_head, n_kv_head)
    programs = B * T
    if gamma is not None:
        programs = max(1, _programs(B * T * blocks, use, dq.device) // blocks)
    dgamma = None if gamma is None else gamma.new_empty((programs, *gamma.shape), dtype=torch.float32)
    y = None if y is None else y if y.stride(-1) == 1 else y.contiguous()
    y_strides = (0, 0) if y is None else y.stride()[:2]
    _launch(_qk_norm_rope_backward_kernel, (programs, blocks), dq.contiguous(), dk.contiguous(), dv.contiguous(), y,
            cos.contiguous(), sin.contiguous(), gamma, dy, dgamma, T, B * T, y_strides[0], eps, Y_ROW=y_strides[1],
            NORMED=normed, STAGES=use.stages, **constants, **({} if gamma is None else _registers(use)))
    return dy, dq.new_empty(0) if gamma is None else dgamma.sum(0).to(gamma.dtype)


@_qk_norm_rope_backward.register_fake
def _(dq, dk, dv, y, cos, sin, gamma, normed, eps):
    dy = dq.new_empty((*dq.shape[:2], (dq.size(2) + 2 * dk.size(2)) * dq.size(3)))
    return dy, dq.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)


def _qk_norm_rope_context(ctx, inputs, output):
    y, cos, sin, gamma, _, _, ctx.normed, ctx.eps = inputs
    ctx.save_for_backward(y if ctx.normed else None, cos, sin, gamma)  # without a norm, the rotation does not need y


def _qk_norm_rope_gradients(ctx, dq, dk, dv):
    y, cos, sin, gamma = ctx.saved_tensors
    dy, dgamma = _qk_norm_rope_backward(dq, dk, dv, y, cos, sin, gamma, ctx.normed, ctx.eps)
    return dy, None, None, None if gamma is None else dgamma, None, None, None, None


_qk_norm_rope.register_autograd(_qk_norm_rope_gradients, setup_context=_qk_norm_rope_context)


def qk_norm_rope(y, cos, sin, n_head, n_kv_head, eps=0.0, normed=(), gammas=(None, None), group=None):
    """
    q, k and v for attention, from a GEMM's rows that hold all three: a norm with its γ, then RoPE on q and k.

    y: (B, T, (n_head + 2 n_kv_head) d_head), in the order q, k, v. cos, sin: (T, d_head/2).
    normed: which of 'q', 'k', 'v' get a norm. gammas: of q and k, each None, (d_head,) or one number per channel, in
    fp32; what scales v after its norm can go into the matrix after attention. group: the channels that a norm's mean is
    over; None is the whole width of q, k or v.
    Returns q (B, T, n_head, d_head), k and v (B, T, n_kv_head, d_head).
    """
    d, normed = 2 * cos.size(-1), "".join(normed)
    if _use_triton(y) and normed in ("", "qk", "qkv") and (not normed or group == d):
        # γ as one number per channel of each head. If heads share it, autograd sums its gradient over them.
        gamma = None
        if normed and any(g is not None for g in gammas):
            gamma = torch.cat([torch.ones((n, d), device=y.device) if g is None else g.reshape(-1, d).expand(n, d)
                               for n, g in zip((n_head, n_kv_head), gammas)])
        heads = n_head + n_kv_head * (len(normed) - 1) if normed else 0
        return _qk_norm_rope(y, cos, sin, gamma, n_head, n_kv_head, heads, eps)
    heads = []
    for name, x, gamma in zip("qkv", y.split([n_head * d, n_kv_head * d, n_kv_head * d], dim=-1), (*gammas, None)):
        if name in normed:
            x = rms_norm(x, eps, gamma, group=group)
        x = x.unflatten(-1, (-1, d))
        heads.append(x if name == "v" else apply_rope(x, cos, sin))
    return tuple(heads)


@jit
def _swiglu_kernel(y, gamma, h, rows, eps, Y_STRIDE: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
                   NORMED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """
    h = silu(a) ⊙ b, where (a, b) = (gate, up), or (γ ⊙ N(gate), N(up)) where NORMED. γ may be None.

    Bytes per bf16 number of h: 4 read and 2 written, with or without the norms. One after the other, two norms, SiLU
    and product would move 18.
    A program holds whole rows of both halves if it needs their means, otherwise a piece of the columns. Everything is
    read and written up to M, γ too, and masked at N in registers. M is a multiple of 8, so all accesses are 16 bytes
    wide; a mask that ends at 4778 numbers would make them 4 bytes wide, and one that ends at 3413 only 2.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside, used = (row < rows) & (column < M), column < N
    a = tl.where(used, tl.load(y + row * Y_STRIDE + column, mask=inside, other=0.0).to(tl.float32), 0.0)
    b = tl.where(used, tl.load(y + row * Y_STRIDE + M + column, mask=inside, other=0.0).to(tl.float32), 0.0)
    if NORMED:
        a, _ = _norm(a, eps, N)
        b, _ = _norm(b, eps, N)
        if gamma is not None:
            a *= tl.load(gamma + column, mask=column < M, other=0.0)
    h_ = tl.where(used, a / (1.0 + tl.exp(-a)) * b, 0.0)  # again, since 0 · r is NaN in a row of NaN
    tl.store(h + row * M + column, h_.to(h.dtype.element_ty), mask=inside)


@jit
def _swiglu_backward_kernel(dh, y, gamma, dy, dgamma, rows, steps, eps, DH_STRIDE: tl.constexpr,
                            Y_STRIDE: tl.constexpr, N: tl.constexpr, M: tl.constexpr, NORMED: tl.constexpr,
                            ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr):
    """
    dy, the gradients of gate and up in y's layout, and per program one row of dγ, from dh and y.

    Bytes per bf16 number of h: 6 read and 4 written. Everything between y and h is computed again: keeping N(gate) and
    N(up) would cost the forward pass 4 more bytes, and memory.
    With γ, programs are few and long as in _rms_norm_backward_kernel. With three inputs and one sum per column,
    registers are scarce. So γ is loaded again per row, from the L1 cache.
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    if gamma is not None:
        dgamma_ = tl.zeros((ROWS, COLUMNS), tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for i in tl.range(steps, num_stages=STAGES):
        row = (first + i * tl.num_programs(0)) * ROWS + tl.arange(0, ROWS)[:, None]
        inside, used = (row < rows) & (column < M), (row < rows) & (column < N)
        a = tl.where(used, tl.load(y + row * Y_STRIDE + column, mask=inside, other=0.0).to(tl.float32), 0.0)
        b = tl.where(used, tl.load(y + row * Y_STRIDE + M + column, mask=inside, other=0.0).to(tl.float32), 0.0)
        dh_ = tl.where(used, tl.load(dh + row * DH_STRIDE + column, mask=inside, other=0.0).to(tl.float32), 0.0)
        if NORMED:
            gate, r_gate = _norm(a, eps, N)
            b, r_up = _norm(b, eps, N)
            a = gate
            if gamma is not None:
                gamma_ = tl.load(gamma + column, mask=column < M, other=0.0)
                a = gate * gamma_
        s = 1.0 / (1.0 + tl.exp(-a))
        da = dh_ * b * s * (1.0 + a * (1.0 - s))
        db = dh_ * a * s
        if NORMED:
            if gamma is not None:
                dgamma_ += tl.where(used, da * gate, 0.0)
                da *= gamma_
            da, db = _norm_backward(da, gate, r_gate, N), _norm_backward(db, b, r_up, N)
        da, db = tl.where(used, da, 0.0), tl.where(used, db, 0.0)
        tl.store(dy + row * (2 * M) + column, da.to(dy.dtype.element_ty), mask=inside)
        tl.store(dy + row * (2 * M) + M + column, db.to(dy.dtype.element_ty), mask=inside)
    if gamma is not None:
        tl.store(dgamma + tl.program_id(0) * M + column, tl.sum(dgamma_, axis=0)[None, :], mask=column < M)


def _padded(gamma, m):
    """γ padded with zeros to m channels, contiguous; None stays None."""
    return gamma if gamma is None else F.pad(gamma, (0, m - gamma.size(0))).contiguous()


def _swiglu_tile(m, normed):
    """(rows, columns, warps, tiles per row): all m columns in one tile if the means need them, else 1024."""
    tile, columns, warps = _tile(m if normed else min(m, 1024), 16)
    return tile, columns, warps, triton.cdiv(m, columns)


@torch.library.custom_op("nanoscale::swiglu", mutates_args=())
def _swiglu(y: Tensor, n: int, eps: float, normed: bool, gamma: Optional[Tensor]) -> Tensor:
    m = y.size(-1) // 2
    h = y.new_empty(*y.shape[:-1], m)
    y = _rows(y)
    tile, columns, warps, across = _swiglu_tile(m, normed)
    _launch(_swiglu_kernel, (triton.cdiv(y.size(0), tile), across), y, _padded(gamma, m), h, y.size(0), eps,
            Y_STRIDE=y.stride(0), N=n, M=m, NORMED=normed, ROWS=tile, COLUMNS=columns, num_warps=warps)
    return h


@_swiglu.register_fake
def _(y, n, eps, normed, gamma):
    return y.new_empty(*y.shape[:-1], y.size(-1) // 2)


@torch.library.custom_op("nanoscale::swiglu_backward", mutates_args=())
def _swiglu_backward(dh: Tensor, y: Tensor, n: int, eps: float, normed: bool,
                     gamma: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    m = y.size(-1) // 2
    dy = y.new_empty(y.shape)
    dh, y = _rows(dh), _rows(y)
    tile, columns, warps, across = _swiglu_tile(m, normed)
    tiles = triton.cdiv(y.size(0), tile)
    use = _constants("swiglu backward" + " γ" * (gamma is not None), m, warps)
    programs = tiles if gamma is None else _programs(tiles, use, y.device)
    dgamma = None if gamma is None else gamma.new_empty(programs, m)
    _launch(_swiglu_backward_kernel, (programs, across), dh, y, _padded(gamma, m), dy, dgamma, y.size(0),
            triton.cdiv(tiles, max(1, programs)), eps, DH_STRIDE=dh.stride(0), Y_STRIDE=y.stride(0), N=n, M=m,
            NORMED=normed, ROWS=tile, COLUMNS=columns, STAGES=use.stages, num_warps=use.warps, **_registers(use))
    return dy, y.new_empty(0) if gamma is None else dgamma[:, :n].sum(0)


@_swiglu_backward.register_fake
def _(dh, y, n, eps, normed, gamma):
    return y.new_empty(y.shape), y.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)


def _swiglu_context(ctx, inputs, output):
    y, ctx.n, ctx.eps, ctx.normed, gamma = inputs
    ctx.save_for_backward(y, gamma)


def _swiglu_gradients(ctx, dh):
    y, gamma = ctx.saved_tensors
    dy, dgamma = _swiglu_backward(dh, y, ctx.n, ctx.eps, ctx.normed, gamma)
    return dy, None, None, None, None if gamma is None else dgamma


_swiglu.register_autograd(_swiglu_gradients, setup_context=_swiglu_context)


activation = F.silu  # of gate; any other function here, such as F.gelu, takes the plain formulas at the end of swiglu


class _NormedSwiGLU(torch.autograd.Function):
    # Written out for a CPU: autograd makes some 20 passes over memory, one per operation, and keeps five copies of
    # the rows. This runs all of them on a block of rows that stays in the cache, and keeps y and the result.
    # torch.compile gets all rows at once and makes two loops of them.

    @staticmethod
    def blocks(gamma, *tensors):
        """Views of 256 rows of each tensor, γ first: shared by all rows, or one row of γ per row."""
        size = max(1, len(tensors[0])) if torch.compiler.is_compiling() else 256
        gammas = gamma.split(size) if gamma is not None and gamma.dim() > 1 else repeat(gamma)
        return zip(gammas, *(t.split(size) for t in tensors))

    @staticmethod
    def forward(ctx, y, n, eps, gamma):
        m, wide = y.size(-1) // 2, _statistics_dtype(y)
        h, r = y.new_zeros(*y.shape[:-1], m) if m > n else y.new_empty(*y.shape[:-1], m), []
        for g, y_, h_ in _NormedSwiGLU.blocks(gamma, _rows(y), _rows(h)):
            gate, up = y_[:, :n].to(wide), y_[:, m:m + n].to(wide)
            r_gate, r_up = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(n).add_(eps).rsqrt_()
                            for x in (gate, up))
            r.append((r_gate, r_up))
            a = gate * r_gate if g is None else (gate * r_gate).mul_(g)
            h_[:, :n] = F.silu(a, inplace=True).mul_(up).mul_(r_up)
        ctx.save_for_backward(y, gamma, h, *map(torch.cat, zip(*r)))
        ctx.n = n
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        # With N = N(gate), a = γ ⊙ N and h = silu(a) ⊙ N(up): the gradients of two norms (see _RMSNorm) and of SwiGLU.
        # The mean in the gradient of up is that of dh ⊙ h, so N(up) itself is not needed.
        y, gamma, h, *r = ctx.saved_tensors
        n, m, wide = ctx.n, y.size(-1) // 2, r[0].dtype
        dy, dgammas = y.new_empty(y.shape), []
        for g, y_, dy_, h_, dh_, r_gate, r_up in _NormedSwiGLU.blocks(gamma, *map(_rows, (y, dy, h, dh)), *r):
            gate, up, h_, dh_ = (t.to(wide) for t in (y_[:, :n], y_[:, m:m + n], h_[:, :n], dh_[:, :n]))
            N = gate * r_gate
            a = N if g is None else N * g
            dup = dh_ * r_up
            da = torch.ops.aten.silu_backward(dup * up, a)
            c = (dh_ * h_).sum(-1, keepdim=True).mul_(r_up).mul_(r_up).div_(-n)
            dup.mul_(F.silu(a)).addcmul_(up, c)
            if g is not None:
                dgammas.append((da * N).sum_to_size(g.shape))
                da.mul_(g)
            c = (da * N).sum(-1, keepdim=True).div_(-n)
            zeros = da.new_zeros(len(da), m - n)
            torch.cat((da.addcmul_(N, c).mul_(r_gate), zeros, dup, zeros), -1, out=dy_)
        if gamma is None:
            return dy, None, None, None
        return dy, None, None, torch.cat(dgammas) if gamma.dim() > 1 else torch.stack(dgammas).sum(0)


def swiglu(y, n, eps=0.0, normed=False, gamma=None):
    """
    silu(gate) ⊙ up (SwiGLU, arXiv 2002.05202); if `normed`, DNP's silu(γ ⊙ N(gate)) ⊙ N(up).

    y: (..., 2 m), a GEMM's rows: gate in the first n of m ≥ n channels, up in the first n of the other m, and zeros
    after each, as scaled_cast's rows of zeros give. gamma: None, (n,) or one row per row of y, in fp32. DNP's vector of
    up is left to the next matrix. Returns (..., m), with zeros after the first n.
    """
    m, written_out = y.size(-1) // 2, activation is F.silu
    gamma = gamma if normed else None
    if written_out and _use_triton(y) and 0 < m and (m <= WIDEST or not normed) and _is_vector(gamma, n):
        return _swiglu(y, n, eps, normed, gamma)
    if not normed:
        gate, up = y.chunk(2, dim=-1)
        return activation(gate) * up
    if written_out and not y.is_cuda:
        return _NormedSwiGLU.apply(y, n, eps, gamma)
    gate, _, up, _ = y.split([n, m - n, n, m - n], dim=-1)
    h = activation(rms_norm(gate, eps, gamma)) * rms_norm(up, eps)
    return F.pad(h, (0, m - n)) if m > n else h
