"""FineWeb, tokenised for GPT-2 already: shards of 100M tokens (200 MB), `kjj0/fineweb10B-gpt2` on Hugging Face.

Shards that are here are kept, and a download that broke off goes on where it stopped.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.corpus import Parser, command_line
from data.download import download, is_finished
from data.tokens import HERE, DataError, load_tokenizer, read_header, write_meta

BASE_URL = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"


def prepare(shards=8, out=HERE / "fineweb", base_url=BASE_URL, quiet=False):
    """Downloads the validation shard and the first training shards, returns their folder. Raises DataError."""
    if not 1 <= shards <= 103:
        raise DataError(f"--shards {shards}: there are 103 training shards; ask for 1 to 103")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06d}.bin" for i in range(1, shards + 1)]:
        if not is_finished(out / name):
            download(f"{base_url}/{name}", out / name, read_header, quiet)
    try:
        tokenizer = load_tokenizer("gpt2")
    except DataError as error:
        tokenizer = None
        print(f"bytes_per_token left empty: {error}", file=sys.stderr)
    meta = write_meta(out, tokenizer)
    if not quiet:
        print(f"train_tokens: {meta['train_tokens']}\nval_tokens: {meta['val_tokens']}\nfolder: {out}")
    return out


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=int, default=8,
                        help="training shards to have, 1 to 103 (default: %(default)s)")
    parser.add_argument("--out", default=HERE / "fineweb", help="folder to write (default: data/fineweb)")
    parser.add_argument("--base_url", default=BASE_URL, help="a mirror (default: %(default)s)")
    command_line(prepare, parser)
