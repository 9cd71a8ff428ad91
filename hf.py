"""
What leaves the house and what comes in: a model folded, the folders that hold one, Hugging Face's names for it.

diag(u) W diag(v) is a matrix like any other (norms.py), so vectors that a model only needed for training go into the
weights. What stands after a norm goes on into the next matrix where nothing non-linear comes between: DNP's u of v into
o, its u of up into down. The rest has to stay: DNP's u of q and k (RoPE follows) and of gate (silu follows), the γ of
Gemma's QK-norm and post-norms.

A folded model is a GPTConfig and a dict of fp32 tensors:

    wte, lm_head                          lm_head is missing where it is tied to wte
    blocks.0.attn.q, k, v, o              blocks.0.ffn.gate, up, down
    blocks.0.attn.q_scale, k_scale        blocks.0.ffn.gate_scale    blocks.0.attn_post, ffn_post    what has to stay
    blocks.0.attn_norm, ffn_norm, norm    the γ of Pre-Norms, where a Hugging Face Llama brings them along

In a mixture of experts the router's γ goes into the router, and each expert is an FFN of its own, all in one stack:

    blocks.0.ffn.router, bias             (E, n_embd) and (E,)
    blocks.0.ffn.experts.gate, up, down   (E, ...); gate_scale too
    blocks.0.ffn.shared.gate, up, down    and gate_scale, as a dense FFN

Knows model.py, settings.py, runs.py and configurator.py. sample.py, export.py, bench.py and train.py take from here.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import get_type_hints

import torch

from configurator import ConfigError, check, open_file, read_json
from model import GPT
from runs import check_settings, load_checkpoint
from settings import GPTConfig, Settings, gpt_config

NORMED = ("norm", "dual_norm")  # placements that put a norm after the linear map
TYPES = get_type_hints(GPTConfig, include_extras=True)


def parts(model):
    """
    What a GPT is made of, by a folded model's names: ({prefix: (Branches, name of the norm before them)},
    {name: matrix}, {name: ScaleVector}). Raises ConfigError where it has a parameter that is none of these.
    """
    branches, matrices, scales = {"": (model.lm_head, "norm")}, {"wte": model.wte}, {}
    for i, block in enumerate(model.blocks):
        p, attn, ffns = f"blocks.{i}.", block.attn, {"": block.ffn}
        branches[p + "attn."], matrices[p + "attn.o"] = (attn.qkv, p + "attn_norm"), attn.o
        if attn.qk_norm:
            scales[p + "attn.q_scale"], scales[p + "attn.k_scale"] = attn.q_scale, attn.k_scale
        if model.config.arch == "gemma":
            scales[p + "attn_post"], scales[p + "ffn_post"] = block.attn_post, block.ffn_post
        if model.config.n_experts:
            branches[p + "ffn."], matrices[p + "ffn.bias"] = (block.ffn.router, p + "ffn_norm"), block.ffn.bias
            ffns = {"experts.": block.ffn.experts, "shared.": block.ffn.shared}
        for kind, ffn in ffns.items():
            if ffn is not None:
                branches[f"{p}ffn.{kind}"], matrices[f"{p}ffn.{kind}down"] = (ffn.gate_up, p + "ffn_norm"), ffn.down
    scales = {name: scale for name, scale in scales.items() if scale is not None}
    known = {*matrices.values(), *(p for scale in scales.values() for p in scale.parameters())}
    for b, _ in branches.values():
        known.update(p for part in (b.weight, b.u, b.v) for p in part.parameters())
    for name, p in model.named_parameters():
        if p not in known:
            raise ConfigError(f"hf.py does not know what {name} does in this model; teach it to parts, fold and load")
    return branches, matrices, scales


@torch.no_grad()
def fold(model):
    """
    The folded model of a GPT: (GPTConfig, tensors), products in fp64, rounded once to fp32. It computes the same
    function. A tied LM head with a scale vector before it gets a matrix of its own. Raises ConfigError where the model
    has a parameter or a placement that is not known here.
    """
    config = model.config
    branches, matrices, scales = parts(model)
    t = {name: w.double() for name, w in matrices.items()} | {name: scale() for name, scale in scales.items()}
    tied = config.tie_embeddings and not config.scale_vectors
    if tied:
        del branches[""]
    for prefix, (b, _) in branches.items():
        for c, u, v in b.vectors():
            w = b.weight[c].double()
            w = w if v is None else w * v.double().unsqueeze(-2)
            if u is not None and c not in b.normed:
                w = w * u.double().unsqueeze(-1)
            elif u is not None and c == "v":
                # attention mixes tokens, not channels; each head of v serves n_head / n_kv_head heads of o
                heads = u.double().view(config.n_kv_head, config.d_head)
                heads = heads.repeat_interleave(config.n_head // config.n_kv_head, dim=0)
                t[prefix + "o"] = t[prefix + "o"] * heads.flatten()
            elif u is not None and c == "up":
                t[prefix + "down"] = t[prefix + "down"] * u.double().unsqueeze(-2)
            elif u is not None:
                t[f"{prefix}{c}_scale"] = u
            t[prefix + c] = w

    scaled = any(is_norm(name) for name in t)
    normed = {"input": "input", "dual": "input", "norm": "norm", "dual_norm": "dual_norm" if scaled else "norm"}
    places = {}
    for name in ("attn_placement", "v_placement", "ffn_placement"):
        places[name] = normed.get(getattr(config, name))
        if places[name] is None:
            raise ConfigError(f"hf.py does not know {name} {getattr(config, name)!r}; teach it to fold and load")
    folded = replace(config, scale_vectors=scaled, heterogeneous=False, reparam="direct", placement="input", **places,
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

    def take(name, shape, default=None):
        x = left.pop(name, default)
        if x is None:
            raise ConfigError(f"there is no tensor {name}")
        if x.shape != torch.Size(shape):
            raise ConfigError(f"{name} has shape {list(x.shape)}, where {list(shape)} belongs")
        return x

    def set_gamma(scale, name, gamma=None):
        shape = (scale.stack, scale.n) if scale.stack else (scale.n,)
        gamma = take(name, shape, torch.ones(shape)) if gamma is None else gamma.expand(shape)
        try:
            scale.set(gamma)
        except ValueError as e:
            raise ConfigError(f"{name}: {e}") from None

    branches, matrices, scales = parts(model)
    for name, w in matrices.items():
        w.copy_(take(name, w.shape, torch.zeros_like(w) if name.endswith("bias") else None))
    for name, scale in scales.items():
        set_gamma(scale, name)
    ones = torch.ones(model.config.n_embd)
    norms = {name: take(name, ones.shape, ones) for name in dict.fromkeys(norm for _, norm in branches.values())}
    for prefix, (b, norm) in branches.items():
        for v in b.v.values():
            set_gamma(v, norm, norms[norm])
        for c, w in b.weight.items():
            if w is model.wte and not b.v and not (norms[norm] == 1).all():
                raise ConfigError("the last norm's γ cannot go into an LM head that is tied to the token table; "
                                  "keep scale_vectors=True")
            if w is not model.wte:
                weight = take(prefix + c, w.shape)
                w.copy_(weight if b.v else weight.double() * norms[norm].double())
        for c, u in b.u.items():
            # DP's u has no norm before it and starts at 1; under gemma q_scale is the QK-norm's
            set_gamma(u, f"{prefix}{c}_scale", None if c in b.normed else torch.ones(u.n))
    if left:
        raise ConfigError(f"{min(left)} has no place in a model with these norms and scale vectors")


def is_norm(name):
    """Whether a tensor of a folded model is a γ."""
    return name.endswith(("norm", "_scale", "_post"))


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face's names

# Our setting -> its name in a config.json; a mixture has more, and our own modeling file the rest under our names.
HF_SETTINGS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
               "d_head": "head_dim", "n_embd": "hidden_size", "ffn_dim": "intermediate_size",
               "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "norm_eps": "rms_norm_eps",
               "tie_embeddings": "tie_word_embeddings", "rope_theta": "rope_theta"}
HF_MIXTRAL = {"n_experts": "num_local_experts", "expert_dim": "intermediate_size",
              "experts_per_token": "num_experts_per_tok"}
# What each class computes beyond HF_SETTINGS: the values of a setting, or all of them (...). A setting that is not
# named here has to be at its default, as one that is new in settings.py will be until somebody teaches the class.
HF_COMPUTES = {
    "llama": dict(arch=("llama",), attn_placement=("input",), v_placement=("input",), ffn_placement=("input",),
                  scale_vectors=..., qkv_norm=..., n_experts=(0,), expert_dim=(0,), experts_per_token=..., router=...),
    "nanoscale": dict(arch=("llama", "gemma"), attn_placement=("input", *NORMED), v_placement=("input", *NORMED),
                      ffn_placement=("input", *NORMED), qkv_norm=("head", "full"), scale_vectors=..., n_experts=...,
                      experts_per_token=..., n_shared_experts=..., expert_dim=...,
                      router=("softmax", "softmax_all", "sigmoid"))}
HF_COMPUTES["mixtral"] = {**HF_COMPUTES["llama"], "n_experts": ..., "expert_dim": ..., "router": ("softmax",)}
TRAINING = {"init_std", "embedding_std", "router_aux", "router_z", "router_bias", "dtype"}  # no class asks
HF_CLASSES = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "nanoscale": "NanoScaleForCausalLM"}

# Our tensors -> Hugging Face's, whose block 0 is model.layers.0. {e} counts experts: on disk each has its own matrices.
HF_TOP = {"wte": "model.embed_tokens.weight", "lm_head": "lm_head.weight", "norm": "model.norm.weight"}
HF_BLOCK = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
            "attn.o": "self_attn.o_proj", "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj",
            "ffn.down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HF_MORE = {
    "llama": {},
    "mixtral": {"ffn.router": "block_sparse_moe.gate", "ffn.experts.gate": "block_sparse_moe.experts.{e}.w1",
                "ffn.experts.up": "block_sparse_moe.experts.{e}.w3",
                "ffn.experts.down": "block_sparse_moe.experts.{e}.w2"},
    "nanoscale": {
        "attn.q_scale": "self_attn.q_norm", "attn.k_scale": "self_attn.k_norm", "ffn.gate_scale": "mlp.gate_norm",
        "attn_post": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post": "post_feedforward_layernorm", "ffn.router": "mlp.gate",
        "ffn.bias": "mlp.gate.e_score_correction_bias",
        **{f"ffn.{ours}.{c}": f"mlp.{theirs}.{c}_proj" for c in ("gate", "up", "down")
           for ours, theirs in (("experts", "experts.{e}"), ("shared", "shared_experts"))},
        "ffn.experts.gate_scale": "mlp.experts.{e}.gate_norm", "ffn.shared.gate_scale": "mlp.shared_experts.gate_norm"}}


def hf_settings(kind):
    """Our setting -> its name in the config.json of a model_type."""
    return {**HF_SETTINGS, **(HF_MIXTRAL if kind == "mixtral" else {}),
            **({name: name for name in HF_COMPUTES[kind]} if kind == "nanoscale" else {})}


def hf_names(kind, n_layer):
    """Our tensor -> its name in the files of a model_type."""
    block = {**HF_BLOCK, **HF_MORE[kind]}
    return {**HF_TOP, **{f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}{'' if ours == 'ffn.bias' else '.weight'}"
                         for i in range(n_layer) for ours, theirs in block.items()}}


def hf_type(config, tensors):
    """
    The model_type of Hugging Face's that computes what a folded model does, theirs where there is one and else
    'nanoscale', our own modeling file. Raises ConfigError where that does not know a setting.
    """
    def unknown(kind):
        computes = {**HF_COMPUTES[kind], **dict.fromkeys([*HF_SETTINGS, *TRAINING], ...)}
        for f in fields(GPTConfig):
            value, known = getattr(config, f.name), computes.get(f.name, (f.default,))
            if known is not ... and value not in known:
                yield f"{f.name}={value!r}"

    biased = any(x.any() for name, x in tensors.items() if name.endswith("ffn.bias"))
    for kind in ("llama", "mixtral"):  # theirs want heads that divide the width, even with a head_dim
        if not biased and config.n_embd % config.n_head == 0 and not list(unknown(kind)):
            return kind
    if said := list(unknown("nanoscale")):
        raise ConfigError(f"hf.py does not know what {', '.join(said)} does, and neither does modeling_nanoscale.py")
    return "nanoscale"


def hf_config(kind, config, tokenizer):
    """config.json of a folded GPTConfig for the model_type kind, as a dict."""
    told = {
        "architectures": [HF_CLASSES[kind]], "model_type": kind, "torch_dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in hf_settings(kind).items()},
        "bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator, "pad_token_id": None,
        "nanoscale_tokenizer": tokenizer.name}
    if kind == "nanoscale":
        return {**told, "auto_map": {"AutoConfig": "modeling_nanoscale.NanoScaleConfig",
                                     "AutoModel": "modeling_nanoscale.NanoScaleModel",
                                     "AutoModelForCausalLM": "modeling_nanoscale.NanoScaleForCausalLM"}}
    # transformers 5 looks here for rope_theta, version 4 and other tools above
    told.update(hidden_act="silu", attention_bias=False, mlp_bias=False,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta})
    if kind == "mixtral":
        told.update(sliding_window=None, output_router_logits=False, router_aux_loss_coef=config.router_aux)
        if config.expert_dim % 8 or config.n_embd % 8:  # transformers' grouped GEMM takes rows of whole 16 bytes alone
            told["experts_implementation"] = "eager"
    return told


def hf_tensors(kind, config, tensors):
    """A folded model's tensors by Hugging Face's names, with the γ of ones that their classes want to see."""
    tensors, theirs = dict(tensors), {}
    names = hf_names(kind, config.n_layer)
    if kind != "nanoscale":
        tensors = {name: torch.ones(config.n_embd) for name in names if is_norm(name)} | tensors
    for name, x in tensors.items():
        if name.endswith("ffn.bias") and name not in names:
            continue  # all zeros, or hf_type would have chosen another class
        if "{e}" in names[name]:
            theirs.update({names[name].format(e=e): x_e.clone() for e, x_e in enumerate(x)})
        else:
            theirs[names[name]] = x
    return theirs


# What a config.json may say without a word about the function, and what it may say in one way only: our models'.
HF_SILENT = {
    "model_type", "architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path",
    "nanoscale_tokenizer", "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
    "use_cache", "initializer_range", "attention_dropout", "pretraining_tp", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise", "experts_implementation", "id2label", "label2id", "is_llama_config",
    "transformers.js_config"}
HF_FIXED = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,),
            "sliding_window": (None,), "partial_rotary_factor": (1, None), "rope_interleaved": (False,),
            "quantization_config": (None,)}
# What a class takes where a config.json says nothing, if it goes by the shape or is the same in all versions. Mixtral's
# 8 KV heads, its rope_theta and ε are asked for: by them a config of another origin may mean Llama's.
HF_DEFAULTS = {
    "llama": dict(num_key_value_heads=None, head_dim=None, tie_word_embeddings=False, max_position_embeddings=2048,
                  rms_norm_eps=1e-6, rope_theta=10000.0),
    "mixtral": dict(head_dim=None, tie_word_embeddings=False), "nanoscale": dict(tie_word_embeddings=False)}


def from_hf(config):
    """
    GPTConfig for a Hugging Face config.json, a dict. Raises ConfigError for what a GPT cannot represent, and for what
    it does not know: transformers may compute anything then.
    """
    kind = config["model_type"]
    if kind not in list(HF_MORE):  # it may be anything, and a list cannot be hashed
        raise ConfigError(f"model_type is {kind!r}; nanoScale reads {', '.join(HF_MORE)}")
    names, theirs_alone = hf_settings(kind), {"rope_parameters", "rope_scaling"}  # our modeling file reads neither
    known = {*names.values(), *HF_SILENT, *HF_FIXED, *({"auto_map"} if kind == "nanoscale" else theirs_alone)}
    for name, value in config.items():
        if name not in known:
            raise ConfigError(f"nanoScale does not know what {name} {value!r} does; if it is nothing, delete the line")
        if name in HF_FIXED and value not in HF_FIXED[name]:
            raise ConfigError(f"its {name} is {value!r}, and nanoScale's models do what {HF_FIXED[name][0]!r} does")
    said = {**HF_DEFAULTS[kind], **config, **hf_rope(config)}
    by_shape = ("num_key_value_heads", "head_dim") if kind != "nanoscale" else ()  # where they are null
    told = {ours: check(theirs, said[theirs], TYPES[ours]) for ours, theirs in names.items()
            if said[theirs] is not None or theirs not in by_shape}
    made = GPTConfig(**told)
    for ours, value in told.items():
        if getattr(made, ours) != value:  # a 0 or "same" is a word of our settings alone
            raise ConfigError(f"its {names[ours]} is {value!r}, which no model can have")
    return made


def hf_rope(config):
    """{"rope_theta": …} of a config.json that says it anywhere. Raises ConfigError for other kinds of RoPE."""
    bases = {config["rope_theta"]} if "rope_theta" in config else set()
    for name in ("rope_parameters", "rope_scaling"):  # transformers 5's and 4's
        rope = config.get(name) or {}
        for key, value in rope.items():
            plain = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1, "rope_theta": value}
            if key not in plain or value != plain[key]:
                raise ConfigError(f"its {name} says {key} {value!r}, and nanoScale's models have plain RoPE")
        bases |= {rope["rope_theta"]} if "rope_theta" in rope else set()
    bases = {check("rope_theta", base, TYPES["rope_theta"]) for base in bases}
    if len(bases) > 1:
        raise ConfigError(f"it says rope_theta more than once: {', '.join(map(str, sorted(bases)))}")
    return {"rope_theta": base for base in bases}


# ---------------------------------------------------------------------------------------------------------------
# folders


def read_config(folder):
    """
    (GPTConfig, tokenizer) of a folder that export.py wrote, or of a Hugging Face Llama or Mixtral; tokenizer is
    'bytes', 'gpt2', or None where the folder is not ours. Raises ConfigError for what is neither or what nanoScale
    cannot represent.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ConfigError(f"{folder}: there is no config.json: neither an exported model nor a run")
    said = read_json(path)
    try:
        if "model_type" not in said:
            raise ConfigError("it is neither an export's nor a Hugging Face model's; export.py makes one of a run")
        name = said.get("nanoscale_tokenizer")
        return from_hf(said), name if name is None else check("nanoscale_tokenizer", name, str)
    except KeyError as e:
        raise ConfigError(f"{path}: {e.args[0]!r} is missing") from None
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:  # a ConfigError is a ValueError
        raise ConfigError(f"{path}: {e}") from None


