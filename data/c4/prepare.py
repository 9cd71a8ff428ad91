"""C4, English, `allenai/c4` on Hugging Face: downloaded shard by shard and tokenised with GPT-2's byte pairs.

A shard is about 320 MB to download and 170M tokens; its text is removed once tokenised. Whole shards are kept: the same
command goes on with the first that is missing. HF_ENDPOINT=URL names a mirror.
"""

import gzip
import json
import sys
import zlib
from pathlib import Path

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from tqdm import tqdm

from configurator import Parser
from data.corpus import command_line, download, home, in_threads
from data.tokens import HERE, BinWriter, DataError, load_tokenizer

REPO = "allenai/c4"
LONGEST = 2 ** 24  # bytes of a line; C4's are far shorter


def blocks(file):
    """Whole lines, about 1 MB of bytes at a time. A line that is too long comes cut, and is no JSON any more."""
    while block := file.read(2 ** 20) + file.readline(LONGEST):
        yield block
        while block and not block.endswith(b"\n"):
            block = file.readline(LONGEST)


def encode_block(block):
    """Lines of JSON -> the tokens of their texts, (n,) uint16, and how many lines had none."""
    tokenizer, documents, lines = load_tokenizer("gpt2"), [np.zeros(0, np.uint16)], block.splitlines()
    for line in lines:
        try:
            documents.append(np.insert(tokenizer.encode(json.loads(line)["text"]), 0, tokenizer.separator))
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):  # cut, foreign, nested too deeply
            pass
    return np.concatenate(documents), len(lines) + 1 - len(documents)


def convert(source, path):
    """
    source, gzip of JSON lines, -> path, a .bin file, whole or not at all; source goes.
    Raises DataError if source is damaged or has no text at all.
    """
    skipped = 0
    try:
        with gzip.open(source) as lines, BinWriter(path) as out:
            for tokens, without in tqdm(in_threads(encode_block, blocks(lines)), path.name, unit="MB", disable=None):
                out.write(tokens)
                skipped += without
            if not out.count:
                raise EOFError("no text in it")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        source.unlink()
        raise DataError(f"{source}: damaged ({error}); removed, run the same command again") from None
    source.unlink()
    if skipped:
        print(f"{path.name}: {skipped} lines skipped, too long or no JSON with a text", file=sys.stderr)


def prepare(shards=8, out=HERE / "c4"):
    """Makes the first validation shard and the first training shards. Raises DataError."""
    if not 1 <= shards <= 1024:
        raise DataError(f"--shards {shards}: there are 1024 training shards; ask for 1 to 1024")
    load_tokenizer("gpt2")  # not to be found missing after an hour of downloading
    sources = {"val_00000.bin": "en/c4-validation.00000-of-00008.json.gz"}
    sources |= {f"train_{i:05d}.bin": f"en/c4-train.{i:05d}-of-01024.json.gz" for i in range(shards)}
    download(REPO, sources, out, convert)


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=int, default=8,
                        help="training shards to have, 1 to 1024 (default: %(default)s)")
    parser.add_argument("--out", type=home, default=HERE / "c4", help="folder to write (default: data/c4)")
    command_line(prepare, parser)
