"""
nanoScale's Transformer for Hugging Face transformers, for models that no class of theirs computes: with norms after q,
k, v, gate and up (DNP), or over all channels of q and k, in Gemma's layout, and mixtures with other routers.
Folded: the scale vectors left are those that no weight can take. export.py puts this file beside the weights; load them
with trust_remote_code=True. It needs nothing else, and runs on transformers 4.57 to 5.24.
"""

import inspect

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

# transformers 5.24 renamed past_key_values, and other versions other arguments of the mask
CACHE = next(name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__)
MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters


class NanoScaleConfig(PretrainedConfig):
    """
    Llama's names, and nanoScale's for the norms. arch 'gemma': post-norms, and a QK-norm. attn_placement (of q and k),
    v_placement, ffn_placement: 'input' no norm after the branches, 'norm' one without a scale vector, 'dual_norm' one
    with it, in v's and up's case in the next matrix. Where all branches of a sublayer have one, none is before them.
    qkv_norm: the norms of q, k and v are over each 'head' or over the 'full' width. scale_vectors: False for none.
    n_experts: 0 for a dense model. router: the chosen experts' weights are a 'softmax' over them, their share of a
    softmax over all ('softmax_all'), or a 'sigmoid' divided by the sum over the chosen.
    """

    model_type = "nanoscale"
    keys_to_ignore_at_inference = [CACHE]

    def __init__(self, vocab_size=256, hidden_size=128, intermediate_size=341, num_hidden_layers=4,
                 num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=256,
                 rope_theta=10000.0, rms_norm_eps=1e-6, arch="llama", attn_placement="dual_norm",
                 v_placement="dual_norm", ffn_placement="dual_norm", qkv_norm="head", scale_vectors=True, n_experts=0,
                 experts_per_token=2, n_shared_experts=0, expert_dim=0, router="softmax", initializer_range=0.02,
                 use_cache=True, tie_word_embeddings=False, **kwargs):
        self.vocab_size, self.hidden_size, self.intermediate_size = vocab_size, hidden_size, intermediate_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_key_value_heads, self.head_dim = num_key_value_heads, head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta, self.rms_norm_eps = rope_theta, rms_norm_eps
        self.arch, self.attn_placement, self.v_placement = arch, attn_placement, v_placement
        self.ffn_placement, self.qkv_norm, self.scale_vectors = ffn_placement, qkv_norm, scale_vectors
        self.n_experts, self.experts_per_token, self.router = n_experts, experts_per_token, router
        self.n_shared_experts, self.expert_dim = n_shared_experts, expert_dim
        self.initializer_range, self.use_cache = initializer_range, use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)


class NanoScaleRMSNorm(nn.Module):
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


def after_branch(placement, n, group, eps, scaled=True):
    """The norm after a branch n wide, or nothing."""
    if placement == "input":
        return nn.Identity()
    return NanoScaleRMSNorm(n if scaled and placement == "dual_norm" else 0, group, eps)


