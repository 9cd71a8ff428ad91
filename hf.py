"""
Import and export in Hugging Face format: fold a model, name its tensors as Hugging Face does, read such a folder back.

diag(u) W diag(v) is a matrix like any other (norms.py), so scale vectors that only training needed go into the weights.
A vector after a norm goes into the next matrix where everything in between is linear: DNP's u of v into o, its u of up
into down. The others stay: DNP's u of q and k (RoPE follows), of gate (silu follows) and of the LM head, the γ of
QK-norms and of Gemma's post-norms.

A folded model is a GPTConfig and a dict of fp32 tensors under Hugging Face's names (WORDS): those of its Llama, and
those of modeling_nanoscale.py for what a Llama does not have. Each expert has matrices of its own there.

Imports model.py, norms.py, settings.py, runs.py and configurator.py.
"""

import os
from pathlib import Path
from typing import get_type_hints

import torch

from configurator import ConfigError, check, open_file, read_json
from model import GPT
from norms import Branches, ScaleVector
from runs import check_settings, load_checkpoint
from settings import GPTConfig, Settings, gpt_config

NORMED = ("norm", "dual_norm")  # placements with a norm after the linear map
PLACES = ("attn_placement", "v_placement", "ffn_placement", "head_placement")
TYPES = get_type_hints(GPTConfig, include_extras=True)

# Our setting -> its name in a config.json, and what a Mixtral and our own class have in addition.
HF_SETTINGS = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads",
               "d_head": "head_dim", "n_embd": "hidden_size", "ffn_dim": "intermediate_size",
               "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "norm_eps": "rms_norm_eps",
               "tie_embeddings": "tie_word_embeddings", "rope_theta": "rope_theta"}
MIXTURE = ("n_experts", "experts_per_token", "expert_dim", "shared_dim", "router")
OURS = ("arch", *MIXTURE, "scale_vectors", *PLACES, "qkv_norm", "qk_norm")
HF_MORE = {"llama": {}, "nanoscale": {name: name for name in OURS}, "mixtral": {
    "n_experts": "num_local_experts", "expert_dim": "intermediate_size", "experts_per_token": "num_experts_per_tok"}}

# Each word of our tensors' names -> Hugging Face's: blocks.0.attn.q is model.layers.0.self_attn.q_proj.weight. Names in
# _scale and _post are the γ that stay; those in _norm are the γ of Pre-Norms, which only Hugging Face's Llama has. {e}
# is the number of an expert.
WORDS = {"wte": "model.embed_tokens", "lm_head": "lm_head", "lm_head_scale": "lm_head.norm", "norm": "model.norm",
         "blocks": "model.layers", "attn": "self_attn", "attn_norm": "input_layernorm", "attn_post": "attn_post_norm",
         "ffn": "mlp", "ffn_norm": "post_attention_layernorm", "ffn_post": "mlp_post_norm",
         "q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "q_scale": "q_norm", "k_scale": "k_norm",
         "gate": "gate_proj", "up": "up_proj", "down": "down_proj", "gate_scale": "gate_norm",
         "router": "gate", "bias": "gate.e_score_correction_bias", "experts": "experts.{e}", "shared": "shared_experts"}
