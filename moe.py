"""
A mixture of experts in place of a block's FFN: router, dispatch, balance. It is given the FFN that it stacks.

Imports norms.py. Shapes: B batch, T tokens; E experts, of which each of N = B·T tokens goes through K.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from norms import ScaleVector


def can_group(x, *widths):
    """
    Whether grouped_linear can be used: bf16 on a GPU, if rows `widths` wide begin at multiples of 16 bytes.

    On a CPU grouped_mm exists in some versions of torch and is not faster.
    """
    has = hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")
    return has and x.is_cuda and x.dtype == torch.bfloat16 and not any(n % 8 for n in widths)


def grouped_linear(x, weight, ends):
    """
    Row i of x times the transpose of its expert's matrix, as one grouped GEMM: (M, K) and (E, N, K) give (M, N).

    ends: (E,) int32, where each expert's rows end; rows are sorted by expert, and ends[-1] must be M: rows after it
    would stay uninitialised. An expert may have no rows; the gradient of its weight is then zeros.
    """
    grouped_mm = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    return grouped_mm(x, weight.transpose(-2, -1), offs=ends)


def looped_linear(x, weight, sizes):
    """grouped_linear as one GEMM per expert. sizes: a list of the experts' numbers of rows."""
    # unbind: the gradient of each weight[e] would be as large as all of weight
    return torch.cat([F.linear(x_e, w_e) for x_e, w_e in zip(x.split(sizes), weight.unbind())])


class _Permute(torch.autograd.Function):
    # x[there] for a permutation whose inverse is known, so that the gradient is a gather too. Autograd's own is a
    # scatter-add, which a GPU does in no fixed order.

    @staticmethod
    def forward(ctx, x, there, back):
        ctx.save_for_backward(there, back)
        return x[there]

    @staticmethod
    def backward(ctx, dy):
        there, back = ctx.saved_tensors
        return _Permute.apply(dy, back, there), None, None


class Route:
    """
    Which rows go to which expert: every token K times, sorted by expert, then by token.

    chosen: (N, K) int64, each token's experts. load: (E,) int64, each expert's number of rows. grouped: one grouped
    GEMM for all experts, or a loop over them, for which the CPU has to wait for load.
    """

    def __init__(self, chosen, load, grouped):
        self.K, self.grouped = chosen.size(1), grouped
        self.sizes, self.ends = (None, load.cumsum(0).to(torch.int32)) if grouped else (load.tolist(), None)
        self.expert, self.order = chosen.flatten().sort(stable=True)  # (N·K,) each
        self.back = torch.empty_like(self.order)
        self.back[self.order] = torch.arange(self.order.numel(), device=chosen.device)

    def dispatch(self, x):
        """(N, n_embd) to (N·K, n_embd), sorted by expert."""
        copies = x.unsqueeze(1).expand(-1, self.K, -1).reshape(-1, x.size(-1))  # the gradient's sum has a fixed order
        return _Permute.apply(copies, self.order, self.back)

    def combine(self, y, weights):
        """(N·K, n_embd) back to (N, n_embd): each token's sum over its experts, weighted by weights, (N, K)."""
        y = _Permute.apply(y, self.back, self.order).unflatten(0, (-1, self.K))
        return (y * weights.unsqueeze(-1)).sum(1).to(y.dtype)

    def linear(self, x, weight):
        return grouped_linear(x, weight, self.ends) if self.grouped else looped_linear(x, weight, self.sizes)

    def rows(self, gamma):
        """From a stack of scale vectors, (E, n), each row's own, (N·K, n); a shared one, (n,), is returned as it is."""
        if gamma.dim() == 1:
            return gamma
        if self.grouped:
            return gamma[self.expert]
        return torch.cat([g.expand(size, -1) for g, size in zip(gamma, self.sizes)])


