"""What the prepare.py scripts share: from files of text to a folder of tokens, and a command line that fails tidily."""

import argparse
import hashlib
import multiprocessing
import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokens import BinWriter, DataError, load_tokenizer, token_counts, write_meta


def goes_to_val(key):
    """About 5% of files, by a hash of the name: it splits the same on every machine and whatever else is there."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big") % 100 < 5


def encode_documents(texts, tokenizer):
    """[str] -> (n,) uint16, a separator before each document"""
    pieces = []
    for text in texts:
        pieces += [[tokenizer.separator], tokenizer.encode(text)]
    return np.concatenate(pieces).astype(np.uint16)


def encode_file(name, path):
    """One file as one document, (n,) uint16, or None if it is not text: unreadable, not UTF-8, empty, with NULs."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return encode_documents([text], load_tokenizer(name)) if text and "\0" not in text else None


def workers():
    """
    A pool with a process a core that leaves Ctrl-C to the parent. Processes, because tiktoken in threads gains little
    beyond a few cores; spawned, because a fork under threads (tqdm's, a caller's) may lock up.
    """
    return multiprocessing.get_context("spawn").Pool(None, signal.signal, (signal.SIGINT, signal.SIG_IGN))


def write_corpus(files, out, tokenizer, quiet=False):
    """
    Tokenises files into out/train.bin, out/val.bin and out/meta.json and returns the content of the latter. What was
    in the folder stays as it was until all is complete.

    files: [(key, path)], the key ordering the files and deciding their split · tokenizer: 'bytes' or 'gpt2'
    Raises DataError if no file holds text.
    """
    files, out = sorted(files), Path(out)
    tok = load_tokenizer(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    skipped, tail = 0, False
    encode = partial(encode_file, tokenizer)
    paths = [path for _, path in files]
    # Bytes are encoded faster than a worker would hand them over.
    with workers() if tokenizer == "gpt2" else nullcontext() as pool:
        encoded = pool.imap(encode, paths, 16) if pool else map(encode, paths)
        with BinWriter(out / "train.bin") as train, BinWriter(out / "val.bin") as val:
            for (key, _), tokens in tqdm(zip(files, encoded), out.name, len(files), unit="file",
                                         disable=True if quiet else None):
                if tokens is None:
                    skipped += 1
                else:
                    (val if goes_to_val(key) else train).write(tokens)
            if train.count + val.count == 0:
                raise DataError(f"{out}: not written, none of {len(files)} files holds UTF-8 text; name other files")
            # Few files may all fall on one side.
            if not train.count:
                train.write(val.cut(val.count))
            if not val.count:
                val.write(train.cut(max(1, train.count // 20)))
                tail = True
            train.flush()
            val.flush()
    meta = write_meta(out, tok)
    if not quiet:
        counts = token_counts(out, "val")
        frequency = counts[counts > 0] / counts.sum()
        print(f"files: {len(files) - skipped} ({skipped} skipped: not UTF-8, empty or with NULs)")
        if tail:
            print("split: too few files to split by file, so val is the last 5% of the tokens")
        print(f"train_tokens: {meta['train_tokens']}\nval_tokens: {meta['val_tokens']}")
        print(f"bytes_per_token: {meta['bytes_per_token']:.4f}")
        # What a model reaches that knows only how often each token occurs.
        print(f"val_unigram_entropy: {-(frequency * np.log(frequency)).sum():.4f} nats")
        print(f"folder: {out}")
    return meta


class Parser(argparse.ArgumentParser):
    """argparse, with the module's docstring laid out as it stands and mistakes told in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def command_line(prepare, parser):
    """Runs prepare with the command line's arguments; what the user can fix is one line on stderr and exit code 2."""
    try:
        prepare(**vars(parser.parse_args()))
    except DataError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:  # a full disk, a folder that cannot be written
        parser.exit(2, f"{error.filename or parser.prog}: {error.strerror or error}; make room or name another --out\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command starts again from what is complete\n")
