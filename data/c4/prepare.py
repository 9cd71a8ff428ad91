"""C4, English, `allenai/c4` on Hugging Face: downloaded shard by shard and tokenised with GPT-2's byte pairs.

A shard is about 320 MB to download and 170M tokens; its text is removed once tokenised. Shards that are here are kept,
and a download that broke off goes on where it stopped.
"""

import gzip
import json
import sys
import zlib
from itertools import islice
from pathlib import Path

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tqdm import tqdm

from data.corpus import Parser, command_line, encode_documents, workers
from data.download import download, is_finished
from data.tokens import HERE, BinWriter, DataError, load_tokenizer, write_meta

BASE_URL = "https://huggingface.co/datasets/allenai/c4/resolve/main/en"
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError)


def encode_lines(lines):
    """[one JSON object with a "text", bytes] -> (n,) uint16. Runs in a worker, parsing included."""
    return encode_documents([json.loads(line)["text"] for line in lines], load_tokenizer("gpt2"))


def convert(source, path, pool, quiet=False):
    """
    source, gzip of JSON lines, -> path, a .bin file, whole or not at all.
    Raises DataError, and removes the source, if that is damaged.
    """
    try:
        with open(source, "rb") as raw, BinWriter(path) as out, \
                tqdm.wrapattr(raw, "read", source.stat().st_size, desc=path.name,
                              disable=True if quiet else None) as counted, \
                gzip.open(counted) as lines:
            # The pool takes a chunk when a worker is free, so the text is never all in memory.
            for tokens in pool.imap(encode_lines, iter(lambda: list(islice(lines, 500)), [])):
                out.write(tokens)
    except DAMAGE as error:
        source.unlink()
        raise DataError(f"{source}: damaged ({type(error).__name__}: {error}); removed, run the same command again") \
            from None


def prepare(shards=8, out=HERE / "c4", base_url=BASE_URL, quiet=False):
    """Makes the first validation shard and the first training shards, returns their folder. Raises DataError."""
    if not 1 <= shards <= 1024:
        raise DataError(f"--shards {shards}: there are 1024 training shards; ask for 1 to 1024")
    out, tokenizer = Path(out), load_tokenizer("gpt2")
    out.mkdir(parents=True, exist_ok=True)
    sources = {"val_00000.bin": "c4-validation.00000-of-00008.json.gz"}
    sources |= {f"train_{i:05d}.bin": f"c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)}
    missing = [name for name in sources if not is_finished(out / name)]
    if missing:
        with workers() as pool:
            for name in missing:
                source = out / sources[name]
                if not source.exists():
                    download(f"{base_url}/{source.name}", source, quiet=quiet)
                convert(source, out / name, pool, quiet)
                source.unlink()
    meta = write_meta(out, tokenizer)
    if not quiet:
        print(f"train_tokens: {meta['train_tokens']}\nval_tokens: {meta['val_tokens']}")
        print(f"bytes_per_token: {meta['bytes_per_token']:.4f}\nfolder: {out}")
    return out


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=int, default=8,
                        help="training shards to have, 1 to 1024 (default: %(default)s)")
    parser.add_argument("--out", default=HERE / "c4", help="folder to write (default: data/c4)")
    parser.add_argument("--base_url", default=BASE_URL, help="a mirror (default: %(default)s)")
    command_line(prepare, parser)
