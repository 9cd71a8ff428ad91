"""
Hand over a trained model without its scale vectors, as a folder that other tools read:

    python export.py out/unified --to hf --out models/unified          for transformers, vLLM and the like
    python export.py out/unified --to nanoscale --out models/unified   for sample.py, and for train.py --init_from

What can be folded is folded (folding.py). With --to hf a Pre-Norm model is then a LlamaForCausalLM whose norms are all
ones, and a Gemma one a Gemma3ForCausalLM. No class of transformers has norms behind v, gate and up, or a γ of its own
for each channel of q and k: DNP models bring modeling_nanoscale.py with them, which loads with trust_remote_code=True.

A mixture of experts is a MixtralForCausalLM; with softmax_all's weights or with shared experts a Qwen2MoeForCausalLM;
with sigmoid's, and with the bias or not, a Glm4MoeForCausalLM. Under DNP, in Gemma's layout, and where a bias chooses
among softmaxes, it brings modeling_nanoscale.py.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

from configurator import ConfigError, refuse

# all that a folder of ours can hold: --overwrite replaces nothing else
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modeling_nanoscale.py"}


def arguments(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a run, with its ckpt.pt, or one that was exported before")
    parser.add_argument("--to", choices=("hf", "nanoscale"), required=True, help="the format")
    parser.add_argument("--out", required=True, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in that folder")
    return parser.parse_args(args)


def open_model(path):
    """
    (GPT, tokenizer) of a run's folder, or of one that folding.py reads. The GPT is on the CPU and computes in fp32;
    tokenizer is a name, or None where the folder is not ours. Raises ConfigError.
    """
    from folding import load, read_config, read_tensors
    from model import GPT
    from runs import load_checkpoint
    from settings import Settings, gpt_config

    path = Path(path)
    if not path.is_dir():
        raise ConfigError(f"{path}: there is no such folder")
    if not (path / "ckpt.pt").exists():
        config, tokenizer = read_config(path)
        model = GPT(config)
        try:
            load(model, read_tensors(path))
        except ConfigError as e:
            raise ConfigError(f"{path}: {e}" if str(path) not in str(e) else str(e)) from None
        return model, tokenizer
    ckpt = load_checkpoint(path / "ckpt.pt")
    try:
        model = GPT(gpt_config(Settings(**ckpt["settings"])))
        model.load_state_dict(ckpt["model"])
    except (TypeError, RuntimeError) as e:
        raise ConfigError(f"{path}/ckpt.pt is of another version of nanoScale: {' '.join(str(e).split())}") from None
    return model, ckpt["tokenizer"]


@contextmanager
def new_folder(path, overwrite):
    """
    A temporary folder to fill, which becomes `path` when all went well and is gone when not. Raises ConfigError where
    `path` is taken: by an export, unless overwrite is True, and by anything else in any case.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; name a folder")
    there = {f.name for f in path.iterdir()} if path.exists() else set()
    if there - FILES:
        raise ConfigError(f"{path} holds what is no export ({min(there - FILES)}); name another folder")
    if there and not overwrite:
        raise ConfigError(f"{path} holds an export already; name another folder, or say --overwrite")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        yield part
        for file in part.iterdir():
            shutil.copymode(part / "config.json", file)  # safetensors keeps its files from other users
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        if there:
            # two renames: killed between them, the old export lies complete beside the new one, under a hidden name
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            try:
                os.rename(part, path)
            except BaseException:
                os.rename(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.rename(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# the tokenizer


def byte_symbols():
    """GPT-2's printable character for each byte, by which byte-level tokenizer files spell their tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def merges(tokens):
    """
    The pair that BPE merges last into each token, in order of rank: what tiktoken's list of tokens leaves out.

    tokens: [bytes], a token's rank is its index, and the first 256 are the single bytes.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs = []
    for rank, token in enumerate(tokens[256:], 256):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            first = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[first:first + 2] = [parts[first] + parts[first + 1]]
        pairs.append(tuple(parts))
    return pairs


def write_tokenizer(folder, tokenizer, max_length):
    """tokenizer.json and tokenizer_config.json; like a document here, what they encode begins with the separator."""
    symbols, end = byte_symbols(), "<|endoftext|>"
    spell = lambda token: "".join(symbols[b] for b in token)
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    tokens[tokenizer.separator] = None
    vocab = {end if token is None else spell(token): i for i, token in enumerate(tokens)}
    bpe = tokenizer.name != "bytes"
    pairs = merges([token for token in tokens if token is not None]) if bpe else []
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": bpe}
    separator, text = {"SpecialToken": {"id": end, "type_id": 0}}, lambda name: {"Sequence": {"id": name, "type_id": 0}}
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": tokenizer.separator, "content": end, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": {"type": "TemplateProcessing", "single": [separator, text("A")],
                           "pair": [separator, text("A"), separator, text("B")],
                           "special_tokens": {end: {"id": end, "ids": [tokenizer.separator], "tokens": [end]}}},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": [f"{spell(a)} {spell(b)}" for a, b in pairs]}})
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end,
        "clean_up_tokenization_spaces": False, "model_max_length": max_length})