class MoE(nn.Module):
    """
    A mixture of SwiGLU experts. Each token goes through the K with the highest scores (arXiv 1701.06538); no token is
    dropped. There may also be a shared expert, an FFN shared_dim wide that every token goes through.

    The router is a branch of the Pre-Norm, with its own γ under HG, else with the γ that all branches share. AP, DP and
    DNP do not act on it [R]: a norm over its logits would fix its temperature. It computes in fp32. Its outputs become
    the weights of the chosen experts by
        softmax      softmax over the chosen, as in Mixtral: they sum to 1. If K = 1 the weight is always 1, and only
                     the auxiliary losses train the router
        softmax_all  softmax over all experts, as in OLMoE: they sum to less than 1
        sigmoid      sigmoids divided by their sum over the chosen, as in DeepSeek-V3

    Two losses or a bias keep the load balanced. The paper names neither router nor loss [R].
    router_aux   E Σ_e f_e p_e per sequence (f: share of the sequence's choices, p: mean probability; 1 if balanced),
                 averaged over sequences (arXiv 2412.19437) and layers. Usually f and p are means over a micro-batch;
                 but then the loss, a product of two means, depends on how the batch is split into micro-batches and
                 processes. This one does not. It is stricter: it asks for balance within each sequence
    router_z     mean of logsumexp(logits)² (arXiv 2202.08906)
    router_bias  after each optimizer step, b_e moves by this towards balance: up if the expert had fewer of the step's
                 tokens than the mean, down if it had more. b is added to the scores only to choose the experts, so it
                 has no gradient (arXiv 2408.15664)
    """

    grouped = None  # True or False, in tests; else can_group says

    def __init__(self, config, router, experts, shared=None):
        """router: Branches with one branch, 'router'. experts: a stack of n_experts FFNs. shared: an FFN, or None."""
        super().__init__()
        self.config, E = config, config.n_experts
        self.router, self.experts, self.shared = router, experts, shared
        if not config.heterogeneous:  # one γ for all branches of the norm
            for ffn in (self.experts, self.shared):
                if ffn is not None:
                    ffn.gate_up.v = self.router.v
        self.register_buffer("bias", torch.zeros(E))
        # sums over the micro-batches since the last optimizer step
        self.register_buffer("load", torch.zeros(E, dtype=torch.int64), persistent=False)
        self.register_buffer("entropy", torch.zeros(()), persistent=False)
        self.loss = None

    def weights(self, dtype):
        """The folded weights of the router, the experts and the shared FFN, for forward."""
        wide = torch.promote_types(dtype, torch.float32)
        return (self.router.folded_weight(wide), self.experts.weights(dtype),
                None if self.shared is None else self.shared.weights(dtype))

    def forward(self, h, weights=None):
        # h: (B, T, n_embd), the output of N, or its input where N is idle before the experts' branches
        config, (B, T, _) = self.config, h.shape
        E, K = config.n_experts, config.experts_per_token
        x = h.flatten(0, 1)  # (N, n_embd)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        W_router, W_experts, W_shared = weights or self.weights(h.dtype)
        logits = F.linear(wide, W_router)  # (N, E)
        if self.experts.gate_up.idle_norm:  # h is not normed, and the router needs its length
            logits = logits * (wide.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt()
        scores = logits.sigmoid() if config.router == "sigmoid" else logits.softmax(-1)
        chosen = (scores.detach() + self.bias).topk(K).indices  # (N, K), the best first
        if config.router == "softmax":
            shares = logits.gather(1, chosen).softmax(-1)  # (N, K)
        else:
            shares = scores.gather(1, chosen)
            if config.router == "sigmoid":
                shares = shares / shares.sum(-1, keepdim=True)

        choices = chosen.view(B, -1)  # (B, T·K)
        counts = choices.new_zeros(B, E).scatter_add_(1, choices, torch.ones_like(choices))
        load = counts.sum(0)
        if torch.is_grad_enabled():  # not in evaluation, which the statistics leave out too
            p = scores / scores.sum(-1, keepdim=True) if config.router == "sigmoid" else scores
            f = counts.to(p.dtype) / (T * K)
            balance = E * (f * p.view(B, T, E).mean(1)).sum(-1).mean()
            self.loss = config.router_aux * balance + config.router_z * logits.logsumexp(-1).square().mean()
            self.load += load
            self.entropy += torch.special.entr(p.detach()).sum(-1).mean()

        grouped = can_group(x, config.n_embd) if self.grouped is None else self.grouped
        route = Route(chosen, load, grouped)
        y = route.combine(self.experts(route.dispatch(x), route, W_experts), shares).view_as(h)
        return y if self.shared is None else y + self.shared(h, weights=W_shared)

    def stacked(self):
        """The parameters that hold one share per expert."""
        yield from (*self.experts.gate_up.weight.values(), self.experts.down)
        for module in self.experts.modules():
            if isinstance(module, ScaleVector) and module.stack:
                yield from module.parameters()


def mixtures(model):
    """The MoE of each block, in order; none in a dense model."""
    return [module for module in model.modules() if isinstance(module, MoE)]


@torch.no_grad()
def take_router_statistics(model):
    """
    (load, entropy) of this process since the last call, and reset both to zero. load: (n_layer, E) int64, how often
    each expert was chosen. entropy: (n_layer,), the router's, in nats, a mean over tokens summed over micro-batches.
    """
    load, entropy = (torch.stack([getattr(moe, name) for moe in mixtures(model)]) for name in ("load", "entropy"))
    for moe in mixtures(model):
        moe.load.zero_()
        moe.entropy.zero_()
    return load, entropy


@torch.no_grad()
def balance_routers(model, load):
    """Move each router's bias by router_bias towards balance. load: (n_layer, E), of a step, over all processes."""
    for moe, n in zip(mixtures(model), load):
        moe.bias += moe.config.router_bias * (n.sum() - n * n.numel()).sign()  # in integers: the same everywhere


def active(model):
    """Parameter -> how many of its numbers one token uses: K/E of those stacked by expert, all of the others."""
    share = {p: moe.config for moe in mixtures(model) for p in moe.stacked()}
    return {p: p.numel() * share[p].experts_per_token // share[p].n_experts if p in share else p.numel()
            for p in model.parameters()}
