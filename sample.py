"""
Text from a trained run, or from a folder that export.py wrote, printed token by token:

    python sample.py out/unified --prompt "def main():" --num_samples 2
    python sample.py models/unified --prompt_file question.txt --temperature 0

It also takes the folder of a Hugging Face Llama with a tokenizer.json, where the package tokenizers is installed.

The model sees at most block_size tokens. When they are full, it drops the older half and reads the rest again.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import ConfigError, Parser, read_bytes, refuse, streams, unheard


def arguments(args=None):
    parser = Parser(__doc__)
    parser.add_argument("model", type=os.path.expanduser,
                        help="the folder of a run, with its ckpt.pt, or of an exported model")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="what to continue; default: the start of a document")
    prompt.add_argument("--prompt_file", type=os.path.expanduser, help="a UTF-8 file with what to continue")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token; default: 0.8")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the k likeliest tokens; default: 50")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else mps, else cpu")
    parsed = parser.parse_args(args)
    # fp32 holds neither logits divided by next to nothing nor a larger divisor; torch's generator takes 64 bits
    if (min(parsed.top_k, parsed.max_new_tokens, parsed.num_samples) < 1
            or parsed.temperature != 0 and not 0.01 <= parsed.temperature <= 1e6 or abs(parsed.seed) >= 2**63):
        parser.error("top_k, max_new_tokens and num_samples must be at least 1, temperature 0 or between 0.01 and 1e6, "
                     "and seed below 2**63")
    return parsed


def open_tokenizer(name, folder):
    """
    (encode, decode) of our tokenizer with this name or, where that is None, of the folder's tokenizer.json.
    encode(text) is the list of tokens that a document with this text begins with; decode(tokens) is a text.
    Raises ConfigError.
    """
    if name is not None:
        from data.tokens import load_tokenizer
        ours = load_tokenizer(name)
        return (lambda text: [ours.separator, *ours.encode(text).tolist()],
                lambda tokens: b"".join(map(ours.token_bytes, tokens)).decode("utf-8", "replace"))

    path = Path(folder, "tokenizer.json")
    if not path.exists():
        raise ConfigError(f"{folder}: its tokenizer is unknown, since it is not from nanoScale or its data had no "
                          "meta.json; put a tokenizer.json there")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ConfigError(f"{path} is for Hugging Face's tokenizers: pip install tokenizers") from None
    try:
        theirs = Tokenizer.from_buffer(read_bytes(path))
    except Exception as e:  # that package raises nothing more precise
        raise ConfigError(f"{path} cannot be read: {e}") from None

    return lambda text: theirs.encode(text).ids, theirs.decode


def main(args):
    prompt = args.prompt
    if args.prompt_file is not None:
        try:
            prompt = read_bytes(args.prompt_file).decode("utf-8")
        except UnicodeDecodeError as e:
            raise ConfigError(f"prompt_file {args.prompt_file} is not a text in UTF-8: {e}") from None

    import torch

    from devices import pick_device
    from hf import open_model
    from settings import Settings

    device, dtype, *_ = pick_device(Settings(device=args.device))
    model, name = open_model(args.model)
    config = model.config
    encode, decode = open_tokenizer(name, args.model)
    start = encode(prompt)
    if not start:
        raise ConfigError(f"{args.model}: its tokenizer has no token for the start of a document; give a --prompt")
    if max(start) >= config.vocab_size:
        raise ConfigError(f"{args.model}: its tokenizer has token {max(start)}, and the model only "
                          f"{config.vocab_size} tokens; use the model's own tokenizer.json")
    # a smaller block_size is a smaller cache: no more tokens than there will be
    config.dtype, config.block_size = dtype, min(config.block_size, len(start) + args.max_new_tokens)
    model.to(device)
    idx = torch.tensor([start], device=device)
    with torch.no_grad():
        if not model(idx[:, -config.block_size:])[0].isfinite().all():
            raise ConfigError(f"{args.model}: its logits are not finite: the run diverged, or the file is damaged")

    generator = torch.Generator(device).manual_seed(args.seed)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}")
        print(prompt, end="", flush=True)
        seen, shown = [*start], len(decode(start))
        for token in model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, generator):
            seen.append(token.item())
            text = decode(seen)
            if not text.endswith("\ufffd"):  # else it may end within a character, and waits for the rest
                print(text[shown:], end="", flush=True)
                shown = len(text)
            if unheard():  # stdout is closed, as by `| head`
                sys.exit(130)
        print(decode(seen)[shown:])


if __name__ == "__main__":
    streams()
    try:
        main(arguments())
    except ConfigError as e:
        refuse(e)
