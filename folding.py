"""
A model without the scale vectors that it only needed for training, and the folders that hold such a model.

Behind a Pre-Norm, diag(u) W diag(v) is a matrix like any other (norms.py), so the vectors go into the weights. What
stands behind a norm goes on into the next matrix where nothing non-linear comes between: DNP's u of v into o, its u
of up into down. The rest has to stay: DNP's u of q and k (RoPE follows) and of gate (silu follows), the γ of Gemma's
QK-norm and post-norms.

A folded model is a GPTConfig and a dict of fp32 tensors:

    wte, lm_head                          lm_head is missing where it is tied to wte
    blocks.0.attn.q, k, v, o              blocks.0.ffn.gate, up, down
    blocks.0.attn.q_scale, k_scale        blocks.0.ffn.gate_scale    blocks.0.attn_post, ffn_post    what has to stay
    blocks.0.attn_norm, ffn_norm, norm    the γ of Pre-Norms, where a Hugging Face Llama brings them along

In a mixture of experts the router's γ goes into the router, and each expert is an FFN of its own, all in one stack:

    blocks.0.ffn.router, bias             (E, n_embd) and (E,)
    blocks.0.ffn.experts.gate, up, down   (E, ...); gate_scale too
    blocks.0.ffn.shared.gate, up, down    and gate_scale, as a dense FFN
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from configurator import ConfigError, Count, Whole, check
from settings import GPTConfig

NORMED = ("norm", "dual_norm")  # placements that put a norm behind the linear map
FFN_MATRICES = ("gate", "up", "down")
# what a config.json for our own modeling file says beyond Llama's
NORM_SETTINGS = ("arch", "attn_placement", "ffn_placement", "qkv_norm", "scale_vectors")
MIXTURE = {"n_experts": Whole, "experts_per_token": Count, "n_shared_experts": Whole, "expert_dim": Whole,
           "router": Literal["softmax", "softmax_all", "sigmoid"]}


def ffns(block, prefix):
    """(prefix, FFN) of a block's FFN, or of its mixture's experts, which are one FFN of stacks, and shared experts."""
    if not block.config.n_experts:
        yield prefix, block.ffn
        return
    yield prefix + "experts.", block.ffn.experts
    if block.ffn.shared is not None:
        yield prefix + "shared.", block.ffn.shared


@torch.no_grad()
def fold(model):
    """
    The folded model of a GPT: (GPTConfig, tensors), products in fp64, rounded once to fp32. It computes the same
    function. A tied LM head with a scale vector before it gets a matrix of its own.
    """
    config, t = model.config, {"wte": model.wte}

    def branches_into(t, prefix, branches):
        """Fold all v, and DP's u; returns the u of DNP, which stand behind a norm."""
        behind = {}
        for c, u, v in branches.vectors():
            w = branches.weight[c].double()
            w = w if v is None else w * v.double().unsqueeze(-2)
            if u is not None and branches.placement == "dual":
                w = w * u.double().unsqueeze(-1)
            elif u is not None:
                behind[c] = u
            t[prefix + c] = w
        return behind

    for i, block in enumerate(model.blocks):
        p, attn = f"blocks.{i}.", block.attn
        u = branches_into(t, p + "attn.", attn.qkv)
        t[p + "attn.o"] = attn.o.double()
        if "v" in u:  # attention mixes tokens, not channels; each head of v serves n_head / n_kv_head heads of o
            u_v = u.pop("v").double().view(config.n_kv_head, config.d_head)
            u_v = u_v.repeat_interleave(config.n_head // config.n_kv_head, dim=0)
            t[p + "attn.o"] = t[p + "attn.o"] * u_v.flatten()
        t.update({f"{p}attn.{c}_scale": u_c for c, u_c in u.items()})
        if attn.qk_norm and attn.q_scale is not None:
            t[p + "attn.q_scale"], t[p + "attn.k_scale"] = attn.q_scale(), attn.k_scale()
        if config.n_experts:
            branches_into(t, p + "ffn.", block.ffn.router)
            t[p + "ffn.bias"] = block.ffn.bias
        for prefix, ffn in ffns(block, p + "ffn."):
            u = branches_into(t, prefix, ffn.gate_up)
            t[prefix + "down"] = ffn.down.double()
            if "up" in u:
                t[prefix + "down"] = t[prefix + "down"] * u.pop("up").double().unsqueeze(-2)
            t.update({f"{prefix}{c}_scale": u_c for c, u_c in u.items()})
        if config.arch == "gemma" and block.attn_post is not None:
            t[p + "attn_post"], t[p + "ffn_post"] = block.attn_post(), block.ffn_post()
    tied = config.tie_embeddings and not config.scale_vectors
    if not tied:
        branches_into(t, "", model.lm_head)

    scaled = any(name.endswith(("_scale", "_post")) for name in t)
    places = {"input": "input", "dual": "input", "norm": "norm", "dual_norm": "dual_norm" if scaled else "norm"}
    folded = replace(config, scale_vectors=scaled, heterogeneous=False, reparam="direct", placement="input",
                     attn_placement=places[config.attn_placement], ffn_placement=places[config.ffn_placement],
                     final_norm_role="input", expert_scales="shared", tie_embeddings=tied, dtype="float32")
    # clones, since a file cannot hold two tensors that share memory and nobody expects a fold to alias the model
    return folded, {name: x.detach().float().cpu().contiguous().clone() for name, x in t.items()}


@torch.no_grad()
def load(model, tensors):
    """
    Give a GPT with any scale vectors the weights of a folded model. Its vectors become what the tensors say, else 1,
    and the γ of a Pre-Norm goes into the weights where there are none. So it computes the same function, if it has
    the same norms. Raises ConfigError where tensors are missing, of another shape, or have no place in the model.
    """
    left = dict(tensors)

    def take(name, shape, optional=False):
        if name not in left and optional:
            return None
        if name not in left:
            raise ConfigError(f"there is no tensor {name}")
        if left[name].shape != torch.Size(shape):
            raise ConfigError(f"{name} has shape {list(left[name].shape)}, where {list(shape)} belongs")
        return left.pop(name)

    def shape(scale):
        return (scale.stack, scale.n) if scale.stack else (scale.n,)

    def set_gamma(scale, gamma, name):
        try:
            scale.set((torch.ones(scale.n) if gamma is None else gamma).expand(shape(scale)))
        except ValueError as e:
            raise ConfigError(f"{name}: {e}") from None

    def fill_branches(branches, prefix, norm, gamma):
        """gamma: that of the Pre-Norm before them, (n_embd,), or None; norm is its name."""
        for v in branches.v.values():
            set_gamma(v, gamma, norm)
        for c, w in branches.weight.items():
            if w is model.wte and gamma is not None and not branches.v and not (gamma == 1).all():
                raise ConfigError("the last norm's γ cannot go into an LM head that is tied to the token table; "
                                  "keep scale_vectors=True")
            if w is not model.wte:
                weight = take(prefix + c, w.shape)
                w.copy_(weight if gamma is None or branches.v else weight.double() * gamma.double())
        for c, u in branches.u.items():
            # DP's u has no norm before it and starts at 1; under gemma q_scale is the QK-norm's
            name = f"{prefix}{c}_scale"
            set_gamma(u, take(name, shape(u), optional=True) if branches.placement == "dual_norm" else None, name)

    def pre_norm(name):
        return name, take(name, (model.config.n_embd,), optional=True)

    model.wte.copy_(take("wte", model.wte.shape))
    for i, block in enumerate(model.blocks):
        p, attn = f"blocks.{i}.", block.attn
        fill_branches(attn.qkv, p + "attn.", *pre_norm(p + "attn_norm"))
        attn.o.copy_(take(p + "attn.o", attn.o.shape))
        norm = pre_norm(p + "ffn_norm")  # one for all that is behind it: router, experts, shared experts
        if model.config.n_experts:
            bias = take(p + "ffn.bias", block.ffn.bias.shape, optional=True)
            block.ffn.bias.copy_(torch.zeros(()) if bias is None else bias)
            fill_branches(block.ffn.router, p + "ffn.", *norm)
        for prefix, ffn in ffns(block, p + "ffn."):
            fill_branches(ffn.gate_up, prefix, *norm)
            ffn.down.copy_(take(prefix + "down", ffn.down.shape))
        output = {"attn.q_scale": attn.q_scale, "attn.k_scale": attn.k_scale} if attn.qk_norm else {}
        if model.config.arch == "gemma":
            output.update(attn_post=block.attn_post, ffn_post=block.ffn_post)
        for name, scale in output.items():
            if scale is not None:
                set_gamma(scale, take(p + name, shape(scale), optional=True), p + name)
    fill_branches(model.lm_head, "", *pre_norm("norm"))
    if left:
        raise ConfigError(f"{min(left)} has no place in a model with these norms and scale vectors")


# ---------------------------------------------------------------------------------------------------------------
# folders


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path.parent}: there is no {path.name}: neither an exported model nor a run") from None
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {e}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a model's: it holds no JSON object")
    return content


