"""
Tokens on disk and the batches made of them.

A .bin file is a header of 256 int32 (magic 20240520, version 1, number of tokens, zeros) and then the tokens as
uint16, all little endian: the layout of llm.c and modded-nanogpt, so their shards work here unchanged and ours there.
A document is a separator token followed by the document's tokens. A folder holds .bin files with the word train or val
in their names and, when our scripts made it, a meta.json that names the tokenizer.

Knows configurator.py alone.
"""

import hashlib
import json
import mmap
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np

from configurator import ConfigError, check, open_file, read_json

HERE = Path(__file__).resolve().parent
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
UNFINISHED = "meta.json.part"  # stands in a folder while its files may be of two corpora


class DataError(ConfigError):
    """One line for the user: which file, what is wrong with it, what to do about it."""


def data_folder(dataset):
    """The folder of a dataset: data/<name> for a name, the path itself for anything with a path separator in it."""
    is_path = any(sep in dataset for sep in {"/", os.sep}) or dataset.startswith("~")
    return Path(os.path.expanduser(dataset)) if is_path else HERE / dataset


def rebuild_command(folder):
    """The command that makes what should be in this folder, for error messages."""
    folder = Path(folder)
    script = {"text": "text/prepare.py FOLDER", "pysrc_gpt2": "pysrc/prepare.py --tokenizer gpt2",
              "pysrc_site": "pysrc/prepare.py --site_packages",
              "pysrc_gpt2_site": "pysrc/prepare.py --tokenizer gpt2 --site_packages",
              }.get(folder.name, f"{folder.name}/prepare.py")
    if Path(os.path.realpath(folder)).parent == HERE and (HERE / script.split()[0]).exists():
        return f"python data/{script}"
    return f"python data/text/prepare.py FOLDER --out {folder}"


# ---------------------------------------------------------------------------------------------------------------------
# Files

def split_files(folder, split):
    """
    The .bin files of a split in a folder, [Path], sorted: those with the word train, or val, in their names.
    Raises DataError for a name with both words, and for a folder that cannot be listed.
    """
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; name a folder that can be read") from None
    words = {Path(folder, name): set(re.findall("[a-z]+", name[:-4])) for name in names if name.endswith(".bin")}
    for path, found in words.items():
        if {"train", "val"} <= found:
            raise DataError(f"{path}: both train and val are in its name; rename it after the one that it is")
    return [path for path, found in words.items() if split in found]


def open_tokens(path):
    """
    A .bin file as its tokens, (n,) uint16 with n at least 1, and the mmap that they lie in; nothing is read yet.
    Raises DataError if the file is not a whole one of our format, ConfigError if it is none at all.
    """
    path = Path(path)
    again = f"delete it and run: {rebuild_command(path.parent)}"
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = np.fromfile(file, "<i4", 256)
        if len(header) < 256:
            raise DataError(f"{path}: {size} bytes are too few for the header; {again}")
        magic, version, n_tokens = (int(value) for value in header[:3])
        if (magic, version) != (MAGIC, VERSION):
            raise DataError(f"{path}: not a file of tokens (magic {magic}, version {version}, and not {MAGIC}, "
                            f"{VERSION}); {again}")
        if n_tokens < 1 or size != HEADER_BYTES + 2 * n_tokens:
            raise DataError(f"{path}: truncated or damaged: the header counts {n_tokens} tokens, which make "
                            f"{HEADER_BYTES + 2 * n_tokens} bytes, and it has {size}; {again}")
        content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return np.frombuffer(content, "<u2", offset=HEADER_BYTES), content