# ---------------------------------------------------------------------------------------------------------------
# the model

# by model_type
HF_CLASSES = {"llama": "LlamaForCausalLM", "gemma3_text": "Gemma3ForCausalLM", "mixtral": "MixtralForCausalLM",
              "qwen2_moe": "Qwen2MoeForCausalLM", "glm4_moe": "Glm4MoeForCausalLM",
              "nanoscale": "NanoScaleForCausalLM"}


def hf_type(config, tensors):
    """The model_type of Hugging Face's that computes what a folded model does; 'nanoscale' is our own."""
    normed = config.attn_placement != "input" or config.ffn_placement != "input"
    if normed or config.n_embd % config.n_head:  # theirs wants heads that divide the width, even with a head_dim
        return "nanoscale"
    if not config.n_experts:
        if config.arch == "llama":
            return "llama"
        return "gemma3_text" if config.qkv_norm == "head" or config.n_head == 1 else "nanoscale"
    if config.router == "sigmoid":  # theirs takes the best two of a group of experts, and all are one group
        return "glm4_moe" if config.arch == "llama" and config.n_experts > 1 else "nanoscale"
    biased = any(x.any() for name, x in tensors.items() if name.endswith("ffn.bias"))
    if config.arch == "gemma" or biased:
        return "nanoscale"
    return "mixtral" if config.router == "softmax" and not config.n_shared_experts else "qwen2_moe"


def hf_config(kind, config, tokenizer):
    """config.json of a folded GPTConfig for the model_type kind, as a dict."""
    from folding import HF_FIXED, HF_SHAPE, MIXTURE, NORM_SETTINGS

    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    common = {
        "architectures": [HF_CLASSES[kind]],
        "model_type": kind, "vocab_size": config.vocab_size, "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_dim, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head, "head_dim": config.d_head,
        "max_position_embeddings": config.block_size, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings and kind not in ("gemma3_text", "nanoscale"),
        "torch_dtype": "float32",
        "bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator, "pad_token_id": None,
        "nanoscale_tokenizer": tokenizer.name,
        # where transformers 4 and other tools look; rope_parameters is transformers 5's
        "rope_theta": config.rope_theta}
    if kind == "nanoscale":
        return {**common, "auto_map": {"AutoConfig": "modeling_nanoscale.NanoScaleConfig",
                                       "AutoModelForCausalLM": "modeling_nanoscale.NanoScaleForCausalLM"},
                **{name: getattr(config, name) for name in (*NORM_SETTINGS, *MIXTURE)}}
    if kind == "gemma3_text":
        return {**common, "hidden_activation": "silu", "attention_bias": False,
                "query_pre_attn_scalar": config.d_head, "sliding_window": config.block_size,
                "layer_types": ["full_attention"] * config.n_layer, "final_logit_softcapping": None,
                "attn_logit_softcapping": None, "rope_parameters": {"full_attention": rope}}
    common.update(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_parameters=rope)
    if kind in HF_SHAPE:
        n_experts, expert_dim = HF_SHAPE[kind]
        common.update(HF_FIXED[kind])
        common.update({n_experts: config.n_experts, expert_dim: config.expert_dim,
                       "num_experts_per_tok": config.experts_per_token, "output_router_logits": False,
                       "router_aux_loss_coef": config.router_aux})
        if config.expert_dim % 8 or config.n_embd % 8:  # transformers' grouped GEMM takes rows of whole 16 bytes alone
            common["experts_implementation"] = "eager"
    if kind == "qwen2_moe":
        common.update(norm_topk_prob=config.router == "softmax", sliding_window=None,
                      shared_expert_intermediate_size=config.n_shared_experts * config.expert_dim)
    if kind == "glm4_moe":
        common.update(n_shared_experts=config.n_shared_experts, num_nextn_predict_layers=0, partial_rotary_factor=1.0,
                      rope_parameters={**rope, "partial_rotary_factor": 1.0})
    return common


