"""
GPT, in two layouts of its norms, with every scale-vector variant of norms.py.

llama: Pre-Norm, RoPE, SwiGLU, no biases.
gemma: the same with Gemma's norms: a post-norm around each sublayer and QK-norm, so that scale vectors with the
    output role exist in the baseline already. Its GeGLU and embedding scaling are left out, so that the norms are
    all that differs between the two.

With n_experts the FFN of every block is a mixture of experts (MoE): the same model with another FFN.

Shapes: B batch, T tokens; n_head heads of d_head channels each for q, n_kv_head for k and v. In a MoE: E experts, K
of them chosen for each of N = B·T tokens.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import can_group, grouped_linear, looped_linear, qk_norm_rope, rms_norm, scaled_cast, swiglu
from norms import Branches, ScaleVector

ALIGN = 8  # bf16 numbers in 16 bytes


@dataclass
class GPTConfig:
    """What GPT needs to know. train.py's Settings has the same names, with a comment for each."""

    arch: str = "llama"
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 0
    d_head: int = 0
    n_embd: int = 128
    ffn_dim: int = 0
    vocab_size: int = 256
    block_size: int = 256
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    scale_vectors: bool = True
    heterogeneous: bool = False
    placement: str = "input"
    attn_placement: str = "same"
    ffn_placement: str = "same"
    qkv_norm: str = "head"
    reparam: str = "direct"
    final_norm_role: str = "input"
    n_experts: int = 0
    experts_per_token: int = 2
    n_shared_experts: int = 0
    expert_dim: int = 0
    router: str = "softmax"
    router_aux: float = 0.02
    router_z: float = 0.001
    router_bias: float = 0.0
    expert_scales: str = "shared"
    dtype: str = "float32"

    def __post_init__(self):
        if self.n_embd % self.n_head and not self.d_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        self.d_head = self.d_head or self.n_embd // self.n_head
        if self.d_head % 2:
            raise ValueError(f"RoPE turns pairs of channels: a head's {self.d_head} are odd")
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}")
        self.ffn_dim = self.ffn_dim or int(8 * self.n_embd / 3)  # SwiGLU's three matrices, as many as 4·n_embd's two
        if self.n_experts:
            if self.experts_per_token > self.n_experts:
                raise ValueError(f"experts_per_token {self.experts_per_token} is more than n_experts {self.n_experts}")
            # as many FLOPs per token as the dense FFN
            self.expert_dim = self.expert_dim or self.ffn_dim // (self.experts_per_token + self.n_shared_experts)
            if not self.expert_dim:
                raise ValueError(f"ffn_dim {self.ffn_dim} leaves no channel for an expert; set expert_dim")
        elif self.expert_dim or self.n_shared_experts:
            raise ValueError("expert_dim and n_shared_experts need n_experts")
        self.attn_placement = self.placement if self.attn_placement == "same" else self.attn_placement
        self.ffn_placement = self.placement if self.ffn_placement == "same" else self.ffn_placement

    def qkv_group(self, n):
        """Channels that the norm of q, k or v takes the mean over, where that has n."""
        return self.d_head if self.qkv_norm == "head" else n

    def branches(self, n_out, **kw):
        """The branches behind one of this model's Pre-Norms."""
        return Branches(self.n_embd, n_out, heterogeneous=self.heterogeneous, form=self.reparam,
                        scale_vectors=self.scale_vectors, eps=self.norm_eps, **kw)

    def output_scale(self, n):
        """The scale vector of a norm that feeds no linear map, or None."""
        return ScaleVector(n, "output", self.reparam) if self.scale_vectors else None


class Linear(nn.Module):
    """
    x Wᵀ without bias, W kept in fp32 and multiplied in x's dtype. stack, route: as in Branches. x is n_in wide, filled
    up with zeros to a multiple of align.
    """

    kept = None  # as in Branches

    def __init__(self, n_in, n_out, align=1, stack=0):
        super().__init__()
        self.align = align
        self.weight = nn.Parameter(torch.empty(stack, n_out, n_in) if stack else torch.empty(n_out, n_in))

    def gemm_weight(self, dtype):
        return scaled_cast([self.weight], [None], [None], dtype, align_columns=self.align)

    def forward(self, x, route=None):
        linear = F.linear if route is None else route.linear
        return linear(x, self.gemm_weight(x.dtype) if self.kept is None else self.kept)


