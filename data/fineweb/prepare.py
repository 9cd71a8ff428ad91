"""FineWeb in GPT-2 tokens: downloads shards of 100M tokens (200 MB) of `kjj0/fineweb10B-gpt2` from Hugging Face.

Complete shards are kept: the same command continues with the first missing one. Set HF_ENDPOINT=URL to use a mirror.
"""

import os
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import ConfigError, Parser
from data.corpus import command_line, finish
from data.tokens import HERE, GPT2Tokenizer, open_tokens

REPO = "kjj0/fineweb10B-gpt2"


def prepare(shards=8, out=HERE / "fineweb"):
    """Downloads the validation shard and the first training shards. Raises ConfigError."""
    if not 1 <= shards <= 103:
        raise ConfigError(f"--shards {shards}: there are 103 training shards; choose 1 to 103")
    from huggingface_hub import hf_hub_download

    out.mkdir(parents=True, exist_ok=True)
    for name in ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]:
        try:
            open_tokens(out / name)
            continue
        except ConfigError:  # missing or incomplete
            pass
        try:
            downloaded = hf_hub_download(REPO, name, repo_type="dataset", local_dir=out / "download.part")
        except Exception as error:  # network, server, storage and disk errors have no class in common
            reason = str(error.__cause__ or error).partition("\n")[0]
            raise ConfigError(f"{REPO}, {name}: not downloaded ({reason}); check the network and the disk, then run "
                              "the same command again") from None
        os.replace(downloaded, out / name)
        open_tokens(out / name)  # raises if it is damaged
    shutil.rmtree(out / "download.part", ignore_errors=True)
    finish(out, GPT2Tokenizer)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=int, default=8,
                        help="number of training shards, 1 to 103 (default: %(default)s)")
    command_line(prepare, parser, "data/fineweb")
