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
"""

import json
from dataclasses import replace
from pathlib import Path

import torch

from configurator import ConfigError, Count, check
from model import GPTConfig

NORMED = ("norm", "dual_norm")  # placements that put a norm behind the linear map


def refuse_mixture(model):
    if model.config.n_experts:
        raise ConfigError("a mixture of experts has no folded form here: it can be neither exported nor started from "
                          "a folder of weights")


@torch.no_grad()
def fold(model):
    """
    The folded model of a GPT: (GPTConfig, tensors), products in fp64, rounded once to fp32. It computes the same
    function. A tied LM head with a scale vector before it gets a matrix of its own.
    """
    refuse_mixture(model)
    config, t = model.config, {"wte": model.wte}

    def branches_into(t, prefix, branches):
        """Fold all v, and DP's u; returns the u of DNP, which stand behind a norm."""
        behind = {}
        for c, u, v in branches.vectors():
            w = branches.weight[c].double()
            w = w if v is None else w * v.double()
            if u is not None and branches.placement == "dual":
                w = w * u.double().unsqueeze(-1)
            elif u is not None:
                behind[c] = u
            t[prefix + c] = w
        return behind

    for i, block in enumerate(model.blocks):
        p, attn, ffn = f"blocks.{i}.", block.attn, block.ffn
        u = branches_into(t, p + "attn.", attn.qkv)
        t[p + "attn.o"] = attn.o.weight.double()
        if "v" in u:  # attention mixes tokens, not channels; each head of v serves n_head / n_kv_head heads of o
            u_v = u.pop("v").double().view(config.n_kv_head, config.d_head)
            u_v = u_v.repeat_interleave(config.n_head // config.n_kv_head, dim=0)
            t[p + "attn.o"] = t[p + "attn.o"] * u_v.flatten()
        t.update({f"{p}attn.{c}_scale": u_c for c, u_c in u.items()})
        if attn.qk_norm and attn.q_scale is not None:
            t[p + "attn.q_scale"], t[p + "attn.k_scale"] = attn.q_scale(), attn.k_scale()
        u = branches_into(t, p + "ffn.", ffn.gate_up)
        t[p + "ffn.down"] = ffn.down.weight.double()
        if "up" in u:
            t[p + "ffn.down"] = t[p + "ffn.down"] * u.pop("up").double()
        t.update({f"{p}ffn.{c}_scale": u_c for c, u_c in u.items()})
        if config.arch == "gemma" and block.attn_post is not None:
            t[p + "attn_post"], t[p + "ffn_post"] = block.attn_post(), block.ffn_post()
    tied = config.tie_embeddings and not config.scale_vectors
    if not tied:
        branches_into(t, "", model.lm_head)

    scaled = any(name.endswith(("_scale", "_post")) for name in t)
    places = {"input": "input", "dual": "input", "norm": "norm", "dual_norm": "dual_norm" if scaled else "norm"}
    folded = replace(config, scale_vectors=scaled, heterogeneous=False, reparam="direct", placement="input",
                     attn_placement=places[config.attn_placement], ffn_placement=places[config.ffn_placement],
                     final_norm_role="input", tie_embeddings=tied, dtype="float32")
    # clones, since a file cannot hold two tensors that share memory and nobody expects a fold to alias the model
    return folded, {name: x.detach().float().cpu().contiguous().clone() for name, x in t.items()}


@torch.no_grad()
def load(model, tensors):
    """
    Give a GPT with any scale vectors the weights of a folded model. Its vectors become what the tensors say, else 1,
    and the γ of a Pre-Norm goes into the weights where there are none. So it computes the same function, if it has
    the same norms. Raises ConfigError where tensors are missing, of another shape, or have no place in the model.
    """
    refuse_mixture(model)
    left = dict(tensors)

    def take(name, shape, optional=False):
        if name not in left and optional:
            return None
        if name not in left:
            raise ConfigError(f"there is no tensor {name}")
        if left[name].shape != torch.Size(shape):
            raise ConfigError(f"{name} has shape {list(left[name].shape)}, where {list(shape)} belongs")
        return left.pop(name)

    def set_gamma(scale, gamma, name):
        try:
            scale.set(torch.ones(scale.n) if gamma is None else gamma)
        except ValueError as e:
            raise ConfigError(f"{name}: {e}") from None

    def fill_branches(branches, prefix, norm):
        gamma = take(norm, (model.config.n_embd,), optional=True)
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
            set_gamma(u, take(name, (u.n,), optional=True) if branches.placement == "dual_norm" else None, name)

    model.wte.copy_(take("wte", model.wte.shape))
    for i, block in enumerate(model.blocks):
        p, attn, ffn = f"blocks.{i}.", block.attn, block.ffn
        fill_branches(attn.qkv, p + "attn.", p + "attn_norm")
        attn.o.weight.copy_(take(p + "attn.o", attn.o.weight.shape))
        fill_branches(ffn.gate_up, p + "ffn.", p + "ffn_norm")
        ffn.down.weight.copy_(take(p + "ffn.down", ffn.down.weight.shape))
        output = {"attn.q_scale": attn.q_scale, "attn.k_scale": attn.k_scale} if attn.qk_norm else {}
        if model.config.arch == "gemma":
            output.update(attn_post=block.attn_post, ffn_post=block.ffn_post)
        for name, scale in output.items():
            if scale is not None:
                set_gamma(scale, take(p + name, (scale.n,), optional=True), p + name)
    fill_branches(model.lm_head, "", "norm")
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
    (GPTConfig, tokenizer) of a folder that export.py wrote, or of a Hugging Face Llama; tokenizer is 'bytes', 'gpt2',
    or None where the folder is not ours. Raises ConfigError for what is neither or what nanoScale cannot represent.
    """
    path = Path(folder) / "config.json"
    there = read_json(path)
    try:
        if there.get("format") == "nanoscale":
            return GPTConfig(**there["settings"]), there["tokenizer"]
        if "model_type" not in there:
            raise ConfigError(f"{path} is neither an exported model's nor a Hugging Face model's")
        return from_hf(there), there.get("nanoscale_tokenizer")
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
# modeling file, follows its names.
HF_TOP = {"wte": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "norm": "model.norm.weight"}
HF_BLOCK = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.o_proj", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj",
            "ffn.down": "mlp.down_proj", "attn_norm": "input_layernorm"}
HF_NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3_text": {"attn.q_scale": "self_attn.q_norm", "attn.k_scale": "self_attn.k_norm",
                    "attn_post": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
                    "ffn_post": "post_feedforward_layernorm"},
}
HF_NORMS["nanoscale"] = {**HF_NORMS["gemma3_text"], "ffn.gate_scale": "mlp.gate_norm"}


def hf_names(model_type, n_layer):
    """Hugging Face's name for each of ours, as a dict."""
    block = {**HF_BLOCK, **HF_NORMS[model_type]}
    return {**HF_TOP, **{f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}.weight"
                         for i in range(n_layer) for ours, theirs in block.items()}}


