"""
Scale vectors: the γ of RMSNorm, in every form, place and role.

After arXiv 2605.26895. A *branch* is a linear map fed by a Pre-Norm: q, k, v, gate, up.
With N(x) = x / sqrt(mean(x²) + ε):

    input      baseline  W_c (γ ⊙ N(x))             one γ for all branches of the norm
               HG        W_c (v_c ⊙ N(x))           heterogeneous: a γ for each
    dual       DP        u_c ⊙ W_c (v_c ⊙ N(x))     one on the output side too
    dual_norm  DNP       u_c ⊙ N(W_c (v_c ⊙ N(x)))  after a norm
    norm                 N(W_c (v_c ⊙ N(x)))        the norm without the vector: a control of ours

HG is about who shares v, the others are about what comes after W, so the two combine. `Branches.forward` is this table
as code, on activations. The methods after it, *the fold*, are how a model runs: the same function, at a lower price.

Knows kernels.py alone. Both files can be lifted into another model.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import rms_norm, scaled_cast

# What the parameters of each form begin at, which makes every γ 1. β is one number for the whole vector.
START = {"direct": {"gamma": 1.0}, "zero_centred": {"w": 0.0}, "product": {"beta": 1.0, "alpha": 1.0},
         "or": {"beta": 1.0, "alpha": 1.0}, "er": {"beta": 0.0, "alpha": 0.0}}


class ScaleVector(nn.Module):
    """
    A scale vector γ, 1 everywhere at initialisation. Calling it returns γ, (n,) in the parameters' dtype.

    stack: 0, or the number of experts that have a vector each: γ is then (stack, n), and every row is a vector of its
        own, with its own direction α and magnitude β.
    role: 'input' when what it scales goes straight into linear maps, 'output' otherwise. The optimizer reads it:
        decay helps the first and hurts the second (paper, section on weight decay).
    form: how γ is parameterised. α ∈ Rⁿ and β is a scalar.
        direct        γ
        zero_centred  γ = 1 + w, as Gemma's: decay pulls γ to 1, not to 0
        product       γ = β α
        or            γ = β N(α) = β √n α/‖α‖   "original space": gradient flow moves the magnitude n times faster
        er            γ = exp(β) exp(α − mean α)  "exponential space": positive, and decay of β and α pulls γ to 1
    """

    def __init__(self, n, role, form="direct", stack=0):
        super().__init__()
        if role not in ("input", "output") or form not in START:
            raise ValueError(f"no scale vector has role {role!r} and form {form!r}; forms: {', '.join(START)}")
        self.n, self.role, self.form, self.stack = n, role, form, stack
        for name in START[form]:
            shape = (1 if name == "beta" else n,)
            shape = (stack, *shape) if stack else () if name == "beta" else shape
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.reset()

    @torch.no_grad()
    def reset(self):
        for name, value in START[self.form].items():
            getattr(self, name).fill_(value)

    @torch.no_grad()
    def set(self, gamma):
        """Make γ what is given, of γ's shape; α of or then has the length of a fresh one, √n. Raises ValueError."""
        if self.form == "direct":
            self.gamma.copy_(gamma)
        elif self.form == "zero_centred":
            self.w.copy_(gamma.double() - 1.0)
        elif self.form == "product":
            self.beta.fill_(1.0)
            self.alpha.copy_(gamma)
        elif self.form == "or":
            size = gamma.double().square().mean(-1, keepdim=True).sqrt()  # (1,) or (stack, 1)
            if not (size > 0).all():
                raise ValueError("or cannot represent a γ of zeros: its α has no direction")
            self.beta.copy_(size.view_as(self.beta))
            self.alpha.copy_(gamma.double() / size)
        elif self.form == "er":
            if not (gamma > 0).all():
                raise ValueError("er cannot represent a γ that is not positive")
            log = gamma.double().log()
            self.beta.copy_(log.mean(-1, keepdim=True).view_as(self.beta))
            self.alpha.copy_(log - log.mean(-1, keepdim=True))
        else:
            raise ValueError(f"{self.form} has no way yet to be given a γ: add one to ScaleVector.set")

    def decays(self, name):
        """Whether weight decay on this parameter moves γ: shrinking or's α leaves √n α/‖α‖ as it was."""
        return not (name == "alpha" and self.form == "or")

    def forward(self):
        if self.form == "direct":
            return self.gamma
        if self.form == "zero_centred":
            return 1.0 + self.w
        if self.form == "product":
            return self.beta * self.alpha
        if self.form == "or":
            length = torch.linalg.vector_norm(self.alpha, dim=-1, keepdim=True)
            return self.beta * math.sqrt(self.n) * self.alpha / length
        return (self.beta + self.alpha - self.alpha.mean(-1, keepdim=True)).exp()

    def extra_repr(self):
        return f"{self.n}, role={self.role}, form={self.form}" + (f", stack={self.stack}" if self.stack else "")


