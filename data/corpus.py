"""
What the prepare.py scripts share: from files of text to a folder of tokens, and a command line that fails tidily.

Knows tokens.py and configurator.py.
"""

import hashlib
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import ConfigError, open_file, streams
from data.tokens import UNFINISHED, BinWriter, DataError, load_tokenizer, write_meta


def find_files(root, ignored):
    """
    The files under root, [(path inside root, with slashes, path)]. ignored: tells of a name whether to pass it over.
    What cannot be text (links to folders or to nothing, FIFOs, devices) is counted on stderr. Raises DataError for a
    folder that cannot be listed, because a corpus without it would be another one.
    """
    def stop(error):
        raise error

    found, left_out = [], []
    try:
        for folder, folders, names in os.walk(root, onerror=stop):
            folders[:] = [name for name in folders if not ignored(name)]
            links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
            for path in (Path(folder, name) for name in names + links if not ignored(name)):
                (found if path.is_file() else left_out).append(path)
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}; put that right and run this again") from None
    if left_out:
        print(f"{root}: {len(left_out)} left out, which are links to folders or to nothing, or special files; the "
              f"first is {left_out[0]}", file=sys.stderr)
    return [(path.relative_to(root).as_posix(), path) for path in found]


def goes_to_val(key):
    """About 5% of files, by a hash of the name: it splits the same on every machine and whatever else is there."""
    return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8], "big") % 100 < 5


def encode_file(path, tokenizer):
    """
    One file as one document, (n,) uint16, or None if it is no text: not UTF-8, empty, with NULs.
    Raises DataError if it cannot be read: a corpus without it would be another one.
    """
    try:
        with open_file(path) as file:
            text = file.read().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except (ConfigError, OSError) as error:
        raise DataError(f"{error}; nothing was written. Mend it or move it away, and run this again") from None
    return np.insert(tokenizer.encode(text), 0, tokenizer.separator) if text and "\0" not in text else None


def in_threads(function, items):
    """
    Yields function(item) for each item in order, worked out on every core, a few items ahead of what was asked for.
    Threads, because tiktoken lets go of the interpreter's lock; and unlike a process none can be killed by itself.
    """
    pool, pending = ThreadPoolExecutor(os.cpu_count()), deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 4 * os.cpu_count():
                yield pending.popleft().result()
        for future in pending:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C nothing is begun any more


def write_corpus(files, out, tokenizer, unit=str):
    """
    Tokenises files into out/train.bin, out/val.bin and out/meta.json. What was in the folder stays as it was until all
    is complete.

    files: [(key, path)], in the order of their keys · tokenizer: 'bytes' or 'gpt2'
    unit: maps a key to the name whose hash decides the split; files with one name stay on one side
    Raises DataError if no file holds text, or one cannot be read.
    """
    # Names are bytes, and the characters that stand for them depend on the locale.
    files, tok = sorted(files, key=lambda file: os.fsencode(file[0])), load_tokenizer(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    skipped = 0
    encoded = in_threads(lambda file: encode_file(file[1], tok), files)
    with BinWriter(out / "train.bin") as train, BinWriter(out / "val.bin") as val:
        for (key, _), tokens in tqdm(zip(files, encoded), out.name, len(files), unit="file", disable=None):
            if tokens is None:
                skipped += 1
            else:
                (val if goes_to_val(unit(key)) else train).write(tokens)
        if train.count + val.count == 0:
            raise DataError(f"{out}: not written, none of {len(files)} files holds UTF-8 text; name other files")
        # Few files may all fall on one side.
        if not train.count:
            train.write(val.cut(val.count))
        if not val.count:
            val.write(train.cut(max(1, train.count // 20)))
            print("split: too few files to split by file, so val is the last 5% of the tokens")
        train.flush()
        val.flush()
        begin(out)
    print(f"files: {len(files) - skipped} ({skipped} skipped: not UTF-8, empty or with NULs)")
    finish(out, tok)


def begin(out):
    """Marks a folder as unfinished until finish(): a kill in between leaves files of two corpora in it."""
    (out / UNFINISHED).touch()
    (out / "meta.json").unlink(missing_ok=True)


def finish(out, tokenizer):
    """Writes meta.json and prints what the folder holds."""
    for key, value in (write_meta(out, tokenizer) | {"folder": out}).items():
        print(f"{key}: {value}")


def home(path):
    """A path, with ~ as the home folder: the type of an argument."""
    return Path(os.path.expanduser(path))


def command_line(prepare, parser):
    """Runs prepare with the command line's arguments; what the user can fix is one line on stderr and exit code 2."""
    streams()
    arguments = vars(parser.parse_args())
    try:
        prepare(**arguments)
    except ConfigError as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:  # a full disk, a folder that cannot be written
        where = error.filename or arguments["out"] or parser.prog
        parser.exit(2, f"{where}: {error.strerror or error}; make room or name another --out\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command starts again from what is complete\n")
