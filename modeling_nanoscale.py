"""
nanoScale's models in Hugging Face transformers, where none of its own classes can compute them: with norms after q, k,
v, gate, up or the LM head (DNP), in Gemma's layout, or with a shared expert or a router other than Mixtral's.

It is transformers' Llama with other layers. The scale vectors are folded: only those that no weight can absorb are
left. export.py puts this file next to the weights; load them with trust_remote_code=True. It needs nothing else and
runs on transformers 4.57 to 5.24. For PEFT, name the modules: target_modules=["q_proj", "v_proj"], or "all-linear".
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama import modeling_llama as llama


class NanoScaleConfig(llama.LlamaConfig):
    """Llama's settings, and nanoScale's under their own names."""

    model_type = "nanoscale"
    base_model_tp_plan = None  # Llama's would split the channels that a norm covers

    arch: str = "llama"  # 'gemma' adds norms of q and k, and one after each sublayer
    # The norms after branches: 'input' is none, 'dual_norm' one with a scale vector, 'norm' one without. The vectors of
    # v and up are in the next matrix. Where all branches of a sublayer have a norm, none stands before them.
    attn_placement: str = "input"  # of q and k
    v_placement: str = "input"
    ffn_placement: str = "input"  # of gate and up
    head_placement: str = "input"
    qkv_norm: str = "head"  # norms of q, k and v are over each 'head', or over the 'full' width
    qk_norm: bool = False  # norms of q and k, whose γ all heads share
    scale_vectors: bool = True  # False for none
    n_experts: int = 0  # 0 for a dense model
    experts_per_token: int = 2
    expert_dim: int = 0
    shared_dim: int = 0  # width of the expert that every token goes through; 0 for none
    # Weights of the chosen experts: a 'softmax' over their logits, their shares of a softmax over all ('softmax_all'),
    # or their 'sigmoid's divided by the sum of these.
    router: str = "softmax"

    def validate(self):
        pass  # in transformers 5, Llama's wants the heads to divide the width


class NanoScaleRMSNorm(nn.Module):
    """γ ⊙ x / sqrt(mean(x²) + ε), in fp32. group: how many channels a mean covers. n: length of γ; 0 for none."""

    def __init__(self, group, eps, n=0):
        super().__init__()
        self.group, self.eps = group, eps
        self.register_parameter("weight", nn.Parameter(torch.ones(n)) if n else None)

    def forward(self, x):
        wide = F.rms_norm(x.float().unflatten(-1, (-1, self.group)), (self.group,), eps=self.eps)
        if self.weight is not None:
            wide = wide * self.weight.float().view(-1, self.group)
        return wide.flatten(-2).to(x.dtype)


def norm_after(config, placement, n, group=None, own_u=True):
    """The norm after a branch of width n, if there is one. own_u: False where u is folded into the next matrix."""
    if placement == "input":
        return nn.Identity()
    scaled = own_u and placement == "dual_norm" and config.scale_vectors
    return NanoScaleRMSNorm(group or n, 1e-16, n if scaled else 0)  # ε: see norms.py


class NanoScaleAttention(llama.LlamaAttention):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        nq, nkv = self.q_proj.out_features, self.k_proj.out_features
        head = config.head_dim if config.qkv_norm == "head" else None
        self.q_norm = norm_after(config, config.attn_placement, nq, head)
        self.k_norm = norm_after(config, config.attn_placement, nkv, head)
        self.v_norm = norm_after(config, config.v_placement, nkv, head, own_u=False)
        if (config.arch == "gemma" or config.qk_norm) and config.attn_placement == "input":
            self.q_norm, self.k_norm = (
                NanoScaleRMSNorm(group, config.rms_norm_eps, group if config.scale_vectors else 0)
                for group in (head or nq, head or nkv))

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **kwargs):
        B, T, _ = hidden_states.shape
        cache = kwargs.pop("cache", kwargs.pop("past_key_values", None))  # its name before transformers 5.24
        branches = (self.q_proj, self.q_norm), (self.k_proj, self.k_norm), (self.v_proj, self.v_norm)
        q, k, v = (norm(proj(hidden_states)).view(B, T, -1, self.head_dim).transpose(1, 2) for proj, norm in branches)
        q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, {"cache_position": kwargs.get("cache_position")})
        attend = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation, llama.eager_attention_forward)
        y, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights


class NanoScaleMLP(nn.Module):
    def __init__(self, config, m):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, m, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, m, bias=False)
        self.down_proj = nn.Linear(m, config.hidden_size, bias=False)
        self.gate_norm = norm_after(config, config.ffn_placement, m)
        self.up_norm = norm_after(config, config.ffn_placement, m, own_u=False)

    def forward(self, h):
        return self.down_proj(F.silu(self.gate_norm(self.gate_proj(h))) * self.up_norm(self.up_proj(h)))


class NanoScaleRouter(nn.Module):
    """h: (tokens, n). Returns each token's K experts and their weights, both (tokens, K). In fp32."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(config.initializer_range * torch.randn(config.n_experts, config.hidden_size))
        # only for the choice; a buffer, since it has no gradient, which stays in fp32 when a model is loaded in bf16
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_experts, dtype=torch.float32))
        normed = config.ffn_placement == "input"  # then h is normed already
        self.norm = nn.Identity() if normed else NanoScaleRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, h):
        kind, logits = self.config.router, F.linear(self.norm(h.float()), self.weight.float())
        scores = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
        chosen = (scores + self.e_score_correction_bias).topk(self.config.experts_per_token).indices
        weights = logits.gather(1, chosen).softmax(-1) if kind == "softmax" else scores.gather(1, chosen)
        return chosen, weights / weights.sum(-1, keepdim=True) if kind == "sigmoid" else weights