def is_norm(name):
    """Whether a tensor of ours is a γ."""
    return name.endswith(("norm", "_scale", "_post"))


def rename_from_hf(tensors, there, folder):
    """Our names for a Hugging Face folder's tensors, and Gemma's two conventions undone. Raises ConfigError."""
    names = {theirs: ours for ours, theirs in hf_names(there["model_type"], there["num_hidden_layers"]).items()}
    if there.get("tie_word_embeddings", there["model_type"] == "gemma3_text"):
        tensors.pop("lm_head.weight", None)
    ours = {}
    for name, x in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):  # old Llamas stored the table that rope_theta gives
            continue
        if name not in names:
            raise ConfigError(f"{folder}: nanoScale's models have no {name}")
        ours[names[name]] = x.float()
    if there["model_type"] == "gemma3_text":
        ours = {name: x + 1 if is_norm(name) else x for name, x in ours.items()}
        ours["wte"] = ours["wte"] * there["hidden_size"] ** 0.5
    return ours


def from_hf(there):
    """GPTConfig for a Hugging Face config.json, a dict. Raises ConfigError for what a GPT cannot represent."""
    kind = there["model_type"]
    if kind not in HF_NORMS:
        raise ConfigError(f"model_type is {kind!r}; nanoScale reads {', '.join(HF_NORMS)}")
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
    wrong = {
        "a bias in attention": there.get("attention_bias"),
        "a bias in the FFN": there.get("mlp_bias"),
        f"RoPE of type {rope_type}": rope_type != "default",
        "RoPE on a part of each head": rope.get("partial_rotary_factor", there.get("partial_rotary_factor", 1)) != 1,
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
    ours = {name: there[name] for name in ("arch", "attn_placement", "ffn_placement", "qkv_norm", "scale_vectors")
            } if kind == "nanoscale" else dict(arch="llama" if kind == "llama" else "gemma")
    return GPTConfig(
        n_layer=count["num_hidden_layers"], n_head=n_head, n_kv_head=n_kv_head, d_head=d_head,
        n_embd=count["hidden_size"], ffn_dim=count["intermediate_size"], vocab_size=count["vocab_size"],
        block_size=there.get("max_position_embeddings", 2048),
        tie_embeddings=there.get("tie_word_embeddings", kind == "gemma3_text"),
        rope_theta=float(rope.get("rope_theta", there.get("rope_theta", 10000.0))),
        norm_eps=there.get("rms_norm_eps", 1e-6), **ours)


# ---------------------------------------------------------------------------------------------------------------
# train.py --init_from

SHAPE = ("arch", "n_layer", "n_head", "n_kv_head", "d_head", "n_embd", "ffn_dim", "vocab_size", "tie_embeddings",
         "rope_theta", "norm_eps")


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
