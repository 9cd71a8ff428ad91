"""
Scale vectors: the γ of RMSNorm, in every form, place and role.

After arXiv 2605.26895. A *branch* is a linear map fed by a Pre-Norm: q, k, v, gate, up and, by itself, the LM head.
With N(x) = x / sqrt(mean(x²)):

    input      baseline  W_c (γ ⊙ N(x))             one γ shared by all branches of the norm
               HG        W_c (v_c ⊙ N(x))           heterogeneous: each branch has its own
    after      AP        u_c ⊙ (W_c N(x))           after-placement: on the output side only
    dual       DP        u_c ⊙ (W_c (v_c ⊙ N(x)))   on both sides
    dual_norm  DNP       u_c ⊙ N(W_c (v_c ⊙ N(x)))  on both sides, with a norm in between
    norm                 N(W_c (v_c ⊙ N(x)))        DNP without u: a control of ours

HG decides who shares v, placement decides what comes after W, so the two combine. `Branches.forward` is this table as
code, on activations. The methods after it, *the fold*, are how a model runs: the same function at a lower cost.

Imports only kernels.py. Both files can be lifted into another model.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels import rms_norm, scaled_cast

PLACEMENTS = ("input", "after", "dual", "dual_norm", "norm")
# What the parameters of each form begin at, which makes every γ 1. β is one number for the whole vector.
START = {"direct": {"gamma": 1.0}, "zero_centred": {"w": 0.0}, "product": {"beta": 1.0, "alpha": 1.0},
         "or": {"beta": 1.0, "alpha": 1.0}, "er": {"beta": 0.0, "alpha": 0.0}}


class ScaleVector(nn.Module):
    """
    A scale vector γ, 1 everywhere at initialisation. Calling it returns γ, (n,) in the parameters' dtype.

    stack: 0, or the number of experts that have a vector each: γ is then (stack, n), and every row is a vector with its
        own direction α and magnitude β.
    role: 'input' if what it scales goes straight into linear maps, 'output' otherwise. The optimizer reads it: the
        paper decays the first and not the second (IWD).
    form: how γ is parameterised. α ∈ Rⁿ and β is a scalar.
        direct        γ
        zero_centred  γ = 1 + w, as Gemma's: decay pulls γ to 1, not to 0
        product       γ = β α
        or            γ = β N(α) = β √n α/‖α‖   "original space": gradient flow moves the magnitude n times faster
        er            γ = exp(β) exp(α − mean α)  "exponential space": positive, and decay of β and α pulls γ to 1
    magnitude: False fixes β, for a γ whose length does nothing, since a norm follows. β's gradient would be rounding
        noise, which AdamW makes whole steps of: with decay β comes to 0, and where it changes sign, so does the branch.
    """

    def __init__(self, n, role, form="direct", stack=0, magnitude=True):
        super().__init__()
        if role not in ("input", "output") or form not in START:
            raise ValueError(f"no scale vector has role {role!r} and form {form!r}; forms: {', '.join(START)}")
        self.n, self.role, self.form, self.stack, self.magnitude = n, role, form, stack, magnitude
        for name in START[form]:
            shape = (1 if name == "beta" else n,)
            shape = (stack, *shape) if stack else () if name == "beta" else shape
            part, fixed = torch.empty(shape), name == "beta" and not magnitude
            setattr(self, name, nn.Buffer(part, persistent=False) if fixed else nn.Parameter(part))
        self.reset()

    @torch.no_grad()
    def reset(self):
        for name, value in START[self.form].items():
            getattr(self, name).fill_(value)

    @torch.no_grad()
    def set(self, gamma):
        """Make γ what is given, or its direction if β is fixed; or's α gets the length √n. Raises ValueError."""
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
        if not self.magnitude and "beta" in START[self.form]:
            self.beta.fill_(START[self.form]["beta"])

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
    placement: one of PLACEMENTS (the table at the top of this file), or a dict with one per branch.
    heterogeneous: a v_c per branch; otherwise all branches share one v. form: of every scale vector. scale_vectors:
    False fixes all of them to 1. role: of v.
    group: channels that the N of dual_norm and norm covers, such as those of a head; by default the whole branch.
    idle: branches whose length a norm further on removes, as QK-norm does; the magnitudes of their vectors are fixed.
    eps: of the same N. The paper has none. It only guards against 0/0, and is far below the Pre-Norm's 1e-6 because
    this N may see the residual stream at its own size (idle_norm).
    stack: 0, or a number of experts. Each branch is then a stack of matrices, (stack, n_out, n_in), with one u_c per
    expert; v_c is shared by the experts, or stacked too where heterogeneous and own_v are set.

    Each branch keeps its own weight, (n_out, n_in), since initialisation and Muon act on matrices.
    """

    def __init__(self, n_in, n_out, placement="input", heterogeneous=False, form="direct", scale_vectors=True,
                 role="input", group=None, eps=1e-16, stack=0, own_v=False, idle=()):
        super().__init__()
        self.n_in, self.n_out, self.group, self.eps = n_in, dict(n_out), group, eps
        self.placement = dict(placement) if isinstance(placement, dict) else dict.fromkeys(n_out, placement)
        if unknown := set(self.placement.values()) - set(PLACEMENTS):
            raise ValueError(f"no placement {unknown.pop()!r}; there are: {', '.join(PLACEMENTS)}")
        self.normed = [c for c, p in self.placement.items() if p in ("dual_norm", "norm")]
        lead = (stack,) if stack else ()
        self.weight = nn.ParameterDict({c: nn.Parameter(torch.empty(*lead, n, n_in)) for c, n in n_out.items()})
        self.u, self.v = nn.ModuleDict(), nn.ModuleDict()
        if scale_vectors:
            scaled = [c for c in n_out if self.placement[c] != "after"]  # the branches with a v
            for c in scaled if heterogeneous else ["shared"] if scaled else []:
                fed = {c} if heterogeneous else {*scaled}
                self.v[c] = ScaleVector(n_in, role, form, stack if heterogeneous and own_v else 0,
                                        magnitude=not fed <= {*self.normed, *idle})
            for c, n in n_out.items():
                if self.placement[c] in ("after", "dual", "dual_norm"):
                    self.u[c] = ScaleVector(n, "output", form, stack, magnitude=c not in idle)

    def vectors(self):
        """(c, u_c, v_c) of each branch: its name and its effective vectors, None where there is none."""
        shared = self.v["shared"]() if "shared" in self.v else None
        for c, placement in self.placement.items():
            v = None if placement == "after" else self.v[c]() if c in self.v else shared
            yield c, self.u[c]() if c in self.u else None, v

    def forward(self, h, route=None):
        """
        h: (..., n_in), which is N(x). Returns a tuple, each branch's (..., n_out) in h's dtype.

        route: for a stack, maps each row of h to its expert: linear(h, weight) takes a weight (stack, n, n_in), and
        rows(γ) gives each row its own of (stack, n).
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

    # The fold. u ⊙ W (v ⊙ h) is (diag(u) W diag(v)) h. Mixed precision casts each fp32 weight at every step anyway, so
    # v and u are multiplied in during that pass, in fp32 and rounded once, and all branches are one GEMM on h. What is
    # left for activations is DNP's norm and the u after it.

    def folded_weight(self, dtype, align=1):
        """
        diag(u_c) W_c diag(v_c) of all branches, stacked by rows: (..., sum of n_out, n_in). Without u_c under DNP.

        align: every branch begins at a row that is a multiple of it, with rows of zeros before: bf16 GEMMs lose much of
        their speed where rows do not begin at multiples of 16 bytes.
        """
        names, us, vs = zip(*self.vectors())
        us = [None if c in self.normed else u for c, u in zip(names, us)]
        return scaled_cast([self.weight[c] for c in names], us, vs, dtype, align)

    def after_norm(self, c):
        """DNP's u_c, which stands after a norm, where no row of W_c can take it; else None."""
        return self.u[c]() if c in self.normed and c in self.u else None

    def gram_fold(self, dtype):
        """
        (W', V, G) of a single branch under DNP, for which u ⊙ N(W (v ⊙ h)) = W' unit(h, V, G, ε).

        With V = W diag(v), ‖V h‖² is hᵀ (VᵀV) h. So the norm is one number per token, known before the GEMM, and u
        folds into W' = diag(u) V, (n_out, n_in), too: no pass over the branch's outputs. G = (n_in / n_out) VᵀV,
        (n_in, n_in) in fp32 at least, has entries of the order of 1, which fp16 can hold. It costs n_in/n_out of the
        branch's FLOPs, so it pays where a branch is much wider than its input, as an LM head is (`gram_pays`). Our
        derivation.
        """
        ((c, u, v),) = self.vectors()
        V = scaled_cast([self.weight[c]], [None], [v], dtype)
        with torch.no_grad():  # the gradient goes through V: see _Unit
            # In pieces, each rounded once: a bf16 product over 50,304 rows may round its partial sums to bf16
            # (split-K). Of multiples of 8 rows, or a GPU takes a slow GEMM.
            pieces = max(1, math.gcd(len(V), 256) // 8) if dtype.itemsize < 4 else 1
            G = V.view(pieces, -1, V.size(1))
            G = (G.mT @ G).to(torch.promote_types(dtype, torch.float32)).sum(0) * (V.size(1) / len(V))
        return scaled_cast([self.weight[c]], [u], [v], dtype), V, G

    @property
    def gram_pays(self):
        """Whether gram_fold is for these branches: only one, under DNP or norm, and 8 times as wide as its input."""
        return len(self.n_out) == 1 and self.idle_norm and sum(self.n_out.values()) >= 8 * self.n_in

    @property
    def idle_norm(self):
        """
        Whether the Pre-Norm is idle: N does not see the length of its input, so that N(W (v ⊙ N(x))) = N(W (v ⊙ x)).
        A model then leaves it out and gives the branches x itself. So v's magnitude is idle, too, and fixed.
        """
        return len(self.normed) == len(self.n_out)


class _Unit(torch.autograd.Function):
    # Written out, since autograd would not know that G is symmetric and made of V twice: three matrix products more.

    @staticmethod
    def forward(ctx, h, V, G, eps):
        wide = torch.promote_types(h.dtype, torch.float32)
        Gh, h_ = F.linear(h, G.to(h.dtype)), h.to(wide)
        r = ((Gh * h_).mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(h, V, Gh, r)
        return (h_ * r).to(h.dtype).view(h.shape)  # a view, as in kernels.py's _RMSNorm

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        # y = r h with r = (‖V h‖² / N + ε)^(-1/2). With c = r³ (dy · h) / n and Vᵀ V h / N = G h / n, dh = r dy − c G h
        # and dV = −(n/N) V Σ c h hᵀ, summed over tokens.
        h, V, Gh, r = ctx.saved_tensors
        n, dy, h_ = h.size(-1), dy.to(r.dtype), h.to(r.dtype)
        c = (dy * h_).mean(-1, keepdim=True) * r**3
        S = (c * h_).to(h.dtype).flatten(0, -2).mT @ h.flatten(0, -2)
        return (r * dy - c * Gh).to(h.dtype), V @ (S.to(r.dtype) * (-n / len(V))).to(V.dtype), None, None


def unit(h, V, G, eps):
    """h / sqrt(hᵀGh / n + ε) in h's dtype, (..., n): what W' of `Branches.gram_fold` maps to u ⊙ N(W (v ⊙ h))."""
    return _Unit.apply(h, V, G, eps)