class BinWriter:
    """
    Writes a .bin file: `with BinWriter(path) as out: out.write(tokens)`.

    The path holds either what it held before or the whole new file, never a part: everything goes to a temporary file
    beside it, renamed at the end. The process id in its name lets two first runs prepare the same corpus at once, and
    the suffix .part keeps what a kill leaves there from being read as data.
    """

    def __init__(self, path):
        self.path, self.count = Path(path), 0
        self.temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")

    def __enter__(self):
        if self.path.exists() and not self.path.is_file():
            raise DataError(f"{self.path}: in the way, and no file; remove it or name another --out")
        self.file = open(self.temporary, "wb+")
        self.file.write(bytes(HEADER_BYTES))
        return self

    def write(self, tokens):
        """Appends integers. Raises DataError for one that is no uint16, or for more than the header can count."""
        tokens = np.asarray(tokens)
        if tokens.size and (tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() > 65535):
            raise DataError(f"{self.path}: tokens must be integers from 0 to 65535 to fit in uint16; "
                            "use a tokenizer with a smaller vocabulary")
        if self.count + tokens.size >= 2 ** 31:
            raise DataError(f"{self.path}: one file cannot count 2**31 tokens; prepare a part of the corpus, "
                            "or bytes with --tokenizer gpt2 (about a quarter of the tokens)")
        self.file.write(tokens.astype("<u2").tobytes())
        self.count += tokens.size

    def cut(self, n):
        """Takes the last n tokens out of the file again and returns them, (n,) uint16."""
        self.count -= n
        self.file.seek(HEADER_BYTES + 2 * self.count)
        tokens = np.frombuffer(self.file.read(), "<u2")
        self.file.seek(HEADER_BYTES + 2 * self.count)
        self.file.truncate()
        return tokens

    def flush(self):
        """Completes the temporary file and forces it to disk: a full disk shows here, before any rename."""
        self.file.seek(0)
        self.file.write(np.array([MAGIC, VERSION, self.count], "<i4").tobytes())
        self.file.seek(0, os.SEEK_END)
        self.file.flush()
        os.fsync(self.file.fileno())

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.flush()
            self.file.close()
            if kind is None:
                os.replace(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


def write_meta(folder, tokenizer):
    """
    Writes meta.json for the .bin files of a folder and returns its content. It comes last: it says that they are whole
    and belong together. tokenizer: what has its name and its vocab_size
    """
    folder = Path(folder)
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
    for split in ("train", "val"):
        meta[f"{split}_tokens"] = sum(len(open_tokens(path)[0]) for path in split_files(folder, split))
    (folder / UNFINISHED).write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(folder / UNFINISHED, folder / "meta.json")
    return meta


def read_meta(folder):
    """
    meta.json of a folder, a dict, {} where there is none, as beside other people's shards.
    Raises DataError for one that cannot be right, and for a folder whose prepare.py was stopped between two files.
    """
    path, again = Path(folder) / "meta.json", rebuild_command(folder)
    if os.path.exists(path.with_name(UNFINISHED)):
        raise DataError(f"{folder}: not whole, prepare.py is at it or was stopped; if it was, run: {again}")
    if not os.path.exists(path):
        return {}
    try:
        meta = read_json(path)
        check(f"{path}: tokenizer", meta.get("tokenizer", ""), str)
        check(f"{path}: vocab_size", meta.get("vocab_size", 1), Annotated[int, 1, 65536])
    except ConfigError as error:
        raise DataError(f"{error}; delete it and run: {again}") from None
    return meta


def vocabulary(folder):
    """How many tokens a folder's tokenizer has: meta.json's number, or GPT-2's for other people's shards."""
    return read_meta(folder).get("vocab_size", GPT2Tokenizer.vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

class ByteTokenizer:
    """A token is a byte of UTF-8; the separator is byte 0, which no text contains (encode drops it)."""

    name, vocab_size, separator = "bytes", 256, 0

    def encode(self, text):
        """str -> (n,) uint16"""
        return np.frombuffer(text.replace("\0", "").encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def token_bytes(self, token):
        """int -> bytes, empty for a token that does not exist"""
        return bytes([token]) if 0 <= token < 256 else b""


class GPT2Tokenizer:
    """GPT-2's byte pairs, by tiktoken. A model's vocabulary padded to 50,304 can produce tokens it does not know."""

    name, vocab_size, separator = "gpt2", 50257, 50256
    longest_run = 2 ** 19  # of blanks; at about a million tiktoken's regular expression runs out of stack

    def __init__(self):
        try:
            import tiktoken
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # a dozen kinds, of requests, urllib3, the disk and tiktoken's own checksums
            raise DataError(f"tokenizer gpt2: tiktoken or its files are missing ({type(error).__name__}); pip install "
                            "tiktoken, and connect to the network once or set TIKTOKEN_CACHE_DIR to a folder that has "
                            "the files") from None

    def encode(self, text):
        """str -> (n,) uint16; the text <|endoftext|> is text here, never the separator"""
        text = text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair has no UTF-8
        cuts = [0]
        for run in re.finditer(r"\s+", text) if len(text) > self.longest_run else ():
            cuts += range(run.start() + self.longest_run, run.end(), self.longest_run)
        pieces = (text[start:end] for start, end in zip(cuts, cuts[1:] + [None]))
        # Not encode_ordinary: its list of Python's ints is made under the interpreter's lock, and threads wait for it.
        tokens = [self.bpe.encode_to_numpy(piece, disallowed_special=()) for piece in pieces]
        return np.concatenate(tokens).astype(np.uint16)

    def token_bytes(self, token):
        """int -> bytes, empty for a token that does not exist"""
        return self.bpe.decode_single_token_bytes(token) if 0 <= token < self.vocab_size else b""


@lru_cache(None)
def load_tokenizer(name):
    """
    The tokenizer called 'bytes' or 'gpt2', with: name, vocab_size, separator (a token), encode(str) -> (n,) uint16,
    token_bytes(int) -> bytes.
    Raises DataError for another name, or if tiktoken is missing its files.
    """
    tokenizers = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}
    if name not in tokenizers:
        raise DataError(f"tokenizer {name!r}: unknown; choose one of {', '.join(tokenizers)}")
    return tokenizers[name]()


# ---------------------------------------------------------------------------------------------------------------------
# Batches

class Tokens:
    """
    One split of a dataset, cut into windows of block_size tokens.

    batch() is a pure function of (files, seed, index): a run that resumes at step s, or ranks that share a batch, ask
    for the indices they need and get what one uninterrupted process would have seen.

    n_tokens int, in the files that hold a window at least · n_windows int, for window() · windows_per_epoch int, for
    batch() · paths [Path] · meta dict, as read_meta gives it · tokenizer str, or None where it is not known
    Raises DataError, naming the file, for data that is missing, damaged, too short or of a larger vocabulary.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=0):
        self.folder, self.split, self.seed = Path(folder), split, seed
        self.block_size, self.vocab_size = block_size, vocab_size
        again = rebuild_command(self.folder)
        self.paths = split_files(self.folder, split)
        if not self.paths:
            raise DataError(f"{self.folder}: no {split} tokens there (a .bin with the word {split} in its name); make "
                            f"them with: {again}")
        self.meta = read_meta(self.folder)
        # Shards without a meta.json are other people's: GPT-2's, unless the vocabulary is too small for them.
        gpt2 = not self.meta and vocab_size >= GPT2Tokenizer.vocab_size
        self.tokenizer = self.meta.get("tokenizer", "gpt2" if gpt2 else None)
        if self.meta.get("vocab_size", 0) > vocab_size:
            raise DataError(f"{self.folder}: its tokenizer has {self.meta['vocab_size']} tokens and the model only "
                            f"{vocab_size}; set --vocab_size={self.meta['vocab_size']} or more")
        self.lengths = np.array([len(open_tokens(path)[0]) for path in self.paths], np.int64)
        self.n_tokens, longest = int(self.lengths[self.lengths > block_size].sum()), int(self.lengths.max())
        if longest <= block_size:
            shorter = f"set --block_size={longest - 1} or less, or " * (longest > 1)
            raise DataError(f"{self.folder}: the longest {split} file has {longest} tokens, and block_size "
                            f"{block_size} needs one more than itself; {shorter}prepare more text")
        # Not all at once: a mapped file holds a descriptor, and often no more than 1024 of those are allowed.
        self._open = lru_cache(256)(self._open)

        # In training a shard gives up one window, so that the rest can start at an offset that differs by epoch and
        # the number of windows does not. A window reads one token more than it advances: the last one's target.
        fixed = (self.lengths - 1) // block_size
        moving = np.where(fixed > 0, np.maximum(self.lengths // block_size - 1, 1), 0)
        self.slack = np.maximum(self.lengths - moving * block_size, 1)  # possible offsets: 0 … slack - 1
        self.fixed_ends, self.moving_ends = np.cumsum(fixed), np.cumsum(moving)
        self.n_windows, self.windows_per_epoch = int(self.fixed_ends[-1]), int(self.moving_ends[-1])
        # Two, because a batch may straddle epochs; more would cost 80 MB each at 10 million windows.
        self._epoch = lru_cache(2)(self._epoch)

    def _epoch(self, epoch):
        """The offset of each shard (n_shards,) and the order of the windows (windows_per_epoch,) in one epoch."""
        # RandomState, because its streams are frozen: a newer numpy may change what default_rng draws.
        random = np.random.RandomState([self.seed % 2 ** 32, epoch])
        return random.randint(0, self.slack, dtype=np.int64), random.permutation(self.windows_per_epoch)

    def batch(self, first, count):
        """
        Samples first … first + count - 1 of an endless stream: epoch after epoch, each in an order and with window
        borders of its own, no token twice within one.
        Returns x, y: (count, block_size) int64, y one token ahead of x. Raises DataError for a token >= vocab_size.
        """
        epochs, positions = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        shard, start = np.empty(count, np.int64), np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            offsets, order = self._epoch(int(epoch))
            shard[mask], start[mask] = self._locate(order[positions[mask]], self.moving_ends)
            start[mask] += offsets[shard[mask]]
        return self._read(shard, start)

    def spread(self, n_tokens):
        """
        The windows for an evaluation on n_tokens (0 is all), (k,) int64: numbers floor((i + 1/2) n_windows / k) for
        i < k, so that every part of the split counts alike. At least one window.
        """
        n = self.n_windows
        k = min(n, max(1, n_tokens // self.block_size)) if n_tokens else n
        return (2 * np.arange(k) + 1) * n // (2 * k)

    def window(self, windows):
        """
        The windows of these numbers, (k,), counted through the files in order; the borders never move.
        Returns x, y: (k, block_size) int64. Raises DataError for a token >= vocab_size.
        """
        return self._read(*self._locate(windows, self.fixed_ends))

    def bytes_per_token(self, windows):
        """
        Mean bytes of text per target of the windows of these numbers, float: it turns their mean loss in nats into
        bits per byte. None where the tokenizer is unknown or its files are missing.
        """
        try:
            tokenizer = load_tokenizer(self.tokenizer)
            lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(65536)])
            lengths[tokenizer.separator] = 0  # a token to predict, and no text
            step = max(1, 2 ** 20 // self.block_size)
            total = sum(lengths[self.window(windows[first:first + step])[1]].sum()
                        for first in range(0, len(windows), step))
        except DataError:
            return None
        return float(total / (len(windows) * self.block_size))

    def _locate(self, windows, ends):
        """Numbers of windows (n,) -> their shards (n,) and first tokens (n,), given where each shard's windows end."""
        shard = np.searchsorted(ends, windows, side="right")
        before = np.concatenate([[0], ends])[shard]
        return shard, (windows - before) * self.block_size

    def _open(self, s):
        """Every window of shard s as a row of block_size + 1 tokens, a view of its mmap, and the mmap."""
        tokens, content = open_tokens(self.paths[s])
        if len(tokens) != self.lengths[s]:
            raise DataError(f"{self.paths[s]}: was replaced while it was read; start the run again")
        return np.lib.stride_tricks.sliding_window_view(tokens, self.block_size + 1), content

    def _read(self, shard, start):
        rows = np.empty((len(shard), self.block_size + 1), np.uint16)
        for s in np.unique(shard):
            windows, content = self._open(s)
            # To read past the end of a file that was cut kills the process; it may still be cut just now.
            if content.size() < len(content):
                raise DataError(f"{self.paths[s]}: was cut while it was read; make it anew with: "
                                f"{rebuild_command(self.folder)}, then go on with --resume=True")
            mask = shard == s
            rows[mask] = windows[start[mask]]
        # On a GPU an index past the embedding is a device assert far from here, on a CPU a crash without a file name.
        if rows.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            path = self.paths[shard[row]]
            raise DataError(f"{path}: token {rows[row, column]} at position {start[row] + column} is outside the "
                            f"vocabulary of {self.vocab_size}; raise --vocab_size if that is not the tokenizer's, "
                            f"else delete the file and run: {rebuild_command(self.folder)}")
        return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)

    def fingerprint(self):
        """
        sha256, hex, over the names, lengths and content of the files: with it a resumed run can tell that its data is
        the same. Above 64 MB it samples 16 pieces of 64 KB a file, first and last included: a check that takes
        minutes would be switched off.
        """
        digest, piece = hashlib.sha256(), 2 ** 16
        whole = 2 * self.lengths.sum() <= 64 * 2 ** 20
        for path in self.paths:
            tokens, content = open_tokens(path)
            digest.update(os.fsencode(path.name) + f" {len(tokens)}\n".encode())
            content = memoryview(content)[HEADER_BYTES:]
            if whole or len(content) <= 16 * piece:
                digest.update(content)
            else:
                for start in np.linspace(0, len(content) - piece, 16).astype(np.int64).tolist():
                    digest.update(content[start:start + piece])
        return digest.hexdigest()
