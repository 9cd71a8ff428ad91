"""
Scale vectors: the γ of RMSNorm, in every form, place and role.

After arXiv 2605.26895. A *branch* is a linear map fed by a Pre-Norm. With N(x) = x / sqrt(mean(x²) + ε):

    baseline             W_c (γ ⊙ N(x))             one γ for all branches of the norm
    HG  heterogeneous    W_c (v_c ⊙ N(x))           a γ for each
    DP  dual             u_c ⊙ W_c (v_c ⊙ N(x))     one on the output side too
    DNP dual_norm        u_c ⊙ N(W_c (v_c ⊙ N(x)))  with a norm before it
    norm                 N(W_c (v_c ⊙ N(x)))        the norm without the vector: a control of ours

HG is about who shares v, the others are about what stands behind W, so the two combine.

All but DNP's u are one view: W_c ↦ diag(u_c) W_c diag(v_c). So they need no work on activations. They are folded
into the weight in the pass that casts it to the compute dtype, and all branches run as one GEMM on N(x).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import rms_norm, scaled_cast

FORMS = ("direct", "or", "er", "product", "zero_centred")
PLACEMENTS = ("input", "dual", "dual_norm", "norm")


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
        or            γ = β √n α/‖α‖     "original space": gradient flow moves the magnitude n times faster
        er            γ = exp(β) √n α/‖α‖  "exponential space"
        Of `or` and `er` the paper's split into magnitude and direction is known to us; these formulas are our
        reconstruction.
    """

    def __init__(self, n, role, form="direct", stack=0):
        super().__init__()
        if role not in ("input", "output") or form not in FORMS:
            raise ValueError(f"no scale vector has role {role!r} and form {form!r}; forms: {', '.join(FORMS)}")
        self.n, self.role, self.form, self.stack = n, role, form, stack
        shape = (stack, n) if stack else (n,)
        if form == "direct":
            self.gamma = nn.Parameter(torch.empty(shape))
        elif form == "zero_centred":
            self.w = nn.Parameter(torch.empty(shape))
        else:
            self.beta = nn.Parameter(torch.empty((stack, 1) if stack else ()))
            self.alpha = nn.Parameter(torch.empty(shape))
        self.reset()

    @torch.no_grad()
    def reset(self):
        for name, p in self.named_parameters():
            p.fill_(0.0 if name == "w" or (name == "beta" and self.form == "er") else 1.0)

    @torch.no_grad()
    def set(self, gamma):
        """Make γ what is given, of γ's shape; α of or and er then has the length of a fresh one, √n. Raises ValueError."""
        if self.form == "direct":
            self.gamma.copy_(gamma)
        elif self.form == "zero_centred":
            self.w.copy_(gamma.double() - 1.0)
        elif self.form == "product":
            self.beta.fill_(1.0)
            self.alpha.copy_(gamma)
        else:
            size = gamma.double().square().mean(-1, keepdim=True).sqrt()  # (1,) or (stack, 1)
            if not (size > 0).all():
                raise ValueError(f"{self.form} cannot represent a γ of zeros: its α has no direction")
            self.beta.copy_((size.log() if self.form == "er" else size).view_as(self.beta))
            self.alpha.copy_(gamma.double() / size)

    def decays(self, name):
        """Whether weight decay on this parameter moves γ: shrinking α leaves √n α/‖α‖ as it was."""
        return not (name == "alpha" and self.form in ("or", "er"))

    def forward(self):
        if self.form == "direct":
            return self.gamma
        if self.form == "zero_centred":
            return 1.0 + self.w
        if self.form == "product":
            return self.beta * self.alpha
        magnitude = self.beta if self.form == "or" else self.beta.exp()
        return magnitude * math.sqrt(self.n) * self.alpha / torch.linalg.vector_norm(self.alpha, dim=-1, keepdim=True)

    def extra_repr(self):
        return f"{self.n}, role={self.role}, form={self.form}" + (f", stack={self.stack}" if self.stack else "")