class Branches(nn.Module):
    """
    The linear maps after one Pre-Norm, with their scale vectors. Takes N(x), returns a tuple of outputs.

    n_in: width of N(x). n_out: name -> width of each branch, in order.
    placement: 'input', 'dual', 'dual_norm' or 'norm' (this file's head), or a dict with one for each branch.
    heterogeneous: v_c for each branch, else one v for all. form: of every scale vector. scale_vectors: False fixes all
    of them to 1. role: of v.
    group: channels that the N of dual_norm and norm covers, such as a head's; by default the branch's whole width.
    stack: 0, or a number of experts. Each branch is then a stack of matrices, (stack, n_out, n_in), with a u_c for each
    expert; v_c is shared by the experts, or stacked too where heterogeneous and own_v are set.

    Each branch keeps a weight of its own, (n_out, n_in), since initialisation and Muon act on matrices.
    """

    def __init__(self, n_in, n_out, placement="input", heterogeneous=False, form="direct", scale_vectors=True,
                 role="input", group=None, eps=1e-6, stack=0, own_v=False):
        super().__init__()
        self.n_out, self.group, self.eps = dict(n_out), group, eps
        self.placement = dict(placement) if isinstance(placement, dict) else dict.fromkeys(n_out, placement)
        if unknown := set(self.placement.values()) - {"input", "dual", "dual_norm", "norm"}:
            raise ValueError(f"no placement {unknown.pop()!r}; there are: input, dual, dual_norm, norm")
        self.normed = [c for c, p in self.placement.items() if p in ("dual_norm", "norm")]
        lead = (stack,) if stack else ()
        self.weight = nn.ParameterDict({c: nn.Parameter(torch.empty(*lead, n, n_in)) for c, n in n_out.items()})
        self.u, self.v = nn.ModuleDict(), nn.ModuleDict()
        if scale_vectors:
            for c in n_out if heterogeneous else ("shared",):
                self.v[c] = ScaleVector(n_in, role, form, stack if heterogeneous and own_v else 0)
            for c, n in n_out.items():
                if self.placement[c] in ("dual", "dual_norm"):
                    self.u[c] = ScaleVector(n, "output", form, stack)

    def vectors(self):
        """(c, u_c, v_c) of each branch: its name and its effective vectors, None where there is none."""
        shared = self.v["shared"]() if "shared" in self.v else None
        for c in self.n_out:
            yield c, self.u[c]() if c in self.u else None, self.v[c]() if c in self.v else shared

    def forward(self, h, route=None):
        """
        h: (..., n_in), which is N(x). Returns a tuple, each branch's (..., n_out) in h's dtype.

        route: for a stack, who knows which expert each row of h is for. It has linear(h, weight), which takes a weight
        (stack, n, n_in), and rows(γ), each row's own of (stack, n).
        """
        linear, rows = (F.linear, lambda gamma: gamma) if route is None else (route.linear, route.rows)
        outputs = []
        for c, u, v in self.vectors():
            y = h if v is None else (rows(v) * h).to(h.dtype)
            y = linear(y, self.weight[c].to(h.dtype))
            if c in self.normed:
                y = rms_norm(y, self.eps, group=self.group)
            outputs.append(y if u is None else (rows(u) * y).to(h.dtype))
        return tuple(outputs)

    # The fold. u ⊙ W (v ⊙ h) is (diag(u) W diag(v)) h: a rank-one factor on the weight, which mixed precision casts for
    # every step anyway. So all v and DP's u ride along in that pass, in fp32 and rounded once, and all branches are one
    # GEMM on h. What is left for activations is DNP's norm and, after it, u.

    def folded_weight(self, dtype, align=1):
        """
        W_c diag(v_c), with DP diag(u_c) W_c diag(v_c), of all branches one below the other: (..., sum of n_out, n_in).

        align: every branch begins at a row that is a multiple of it, with rows of zeros before: bf16 GEMMs lose much of
        their speed where rows do not begin at multiples of 16 bytes.
        """
        names, us, vs = zip(*self.vectors())
        us = [None if c in self.normed else u for c, u in zip(names, us)]
        return scaled_cast([self.weight[c] for c in names], us, vs, dtype, align)

    def after_norm(self, c):
        """DNP's u_c, which stands after a norm, where no row of W_c can take it; else None."""
        return self.u[c]() if c in self.normed and c in self.u else None

    @property
    def idle_norm(self):
        """
        Whether the Pre-Norm is idle: N does not see the length of its input, so that N(W (v ⊙ N(x))) = N(W (v ⊙ x)).
        A model then leaves it out and gives the branches x itself.

        ε is where the two differ: to be the same, the branches' ε would have to be ε / r² for each token, r = 1/rms(x).
        We leave it as it is. So ε acts on W (v ⊙ x), at the size that the residual stream has; results/idle_norm has
        what that changes.
        """
        return len(self.normed) == len(self.n_out)