MIXTRAL_WORDS = {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def hf_names(name, n_experts):
    """The names of one of our tensors in Hugging Face's files, as a list: one name, or one per expert."""
    try:
        theirs = ".".join(word if word.isdigit() else WORDS[word] for word in name.split("."))
    except KeyError:
        raise ConfigError(f"hf.py does not know the parameter {name}; add it to WORDS and to load") from None
    theirs += "" if name.endswith(".bias") else ".weight"
    return [theirs.format(e=e) for e in range(n_experts)] if "{e}" in theirs else [theirs]


def norms_of(config):
    """The settings of a GPTConfig that put a norm after a branch."""
    return [name for name in (*PLACES, "qk_norm") if getattr(config, name) in (True, *NORMED)]


def parts(model):
    """
    A GPT in parts: ({prefix: Branches}, {name: ScaleVector that is in none of them}, {name: any other tensor of its
    state_dict}). The prefix of blocks.0.attn.qkv is blocks.0.attn., so that its matrices are blocks.0.attn.q, k, v.
    """
    modules = dict(model.named_modules())
    branches = {name: module for name, module in modules.items() if isinstance(module, Branches)}
    taken = tuple(f"{name}." for name in branches)
    scales = {name: module for name, module in modules.items()
              if isinstance(module, ScaleVector) and not name.startswith(taken)}
    taken += tuple(f"{name}." for name in scales)
    return ({name[:name.rfind(".") + 1]: module for name, module in branches.items()}, scales,
            {name: x for name, x in model.state_dict().items() if not name.startswith(taken)})


@torch.no_grad()
def fold(model):
    """
    The folded model of a GPT: (GPTConfig, tensors). It computes the same function. A tied LM head with scale vectors
    gets its own matrix.
    """
    config = model.config
    branches, scales, t = parts(model)
    t |= {name: scale() for name, scale in scales.items()}
    for prefix, b in branches.items():
        matrices = b.folded_weight(model.wte.dtype).split([*b.n_out.values()], dim=-2)
        t |= {prefix + c: w for c, w in zip(b.n_out, matrices)}
        for c, u in ((c, b.u[c]()) for c in b.normed if c in b.u):
            if c == "v":  # attention mixes tokens, not channels; each head of v serves n_head / n_kv_head heads of o
                heads = u.view(config.n_kv_head, 1, -1).expand(-1, config.n_head // config.n_kv_head, -1)
                t[prefix + "o"] = t[prefix + "o"] * heads.flatten()
            elif c == "up":
                t[prefix + "down"] = t[prefix + "down"] * u.unsqueeze(-2)
            else:
                t[f"{prefix}{c}_scale"] = u
    tied = config.tie_embeddings and not config.scale_vectors
    if tied:
        del t["lm_head"]
    kept = {name: getattr(config, name) for name in (*HF_SETTINGS, *OURS)}
    kept |= {name: "input" for name in PLACES if kept[name] not in NORMED}
    tensors = {}
    for name, x in t.items():
        tensors |= zip(hf_names(name, config.n_experts), x if ".experts." in name else [x])
    folded = GPTConfig(**kept | dict(scale_vectors=any(x.endswith("norm.weight") for x in tensors), tie_embeddings=tied,
                                     qk_norm=config.qk_norm and config.attn_placement not in NORMED))
    # clones: a file cannot hold two tensors that share memory, and the caller may change the model
    return folded, {name: x.detach().float().cpu().contiguous().clone() for name, x in tensors.items()}


@torch.no_grad()
def load(model, tensors):
    """
    Give a fresh GPT, whose γ are 1, the weights of a folded model, and the γ that it has. The γ of a Pre-Norm goes
    into the weights of branches without a vector. The GPT then computes the same function, if it has the same norms.
    Raises ConfigError where tensors are missing, have another shape, or have no place in the model.
    """
    left, n_experts = dict(tensors), model.config.n_experts

    def take(name, like, default=None):
        """The tensor of this name, of the shape of `like`; full of `default` where there is none."""
        stacked, found = ".experts." in name, []
        for theirs, part in zip(hf_names(name, n_experts), like if stacked else [like]):
            if theirs not in left and default is None:
                raise ConfigError(f"there is no tensor {theirs}")
            x = left.pop(theirs) if theirs in left else torch.full_like(part, default)
            if x.shape != part.shape:
                raise ConfigError(f"{theirs} has shape {list(x.shape)} and should have {list(part.shape)}")
            found.append(x)
        return torch.stack(found) if stacked else found[0]

    branches, scales, matrices = parts(model)
    for name, w in matrices.items():
        w.copy_(take(name, w, 0.0 if name.endswith("bias") else None))
    for prefix, b in branches.items():
        # v and up have theirs in the next matrix
        scales |= {f"{prefix}{c}_scale": u for c, u in b.u.items() if c in b.normed and c not in ("v", "up")}
    gammas = [(name, scale, take(name, scale(), 1.0)) for name, scale in scales.items()]
    norms = {}
    for prefix, b in branches.items():
        name = ".".join(prefix.split(".")[:3]) + "_norm" if prefix else "norm"
        norm = norms.setdefault(name, take(name, torch.empty(model.config.n_embd), 1.0))  # router and experts share it
        gammas += [(name, v, norm) for v in b.v.values()]
        for c, _, v in b.vectors():
            if b.weight[c] is not model.wte:
                w = take(prefix + c, b.weight[c])
                b.weight[c].copy_(w if v is not None else w.double() * norm.double())
            elif v is None and not (norm == 1).all():
                raise ConfigError("the last norm's γ has no place: the LM head is tied to the token table and has no "
                                  "scale vector before it; set scale_vectors=True and head_placement=input")
    for name, scale, gamma in gammas:
        try:
            scale.set(gamma.expand_as(scale()))
        except ValueError as e:
            raise ConfigError(f"{hf_names(name, n_experts)[0]}: {e}") from None
    if left:
        raise ConfigError(f"{min(left)} has no place in a model with these settings")


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face's classes


def hf_type(config, tensors):
    """The model_type that computes a folded model: 'llama' or 'mixtral' where that does, else 'nanoscale'."""
    # transformers' Llama refuses a width that the number of heads does not divide
    if config.arch != "llama" or norms_of(config) or config.n_embd % config.n_head:
        return "nanoscale"
    if not config.n_experts:
        return "llama"
    biased = any(x.any() for name, x in tensors.items() if name.endswith("bias"))
    return "mixtral" if config.router == "softmax" and not config.shared_dim and not biased else "nanoscale"


def hf_config(kind, config, tokenizer):
    """config.json of a folded GPTConfig for a model_type, as a dict."""
    classes = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "nanoscale": "NanoScaleForCausalLM"}
    told = {
        "architectures": [classes[kind]], "model_type": kind, "torch_dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in (HF_SETTINGS | HF_MORE[kind]).items()},
        # transformers 5 reads the base from here, version 4 and other tools from rope_theta
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator, "pad_token_id": None,
        "nanoscale_tokenizer": tokenizer.name}
    if kind == "nanoscale":
        told["auto_map"] = {"AutoConfig": "modeling_nanoscale.NanoScaleConfig",
                            "AutoModel": "modeling_nanoscale.NanoScaleModel",
                            "AutoModelForCausalLM": "modeling_nanoscale.NanoScaleForCausalLM"}
    if kind == "mixtral" and (config.expert_dim % 8 or config.n_embd % 8):
        told["experts_implementation"] = "eager"  # transformers' grouped GEMM takes only rows of whole 16 bytes
    return told


def renamed(tensors, words):
    return {".".join(words.get(word, word) for word in name.split(".")): x for name, x in tensors.items()}


def hf_tensors(kind, config, tensors):
    """A folded model's tensors, as the class of this model_type names them."""
    if kind == "nanoscale":
        return tensors
    # the others have γ in their Pre-Norms, and no bias in the router, where ours is zeros
    norms = ["norm", *(f"blocks.{i}.{part}_norm" for i in range(config.n_layer) for part in ("attn", "ffn"))]
    tensors = {hf_names(name, 0)[0]: torch.ones(config.n_embd) for name in norms} | {
        name: x for name, x in tensors.items() if not name.endswith("bias")}
    return renamed(tensors, MIXTRAL_WORDS) if kind == "mixtral" else tensors


HF_DEFAULTS = dict(num_key_value_heads=None, head_dim=None, max_position_embeddings=2048, rms_norm_eps=1e-6,
                   rope_theta=10000.0, tie_word_embeddings=False)  # Llama's
# Other settings that change what transformers' Llama computes, and the values under which a GPT computes the same.
HF_FIXED = {"attention_bias": (False,), "mlp_bias": (False,), "hidden_act": ("silu", "swish"),
            "rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1, None),
            "is_causal": (True,), **dict.fromkeys(("sliding_window", "quantization_config"), (None,)),
            "nanoscale_tokenizer": ("bytes", "gpt2")}


# ---------------------------------------------------------------------------------------------------------------
# folders


def read_config(folder):
    """
    (GPTConfig, tokenizer) of a folder that export.py wrote, or of a Hugging Face Llama; tokenizer is 'bytes', 'gpt2',
    or None where the folder is not ours. Raises ConfigError for any other folder, and for what a GPT cannot represent.
    """
    path = Path(folder, "config.json")
    said = read_json(path)
    kind, tokenizer = said.get("model_type"), said.get("nanoscale_tokenizer")
    try:
        if kind != "llama" and (tokenizer is None or kind not in list(HF_MORE)):
            raise ConfigError(f"model_type is {kind!r}; nanoScale reads Llamas and folders that export.py wrote")
        # RoPE's settings are in a dict of their own (rope_parameters in transformers 5), or among the others
        pairs = [pair for part in ("rope_scaling", "rope_parameters") for pair in (said.get(part) or {}).items()]
        pairs += said.items()
        for name, value in pairs:
            if value not in HF_FIXED.get(name, [value]):
                raise ConfigError(f"its {name} is {value!r}; nanoScale reads only models where it is "
                                  f"{HF_FIXED[name][0]!r}")
        bases = [value for name, value in pairs if name == "rope_theta"]
        if any(base != bases[0] for base in bases):  # versions of transformers differ in which one they take
            raise ConfigError(f"it has several values of rope_theta: {', '.join(map(repr, bases))}; keep one")
        said = HF_DEFAULTS | dict(pairs)
        names = HF_SETTINGS | HF_MORE[kind]
        told = {ours: check(theirs, said[theirs], TYPES[ours]) for ours, theirs in names.items()
                if said[theirs] is not None or theirs not in ("num_key_value_heads", "head_dim")}  # null: by the shape
        return GPTConfig(**told), tokenizer
    except KeyError as e:
        raise ConfigError(f"{path}: {e.args[0]!r} is missing") from None
    except (ValueError, AttributeError) as e:  # a ConfigError is a ValueError
        raise ConfigError(f"{path}: {e}") from None


def read_tensors(folder):
    """
    The tensors of such a folder, in fp32, named as in a folded model. Raises ConfigError, also where config.json asks
    for much more than there is, so that the caller can make a model for them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    tensors, (config, _) = {}, read_config(folder)
    for file in sorted(Path(folder).glob("model*.safetensors")):  # one, or shards
        try:
            with open_file(file) as f:  # safetensors would wait for a FIFO, and opens only paths in UTF-8
                tensors.update(parse(f.read()))
        except (SafetensorError, OSError) as e:
            raise ConfigError(f"{file} is cut off or damaged: {e}") from None
    if not tensors:
        raise ConfigError("there is no model.safetensors; nanoScale reads no other weights")
    # a model that is much larger than its weights could take all memory, or be larger than torch can count
    ffn = config.n_experts * config.expert_dim + config.shared_dim or config.ffn_dim
    block = config.n_embd * (2 * config.n_head * config.d_head + 3 * ffn)
    wanted = config.vocab_size * config.n_embd + config.n_layer * block + config.block_size * config.d_head
    found = sum(x.numel() for x in tensors.values())
    if wanted > 2 * found + 2**28:
        raise ConfigError(f"config.json describes at least {wanted:,} numbers, but the weights are only {found:,}")
    ours = {theirs: word for word, theirs in MIXTRAL_WORDS.items()}
    tensors = {name: x.float() for name, x in renamed(tensors, ours).items()
               if not name.endswith("rotary_emb.inv_freq")}  # old Llamas store this table, which rope_theta gives
    table, head = (tensors.get(name) for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if config.tie_embeddings and table is not None and head is not None and torch.equal(table, head):
        del tensors["lm_head.weight"]  # stored twice
    return tensors


def open_model(path):
    """
    (GPT, tokenizer) of a run's folder, or of one that read_config reads. The GPT is on the CPU and computes in fp32;
    tokenizer is a name, or None where it is unknown. Raises ConfigError.
    """
    path = Path(path)
    if not os.path.lexists(path / "ckpt.pt"):
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

SHAPE = ("arch", *(name for name in HF_SETTINGS if name != "block_size"), *MIXTURE)


def adopt(s):
    """
    Set the shape in train.py's settings from the folder s.init_from: the settings in SHAPE, and those of its norms.
    Scale vectors, placements and block_size stay the user's. A resumed run takes its shape from its own folder, so
    that s.init_from may be gone by then.

    Returns (tokenizer or None, a line to print or ""). The line says which norms the settings add: with them
    no weights compute the folder's function. Raises ConfigError where settings contradict the folder, or drop norms
    that the weights were trained with.
    """
    run = os.path.join(s.out_dir, "config.json")
    if s.resume and os.path.exists(run):
        saved = check_settings(read_json(run).get("settings"), run)
        take_shape(s, {name: saved[name] for name in (*SHAPE, "qkv_norm", "qk_norm") if name in saved}, run)
        return None, ""
    source, tokenizer = read_config(s.init_from)
    had, shape = norms_of(source), {name: getattr(source, name) for name in SHAPE}
    if source.qk_norm:
        shape["qk_norm"] = True
    if source.arch == "gemma" or {"attn_placement", "v_placement", "qk_norm"} & {*had}:
        shape["qkv_norm"] = source.qkv_norm
    take_shape(s, shape, s.init_from)
    made = gpt_config(s)
    has = norms_of(made)
    for name in had:
        if name not in has:
            raise ConfigError(f"{s.init_from} was trained with norms there, and {name} {getattr(made, name)!r} has "
                              f"none: set it to dual_norm or norm")
    new = " and ".join(f"{name}={getattr(made, name)}" for name in has if name not in had)
    return tokenizer, new and (f"{new}: {s.init_from} was trained without these norms, so the first loss is not that "
                               f"model's")


def take_shape(s, shape, where):
    """Copy shape, a dict, into the settings s. Raises ConfigError where s has neither that value nor the default."""
    for name, theirs in shape.items():
        mine = getattr(s, name)
        if mine not in (theirs, type(s).__dataclass_fields__[name].default, 0):
            raise ConfigError(f"{name} {mine!r} contradicts {where}, which has {theirs!r}; leave it out")
        setattr(s, name, theirs)
