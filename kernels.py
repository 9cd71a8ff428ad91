"""
The element-wise work around the linear maps, in plain PyTorch: what a CPU runs, and what torch.compile fuses.

Each function stands alone; nothing here knows about models.
"""

import torch
import torch.nn.functional as F


def _statistics_dtype(x):
    """Sums over a row are taken in fp32 at least: bf16 has 8 bits, and a mean over 2048 squares needs more."""
    return torch.promote_types(x.dtype, torch.float32)


class _RMSNorm(torch.autograd.Function):
    # Written out because autograd's own backward of these four operations makes eight passes over the rows and
    # keeps three copies of them; this one makes four and keeps x. On 2 CPU cores that is most of the norm's cost.

    @staticmethod
    def forward(ctx, x, eps):
        ctx.save_for_backward(x)
        ctx.eps = eps
        x_ = x.to(_statistics_dtype(x))
        r = torch.linalg.vector_norm(x_, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        return (x_ * r).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        # y = r x with r = (mean(x²) + ε)^(-1/2), so dx = r (dy − y · mean(y ⊙ dy)). Every step is differentiable
        # from x, so that second derivatives (a Hessian's top eigenvalue, say) come out right too.
        (x,) = ctx.saved_tensors
        x_, dy_ = x.to(_statistics_dtype(x)), dy.to(_statistics_dtype(x))
        r = (x_.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        c = (x_ * dy_).mean(-1, keepdim=True) * r.square()
        return (r * (dy_ - c * x_)).to(x.dtype), None


def rms_norm(x, eps, gamma=None):
    """
    γ ⊙ x / sqrt(mean(x²) + ε) over the last axis (RMSNorm, arXiv 1910.07467); without gamma, N(x).

    x: (..., n) of any float dtype. eps: passed always, since F.rms_norm's default depends on the dtype.
    gamma: None, or anything that broadcasts against x, in fp32. The result has x's dtype and is rounded once.
    """
    if gamma is None:
        return _RMSNorm.apply(x, eps)
    return (_RMSNorm.apply(x.to(_statistics_dtype(x)), eps) * gamma).to(x.dtype)


def scaled_cast(weight, u, v, dtype):
    """
    dtype(u ⊙ W ⊙ v): the weight that a GEMM reads, with its scale vectors in it.

    weight: (..., N, K) in fp32. u: None or (..., N), scales rows (outputs). v: None or (..., K), scales columns
    (inputs). Scaled in fp32 and rounded once: mixed precision casts every weight for every step anyway, and the
    vectors ride along in that pass.
    """
    if v is not None:
        weight = weight * v.unsqueeze(-2)
    if u is not None:
        weight = weight * u.unsqueeze(-1)
    return weight.to(dtype)


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
