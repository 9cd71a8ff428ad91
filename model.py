"""
GPT, in two layouts of its norms, with every scale-vector variant of norms.py.

llama: Pre-Norm, RoPE, SwiGLU, no biases.
gemma: the same with Gemma's norms: a post-norm after each sublayer, and QK-norm, so that even the baseline has scale
    vectors with the output role. Gemma's GeGLU and embedding scaling are left out, so that the two layouts differ only
    in their norms.

With n_experts the FFN of every block is a mixture of experts (MoE): the same model with another FFN.

Shapes: B batch, T tokens; n_head heads of d_head channels for q, n_kv_head for k and v. In a MoE: E experts, of which
each of N = B·T tokens goes through K.

Imports kernels.py, norms.py and moe.py.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import qk_norm_rope, rms_norm, scaled_cast, swiglu
from moe import MoE, active, mixtures
from norms import Branches, ScaleVector, unit

ALIGN = 8  # bf16 numbers in 16 bytes


def branches(config, n_out, **kw):
    """The branches after one Pre-Norm of the model; n_out as in Branches."""
    return Branches(config.n_embd, n_out, heterogeneous=config.heterogeneous, form=config.reparam,
                    scale_vectors=config.scale_vectors, **kw)


def output_scale(config, n):
    """The scale vector of a norm that feeds no linear map, or None."""
    return ScaleVector(n, "output", config.reparam) if config.scale_vectors else None


def rope_tables(d_head, block_size, theta):
    """
    cos and sin of RoPE's angles (arXiv 2104.09864), each (block_size, d_head/2) in fp32.

    Channel i turns together with channel i + d_head/2, as in Hugging Face's Llama, at rate theta^(−2i/d_head).
    """
    rates = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float64), rates)
    return angles.cos().float(), angles.sin().float()


class KVCache:
    """One block's keys and values of the tokens so far, so that the next token costs one row, not the whole context."""

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
        placement = {"q": config.attn_placement, "k": config.attn_placement, "v": config.v_placement}
        gemma, normed = config.arch == "gemma", config.attn_placement in ("dual_norm", "norm")
        self.qk_norm = (config.qk_norm or gemma) and not normed
        self.qkv = branches(config, {"q": nq, "k": nkv, "v": nkv}, placement=placement,
                            group=config.d_head if config.qkv_norm == "head" else None,
                            idle=["q", "k"] * self.qk_norm + ["v"] * gemma)  # v goes through o to the post-norm
        self.o = nn.Parameter(torch.empty(config.n_embd, nq))
        if self.qk_norm:
            per_head = config.qkv_norm == "head"
            self.q_scale = output_scale(config, config.d_head if per_head else nq)
            self.k_scale = output_scale(config, config.d_head if per_head else nkv)

    def weights(self, dtype):
        """
        What its two GEMMs multiply by: q, k and v stacked by rows, and o. Attention mixes tokens, not channels, so
        DNP's u of v folds into o's columns; each head of v serves n_head / n_kv_head heads of o.
        """
        config, u_v = self.config, self.qkv.after_norm("v")
        if u_v is not None:
            u_v = u_v.view(config.n_kv_head, 1, -1).expand(-1, config.n_head // config.n_kv_head, -1).flatten()
        return self.qkv.folded_weight(dtype), scaled_cast([self.o], [None], [u_v], dtype)

    def forward(self, h, cos, sin, cache=None, weights=None):
        (B, T, _), config = h.shape, self.config
        W_qkv, W_o = weights or self.weights(h.dtype)
        normed, gammas, eps = self.qkv.normed, [self.qkv.after_norm(c) for c in "qk"], self.qkv.eps
        if self.qk_norm:
            normed, eps = ["q", "k", *normed], config.norm_eps
            gammas = [self.q_scale and self.q_scale(), self.k_scale and self.k_scale()]
        q, k, v = qk_norm_rope(F.linear(h, W_qkv), cos, sin, config.n_head, config.n_kv_head, eps, normed, gammas,
                               self.qkv.group)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, d_head)
        if cache is not None:
            k, v = cache.extend(k, v)
        # a single token is the last one and sees all keys
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=config.n_kv_head != config.n_head)
        return F.linear(y.transpose(1, 2).reshape(B, T, -1), W_o)