def rope_tables(d_head, block_size, theta):
    """
    cos and sin of RoPE's angles (arXiv 2104.09864), each (block_size, d_head/2) in fp32.

    Channel i turns together with channel i + d_head/2, as in Hugging Face's Llama, at rate theta^(−2i/d_head).
    """
    rates = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float64), rates)
    return angles.cos().float(), angles.sin().float()


class KVCache:
    """One block's keys and values of the tokens so far, so that the next one costs a row and not the whole context."""

    def __init__(self, config, batch, device):
        shape = (batch, config.n_kv_head, config.block_size, config.d_head)
        self.k, self.v = (torch.empty(shape, dtype=getattr(torch, config.dtype), device=device) for _ in "kv")
        self.length = 0

    def extend(self, k, v):
        """Append k, v: (B, n_kv_head, T, d_head); returns those of all tokens so far."""
        start, self.length = self.length, self.length + k.size(2)
        self.k[:, :, start:self.length], self.v[:, :, start:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        nq, nkv = config.n_head * config.d_head, config.n_kv_head * config.d_head
        self.qkv = config.branches({"q": nq, "k": nkv, "v": nkv}, placement=config.attn_placement,
                                   group=config.d_head if config.qkv_norm == "head" else None)
        self.o = Linear(nq, config.n_embd)
        # dual_norm and norm put a norm behind q and k already
        self.qk_norm = config.arch == "gemma" and config.attn_placement in ("input", "dual")
        if self.qk_norm:
            self.q_scale = config.output_scale(config.qkv_group(nq))
            self.k_scale = config.output_scale(config.qkv_group(nkv))

    def forward(self, h, cos, sin, cache=None):
        B, T, _ = h.shape
        config = self.config
        normed, gammas = ("qkv" if self.qkv.normed else ""), self.qkv.gammas()
        if self.qk_norm:
            normed, gammas = "qk", [self.q_scale and self.q_scale(), self.k_scale and self.k_scale(), None]
        q, k, v = qk_norm_rope(self.qkv.linear(h), cos, sin, config.n_head, config.n_kv_head, config.norm_eps, normed,
                               gammas, self.qkv.group)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, d_head)
        if cache is not None:
            k, v = cache.extend(k, v)
        # a single token comes last and sees all keys; without a cache it has only itself to see
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=config.n_kv_head != config.n_head)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class FFN(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate) ⊙ up)."""

    def __init__(self, config, ffn_dim, stack=0):
        super().__init__()
        self.ffn_dim = ffn_dim
        self.gate_up = config.branches({"gate": ffn_dim, "up": ffn_dim}, placement=config.ffn_placement, align=ALIGN,
                                       stack=stack, own_v=config.expert_scales == "own")
        self.down = Linear(ffn_dim, config.n_embd, ALIGN, stack)

    def forward(self, h, route=None):
        y = self.gate_up.linear(h, route)  # (..., 2 × ffn_dim), each filled up
        y = swiglu(y, self.ffn_dim, self.gate_up.eps, self.gate_up.normed, self.gate_up.gammas(route))
        return self.down(y, route)


class _Permute(torch.autograd.Function):
    # x[there] for a permutation `there` whose inverse is known: the gradient is a gather as well. Autograd's own is a
    # scatter-add, which a GPU does in any order.

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
    Which rows go to which expert: every token K times, sorted by expert, and by token within one.

    chosen: (N, K) int64, each token's experts. load: (E,) int64, each expert's rows. grouped: one grouped GEMM for all
    experts, or a loop over them, which has to wait for load.
    """

    def __init__(self, chosen, load, grouped):
        self.K, self.grouped = chosen.size(1), grouped
        self.sizes, self.ends = (None, load.cumsum(0).to(torch.int32)) if grouped else (load.tolist(), None)
        self.expert, self.order = chosen.flatten().sort(stable=True)  # (N·K,) each
        self.back = torch.empty_like(self.order)
        self.back[self.order] = torch.arange(self.order.numel(), device=chosen.device)

    def dispatch(self, x):
        """(N, n_embd) to (N·K, n_embd), each expert's rows together."""
        copies = x.unsqueeze(1).expand(-1, self.K, -1).reshape(-1, x.size(-1))  # its gradient is a sum in fixed order
        return _Permute.apply(copies, self.order, self.back)

    def combine(self, y, weights):
        """(N·K, n_embd) back to (N, n_embd): the sum over a token's experts times weights, (N, K), in their order."""
        y = _Permute.apply(y, self.back, self.order).unflatten(0, (-1, self.K))
        return (y * weights.unsqueeze(-1)).sum(1).to(y.dtype)

    def linear(self, x, weight):
        return grouped_linear(x, weight, self.ends) if self.grouped else looped_linear(x, weight, self.sizes)

    def rows(self, gamma):
        """Each row's own of a stack of scale vectors, (E, n) to (N·K, n); one that experts share, (n,), stays."""
        if gamma.dim() == 1:
            return gamma
        if self.grouped:
            return gamma[self.expert]
        return torch.cat([g.expand(size, -1) for g, size in zip(gamma, self.sizes)])