def apply_rope(x, cos, sin):
    a, b = x.chunk(2, dim=-1)  # x: (B, heads, T, d); cos, sin: (B, 1, T, d/2)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def eager_attention(module, q, k, v, mask, scaling, **kwargs):
    """q: (B, heads, T, d). Returns (B, T, heads, d) and what each token attends to, (B, heads, T, S)."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class NanoScaleAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim, self.scaling = config.head_dim, config.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        n, nq = config.hidden_size, config.num_attention_heads * config.head_dim
        nkv, eps = config.num_key_value_heads * config.head_dim, config.rms_norm_eps
        self.q_proj, self.o_proj = nn.Linear(n, nq, bias=False), nn.Linear(nq, n, bias=False)
        self.k_proj, self.v_proj = nn.Linear(n, nkv, bias=False), nn.Linear(n, nkv, bias=False)
        head = config.head_dim if config.qkv_norm == "head" else None
        self.q_norm = after_branch(config.attn_placement, nq, head or nq, eps)
        self.k_norm = after_branch(config.attn_placement, nkv, head or nkv, eps)
        self.v_norm = after_branch(config.v_placement, nkv, head or nkv, eps, scaled=False)
        if config.arch == "gemma" and config.attn_placement == "input":  # QK-norm; heads share γ
            self.q_norm, self.k_norm = (NanoScaleRMSNorm(width if config.scale_vectors else 0, width, eps)
                                        for width in (head or nq, head or nkv))

    def forward(self, h, cos, sin, mask, cache, cache_position, **kwargs):
        B, T, _ = h.shape
        q, k, v = self.q_norm(self.q_proj(h)), self.k_norm(self.k_proj(h)), self.v_norm(self.v_proj(h))
        q, k, v = (x.view(B, T, -1, self.head_dim).transpose(1, 2) for x in (q, k, v))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, {"cache_position": cache_position})
        kind = self.config._attn_implementation
        attend = eager_attention if kind in (None, "eager") else ALL_ATTENTION_FUNCTIONS[kind]
        y, weights = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights


class NanoScaleMLP(nn.Module):
    def __init__(self, config, m):
        super().__init__()
        n, eps = config.hidden_size, config.rms_norm_eps
        self.gate_proj, self.up_proj = nn.Linear(n, m, bias=False), nn.Linear(n, m, bias=False)
        self.down_proj = nn.Linear(m, n, bias=False)
        self.gate_norm = after_branch(config.ffn_placement, m, m, eps)
        self.up_norm = after_branch(config.ffn_placement, m, m, eps, scaled=False)

    def forward(self, h):
        return self.down_proj(F.silu(self.gate_norm(self.gate_proj(h))) * self.up_norm(self.up_proj(h)))


class NanoScaleRouter(nn.Module):
    """h: (tokens, n). Returns each token's K experts and their weights, both (tokens, K); all in fp32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_experts, config.hidden_size))
        # for the choice alone, and without a gradient
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.n_experts, dtype=torch.float32), False)
        idle = config.ffn_placement == "input"  # then h is normed already
        self.norm = nn.Identity() if idle else NanoScaleRMSNorm(0, config.hidden_size, config.rms_norm_eps)

    def forward(self, h):
        kind, logits = self.config.router, F.linear(self.norm(h.float()), self.weight.float())
        scores = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
        chosen = (scores + self.e_score_correction_bias).topk(self.config.experts_per_token).indices
        weights = logits.gather(1, chosen).softmax(-1) if kind == "softmax" else scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) if kind == "sigmoid" else weights


