"""
Write a trained model, its scale vectors folded into the weights, as a Hugging Face folder:

    python export.py out/unified --out models/unified

transformers, lm_eval and llama.cpp's convert_hf_to_gguf.py read it; so do sample.py and train.py --init_from. A model
without norms after its branches (placement input, after or dual) becomes a LlamaForCausalLM, or a MixtralForCausalLM.
No class of transformers has norms after v, gate, up or the LM head. So models with DNP, QK-norm, Gemma's layout, a
shared expert, or a router other than Mixtral's come with modeling_nanoscale.py: load them with trust_remote_code=True.
llama.cpp cannot run these.

The tokenizer adds no special tokens. To begin a document, write <|endoftext|> before it, as sample.py does.
Needs transformers, and checks with it that the folder computes the model's logits.
"""

import json
import os
import shutil
import signal
import sys
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import ConfigError, Parser, refuse, streams


def arguments(args=None):
    parser = Parser(__doc__)
    parser.add_argument("model", type=os.path.expanduser,
                        help="the folder of a run, with its ckpt.pt, or one that export.py wrote")
    parser.add_argument("--out", required=True, type=os.path.expanduser, help="the folder to write")
    return parser.parse_args(args)


def write_tokenizer(folder, tokenizer, config):
    """
    tokenizer.json and tokenizer_config.json, for transformers, lm_eval and llama.cpp's converter alike.

    The converter recognises GPT-2's BPE by the tokens of a sample text, so that no separator may stand before them. The
    only vocabulary of bytes that llama.cpp knows is SentencePiece's fallback for unknown characters. It writes a space
    as ▁, so a ▁ in a text is read as a space.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    end, own = "<|endoftext|>", {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}
    del own[tokenizer.separator]
    if tokenizer.name == "bytes":
        spell = lambda b: "▁" if b == b" " else b.decode() if b < b"\x80" else f"<0x{b.hex().upper()}>"
        vocab = {end: tokenizer.separator} | {spell(token): i for i, token in own.items()}
        # the converter makes up the rest of the model's vocabulary only for a BPE
        vocab |= {f"<unused{i}>": i for i in range(len(vocab), config.vocab_size)}
        theirs = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
        theirs.normalizer = normalizers.Replace(" ", "▁")
        theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        symbols = bytes_to_unicode()
        spell = lambda token: "".join(symbols[b] for b in token)
        vocab = {end: tokenizer.separator} | {spell(token): i for i, token in own.items()}
        # tiktoken has no list of merges: any two tokens whose bytes make up a third are merged, lowest number first
        halves = ((spell(token[:i]), spell(token[i:])) for token in own.values() for i in range(1, len(token)))
        theirs = Tokenizer(models.BPE(vocab, [pair for pair in halves if vocab.keys() >= set(pair)]))
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(end, normalized=False, special=True)])
    (folder / "tokenizer.json").write_text(theirs.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end, "add_bos_token": False,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": config.block_size,
        "model_input_names": ["input_ids", "attention_mask"]}, indent=1) + "\n", encoding="utf-8")


def compare(folder, model, reader):
    """
    Raise ConfigError where a folder's logits, as the class named `reader` computes them, are not those of the model:
    model.py may have changed in a way that no parameter and no setting shows.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    module = "modeling_nanoscale" if reader == "NanoScaleForCausalLM" else "transformers"
    idx = torch.arange(min(model.config.block_size, 64))[None] * 7 % model.config.vocab_size
    with torch.no_grad(), TemporaryDirectory() as tmp:
        Path(tmp, "model").symlink_to(folder)  # transformers reads only paths in UTF-8
        theirs = getattr(import_module(module), reader).from_pretrained(Path(tmp, "model"), dtype=torch.float32)
        computed, expected = theirs(idx).logits, model(idx)[0]
    errors = (computed - expected).abs().amax(-1) / expected.abs().max()  # each token's largest
    # rounding may send a token to another expert
    error = (errors.median() if model.config.n_experts else errors.max()).item()
    if not error < 1e-3:
        raise ConfigError(f"the logits of this export would differ from the model's by {error:.1g} of their size: "
                          f"model.py does something that hf.py does not know")


def main(args):
    try:
        import transformers  # noqa: F401
        from safetensors.torch import save
    except ImportError:
        raise ConfigError("an export needs Hugging Face's transformers: pip install transformers") from None
    from data.tokens import load_tokenizer
    from hf import fold, hf_config, hf_tensors, hf_type, open_model

    model, name = open_model(args.model)
    if name is None:
        raise ConfigError(f"{args.model}: its tokenizer is unknown. It is not ours, or its data has no meta.json")
    tokenizer = load_tokenizer(name)
    config, tensors = fold(model)
    kind = hf_type(config, tensors)
    said = hf_config(kind, config, tokenizer)
    (reader,) = said["architectures"]
    out = Path(os.path.realpath(args.out))  # unlike resolve(), no error for links in a circle
    try:
        if os.path.lexists(out) and not (out.is_dir() and not os.listdir(out)):
            raise ConfigError(f"{out} is there already; delete it, or name another folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=".") as tmp:  # gone afterwards, whatever happens
            folder = Path(tmp, out.name)
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
            weights = save(hf_tensors(kind, config, tensors), {"format": "pt"})
            (folder / "model.safetensors").write_bytes(weights)
            write_tokenizer(folder, tokenizer, config)
            if kind == "nanoscale":
                shutil.copyfile(Path(__file__).with_name("modeling_nanoscale.py"), folder / "modeling_nanoscale.py")
            compare(folder, model, reader)
            os.rename(folder, out)
    except OSError as e:
        raise ConfigError(f"{args.out} cannot be written: {e}") from None
    count = {key: x.numel() for key, x in tensors.items() if not key.endswith("bias")}
    vectors = sum(n for key, n in count.items() if key.endswith("norm.weight"))
    print(f"{args.out}: {sum(count.values()):,} parameters, {vectors:,} of them in scale vectors that cannot be folded")
    if model.config.tie_embeddings and not config.tie_embeddings:
        print("The LM head is no longer tied: its scale vectors are folded into it.")
    how = ", with trust_remote_code=True, and not in llama.cpp" if kind == "nanoscale" else ""
    print(f"Its logits equal the model's. It loads as {reader}{how}")


if __name__ == "__main__":
    streams()
    parsed = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing half-written is left
    try:
        main(parsed)
    except ConfigError as e:
        refuse(e)