class MoE(nn.Module):
    """
    A mixture of SwiGLU experts, of which each token goes through the K with the highest scores (arXiv 1701.06538), and
    none is dropped. Shared experts are one FFN, n_shared_experts × expert_dim wide, that every token goes through.

    The router is a branch of the Pre-Norm: with a γ of its own under HG, else with the one that all branches share. DP
    and DNP leave it alone (our reading: a norm over the logits would fix the router's temperature). It computes in
    fp32. Its outputs become the weights of the chosen experts by
        softmax      softmax over the chosen, as Mixtral: they sum to 1. With K = 1 the weight is always 1, and nothing
                     but the auxiliary losses trains the router
        softmax_all  softmax over all experts, as OLMoE: they sum to less
        sigmoid      sigmoids, divided by their sum over the chosen, as DeepSeek-V3

    Balance is kept by two losses, or by a bias.
    router_aux   E Σ_e f_e p_e for each sequence (f: share of the sequence's choices, p: mean probability; 1 when
                 balanced), averaged over sequences (arXiv 2412.19437) and layers. The usual f and p are those of a
                 micro-batch; a product of two means depends on how the batch was split, so that loss would change with
                 the micro-batch and the number of processes. This one does not. It asks for more: balance within each
                 sequence
    router_z     mean of logsumexp(logits)² (arXiv 2202.08906)
    router_bias  after each optimizer step, b_e moves by this towards balance: up where the expert had less than the
                 mean of the step's tokens, down where it had more. b is added to scores for the choice alone, so it
                 has no gradient (arXiv 2408.15664)
    """

    grouped = None  # True or False, in tests; else kernels.can_group says

    def __init__(self, config):
        super().__init__()
        self.config = config
        E = config.n_experts
        self.router = config.branches({"router": E})
        self.experts = FFN(config, config.expert_dim, stack=E)
        self.shared = FFN(config, config.n_shared_experts * config.expert_dim) if config.n_shared_experts else None
        if not config.heterogeneous:  # one γ for all branches of the norm
            for ffn in (self.experts, self.shared):
                if ffn is not None:
                    ffn.gate_up.v = self.router.v
        self.register_buffer("bias", torch.zeros(E))
        # of the micro-batches since the last optimizer step
        self.register_buffer("load", torch.zeros(E, dtype=torch.int64), persistent=False)
        self.register_buffer("entropy", torch.zeros(()), persistent=False)
        self.loss = None

    def forward(self, h):
        # h: (B, T, n_embd), the output of N
        config, (B, T, _) = self.config, h.shape
        E, K = config.n_experts, config.experts_per_token
        x = h.flatten(0, 1)  # (N, n_embd)
        (logits,) = self.router(x.to(torch.promote_types(x.dtype, torch.float32)))  # (N, E)
        scores = logits.sigmoid() if config.router == "sigmoid" else logits.softmax(-1)
        chosen = (scores.detach() + self.bias).topk(K).indices  # (N, K), the best first
        if config.router == "softmax":
            weights = logits.gather(1, chosen).softmax(-1)
        else:
            weights = scores.gather(1, chosen)
            if config.router == "sigmoid":
                weights = weights / weights.sum(-1, keepdim=True)

        choices = chosen.view(B, -1)  # (B, T·K)
        counts = choices.new_zeros(B, E).scatter_add_(1, choices, torch.ones_like(choices))
        load = counts.sum(0)
        if torch.is_grad_enabled():  # evaluation balances nothing and leaves no trace in the statistics
            p = scores / scores.sum(-1, keepdim=True) if config.router == "sigmoid" else scores
            f = counts.to(p.dtype) / (T * K)
            balance = E * (f * p.view(B, T, E).mean(1)).sum(-1).mean()
            self.loss = config.router_aux * balance + config.router_z * logits.logsumexp(-1).square().mean()
            self.load += load
            self.entropy += torch.special.entr(p.detach()).sum(-1).mean()

        grouped = can_group(x, config.n_embd) if self.grouped is None else self.grouped
        route = Route(chosen, load, grouped)
        y = route.combine(self.experts(route.dispatch(x), route), weights).view_as(h)
        return y if self.shared is None else y + self.shared(h)

    def stacked(self):
        """The parameters of which each expert has a share of its own."""
        yield from (*self.experts.gate_up.weight.values(), self.experts.down.weight)
        for module in self.experts.modules():
            if isinstance(module, ScaleVector) and module.stack:
                yield from module.parameters()


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attn = Attention(config)
        self.ffn = MoE(config) if config.n_experts else FFN(config, config.ffn_dim)
        if config.arch == "gemma":
            self.attn_post = config.output_scale(config.n_embd)
            self.ffn_post = config.output_scale(config.n_embd)

    def forward(self, x, y, cos, sin, cache=None):
        """
        x: the residual stream, (B, T, n_embd), and y: what the last sublayer adds to it, None at first. The sum is left
        to the norm behind it, which reads both anyway. Returns the next x and y.

        The Pre-Norms are N alone: their scale vectors live in the branches behind them.
        """
        eps = self.config.norm_eps
        h, x = (rms_norm(x, eps), x) if y is None else rms_norm(y, eps, residual=x)
        y = self.attn(h, cos, sin, cache)
        if self.config.arch == "gemma":
            y = rms_norm(y, eps, self.attn_post and self.attn_post())
        h, x = rms_norm(y, eps, residual=x)
        y = self.ffn(h)
        if self.config.arch == "gemma":
            y = rms_norm(y, eps, self.ffn_post and self.ffn_post())
        return x, y