def read_config(folder):
    """
    (GPTConfig, tokenizer) of a folder that export.py wrote, or of a Hugging Face Llama or Mixtral; tokenizer is
    'bytes', 'gpt2', or None where the folder is not ours. Raises ConfigError for what is neither or what nanoScale
    cannot represent.
    """
    path = Path(folder) / "config.json"
    there = read_json(path)
    try:
        if there.get("format") == "nanoscale":
            config, tokenizer = GPTConfig(**there["settings"]), there["tokenizer"]
        elif "model_type" not in there:
            raise ConfigError(f"{path} is neither an exported model's nor a Hugging Face model's")
        else:
            config, tokenizer = from_hf(there), there.get("nanoscale_tokenizer")
        for name, hint in MIXTURE.items():
            check(name, getattr(config, name), hint)
        return config, tokenizer
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}" if str(path) not in str(e) else str(e)) from None
    except KeyError as e:
        raise ConfigError(f"{path}: {e.args[0]!r} is missing") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise ConfigError(f"{path}: {e}") from None


def read_tensors(folder):
    """The tensors of such a folder, in fp32 and by our names. Raises ConfigError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    files = sorted({*read_json(index).get("weight_map", {}).values()}) if index.exists() else ["model.safetensors"]
    tensors = {}
    for name in files:
        try:
            tensors.update(load_file(folder / name))
        except FileNotFoundError:
            raise ConfigError(f"{folder}: there is no {name}; only weights in safetensors are read") from None
        except (SafetensorError, OSError) as e:
            raise ConfigError(f"{folder / name} is cut off or damaged: {e}") from None
    for name, x in tensors.items():
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ConfigError(f"{folder}: {name} is {x.dtype}: quantised weights are not read")
    there = read_json(folder / "config.json")
    if there.get("format") != "nanoscale":
        tensors = rename_from_hf(tensors, there, folder)
    return {name: x.float() for name, x in tensors.items()}


# Ours -> Hugging Face's, whose block 0 is model.layers.0. "gemma3_text" has two norms more, and "nanoscale", our own
# modeling file, follows its names and glm4_moe's. {e} counts experts: on disk each has matrices of its own.
HF_TOP = {"wte": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "norm": "model.norm.weight"}
HF_BLOCK = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.o_proj", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj",
            "ffn.down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HF_EXPERTS = {"ffn.router": "mlp.gate", **{f"ffn.experts.{c}": f"mlp.experts.{{e}}.{c}_proj" for c in FFN_MATRICES}}
HF_MORE = {
    "llama": {},
    "gemma3_text": {"attn.q_scale": "self_attn.q_norm", "attn.k_scale": "self_attn.k_norm",
                    "attn_post": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
                    "ffn_post": "post_feedforward_layernorm"},
    "mixtral": {"ffn.router": "block_sparse_moe.gate", "ffn.experts.gate": "block_sparse_moe.experts.{e}.w1",
                "ffn.experts.up": "block_sparse_moe.experts.{e}.w3",
                "ffn.experts.down": "block_sparse_moe.experts.{e}.w2"},
    "qwen2_moe": {**HF_EXPERTS, "ffn.shared_gate": "mlp.shared_expert_gate",
                  **{f"ffn.shared.{c}": f"mlp.shared_expert.{c}_proj" for c in FFN_MATRICES}},
    "glm4_moe": {**HF_EXPERTS, "ffn.bias": "mlp.gate.e_score_correction_bias",
                 **{f"ffn.shared.{c}": f"mlp.shared_experts.{c}_proj" for c in FFN_MATRICES}},
}
HF_MORE["nanoscale"] = {**HF_MORE["glm4_moe"], **HF_MORE["gemma3_text"], "ffn.gate_scale": "mlp.gate_norm",
                        "ffn.experts.gate_scale": "mlp.experts.{e}.gate_norm",
                        "ffn.shared.gate_scale": "mlp.shared_experts.gate_norm"}

# where the config.json of a mixture has the number of experts and the width of one
HF_SHAPE = {"mixtral": ("num_local_experts", "intermediate_size"),
            "qwen2_moe": ("num_experts", "moe_intermediate_size"),
            "glm4_moe": ("n_routed_experts", "moe_intermediate_size")}
# and what it has to say, so that the class computes what a mixture of ours does
HF_FIXED = {"mixtral": {"sliding_window": None},
            "qwen2_moe": {"qkv_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
                          "use_sliding_window": False},
            "glm4_moe": {"use_qk_norm": False, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1,
                         "norm_topk_prob": True, "routed_scaling_factor": 1.0}}


def hf_names(model_type, n_layer):
    """Hugging Face's name for each of ours, as a dict."""
    block = {**HF_BLOCK, **HF_MORE[model_type]}
    return {**HF_TOP, **{f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}{'' if ours == 'ffn.bias' else '.weight'}"
                         for i in range(n_layer) for ours, theirs in block.items()}}