class NanoScaleMoE(nn.Module):
    """Each token goes through the K experts with the highest scores, and through the shared ones, which are one MLP."""

    def __init__(self, config):
        super().__init__()
        self.gate = NanoScaleRouter(config)
        self.experts = nn.ModuleList(NanoScaleMLP(config, config.expert_dim) for _ in range(config.n_experts))
        shared = config.n_shared_experts * config.expert_dim
        self.shared_experts = NanoScaleMLP(config, shared) if shared else None

    def forward(self, h):
        x = h.flatten(0, 1)  # (tokens, n)
        chosen, weights = self.gate(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, place = (chosen == e).nonzero(as_tuple=True)
            y = y.index_add(0, token, (expert(x[token]) * weights[token, place, None]).to(y.dtype))
        y = y.view_as(h)
        return y if self.shared_experts is None else y + self.shared_experts(h)


class NanoScaleLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        n, eps, placements = config.hidden_size, config.rms_norm_eps, (config.attn_placement, config.v_placement)
        self.self_attn = NanoScaleAttention(config, layer_idx)
        self.mlp = NanoScaleMoE(config) if config.n_experts else NanoScaleMLP(config, config.intermediate_size)
        # a norm does not see the length of what goes into it: before branches that all have one after them it is idle
        self.attn_norm = NanoScaleRMSNorm(0, n, eps) if "input" in placements else nn.Identity()
        self.mlp_norm = NanoScaleRMSNorm(0, n, eps) if config.ffn_placement == "input" else nn.Identity()
        gemma, post = config.arch == "gemma", n if config.scale_vectors else 0
        self.post_attention_layernorm = NanoScaleRMSNorm(post, n, eps) if gemma else nn.Identity()
        self.post_feedforward_layernorm = NanoScaleRMSNorm(post, n, eps) if gemma else nn.Identity()

    def forward(self, x, **kwargs):
        y, weights = self.self_attn(self.attn_norm(x), **kwargs)
        x = x + self.post_attention_layernorm(y)
        return x + self.post_feedforward_layernorm(self.mlp(self.mlp_norm(x))), weights


class NanoScalePreTrainedModel(PreTrainedModel):
    config_class = NanoScaleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoScaleLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        if config.n_experts:  # 4.57 refuses the name of a parameter that is not there
            self._keep_in_fp32_modules_strict = {"e_score_correction_bias"}

    @classmethod
    def _can_set_attn_implementation(cls):  # theirs looks for a phrase in this file, and 5.24 for another than 4.57
        return True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, NanoScaleRouter):
            nn.init.normal_(module.weight, 0.0, self.config.initializer_range)
            nn.init.zeros_(module.e_score_correction_bias)


class NanoScaleModel(NanoScalePreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NanoScaleLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NanoScaleRMSNorm(0, config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def rope(self, positions, dtype):
        """cos and sin, (B, 1, T, d/2), of positions (B, T)."""
        wide = torch.float32 if positions.device.type == "mps" else torch.float64
        d = self.config.head_dim
        rates = self.config.rope_theta ** (-torch.arange(0, d, 2, dtype=wide, device=positions.device) / d)
        angles = (positions.to(wide).unsqueeze(-1) * rates).unsqueeze(1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, output_attentions=None, output_hidden_states=None, cache_position=None, cache=None,
                **kwargs):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        config = self.config
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        use_cache = config.use_cache and not self.training if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training:  # a layer that runs twice would extend it twice
            cache, use_cache = None, False
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        if cache_position is None:
            past = 0 if cache is None else cache.get_seq_length()
            cache_position = torch.arange(x.size(1), device=x.device) + past
        if position_ids is None:
            position_ids = cache_position.unsqueeze(0)
        told = dict(config=config, inputs_embeds=x, input_embeds=x, attention_mask=attention_mask, cache=cache,
                    past_key_values=cache, cache_position=cache_position, position_ids=position_ids)
        mask = create_causal_mask(**{name: value for name, value in told.items() if name in MASK_ARGUMENTS})
        cos, sin = self.rope(position_ids, x.dtype)
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden, attentions = (), ()
        for layer in self.layers:
            hidden += (x,) if output_hidden_states else ()
            x, weights = layer(x, cos=cos, sin=sin, mask=mask, cache=cache, cache_position=cache_position,
                               output_attentions=output_attentions, **kwargs)
            attentions += (weights,) if output_attentions and weights is not None else ()  # sdpa warns, and has none
        x = self.norm(x)
        return BaseModelOutputWithPast(
            last_hidden_state=x, hidden_states=(*hidden, x) if output_hidden_states else None,
            attentions=attentions or None, **{CACHE: cache})


class NanoScaleForCausalLM(NanoScalePreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # where config.tie_word_embeddings

    def __init__(self, config):
        super().__init__(config)
        self.model = NanoScaleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, logits_to_keep=0, cache=None, **kwargs):
        out = self.model(input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache,
                         cache=cache, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, keep])
        loss = None
        if labels is not None:  # divides by num_items_in_batch, where Trainer says it in kwargs
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states,
                                      attentions=out.attentions, **{CACHE: getattr(out, CACHE)})