def hf_tensors(kind, config, tensors):
    """A folded model's tensors by Hugging Face's names, with the γ that their classes want to see and Gemma's ways."""
    import torch

    from folding import hf_names, is_norm

    tensors = dict(tensors)
    names = hf_names(kind, config.n_layer)
    if kind == "nanoscale":
        tensors.setdefault("lm_head", tensors["wte"].clone())  # not tied there: one way less to load it wrong
    else:
        for name in names:
            if is_norm(name):
                n = config.d_head if name.endswith("_scale") else config.n_embd
                tensors.setdefault(name, torch.ones(n))
    if kind == "gemma3_text":
        tensors.setdefault("lm_head", tensors["wte"].clone())
        # their γ is 1 + weight, and their embeddings are multiplied by the root of the width
        tensors = {name: x - 1 if is_norm(name) else x for name, x in tensors.items()}
        tensors["wte"] = tensors["wte"] / config.n_embd ** 0.5
    if kind == "qwen2_moe":
        # their shared expert has a gate, sigmoid(gate(x)): of zeros it halves what is twice as much
        for i in range(config.n_layer):
            tensors[f"blocks.{i}.ffn.shared_gate"] = torch.zeros(1, config.n_embd)
        tensors = {name: 2 * x if name.endswith("shared.down") else x for name, x in tensors.items()}
    if kind in ("qwen2_moe", "glm4_moe") and not config.n_shared_experts:
        for i in range(config.n_layer):  # these classes always have one; it is 0 wide
            tensors.update({f"blocks.{i}.ffn.shared.{c}": torch.zeros(0, config.n_embd) for c in ("gate", "up")})
            tensors[f"blocks.{i}.ffn.shared.down"] = torch.zeros(config.n_embd, 0)
    theirs = {}
    for name, x in tensors.items():
        if name.endswith("ffn.bias") and name not in names:
            continue  # all zeros, or hf_type would have chosen another class
        if "{e}" in names[name]:
            theirs.update({names[name].format(e=e): x_e.clone() for e, x_e in enumerate(x)})
        else:
            theirs[names[name]] = x
    return theirs


def write_model(folder, config, tensors, tokenizer, to):
    """Fill an empty folder with a folded model. tokenizer: as load_tokenizer returns it. to: 'hf' or 'nanoscale'."""
    from dataclasses import asdict

    from safetensors.torch import save_file

    if to == "nanoscale":
        settings = {name: value for name, value in asdict(config).items() if name != "dtype"}
        write_json(folder / "config.json", {"format": "nanoscale", "settings": settings, "tokenizer": tokenizer.name})
        save_file(tensors, folder / "model.safetensors")
        return
    kind = hf_type(config, tensors)
    write_json(folder / "config.json", hf_config(kind, config, tokenizer))
    save_file(hf_tensors(kind, config, tensors), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, tokenizer, config.block_size)
    if kind == "nanoscale":
        shutil.copy(Path(__file__).with_name("modeling_nanoscale.py"), folder)


def main(args):
    with new_folder(args.out, args.overwrite) as folder:
        from data.tokens import load_tokenizer
        from folding import fold, is_norm

        model, name = open_model(args.model)
        if name is None:
            raise ConfigError(f"{args.model} is not a model of nanoScale's: its tokenizer is unknown")
        config, tensors = fold(model)
        write_model(folder, config, tensors, load_tokenizer(name), args.to)
    count = {key: x.numel() for key, x in tensors.items() if not key.endswith("ffn.bias")}
    vectors = sum(n for key, n in count.items() if is_norm(key))
    print(f"{args.out}: {sum(count.values()):,} parameters, {vectors:,} of them in scale vectors that cannot be folded")
    if model.config.tie_embeddings and not config.tie_embeddings:
        print("The LM head is not tied any more: the last norm's scale vector went into it.")
    kind = hf_type(config, tensors)
    if args.to == "hf" and kind == "nanoscale":
        print("No class of transformers computes this model. Its code is beside the weights, in modeling_nanoscale.py: "
              "load it with trust_remote_code=True.")
    elif args.to == "hf":
        print(f"Loads as {HF_CLASSES[kind]}.")


if __name__ == "__main__":
    parsed = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half is left behind
    from data.tokens import DataError
    try:
        main(parsed)
    except (ConfigError, DataError) as e:
        refuse(e)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as e:  # a full disk, a folder that may not be written
        refuse(f"{parsed.out} cannot be written: {e}")
