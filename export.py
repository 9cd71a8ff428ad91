"""
Hand over a trained model without its scale vectors, as a folder that other tools read:

    python export.py out/unified --to hf --out models/unified           for transformers, vLLM and the like
    python export.py out/unified_free --to llama.cpp --out models/free  for its convert_hf_to_gguf.py

sample.py and train.py --init_from read such a folder too. What can be folded is folded (hf.py). A model without norms
after its branches is then a LlamaForCausalLM whose norms are all ones, or a MixtralForCausalLM. No class of
transformers has norms after v, gate and up, or a γ of its own for each channel of q and k: DNP models, Gemma's layout
and other routers than Mixtral's bring modeling_nanoscale.py with them, which loads with trust_remote_code=True.
"""

import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import ConfigError, Parser, refuse, streams

# all that a folder of ours can hold: --overwrite replaces nothing else
FILES = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modeling_nanoscale.py"}


def arguments(args=None):
    parser = Parser(__doc__)
    parser.add_argument("model", type=os.path.expanduser,
                        help="the folder of a run, with its ckpt.pt, or one that was exported before")
    parser.add_argument("--to", choices=("hf", "llama.cpp"), required=True, help="the format")
    parser.add_argument("--out", required=True, type=os.path.expanduser, help="the folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in that folder")
    return parser.parse_args(args)


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


def write_tokenizer(folder, tokenizer, config, to):
    """
    tokenizer.json and tokenizer_config.json; like a document here, what they encode begins with the separator.

    llama.cpp's converter knows a BPE by what it makes of a text alone, so that add_bos_token has to ask for the
    separator; and bytes as sentencepiece's fallback for unknown characters, where a space is ▁, and a ▁ a space.
    """
    symbols, end, bpe = byte_symbols(), "<|endoftext|>", tokenizer.name != "bytes"
    spell = lambda token: "".join(symbols[b] for b in token)
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    tokens[tokenizer.separator] = None
    pairs = merges([token for token in tokens if token is not None]) if bpe else []
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": bpe}
    separator, text = {"SpecialToken": {"id": end, "type_id": 0}}, lambda name: {"Sequence": {"id": name, "type_id": 0}}
    told = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": tokenizer.separator, "content": end, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}],
        "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": {"type": "TemplateProcessing", "single": [separator, text("A")],
                           "pair": [separator, text("A"), separator, text("B")],
                           "special_tokens": {end: {"id": end, "ids": [tokenizer.separator], "tokens": [end]}}},
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "merges": [f"{spell(a)} {spell(b)}" for a, b in pairs]}}
    if to == "llama.cpp":
        told["post_processor"] = None
    if to == "llama.cpp" and not bpe:
        replace = lambda old, new: {"type": "Replace", "pattern": {"String": old}, "content": new}
        told.update(normalizer=replace(" ", "▁"), pre_tokenizer=None, decoder={"type": "Sequence", "decoders": [
            replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}]})
        told["model"]["byte_fallback"] = True
        spell = lambda token: "▁" if token == b" " else f"<0x{token.hex().upper()}>"
    told["model"]["vocab"] = {end if token is None else spell(token): i for i, token in enumerate(tokens)}
    if to == "llama.cpp" and not bpe:  # of a BPE, its converter makes these up itself
        told["model"]["vocab"].update({f"<unused{i}>": i for i in range(len(tokens), config.vocab_size)})
    write_json(folder / "tokenizer.json", told)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "add_bos_token": True,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": config.block_size,
        "model_input_names": ["input_ids", "attention_mask"]})


# ---------------------------------------------------------------------------------------------------------------
# the model


def write_model(folder, config, tensors, tokenizer, to):
    """
    Fill an empty folder with a folded model. tokenizer: as load_tokenizer returns it. to: a format of --to. Returns the
    class of transformers that reads it. Raises ConfigError where the format has no such model.
    """
    from safetensors.torch import save_file

    from hf import hf_config, hf_tensors, hf_type

    kind = hf_type(config, tensors)
    if to == "llama.cpp" and kind == "nanoscale":
        raise ConfigError("llama.cpp computes Llamas and Mixtrals: no norms after the branches (placement input and "
                          "dual have none), no other layout or router")
    told = hf_config(kind, config, tokenizer)
    write_json(folder / "config.json", told)
    save_file(hf_tensors(kind, config, tensors), folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, tokenizer, config, to)
    if kind == "nanoscale":
        shutil.copy(Path(__file__).with_name("modeling_nanoscale.py"), folder)
    return told["architectures"][0]


def compare(folder, model, name):
    """
    Whether a folder's logits, as the class `name` computes them, were compared with those of the model that it came
    from; that takes transformers. Raises ConfigError where they differ: model.py may have been changed in a way that no
    parameter and no setting tells.
    """
    try:
        import transformers
    except ImportError:
        return False
    import torch

    transformers.utils.logging.disable_progress_bar()
    theirs = import_module("modeling_nanoscale" if name == "NanoScaleForCausalLM" else "transformers")
    idx = torch.arange(min(model.config.block_size, 64))[None] * 7 % model.config.vocab_size
    with torch.no_grad():
        computed = getattr(theirs, name).from_pretrained(folder, dtype=torch.float32)(idx).logits
        expected = model(idx)[0]
    # each token's largest error, and of these the median: rounding may send a token to another expert
    error = ((computed - expected).abs().amax(-1).median() / expected.abs().max()).item()
    if not error < 1e-3:
        raise ConfigError(f"this export would compute another function than the model, off by {error:.1g} of its "
                          f"logits: model.py does something that hf.py does not know")
    return True


def main(args):
    with new_folder(args.out, args.overwrite) as folder:
        from data.tokens import load_tokenizer
        from hf import fold, is_norm, open_model

        model, name = open_model(args.model)
        if name is None:
            raise ConfigError(f"{args.model} is not a model of nanoScale's: its tokenizer is unknown")
        config, tensors = fold(model)
        reader = write_model(folder, config, tensors, load_tokenizer(name), args.to)
        compared = compare(folder, model, reader)
    count = {key: x.numel() for key, x in tensors.items() if not key.endswith("ffn.bias")}
    vectors = sum(n for key, n in count.items() if is_norm(key))
    print(f"{args.out}: {sum(count.values()):,} parameters, {vectors:,} of them in scale vectors that cannot be folded")
    if model.config.tie_embeddings and not config.tie_embeddings:
        print("The LM head is not tied any more: the last norm's scale vector went into it.")
    if reader == "NanoScaleForCausalLM":
        print("No class of transformers computes this model. Its code is beside the weights, in modeling_nanoscale.py: "
              "load it with trust_remote_code=True.")
    else:
        print(f"Loads as {reader}.")
    print("Its logits equal the model's." if compared else
          "transformers is not installed here: nobody has compared this folder's logits with the model's.")


if __name__ == "__main__":
    streams()
    parsed = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half is left
    from safetensors import SafetensorError  # what it makes of a full disk
    try:
        main(parsed)
    except ConfigError as e:
        refuse(e)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, SafetensorError) as e:  # a full disk, a folder that may not be written
        refuse(f"{parsed.out} cannot be written: {e}")