class FFN(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate) ⊙ up). stack, route: as in Branches."""

    def __init__(self, config, ffn_dim, stack=0):
        super().__init__()
        self.ffn_dim = ffn_dim
        self.gate_up = branches(config, {"gate": ffn_dim, "up": ffn_dim}, placement=config.ffn_placement, stack=stack,
                                own_v=config.expert_scales == "own",
                                idle=["up"] * (config.arch == "gemma" and not config.n_experts))
        shape = (config.n_embd, ffn_dim)
        self.down = nn.Parameter(torch.empty(stack, *shape) if stack else torch.empty(shape))

    def weights(self, dtype):
        """
        What its two GEMMs multiply by: gate and up stacked by rows, and down; the hidden width is padded. The product
        is linear in up, so DNP's u of up folds into down's columns.
        """
        down = scaled_cast([self.down], [None], [self.gate_up.after_norm("up")], dtype, align_columns=ALIGN)
        return self.gate_up.folded_weight(dtype, ALIGN), down

    def forward(self, h, route=None, weights=None):
        linear, branches = F.linear if route is None else route.linear, self.gate_up
        W_gate_up, W_down = weights or self.weights(h.dtype)
        gamma = branches.after_norm("gate")
        if gamma is not None and route is not None:
            gamma = route.rows(gamma)
        return linear(swiglu(linear(h, W_gate_up), self.ffn_dim, branches.eps, bool(branches.normed), gamma), W_down)


def pre_norm(x, y, branches, eps):
    """(N(x + y), x + y), y being None in the first block; where N is idle before these branches, (x + y, x + y)."""
    if branches.idle_norm:
        x = x if y is None else x + y
        return x, x
    return (rms_norm(x, eps), x) if y is None else rms_norm(y, eps, residual=x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attn = Attention(config)
        if config.n_experts:
            self.ffn = MoE(config, branches(config, {"router": config.n_experts}),
                           FFN(config, config.expert_dim, stack=config.n_experts),
                           FFN(config, config.shared_dim) if config.shared_dim else None)
        else:
            self.ffn = FFN(config, config.ffn_dim)
        if config.arch == "gemma":
            self.attn_post = output_scale(config, config.n_embd)
            self.ffn_post = output_scale(config, config.n_embd)

    def weights(self, dtype):
        """What the GEMMs of attention and of the FFN multiply by, for forward."""
        return self.attn.weights(dtype), self.ffn.weights(dtype)

    def forward(self, x, y, cos, sin, cache=None, weights=(None, None)):
        """
        x: the residual stream, (B, T, n_embd), and y: what the last sublayer adds to it, None at first. The next norm
        does the addition, since it reads both anyway. Returns the next x and y.

        The Pre-Norms have no vector: it is in the branches after them.
        """
        gemma, eps = self.config.arch == "gemma", self.config.norm_eps
        h, x = pre_norm(x, y, self.attn.qkv, eps)
        y = self.attn(h, cos, sin, cache, weights[0])
        if gemma:
            y = rms_norm(y, eps, self.attn_post and self.attn_post())
        h, x = pre_norm(x, y, (self.ffn.experts if self.config.n_experts else self.ffn).gate_up, eps)
        y = self.ffn(h, weights=weights[1])
        if gemma:
            y = rms_norm(y, eps, self.ffn_post and self.ffn_post())
        return x, y


class GPT(nn.Module):
    """
    A decoder-only Transformer. Parameters are fp32; activations have config.dtype; norm statistics and the loss are
    fp32 (fp64 if config.dtype is). Initialised from the global RNG, from which scale vectors draw nothing: the same
    seed gives the same matrices under every strategy.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Parameter(torch.empty(config.vocab_size, config.n_embd))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # a Pre-Norm with one branch: the paper's "single linear branch such as the final output projection"
        self.lm_head = branches(config, {"lm_head": config.vocab_size}, placement=config.head_placement,
                                role=config.final_norm_role)
        if config.tie_embeddings:
            self.lm_head.weight["lm_head"] = self.wte
        cos, sin = rope_tables(config.d_head, config.block_size, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    def named_roles(self):
        """
        Yield (name, parameter, role, decays) of every parameter, once.

        role: 'matrix' (hidden weights: 2-D, or 3-D stacks of experts), 'embedding' (the token table and the LM head),
        'router', 'input' or 'output' (a scale vector's). A router's rows are classes, like the LM head's, so it is
        trained by AdamW, not by Muon, which makes the directions of a matrix equally strong. decays: False for α of OR,
        whose decay would not change γ.
        Raises RuntimeError on a parameter that it does not know.
        """
        roles = {}
        special = {self.lm_head: "embedding", **{ffn.router: "router" for ffn in mixtures(self)}}
        for module in self.modules():
            if isinstance(module, ScaleVector):
                for name, p in module.named_parameters():
                    roles[p] = (module.role, module.decays(name))
            elif isinstance(module, (Attention, FFN)):
                roles[module.o if isinstance(module, Attention) else module.down] = ("matrix", True)
            elif isinstance(module, Branches):
                for p in module.weight.values():
                    roles[p] = (special.get(module, "matrix"), True)
        roles[self.wte] = ("embedding", True)
        for name, p in self.named_parameters():
            if p not in roles:
                raise RuntimeError(f"model.py does not know the role of parameter {name}")
            yield name, p, *roles[p]

    @torch.no_grad()
    def init_weights(self):
        """
        N(0, init_std) for matrices, by default 1/√fan_in, which preserves the size of activations; N(0, embedding_std)
        for the token table; 1 for every γ. Raises on a parameter that named_roles does not know.
        """
        config = self.config
        for _, p, role, _ in self.named_roles():
            if role not in ("input", "output"):
                p.normal_(0.0, config.init_std or p.size(-1)**-0.5)
        if config.embedding_std or not config.tie_embeddings:
            self.wte.normal_(0.0, config.embedding_std or 1.0)
        for module in self.modules():
            if isinstance(module, ScaleVector):
                module.reset()

    def forward(self, idx, targets=None, caches=None, weights=None):
        """
        idx, targets: (B, T) int64, T ≤ block_size. Returns (logits, loss): logits (B, T, vocab_size) in the compute
        dtype, without a gradient where there are targets; the loss is the mean over all tokens in nats, fp32, or None
        without targets.

        caches: a KVCache per block, where idx continues what they hold: T is 1, unless they are empty. The logits are
        then only those of the last token, (B, 1, vocab_size).
        weights: what `weights` returned, to reuse it while the parameters do not change; None folds them anew.
        """
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit in block_size {self.config.block_size}")
        x, y = F.embedding(idx, self.wte).to(getattr(torch, self.config.dtype)), None
        for i, block in enumerate(self.blocks):
            x, y = block(x, y, self.cos[start:end], self.sin[start:end], caches[i] if caches else None,
                         weights[i] if weights else (None, None))
        if caches:
            x, y = x[:, -1:], y[:, -1:]
        h, _ = pre_norm(x, y, self.lm_head, self.config.norm_eps)
        logits = self.logits(h, *(weights[-1] if weights else self.head_weights(h.dtype)))
        if targets is None:
            return logits, None
        # Compiled, `wide` is never written: the sums read the bf16 logits. So a loss in chunks would save little.
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide.view(-1, wide.size(-1)), targets.reshape(-1))
        if self.config.n_experts and torch.is_grad_enabled():
            extra = sum(ffn.loss for ffn in mixtures(self)) / self.config.n_layer
            loss = loss + (extra - extra.detach())  # only its gradient: losses stay comparable with a dense run's
            for ffn in mixtures(self):
                ffn.loss = None
        # Detached, since torch.compile's backward pass would begin with a gradient of zeros for logits that nobody
        # uses: at 0.12B 3.3 GB to write and to read.
        return logits.detach(), loss

    def head_weights(self, dtype):
        """(W, V, G) of the LM head: see Branches.gram_fold; V and G are None where the head has no norm, or where it is
        so narrow that a norm of the logits themselves is cheaper."""
        head = self.lm_head
        return head.gram_fold(dtype) if head.gram_pays else (head.folded_weight(dtype), None, None)

    def logits(self, h, W, V, G):
        """The LM head: h, (B, T, n_embd), to (B, T, vocab_size)."""
        head = self.lm_head
        if G is not None:
            return F.linear(unit(h, V, G, head.eps), W)
        logits = F.linear(h, W)
        return rms_norm(logits, head.eps, head.after_norm("lm_head")) if head.normed else logits

    def weights(self, dtype):
        """All folded weights: one entry per block, and the LM head's (W, V, G)."""
        return [*(block.weights(dtype) for block in self.blocks), self.head_weights(dtype)]

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, generator=None):
        """
        Continue idx, (B, T) int64 with T ≥ 1, and yield each new column of tokens, (B, 1), as it comes. The parameters
        are read once, before the first.

        temperature: 0 takes the likeliest token. top_k: sample from the k likeliest only.
        The model sees at most the last block_size tokens. The cached keys contain RoPE's positions, so a full window
        cannot move by one token: it drops its older half, is read again from position 0, and fills up again.
        """
        window, caches = idx[:, -self.config.block_size:], None
        weights = self.weights(getattr(torch, self.config.dtype))
        for _ in range(max_new_tokens):
            if window.size(1) > self.config.block_size:
                window, caches = window[:, -max(1, self.config.block_size // 2):], None
            if caches is None:
                caches = [KVCache(self.config, idx.size(0), idx.device) for _ in self.blocks]
            unread = window[:, caches[0].length:]
            logits = self(unread, caches=caches, weights=weights)[0][:, -1].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -float("inf"))
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            window = torch.cat((window, new), dim=1)
            yield new

    def counts(self):
        """Parameters, as a dict: 'params' (all), 'active_params' (used for one token), 'scale_params' (in γ's)."""
        params = sum(p.numel() for p in self.parameters())
        scale = sum(p.numel() for _, p, role, _ in self.named_roles() if role in ("input", "output"))
        return {"params": params, "active_params": sum(active(self).values()), "scale_params": scale}

    def flops_per_token(self):
        """
        Floating-point operations of training on one token, forward and backward: 6 N + 12 L n_head d_head T.

        PaLM's formula (arXiv 2204.02311, appendix B), without rematerialisation. N counts the weights that multiply a
        token's activations: not the token table, which is looked up, nor scale vectors, which act on weights; K of E
        experts. The second term is attention's, without a discount for the causal half, as in PaLM, nanoGPT and most
        MFU figures.
        """
        config, used = self.config, active(self)
        hidden = sum(used[p] for _, p, role, _ in self.named_roles() if role in ("matrix", "router"))
        n = hidden + config.vocab_size * config.n_embd
        return 6 * n + 12 * config.n_layer * config.n_head * config.d_head * config.block_size