class NanoScaleMoE(nn.Module):
    """Each token goes through the K experts with the highest scores, and through the shared expert."""

    def __init__(self, config):
        super().__init__()
        self.gate = NanoScaleRouter(config)
        self.experts = nn.ModuleList(NanoScaleMLP(config, config.expert_dim) for _ in range(config.n_experts))
        self.shared_experts = NanoScaleMLP(config, config.shared_dim) if config.shared_dim else None

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
        # a norm ignores the length of its input, so the one before branches that all end in a norm is left out
        self.attn_norm = NanoScaleRMSNorm(n, eps) if "input" in placements else nn.Identity()
        self.mlp_norm = NanoScaleRMSNorm(n, eps) if config.ffn_placement == "input" else nn.Identity()
        gemma, scaled = config.arch == "gemma", n if config.scale_vectors else 0
        self.attn_post_norm = NanoScaleRMSNorm(n, eps, scaled) if gemma else nn.Identity()
        self.mlp_post_norm = NanoScaleRMSNorm(n, eps, scaled) if gemma else nn.Identity()

    def forward(self, hidden_states, **kwargs):
        y, _ = self.self_attn(self.attn_norm(hidden_states), **kwargs)
        x = hidden_states + self.attn_post_norm(y)
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


class NanoScaleHead(nn.Linear):
    """The LM head, and under DNP its norm over the vocabulary."""

    def __init__(self, config):
        super().__init__(config.hidden_size, config.vocab_size, bias=False)
        self.norm = norm_after(config, config.head_placement, config.vocab_size)

    def forward(self, h):
        return self.norm(super().forward(h))


class NanoScalePreTrainedModel(llama.LlamaPreTrainedModel):
    config_class = NanoScaleConfig
    _no_split_modules = ["NanoScaleLayer"]
    _can_record_outputs = {"hidden_states": NanoScaleLayer, "attentions": NanoScaleAttention}


class NanoScaleModel(NanoScalePreTrainedModel, llama.LlamaModel):
    def __init__(self, config):
        PreTrainedModel.__init__(self, config)  # not Llama's, which makes Llama's layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NanoScaleLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NanoScaleRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = llama.LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class NanoScaleForCausalLM(NanoScalePreTrainedModel, llama.LlamaForCausalLM):
    def __init__(self, config):
        PreTrainedModel.__init__(self, config)
        self.model = NanoScaleModel(config)
        self.lm_head = NanoScaleHead(config)
        self.post_init()
        # Trainer's label_smoothing_factor shifts the labels only for classes whose name is in this table
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["nanoscale"] = "NanoScaleForCausalLM"

    def resize_token_embeddings(self, *args, **kwargs):
        if self.config.head_placement != "input":
            raise ValueError("This LM head has a norm over the vocabulary, so that new tokens would change the logits "
                             "of all others. It cannot be resized.")
        return super().resize_token_embeddings(*args, **kwargs)