def is_norm(name):
    """Whether a tensor of ours is a γ."""
    return name.endswith(("norm", "_scale", "_post"))


def rename_from_hf(tensors, there, folder):
    """Our names for a Hugging Face folder's tensors, and the ways of Gemma and Qwen undone. Raises ConfigError."""
    kind, left, ours = there["model_type"], dict(tensors), {}
    if there.get("tie_word_embeddings", kind == "gemma3_text"):
        left.pop("lm_head.weight", None)
    for name, theirs in hf_names(kind, there["num_hidden_layers"]).items():
        experts = range(there[HF_SHAPE[kind][0]] if kind in HF_SHAPE else there.get("n_experts", 0))
        each = [theirs.format(e=e) for e in experts] if "{e}" in theirs else [theirs]
        found = [left.pop(x).float() for x in each if x in left]
        if found and (len(found) < len(each) or len({x.shape for x in found}) > 1):
            raise ConfigError(f"{folder}: {each[0]} and the other experts' are not {len(each)} of one shape")
        if found:
            ours[name] = torch.stack(found) if "{e}" in theirs else found[0]
    for name in left:
        if not name.endswith("rotary_emb.inv_freq"):  # old Llamas stored the table that rope_theta gives
            raise ConfigError(f"{folder}: nanoScale's models have no {name}")
    if kind == "gemma3_text":
        ours = {name: x + 1 if is_norm(name) else x for name, x in ours.items()}
        ours["wte"] = ours["wte"] * there["hidden_size"] ** 0.5
    if kind == "qwen2_moe":  # a gate of zeros halves the shared experts
        if any(ours.pop(name).any() for name in [*ours] if name.endswith("shared_gate")):
            raise ConfigError(f"{folder}: its shared experts have a gate, which nanoScale's have not")
        ours = {name: x / 2 if name.endswith("shared.down") else x for name, x in ours.items()}
    # a class that always has shared experts has 0-wide ones where there are none
    return {name: x for name, x in ours.items() if x.numel()}