def read_tensors(folder):
    """
    The tensors of such a folder, in fp32 and by our names. Raises ConfigError, also where config.json asks for much
    more than they are, so that a model can be made for them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    files = read_json(index).get("weight_map") if index.exists() else {"": "model.safetensors"}
    if not isinstance(files, dict) or not all(type(name) is str and Path(name).name == name for name in files.values()):
        raise ConfigError(f"{index}: its weight_map names something else than files beside it")
    tensors = {}
    for name in sorted({*files.values()}):
        if not (folder / name).exists():
            raise ConfigError(f"there is no {name}; only weights in safetensors are read")
        open_file(folder / name).close()
        try:
            tensors.update(load_file(folder / name))
        except (SafetensorError, OSError) as e:
            raise ConfigError(f"{folder / name} is cut off or damaged: {e}") from None
    for name, x in tensors.items():
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ConfigError(f"{name} is {x.dtype}: quantised weights are not read")
    config, _ = read_config(folder)
    try:
        with torch.device("meta"):
            model = GPT(config)
        wanted = sum(x.numel() for x in (*model.parameters(), *model.buffers()))
    except RuntimeError:  # more than 2⁶³
        wanted = 2**63
    found = sum(x.numel() for x in tensors.values())
    if wanted > 2 * found + 2**28:  # 1 GB for RoPE's tables, and whatever may be tied
        raise ConfigError(f"config.json asks for {wanted:,} numbers, and the weights are {found:,}")
    return rename_from_hf(tensors, read_json(folder / "config.json")["model_type"], config)


def rename_from_hf(tensors, kind, config):
    """Our names for a Hugging Face folder's tensors. Raises ConfigError."""
    left, ours = dict(tensors), {}
    for name, theirs in hf_names(kind, config.n_layer).items():
        each = [theirs.format(e=e) for e in range(config.n_experts)] if "{e}" in theirs else [theirs]
        found = [left.pop(x).float() for x in each if x in left]
        if found and (len(found) < len(each) or len({x.shape for x in found}) > 1):
            raise ConfigError(f"{each[0]} and the other experts' are not {len(each)} of one shape")
        if found:
            ours[name] = torch.stack(found) if "{e}" in theirs else found[0]
    for name in left:
        if not name.endswith("rotary_emb.inv_freq"):  # old Llamas stored the table that rope_theta gives
            raise ConfigError(f"nanoScale's models have no {name}")
    if config.tie_embeddings and "lm_head" in ours and not torch.equal(ours.pop("lm_head"), ours.get("wte")):
        raise ConfigError("config.json ties lm_head to the token table, and the file has another lm_head; "
                          "set tie_word_embeddings to the one that is meant")
    if not config.tie_embeddings and "lm_head" not in ours:  # transformers makes one up at random
        raise ConfigError("there is no lm_head.weight; if it is the token table, "
                          "set tie_word_embeddings to true in config.json")
    return ours


