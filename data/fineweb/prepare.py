"""FineWeb, tokenised for GPT-2 already: shards of 100M tokens (200 MB), `kjj0/fineweb10B-gpt2` on Hugging Face.

Whole shards are kept: the same command goes on with the first that is missing. HF_ENDPOINT=URL names a mirror.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import Parser
from data.corpus import command_line, download, home
from data.tokens import HERE, DataError

REPO = "kjj0/fineweb10B-gpt2"


def prepare(shards=8, out=HERE / "fineweb"):
    """Downloads the validation shard and the first training shards. Raises DataError."""
    if not 1 <= shards <= 103:
        raise DataError(f"--shards {shards}: there are 103 training shards; ask for 1 to 103")
    names = ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]
    download(REPO, {name: name for name in names}, out, os.replace)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=int, default=8,
                        help="training shards to have, 1 to 103 (default: %(default)s)")
    parser.add_argument("--out", type=home, default=HERE / "fineweb", help="folder to write (default: data/fineweb)")
    command_line(prepare, parser)
