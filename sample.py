"""
Text from a trained run, streamed as it comes:

    python sample.py out/unified --prompt "def main():" --num_samples 2
"""

import argparse
import codecs
import sys

from configurator import ConfigError, refuse


def arguments(args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, with its ckpt.pt")
    parser.add_argument("--prompt", default="", help="what to continue; default: the start of a document")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--max_new_tokens", type=int, default=500)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token; default: 0.8")
    parser.add_argument("--top_k", type=int, default=50, help="sample from the k likeliest tokens; default: 50")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="auto", help="default: cuda where there is one, else cpu")
    parsed = parser.parse_args(args)
    if parsed.top_k < 1 or parsed.temperature < 0 or parsed.max_new_tokens < 1:
        parser.error("top_k and max_new_tokens must be at least 1 and temperature at least 0")
    return parsed


def main(args):
    from pathlib import Path

    import torch

    from data.tokens import data_folder, load_tokenizer
    from model import GPT
    from train import Settings, gpt_config, load_checkpoint, pick_device

    ckpt = load_checkpoint(Path(args.run) / "ckpt.pt")
    settings = Settings(**ckpt["settings"])
    settings.device = args.device
    device, dtype = pick_device(settings)
    model = GPT(gpt_config(settings, dtype))
    model.load_state_dict(ckpt["model"])
    model.to(device)
    tokenizer = load_tokenizer(ckpt["tokenizer"])

    start = [tokenizer.separator, *tokenizer.encode(args.prompt).tolist()]
    generator = torch.Generator(device).manual_seed(args.seed)
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}")
        # a token may end in the middle of a character: the decoder holds its bytes back until the rest has come
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        print(args.prompt, end="", flush=True)
        idx = torch.tensor([start], device=device)
        for token in model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, generator):
            print(decode(tokenizer.token_bytes(token.item())), end="", flush=True)
        print()


if __name__ == "__main__":
    parsed = arguments()
    from data.tokens import DataError
    try:
        main(parsed)
    except (ConfigError, DataError) as e:
        refuse(e)
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