def from_hf(there):
    """GPTConfig for a Hugging Face config.json, a dict. Raises ConfigError for what a GPT cannot represent."""
    kind = there["model_type"]
    if kind not in HF_MORE:
        raise ConfigError(f"model_type is {kind!r}; nanoScale reads {', '.join(HF_MORE)}")
    # what Llama and Gemma have where config.json says nothing; the mixtures' classes differ, so theirs must say
    there = there if kind in HF_SHAPE else {"rope_theta": 10000.0, "rms_norm_eps": 1e-6, **there}
    rope = there.get("rope_parameters") or {}
    if kind == "gemma3_text":
        rope = rope.get("full_attention") or rope
    scaling = there.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", rope.get("rope_type", "default")))
    count = {key: check(key, there[key], Count) for key in (
        "num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size", "vocab_size")}
    n_head = count["num_attention_heads"]
    n_kv_head = check("num_key_value_heads", there.get("num_key_value_heads") or n_head, Count)
    d_head = check("head_dim", there.get("head_dim") or count["hidden_size"] // n_head, Count)
    activation = there.get("hidden_activation" if kind == "gemma3_text" else "hidden_act", "silu")
    part = 0.5 if kind == "glm4_moe" else 1  # of each head, unless config.json says something
    wrong = {
        "a bias in attention": there.get("attention_bias"),
        "a bias in the FFN": there.get("mlp_bias"),
        f"RoPE of type {rope_type}": rope_type != "default",
        "RoPE on a part of each head": rope.get("partial_rotary_factor", there.get("partial_rotary_factor", part)) != 1,
        f"activation {activation}": activation not in ("silu", "swish"),
        "quantised weights": there.get("quantization_config"),
        "soft-capped logits": there.get("final_logit_softcapping") or there.get("attn_logit_softcapping"),
        "bidirectional attention": there.get("use_bidirectional_attention"),
        "sliding windows": kind == "gemma3_text" and set(there.get("layer_types") or "?") != {"full_attention"},
        "attention scores of another scale": kind == "gemma3_text" and there.get("query_pre_attn_scalar") != d_head,
    }
    for what, has in wrong.items():
        if has:
            raise ConfigError(f"it has {what}, which nanoScale's models have not")
    for name, value in HF_FIXED.get(kind, {}).items():
        if there.get(name) != value:
            raise ConfigError(f"its {name} is {there.get(name)!r}, and nanoScale's models compute what {value!r} does")
    ours = dict(arch="gemma" if kind == "gemma3_text" else "llama")
    if kind == "nanoscale":
        ours = {name: there[name] for name in NORM_SETTINGS} | {name: there[name] for name in MIXTURE if name in there}
    if kind in HF_SHAPE:
        names = (*HF_SHAPE[kind], "num_experts_per_tok")
        n_experts, expert_dim, k = (check(name, there[name], Count) for name in names)
        ours.update(n_experts=n_experts, expert_dim=expert_dim, experts_per_token=k,
                    router="sigmoid" if kind == "glm4_moe" else "softmax")
    if kind == "glm4_moe":
        ours["n_shared_experts"] = there["n_shared_experts"]
    if kind == "qwen2_moe":
        shared = check("shared_expert_intermediate_size", there["shared_expert_intermediate_size"], Whole)
        if shared % expert_dim:
            raise ConfigError(f"its shared expert is {shared} wide, which is no multiple of an expert's {expert_dim}")
        ours.update(n_shared_experts=shared // expert_dim,
                    router="softmax" if check("norm_topk_prob", there["norm_topk_prob"], bool) else "softmax_all")
    return GPTConfig(
        n_layer=count["num_hidden_layers"], n_head=n_head, n_kv_head=n_kv_head, d_head=d_head,
        n_embd=count["hidden_size"], ffn_dim=0 if kind in HF_SHAPE else count["intermediate_size"],
        vocab_size=count["vocab_size"], block_size=there.get("max_position_embeddings", 2048),
        tie_embeddings=there.get("tie_word_embeddings", kind == "gemma3_text"),
        rope_theta=float({**there, **rope}["rope_theta"]), norm_eps=there["rms_norm_eps"], **ours)


# ---------------------------------------------------------------------------------------------------------------
# train.py --init_from

SHAPE = ("arch", "n_layer", "n_head", "n_kv_head", "d_head", "n_embd", "ffn_dim", "vocab_size", "tie_embeddings",
         "rope_theta", "norm_eps", *MIXTURE)


def adopt(s):
    """
    Set the shape in train.py's settings from the folder s.init_from: what SHAPE names, and qkv_norm where it matters.
    Scale vectors, placements and block_size stay the user's. A resumed run has its shape from its own folder, so that
    s.init_from may be gone by then.

    Returns (tokenizer or None, a line to print or ""): the line says where the settings add norms, so that no choice
    of weights computes the folder's function. Raises ConfigError where settings contradict the folder, and where they
    drop norms that the weights were trained with.
    """
    run = Path(s.out_dir) / "config.json"
    if s.resume and run.exists():
        there = read_json(run).get("settings", {})
        take_shape(s, {name: there[name] for name in (*SHAPE, "qkv_norm") if name in there}, run)
        return None, ""
    source, tokenizer = read_config(s.init_from)
    has = {"attn": source.attn_placement in NORMED, "ffn": source.ffn_placement in NORMED}
    names = SHAPE + (("qkv_norm",) if has["attn"] or source.arch == "gemma" else ())
    take_shape(s, {name: getattr(source, name) for name in names}, s.init_from)
    new = []
    for part in has:
        mine = getattr(s, f"{part}_placement")
        mine = s.placement if mine == "same" else mine
        if has[part] and mine not in NORMED:
            raise ConfigError(f"{s.init_from} was trained with norms behind its {part} branches, and {part}_placement "
                              f"{mine!r} has none: set it to dual_norm or norm")
        if mine in NORMED and not has[part]:
            new.append(f"{part}_placement={mine}")
    return tokenizer, (f"{' and '.join(new)}: norms that {s.init_from} was trained without. The first loss is not "
                       f"that model's" if new else "")


def take_shape(s, shape, where):
    """Set what shape, a dict, names in the settings s. Raises ConfigError where s has neither that nor its default."""
    for name, theirs in shape.items():
        mine = getattr(s, name)
        if mine not in (theirs, type(s).__dataclass_fields__[name].default):
            raise ConfigError(f"{name} {mine!r} contradicts {where}, which has {theirs!r}; leave it out")
        setattr(s, name, theirs)