def open_model(path):
    """
    (GPT, tokenizer) of a run's folder, or of one that read_config reads. The GPT is on the CPU and computes in fp32;
    tokenizer is a name, or None where the folder is not ours. Raises ConfigError.
    """
    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder")
    if not (path / "ckpt.pt").exists():
        config, tokenizer = read_config(path)
        try:
            tensors = read_tensors(path)
            model = GPT(config)
            load(model, tensors)
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}") from None
        return model, tokenizer
    ckpt = load_checkpoint(path / "ckpt.pt")
    try:
        model = GPT(gpt_config(Settings(**ckpt["settings"])))
        model.load_state_dict(ckpt["model"])
    except (TypeError, RuntimeError) as e:
        raise ConfigError(f"{path}/ckpt.pt is of another version of nanoScale: {' '.join(str(e).split())}") from None
    return model, ckpt["tokenizer"]


# ---------------------------------------------------------------------------------------------------------------
# train.py --init_from

SHAPE = ("arch", "n_layer", "n_head", "n_kv_head", "d_head", "n_embd", "ffn_dim", "vocab_size", "tie_embeddings",
         "rope_theta", "norm_eps", "n_experts", "experts_per_token", "n_shared_experts", "expert_dim", "router")


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
        saved = check_settings(read_json(run).get("settings"), run)
        take_shape(s, {name: saved[name] for name in (*SHAPE, "qkv_norm") if name in saved}, run)
        return None, ""
    source, tokenizer = read_config(s.init_from)
    attn, ffn = (s.placement if place == "same" else place for place in (s.attn_placement, s.ffn_placement))
    mine = {"attn": attn, "v": attn if s.v_placement == "same" else s.v_placement, "ffn": ffn}
    has = {part: getattr(source, f"{part}_placement") in NORMED for part in mine}
    names = SHAPE + (("qkv_norm",) if has["attn"] or has["v"] or source.arch == "gemma" else ())
    take_shape(s, {name: getattr(source, name) for name in names}, s.init_from)
    for part, place in mine.items():
        if has[part] and place not in NORMED:
            raise ConfigError(f"{s.init_from} was trained with norms after its {part} branches, and {part}_placement "
                              f"{place!r} has none: set it to dual_norm or norm")
    new = [f"{part}_placement={place}" for part, place in mine.items() if place in NORMED and not has[part]]
    return tokenizer, (f"{' and '.join(new)}: norms that {s.init_from} was trained without. The first loss is not "
                       f"that model's" if new else "")


def take_shape(s, shape, where):
    """Set what shape, a dict, names in the settings s. Raises ConfigError where s has neither that nor its default."""
    for name, theirs in shape.items():
        mine = getattr(s, name)
        if mine not in (theirs, type(s).__dataclass_fields__[name].default, 0):
            raise ConfigError(f"{name} {mine!r} contradicts {where}, which has {theirs!r}; leave it out")
        setattr(s, name, theirs)