class Branches(nn.Module):
    """
    The linear maps behind one Pre-Norm, with their scale vectors. Takes N(x), returns a tuple of outputs.

    n_in: width of N(x). n_out: name -> width of each branch, in order.
    placement: 'input', 'dual', 'dual_norm' or 'norm' (this file's head). heterogeneous: v_c for each branch, else
    one v for all. form: of every scale vector. scale_vectors: False fixes all of them to 1. role: of v.
    group: channels that dual_norm's and norm's N covers, such as a head's; by default the branch's whole width.
    align: every branch's outputs begin at a multiple of it in the one GEMM's rows, with zeros before: bf16 GEMMs lose
    much of their speed where rows do not begin at multiples of 16 bytes.
    stack: 0, or a number of experts. Each branch is then a stack of matrices, (stack, n_out, n_in), with a u_c for each
    expert; v_c is shared by the experts, or stacked too where heterogeneous and own_v are set.

    Each branch keeps a weight of its own, (n_out, n_in), since initialisation and Muon act on matrices.
    `folded` says which of two equal ways computes the outputs. True scales the weights and is how it runs; False
    scales the activations, as the paper writes it, and is there to be compared with.
    """

    folded = True
    kept = None  # gemm_weight's result, while someone promises that no parameter changes (GPT.weights_kept)

    def __init__(self, n_in, n_out, placement="input", heterogeneous=False, form="direct", scale_vectors=True,
                 role="input", group=None, eps=1e-6, align=1, stack=0, own_v=False):
        super().__init__()
        if placement not in PLACEMENTS:
            raise ValueError(f"no placement {placement!r}; there are: {', '.join(PLACEMENTS)}")
        self.n_out, self.placement, self.group, self.eps, self.align = dict(n_out), placement, group, eps, align
        self.normed = placement in ("dual_norm", "norm")
        lead = (stack,) if stack else ()
        self.weight = nn.ParameterDict({c: nn.Parameter(torch.empty(*lead, n, n_in)) for c, n in n_out.items()})
        self.u, self.v = nn.ModuleDict(), nn.ModuleDict()
        if scale_vectors:
            for c in n_out if heterogeneous else ("shared",):
                self.v[c] = ScaleVector(n_in, role, form, stack if heterogeneous and own_v else 0)
        if scale_vectors and placement in ("dual", "dual_norm"):
            for c, n in n_out.items():
                self.u[c] = ScaleVector(n, "output", form, stack)

    def vectors(self):
        """The effective (u_c, v_c) of each branch, None where there is none."""
        shared = self.v["shared"]() if "shared" in self.v else None
        for c in self.n_out:
            u = self.u[c]() if c in self.u else None
            v = self.v[c]() if c in self.v else shared
            yield c, u, v

    def gemm_weight(self, dtype):
        """All branches' weights with their scale vectors in them, one below the other, (..., sum of n_out, n_in)."""
        _, us, vs = zip(*self.vectors())
        if self.placement != "dual":
            us = [None] * len(us)
        return scaled_cast([self.weight[c] for c in self.n_out], us, vs, dtype, self.align)

    def linear(self, h, route=None):
        """All that comes before DNP's norm, the branches beside each other: (..., sum of n_out, aligned)."""
        linear = F.linear if route is None else route.linear
        if self.folded:
            return linear(h, self.gemm_weight(h.dtype) if self.kept is None else self.kept)
        y = []
        for c, u, v in self.vectors():
            y_c = linear(h if v is None else (h * self.rows(v, route)).to(h.dtype), self.weight[c].to(h.dtype))
            if self.placement == "dual" and u is not None:
                y_c = (y_c * self.rows(u, route)).to(h.dtype)
            y.append(F.pad(y_c, (0, -y_c.size(-1) % self.align)))
        return torch.cat(y, dim=-1)

    def gammas(self, route=None):
        """What DNP scales by behind its norm, for each branch, or None."""
        return [self.rows(self.u[c](), route) if c in self.u and self.normed else None for c in self.n_out]

    @staticmethod
    def rows(gamma, route):
        return gamma if route is None else route.rows(gamma)

    def forward(self, h, route=None):
        """
        h: (..., n_in), the output of N. route: for a stack, who knows which expert each row of h is for. It has
        linear(h, weight), which takes a weight (stack, n, n_in), and rows(γ), each row's own of (stack, n).

        A model that has a kernel for what follows takes linear and gammas instead, and norms there.
        """
        filled = [n + -n % self.align for n in self.n_out.values()]
        y = [y_c[..., :n] for y_c, n in zip(self.linear(h, route).split(filled, dim=-1), self.n_out.values())]
        if self.normed:
            y = [rms_norm(y_c, self.eps, gamma, group=self.group) for y_c, gamma in zip(y, self.gammas(route))]
        return tuple(y)
