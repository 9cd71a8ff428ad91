"""
What the prepare.py scripts share: turning text files into a folder of tokens, and a command line with one-line errors.

Imports tokens.py and configurator.py.
"""

import argparse
import hashlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import ConfigError, read_bytes, refuse, streams
from data.tokens import UNFINISHED, load_tokenizer, split_files, write_bin, write_meta


def find_files(root, ignored):
    """
    The files under root and its sub-folders, [(path inside root, with slashes, path)].

    ignored(name) is True for the names of files and folders to leave out. Links to folders, dangling links and special
    files are left out too, and counted on stderr. Raises ConfigError for a folder that cannot be listed, since a corpus
    without it would be a different one.
    """
    def stop(error):
        raise ConfigError(f"{error.filename}: {error.strerror}; fix that and run the same command again")

    found, left_out = [], []
    for folder, folders, names in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if not ignored(name)]
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for path in (Path(folder, name) for name in names + links if not ignored(name)):
            (found if os.path.isfile(path) else left_out).append(path)
    if left_out:
        print(f"{root}: left out {len(left_out)} links to folders, dangling links and special files; the first is "
              f"{left_out[0]}", file=sys.stderr)
    return [(path.relative_to(root).as_posix(), path) for path in found]


def goes_to_val(key):
    """
    True for about 5% of keys, by their hash: the split is the same on every machine and does not depend on what other
    files there are.
    """
    return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8], "big") % 100 < 5


def encode_file(path, tokenizer):
    """
    One file as one document, (n,) uint16, or None if it is not text: not UTF-8, empty, or with NULs or a million blanks
    in a row. Raises ConfigError if it cannot be read: without it the corpus would be a different one.
    """
    try:
        content = read_bytes(path)
    except ConfigError as error:
        raise ConfigError(f"{error}; nothing was written. Fix or move it and run the same command again") from None
    try:
        tokens = tokenizer.encode(content.decode("utf-8"))
    except ValueError:
        return None
    return np.insert(tokens, 0, tokenizer.separator) if content and b"\0" not in content else None


def save(out, tokenizer, train, val):
    """
    Writes a corpus to a folder: train.bin and val.bin from two lists of documents, arrays of uint16 or uint8, and
    meta.json. An older corpus in the folder stays as it was until both files are complete on the disk.
    Raises ConfigError if the folder has other files that would be read as part of this corpus.
    """
    for split in ("train", "val"):
        for path in split_files(out, split):
            if path.name != f"{split}.bin":
                raise ConfigError(f"{path}: would be read as part of this corpus; move it or choose another --out")
    # The process id lets two processes prepare the same corpus at once; the suffix keeps a leftover from being data.
    parts = {split: out / f"{split}.bin.{os.getpid()}.part" for split in ("train", "val")}
    try:
        write_bin(parts["train"], train)
        write_bin(parts["val"], val)
        # A kill between the renames of train.bin and val.bin leaves files of two corpora, and the old meta.json would
        # describe both wrongly. So the folder counts as unfinished until write_meta.
        (out / UNFINISHED).touch()
        (out / "meta.json").unlink(missing_ok=True)
        for split, part in parts.items():
            os.replace(part, out / f"{split}.bin")
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)
    finish(out, tokenizer)


def finish(out, tokenizer):
    """Writes meta.json and prints what the folder holds."""
    for key, value in (write_meta(out, tokenizer) | {"folder": out}).items():
        print(f"{key}: {value}")


def write_corpus(files, out, tokenizer, unit=str):
    """
    Tokenises files into a corpus in the folder out. All of its tokens are in memory at once, 2 bytes each.

    files: [(key, path)], written in the order of their keys; a file and the links to it are one document, with the
    first key
    tokenizer: 'bytes' or 'gpt2'
    unit: maps a key to the name whose hash decides the split; files with the same name stay on one side
    Raises ConfigError if no file holds text, or if one cannot be read.
    """
    # By the bytes of the names: the characters that Python makes of them depend on the locale.
    files, found = sorted(files, key=lambda file: os.fsencode(file[0])), {}
    for key, path in files:
        found.setdefault(os.path.realpath(path), (key, path))
    files = list(found.values())
    tok = load_tokenizer(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    train, val = [], []
    with ThreadPoolExecutor() as pool:  # threads, because tiktoken releases the interpreter's lock
        encoded = pool.map(lambda file: encode_file(file[1], tok), files)
        for (key, _), tokens in tqdm(zip(files, encoded), out.name, len(files), unit="file", disable=None):
            if tokens is not None:
                (val if goes_to_val(unit(key)) else train).append(tokens)
    documents = len(train) + len(val)
    if not documents:
        raise ConfigError(f"{out}: not written, none of {len(files)} files holds UTF-8 text; choose other files")
    if not (train and val):
        tokens = np.concatenate(train + val)
        train, val = ([half] for half in np.split(tokens, [-max(1, len(tokens) // 20)]))
        print("split: too few files to split by file, so val is the last 5% of the tokens")
    print(f"files: {documents} ({len(files) - documents} skipped: empty or not UTF-8 text)")
    save(out, tok, train, val)


def home(path):
    """The type of a path on the command line; ~ is the home folder."""
    return Path(os.path.expanduser(path))


def command_line(prepare, parser, default):
    """
    Adds --out, whose default is described, and runs prepare with the command line's arguments. A mistake of the user is
    one line on stderr and exit code 2.
    """
    parser.add_argument("--out", type=home, default=argparse.SUPPRESS,
                        help=f"folder to write; train with --dataset=FOLDER (default: {default})")
    streams()
    arguments = vars(parser.parse_args())
    try:
        prepare(**arguments)
    except ConfigError as error:
        refuse(error)
    except OSError as error:  # a full disk, a folder that cannot be written
        where = error.filename or arguments.get("out", "the corpus")
        refuse(f"{where}: {error.strerror or error}; make room or choose another --out")
