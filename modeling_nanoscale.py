"""
nanoScale's Transformer for Hugging Face transformers, for models that no class of theirs computes: with norms behind
q, k, v, gate and up (DNP), or over all channels of q and k, and mixtures of experts in layouts that theirs have not.
Folded: the scale vectors left are those that no weight can take. export.py puts this file beside the weights; load them
with trust_remote_code=True. It needs nothing else.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import (
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast


class NanoScaleConfig(PretrainedConfig):
    """
    Llama's names, and nanoScale's for the norms. arch 'gemma': post-norms, and a QK-norm. attn_placement,
    ffn_placement: 'input' no norm behind the branches, 'norm' one without a scale vector, 'dual_norm' one with it.
    qkv_norm: the norms of q, k and v are over each 'head' or over the 'full' width. scale_vectors: False for none.
    n_experts: 0 for a dense model. router: the chosen experts' weights are a 'softmax' over them, their share of a
    softmax over all ('softmax_all'), or a 'sigmoid' divided by the sum over the chosen.
    """

    model_type = "nanoscale"

    def __init__(self, vocab_size=256, hidden_size=128, intermediate_size=341, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=256,
                 rope_theta=10000.0, rms_norm_eps=1e-6, arch="llama", attn_placement="dual_norm",
                 ffn_placement="dual_norm", qkv_norm="head", scale_vectors=True, n_experts=0, experts_per_token=2,
                 n_shared_experts=0, expert_dim=0, router="softmax", initializer_range=0.02, use_cache=True,
                 tie_word_embeddings=False, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta, self.rms_norm_eps = rope_theta, rms_norm_eps
        self.arch, self.attn_placement, self.ffn_placement = arch, attn_placement, ffn_placement
        self.qkv_norm, self.scale_vectors = qkv_norm, scale_vectors
        self.n_experts, self.experts_per_token, self.router = n_experts, experts_per_token, router
        self.n_shared_experts, self.expert_dim = n_shared_experts, expert_dim
        self.initializer_range, self.use_cache = initializer_range, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class Norm(nn.Module):
    """γ ⊙ x / sqrt(mean(x²) + ε), the mean over each `group` of channels, in fp32; γ has n channels, none if n is 0."""

    def __init__(self, n, group, eps):
        super().__init__()
        self.group, self.eps = group, eps
        self.register_parameter("weight", nn.Parameter(torch.ones(n)) if n else None)

    def forward(self, x):
        wide = x.float().unflatten(-1, (-1, self.group))
        wide = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        if self.weight is not None:
            wide = wide * self.weight.float().view(-1, self.group)
        return wide.flatten(-2).to(x.dtype)


def apply_rope(x, cos, sin):
    a, b = x.chunk(2, dim=-1)  # x: (B, heads, T, d); cos, sin: (B, 1, T, d/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.d_head = layer, config.head_dim
        n, nq = config.hidden_size, config.num_attention_heads * config.head_dim
        nkv = config.num_key_value_heads * config.head_dim
        self.grouped = nkv != nq
        self.q_proj, self.o_proj = nn.Linear(n, nq, bias=False), nn.Linear(nq, n, bias=False)
        self.k_proj, self.v_proj = nn.Linear(n, nkv, bias=False), nn.Linear(n, nkv, bias=False)
        self.q_norm = self.k_norm = self.v_norm = nn.Identity()
        group = {"q": nq, "k": nkv, "v": nkv} if config.qkv_norm == "full" else dict.fromkeys("qkv", config.head_dim)
        if config.attn_placement != "input":  # behind all three; γ, where there is one, over all channels
            scaled = config.attn_placement == "dual_norm"
            self.q_norm = Norm(nq if scaled else 0, group["q"], config.rms_norm_eps)
            self.k_norm = Norm(nkv if scaled else 0, group["k"], config.rms_norm_eps)
            self.v_norm = Norm(0, group["v"], config.rms_norm_eps)
        elif config.arch == "gemma":  # QK-norm; heads share γ
            self.q_norm = Norm(group["q"] if config.scale_vectors else 0, group["q"], config.rms_norm_eps)
            self.k_norm = Norm(group["k"] if config.scale_vectors else 0, group["k"], config.rms_norm_eps)

    def forward(self, h, cos, sin, mask, cache):
        B, T, _ = h.shape
        q, k, v = self.q_norm(self.q_proj(h)), self.k_norm(self.k_proj(h)), self.v_norm(self.v_proj(h))
        q, k, v = (x.view(B, T, -1, self.d_head).transpose(1, 2) for x in (q, k, v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config, m):
        super().__init__()
        n = config.hidden_size
        self.gate_proj, self.up_proj = nn.Linear(n, m, bias=False), nn.Linear(n, m, bias=False)
        self.down_proj = nn.Linear(m, n, bias=False)
        self.gate_norm = self.up_norm = nn.Identity()
        if config.ffn_placement != "input":
            self.gate_norm = Norm(m if config.ffn_placement == "dual_norm" else 0, m, config.rms_norm_eps)
            self.up_norm = Norm(0, m, config.rms_norm_eps)

    def forward(self, h):
        return self.down_proj(F.silu(self.gate_norm(self.gate_proj(h))) * self.up_norm(self.up_proj(h)))


class MoE(nn.Module):
    """Each token goes through the K experts with the highest scores, and through the shared ones, which are one MLP."""

    def __init__(self, config):
        super().__init__()
        self.router, self.k = config.router, config.experts_per_token
        self.gate = nn.Linear(config.hidden_size, config.n_experts, bias=False)
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(config.n_experts))  # for the choice alone
        self.experts = nn.ModuleList(MLP(config, config.expert_dim) for _ in range(config.n_experts))
        shared = config.n_shared_experts * config.expert_dim
        self.shared_experts = MLP(config, shared) if shared else None

    def forward(self, h):
        x = h.flatten(0, 1)  # (tokens, n)
        logits = F.linear(x.float(), self.gate.weight.float())  # (tokens, experts)
        scores = logits.sigmoid() if self.router == "sigmoid" else logits.softmax(-1)
        chosen = (scores + self.gate.e_score_correction_bias).topk(self.k).indices  # (tokens, K)
        weights = logits.gather(1, chosen).softmax(-1) if self.router == "softmax" else scores.gather(1, chosen)
        if self.router == "sigmoid":
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, (expert(x[token]) * weights[token, place, None]).to(y.dtype))
        y = y.view_as(h)
        return y if self.shared_experts is None else y + self.shared_experts(h)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        n, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn, self.norm = Attention(config, layer), Norm(0, n, eps)
        self.mlp = MoE(config) if config.n_experts else MLP(config, config.intermediate_size)
        post = (lambda: Norm(n if config.scale_vectors else 0, n, eps)) if config.arch == "gemma" else nn.Identity
        self.post_attention_layernorm, self.post_feedforward_layernorm = post(), post()

    def forward(self, x, *args):
        x = x + self.post_attention_layernorm(self.self_attn(self.norm(x), *args))
        return x + self.post_feedforward_layernorm(self.mlp(self.norm(x)))


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = Norm(0, config.hidden_size, config.rms_norm_eps)


# transformers 5.24 renamed past_key_values, and its generate() knows the new name alone
CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)


class NanoScaleForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoScaleConfig
    base_model_prefix = "model"
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    def __init__(self, config):
        super().__init__(config)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def rope(self, positions, dtype):
        """cos and sin, (B, 1, T, d/2), of positions (B, T)."""
        wide = torch.float32 if positions.device.type == "mps" else torch.float64
        d = self.config.head_dim
        rates = self.config.rope_theta ** (-torch.arange(0, d, 2, dtype=wide, device=positions.device) / d)
        angles = (positions.to(wide).unsqueeze(-1) * rates).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, cache=None, **kwargs):
        T = input_ids.size(1)
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache()
        past = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device).unsqueeze(0)
        mask = torch.ones(T, past + T, dtype=torch.bool, device=input_ids.device).tril(past)[None, None]
        if attention_mask is not None and attention_mask.dim() == 2:
            mask = mask & attention_mask[:, None, None, :past + T].bool()
            # padding sees itself, so that no row of the softmax is empty
            mask = mask | torch.eye(past + T, dtype=torch.bool, device=mask.device)[past:]
        x = self.model.embed_tokens(input_ids)
        cos, sin = self.rope(position_ids, x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, mask, cache)
        x = x[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else x[:, logits_to_keep]
        logits = self.lm_head(self.model.final_norm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
