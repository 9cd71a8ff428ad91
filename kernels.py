"""
The element-wise work around the linear maps, in plain PyTorch: what a CPU runs, and what torch.compile fuses.

Each function stands alone; nothing here knows about models.
"""

import torch


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
