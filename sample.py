"""
Text from a trained run, or from a folder that export.py wrote, streamed as it comes:

    python sample.py out/unified --prompt "def main():" --num_samples 2
    python sample.py models/unified --prompt_file question.txt --temperature 0

The model sees block_size tokens at most. When they are full, the older half is dropped and the rest read anew.
"""

import argparse
import codecs
import sys

from configurator import ConfigError, refuse


def arguments(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the folder of a run, with its ckpt.pt, or of an export of either kind")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", default="", help="what to continue; default: the start of a document")
    prompt.add_argument("--prompt_file", help="a UTF-8 file with what to continue")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token; default: 0.8")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the k likeliest tokens; default: 50")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parsed = parser.parse_args(args)
    if min(parsed.top_k, parsed.max_new_tokens, parsed.num_samples) < 1 or not 0 <= parsed.temperature < float("inf"):
        parser.error("top_k, max_new_tokens and num_samples must be at least 1 and temperature at least 0")
    return parsed


def read_prompt(args):
    if args.prompt_file is None:
        return args.prompt
    try:
        with open(args.prompt_file, encoding="utf-8", newline="") as f:
            return f.read()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"prompt_file {args.prompt_file} cannot be read: {e}") from None


def main(args):
    prompt = read_prompt(args)

    from dataclasses import replace

    import torch

    from data.tokens import load_tokenizer
    from export import open_model
    from folding import fold, load
    from model import GPT
    from train import Settings, pick_device

    device, dtype = pick_device(Settings(device=args.device))
    trained, name = open_model(args.model)
    if name is None:
        raise ConfigError(f"{args.model} is not a model of nanoScale's: its tokenizer is unknown")
    tokenizer = load_tokenizer(name)
    # folded, so that generating spends nothing on scale vectors
    config, tensors = fold(trained)
    model = GPT(replace(config, dtype=dtype))
    load(model, tensors)
    model.to(device)
    del trained, tensors

    start = [tokenizer.separator, *tokenizer.encode(prompt).tolist()]
    generator = torch.Generator(device).manual_seed(args.seed)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}")
        # a token may end in the middle of a character: the decoder holds its bytes back until the rest has come
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(prompt, end="", flush=True)
        idx = torch.tensor([start], device=device)
        for token in model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, generator):
            print(decoder.decode(tokenizer.token_bytes(token.item())), end="", flush=True)
        print(decoder.decode(b"", final=True))


if __name__ == "__main__":
    parsed = arguments()
    from data.tokens import DataError
    try:
        main(parsed)
    except (ConfigError, DataError) as e:
        refuse(e)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
