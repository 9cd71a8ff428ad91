"""
GPT, in two layouts of its norms, with every scale-vector variant of norms.py.

llama: Pre-Norm, RoPE, SwiGLU, no biases.
gemma: the same with Gemma's norms: a post-norm around each sublayer and QK-norm, so that scale vectors with the
    output role exist in the baseline already. Its GeGLU and embedding scaling are left out, so that the norms are
    all that differs between the two.

Shapes: B batch, T tokens; n_head heads of d_head channels each for q, n_kv_head for k and v.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import rms_norm
from norms import Branches, ScaleVector, output_norm


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
    """x Wᵀ without bias, W kept in fp32 and multiplied in x's dtype."""

    kept = None  # as in Branches

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))

    def gemm_weight(self, dtype):
        return self.weight.to(dtype)

    def forward(self, x):
        return F.linear(x, self.gemm_weight(x.dtype) if self.kept is None else self.kept)


def rope_tables(d_head, block_size, theta):
    """
    cos and sin of RoPE's angles (arXiv 2104.09864), each (block_size, d_head/2) in fp32.

    Channel i turns together with channel i + d_head/2, as in Hugging Face's Llama, at rate theta^(−2i/d_head).
    """
    rates = theta ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.outer(torch.arange(block_size, dtype=torch.float64), rates)
    return angles.cos().float(), angles.sin().float()


def apply_rope(x, cos, sin):
    """Turn each pair of channels of x, (B, T, n_head, d_head), by its position's angle; cos, sin: (T, d_head/2)."""
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)  # (T, 1, d_head/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


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
        q, k, v = self.qkv(h)  # (B, T, n_head × d_head), twice (B, T, n_kv_head × d_head)
        if self.qk_norm:
            q = output_norm(q, self.q_scale, config.qkv_group(q.size(-1)), config.norm_eps)
            k = output_norm(k, self.k_scale, config.qkv_group(k.size(-1)), config.norm_eps)
        q, k, v = (x.view(B, T, -1, config.d_head) for x in (q, k, v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, heads, T, d_head)
        if cache is not None:
            k, v = cache.extend(k, v)
        # a single token comes last and sees all keys; without a cache it has only itself to see
        y = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=config.n_kv_head != config.n_head)
        return self.o(y.transpose(1, 2).reshape(B, T, -1))


class FFN(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate) ⊙ up)."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = config.branches({"gate": config.ffn_dim, "up": config.ffn_dim}, placement=config.ffn_placement)
        self.down = Linear(config.ffn_dim, config.n_embd)

    def forward(self, h):
        gate, up = self.gate_up(h)  # (B, T, ffn_dim) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.attn = Attention(config)
        self.ffn = FFN(config)
        if config.arch == "gemma":
            self.attn_post = config.output_scale(config.n_embd)
            self.ffn_post = config.output_scale(config.n_embd)

    def forward(self, x, cos, sin, cache=None):
        # x: (B, T, n_embd). The Pre-Norms are N alone: their scale vectors live in the branches behind them
        config, eps = self.config, self.config.norm_eps
        y = self.attn(rms_norm(x, eps), cos, sin, cache)
        x = x + (output_norm(y, self.attn_post, config.n_embd, eps) if config.arch == "gemma" else y)
        y = self.ffn(rms_norm(x, eps))
        return x + (output_norm(y, self.ffn_post, config.n_embd, eps) if config.arch == "gemma" else y)


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

        role: 'matrix' (hidden 2-D weights), 'embedding' (the token table and the LM head), 'input' or 'output' (a
        scale vector's). decays: False for the directions α that weight decay would shrink to no effect.
        Raises RuntimeError on a parameter that it does not know.
        """
        roles = {}
        for module in self.modules():
            if isinstance(module, ScaleVector):
                for name, p in module.named_parameters():
                    roles[p] = (module.role, module.decays(name))
            elif isinstance(module, Linear):
                roles[module.weight] = ("matrix", True)
            elif isinstance(module, Branches):
                for p in module.weight.values():
                    roles[p] = ("embedding" if module is self.lm_head else "matrix", True)
        roles[self.wte] = ("embedding", True)
        for name, p in self.named_parameters():
            if p not in roles:
                raise RuntimeError(f"model.py does not know the role of parameter {name}")
            yield name, p, *roles[p]

    @torch.no_grad()
    def init_weights(self):
        """N(0, 0.02) for every matrix and embedding, 1 for every γ. Raises on a parameter named_roles doesn't know."""
        for _, p, role, _ in self.named_roles():
            if role in ("matrix", "embedding"):
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
        x = F.embedding(idx, self.wte).to(getattr(torch, self.config.dtype))
        for i, block in enumerate(self.blocks):
            x = block(x, self.cos[start:end], self.sin[start:end], caches[i] if caches else None)
        if caches:
            x = x[:, -1:]
        (logits,) = self.lm_head(rms_norm(x, self.config.norm_eps))
        if targets is None:
            return logits, None
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, F.cross_entropy(wide.view(-1, wide.size(-1)), targets.reshape(-1))

    @contextmanager
    def weights_kept(self):
        """While this holds, no parameter may change: every linear map makes its weight once, not at each forward."""
        maps = [module for module in self.modules() if isinstance(module, (Linear, Branches))]
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

    def counts(self):
        """Parameters, as a dict: 'params' (all), 'active_params' (used for one token), 'scale_params' (in γ's)."""
        params = sum(p.numel() for p in self.parameters())
        scale = sum(p.numel() for _, p, role, _ in self.named_roles() if role in ("input", "output"))
        return {"params": params, "active_params": params, "scale_params": scale}

    def flops_per_token(self):
        """
        Floating-point operations of training, forward and backward, for one token: 6 N + 12 L n_head d_head T.

        PaLM's formula (arXiv 2204.02311, appendix B), without rematerialisation. N counts the weights that multiply
        activations: not the token table, which is looked up, and not scale vectors, which act on weights. The second
        term is attention's, with no discount for the causal half, as PaLM, nanoGPT and most MFU figures have it.
        """
        config = self.config
        hidden = sum(p.numel() for _, p, role, _ in self.named_roles() if role == "matrix")
        n = hidden + config.vocab_size * config.n_embd
        return 6 * n + 12 * config.n_layer * config.n_head * config.d_head * config.block_size