class GPT(nn.Module):
    """
    A decoder-only Transformer. Parameters are fp32; activations have config.dtype; norm statistics and the loss are
    in fp32 (or in fp64, where config.dtype is). Initialised from the global RNG, in an order in which scale vectors
    draw nothing: the same seed gives the same matrices under every strategy.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # What stands before the LM head is a Pre-Norm with one branch. DP and DNP do not act here.
        self.lm_head = config.branches({"lm_head": config.vocab_size}, role=config.final_norm_role)
        if config.tie_embeddings:
            self.lm_head.weight["lm_head"] = self.wte
        cos, sin = rope_tables(config.d_head, config.block_size, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def named_roles(self):
        """
        Yield (name, parameter, role, decays) once for each parameter.

        role: 'matrix' (hidden weights: 2-D, or 3-D stacks of experts), 'embedding' (the token table and the LM head),
        'router', 'input' or 'output' (a scale vector's). A router's rows are classes, as the LM head's are: Muon, which
        makes the directions of a matrix equally strong, is not for it, AdamW is. decays: False for the directions α
        that weight decay would shrink to no effect.
        Raises RuntimeError on a parameter that it does not know.
        """
        roles = {}
        branches = {self.lm_head: "embedding", **{ffn.router: "router" for ffn in self.mixtures()}}
        for module in self.modules():
            if isinstance(module, ScaleVector):
                for name, p in module.named_parameters():
                    roles[p] = (module.role, module.decays(name))
            elif isinstance(module, Linear):
                roles[module.weight] = ("matrix", True)
            elif isinstance(module, Branches):
                for p in module.weight.values():
                    roles[p] = (branches.get(module, "matrix"), True)
        roles[self.wte] = ("embedding", True)
        for name, p in self.named_parameters():
            if p not in roles:
                raise RuntimeError(f"model.py does not know the role of parameter {name}")
            yield name, p, *roles[p]

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) for all matrices, 1 for every γ. Raises on a parameter that named_roles doesn't know."""
        for _, p, role, _ in self.named_roles():
            if role not in ("input", "output"):
                p.normal_(0.0, 0.02)
        for module in self.modules():
            if isinstance(module, ScaleVector):
                module.reset()

    def forward(self, idx, targets=None, caches=None):
        """
        idx, targets: (B, T) int64, T ≤ block_size. Returns (logits, loss): logits (B, T, vocab_size) in the compute
        dtype; the loss is the mean over all tokens in nats, fp32, or None without targets.

        caches: a KVCache for each block, where idx goes on behind what they hold: T is 1, unless they are empty.
        The logits are then the last token's alone, (B, 1, vocab_size).
        """
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit in block_size {self.config.block_size}")
        x, y = F.embedding(idx, self.wte).to(getattr(torch, self.config.dtype)), None
        for i, block in enumerate(self.blocks):
            x, y = block(x, y, self.cos[start:end], self.sin[start:end], caches[i] if caches else None)
        if caches:
            x, y = x[:, -1:], y[:, -1:]
        (logits,) = self.lm_head(rms_norm(y, self.config.norm_eps, residual=x)[0])
        if targets is None:
            return logits, None
        # Compiled, `wide` never exists: the sums read the bf16 logits. So a loss in chunks would save little.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide.view(-1, wide.size(-1)), targets.reshape(-1))
        if self.config.n_experts and torch.is_grad_enabled():
            extra = sum(ffn.loss for ffn in self.mixtures()) / self.config.n_layer
            loss = loss + (extra - extra.detach())  # a gradient and no value: losses stay comparable with a dense run's
            for ffn in self.mixtures():
                ffn.loss = None
        return logits, loss

    @contextmanager
    def weights_kept(self):
        """While this holds, no parameter may change: every linear map makes its weight once, not at each forward."""
        routers = {ffn.router for ffn in self.mixtures()}  # they compute in fp32, and cost little
        maps = [m for m in self.modules() if isinstance(m, (Linear, Branches)) and m not in routers]
        try:
            for module in maps:
                module.kept = module.gemm_weight(getattr(torch, self.config.dtype)).detach()
            yield
        finally:
            for module in maps:
                module.kept = None

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """
        Continue idx, (B, T) int64 with T ≥ 1, and yield each new column of tokens, (B, 1), as it comes.

        temperature: 0 takes the likeliest token. top_k: sample from the k likeliest only.
        The model sees the last block_size tokens at most. RoPE's positions are in the cached keys, so a full window
        cannot move on by one token: it drops its older half, is read anew from position 0, and fills up again.
        """
        window, caches = idx[:, -self.config.block_size:], None
        with self.weights_kept():
            for _ in range(max_new_tokens):
                if window.size(1) > self.config.block_size:
                    window, caches = window[:, -max(1, self.config.block_size // 2):], None
                if caches is None:
                    caches = [KVCache(self.config, idx.size(0), idx.device) for _ in self.blocks]
                unread = window[:, caches[0].length:]
                logits = self(unread, caches=caches)[0][:, -1].float()
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)
                else:
                    if top_k is not None:
                        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                        logits = logits.masked_fill(logits < kth, -float("inf"))
                    new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
                window = torch.cat((window, new), dim=1)
                yield new

    def mixtures(self):
        """The MoE of each block, in order; none in a dense model."""
        return [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]

    @torch.no_grad()
    def take_router_statistics(self):
        """
        (load, entropy) since the last call: (n_layer, E) int64, choices of each expert; (n_layer,), the router's
        entropy in nats, the mean over tokens, summed over micro-batches. Of this process; they begin again at zero.
        """
        mixtures = self.mixtures()
        taken = torch.stack([ffn.load for ffn in mixtures]), torch.stack([ffn.entropy for ffn in mixtures])
        for ffn in mixtures:
            ffn.load.zero_()
            ffn.entropy.zero_()
        return taken

    @torch.no_grad()
    def balance_routers(self, load):
        """Move each router's bias by router_bias towards balance. load: (n_layer, E), of a step, over all processes."""
        for ffn, n in zip(self.mixtures(), load):
            ffn.bias += self.config.router_bias * (n.sum() - n * n.numel()).sign()  # in integers: the same everywhere

    def active(self):
        """Parameter -> how many of its numbers are used for one token: K of E experts' in what experts have stacked."""
        stacked = {p for ffn in self.mixtures() for p in ffn.stacked()}
        config = self.config
        return {p: p.numel() * config.experts_per_token // config.n_experts if p in stacked else p.numel()
                for p in self.parameters()}

    def counts(self):
        """Parameters, as a dict: 'params' (all), 'active_params' (used for one token), 'scale_params' (in γ's)."""
        params = sum(p.numel() for p in self.parameters())
        scale = sum(p.numel() for _, p, role, _ in self.named_roles() if role in ("input", "output"))
        return {"params": params, "active_params": sum(self.active().values()), "scale_params": scale}

    def flops_per_token(self):
        """
        Floating-point operations of training, forward and backward, for one token: 6 N + 12 L n_head d_head T.

        PaLM's formula (arXiv 2204.02311, appendix B), without rematerialisation. N counts the weights that multiply
        activations, for one token: not the token table, which is looked up, and not scale vectors, which act on
        weights; of E experts, K. The second term is attention's, with no discount for the causal half, as PaLM, nanoGPT
        and most MFU figures have it.
        """
        config, active = self.config, self.active()
        hidden = sum(active[p] for _, p, role, _ in self.named_roles() if role in ("matrix", "router"))
        n = hidden + config.vocab_size * config.n_embd
        return 6 * n + 12 * config.n_layer * config.n_head * config.d_head * config.block_size
