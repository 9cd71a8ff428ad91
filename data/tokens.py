"""
Tokens on disk and the batches made of them.

A .bin file is a header of 256 int32 (magic 20240520, version 1, number of tokens, zeros) and then the tokens as
uint16, all little endian. It is the layout of llm.c and modded-nanogpt, so their shards work here and ours there. A
document is a separator token followed by the document's tokens. A folder holds .bin files with the word train or val
in their names and, when our scripts made it, a meta.json that names the tokenizer.

Imports configurator.py.
"""

import hashlib
import json
import mmap
import os
import re
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np

from configurator import ConfigError, check, open_file, read_json

HERE = Path(__file__).resolve().parent
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
UNFINISHED = "meta.json.part"  # present while the files of a folder may belong to two corpora


def data_folder(dataset):
    """The folder of a dataset: data/<name> for a name, the path itself for anything with a slash in it."""
    is_path = "/" in dataset or os.sep in dataset or dataset.startswith("~")
    return Path(os.path.expanduser(dataset)) if is_path else HERE / dataset


def rebuild_command(folder):
    """The command that makes the data of this folder, for error messages."""
    folder = Path(folder)
    script = {"text": "text/prepare.py FOLDER", "pysrc_gpt2": "pysrc/prepare.py --tokenizer gpt2",
              "pysrc_site": "pysrc/prepare.py --site_packages",
              "pysrc_gpt2_site": "pysrc/prepare.py --tokenizer gpt2 --site_packages",
              }.get(folder.name, f"{folder.name}/prepare.py")
    if Path(os.path.realpath(folder)).parent == HERE and (HERE / script.split()[0]).exists():
        return f"python data/{script}"
    return f"python data/text/prepare.py FOLDER --out {shlex.quote(str(folder))}"


# ---------------------------------------------------------------------------------------------------------------------
# Files

def split_files(folder, split):
    """
    The .bin files in a folder whose names have the word of a split (train or val) in them: [Path], sorted.
    Raises ConfigError for a name with both words, and for a folder that cannot be listed.
    """
    try:
        names = sorted(os.listdir(folder)) if os.path.lexists(folder) else []
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; choose a folder that can be read") from None
    words = {Path(folder, name): set(re.findall("[a-z]+", name[:-4])) for name in names if name.endswith(".bin")}
    for path, found in words.items():
        if {"train", "val"} <= found:
            raise ConfigError(f"{path}: both train and val are in its name; rename it to say which split it is")
    return [path for path, found in words.items() if split in found]


def open_tokens(path):
    """
    The tokens of a .bin file, (n,) uint16 with n at least 1, and the mmap that holds them. Reads only the header.
    Raises ConfigError if the file is damaged, of another format, or not a regular file.
    """
    path = Path(path)
    again = f"delete it and run: {rebuild_command(path.parent)}"
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        magic, version, n_tokens = np.frombuffer(file.read(12).ljust(12, b"\0"), "<i4").tolist()
        if (magic, version) != (MAGIC, VERSION):
            raise ConfigError(f"{path}: not a file of tokens (magic {magic}, version {version} instead of {MAGIC}, "
                              f"{VERSION}); {again}")
        if n_tokens < 1 or size != HEADER_BYTES + 2 * n_tokens:
            raise ConfigError(f"{path}: truncated or damaged (its header counts {n_tokens} tokens, which need "
                              f"{HEADER_BYTES + 2 * n_tokens} bytes; the file has {size}); {again}")
        content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    return np.frombuffer(content, "<u2", offset=HEADER_BYTES), content


def write_bin(path, documents):
    """
    Writes a .bin file, and waits until it is on the disk. documents: arrays of uint16 or uint8, one after the other
    Raises ConfigError for more tokens than the header can count.
    """
    count = sum(map(len, documents))
    if count >= 2 ** 31:
        raise ConfigError(f"{path}: a file cannot hold 2**31 tokens or more; prepare a part of the corpus, or use "
                          "--tokenizer gpt2 in place of bytes (about a quarter of the tokens)")
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, count
    with open(path, "wb") as file:
        file.write(header)
        file.writelines(tokens.astype("<u2", casting="safe") for tokens in documents)
        file.flush()
        os.fsync(file.fileno())


def write_meta(folder, tokenizer):
    """
    Writes meta.json for the .bin files of a folder and returns its content. Call it last: meta.json says that the files
    are complete and belong together. tokenizer: anything with a name and a vocab_size
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
    The content of a folder's meta.json, a dict; {} if there is none, as with shards made by other projects.
    Raises ConfigError if its values are impossible, or if prepare.py was stopped between two files.
    """
    path, again = Path(folder) / "meta.json", rebuild_command(folder)
    if os.path.exists(path.with_name(UNFINISHED)):
        raise ConfigError(f"{folder}: incomplete: prepare.py is still running or was stopped; if stopped, run: {again}")
    if not os.path.exists(path):
        return {}
    try:
        meta = read_json(path)
        check(f"{path}: tokenizer", meta.get("tokenizer", ""), str)
        check(f"{path}: vocab_size", meta.get("vocab_size", 1), Annotated[int, 1, 65536])
    except ConfigError as error:
        raise ConfigError(f"{error}; delete it and run: {again}") from None
    return meta


def vocabulary(folder):
    """The vocabulary size of a folder's tokenizer: from meta.json, or GPT-2's for shards made by other projects."""
    return read_meta(folder).get("vocab_size", GPT2Tokenizer.vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

class ByteTokenizer:
    """A token is a byte of UTF-8. The separator is byte 0, which encode removes from the text."""

    name, vocab_size, separator = "bytes", 256, 0

    def encode(self, text):
        """str -> (n,) uint16"""
        return np.frombuffer(text.replace("\0", "").encode("utf-8", "replace"), np.uint8).astype(np.uint16)

    def token_bytes(self, token):
        """int -> bytes, empty for a token that does not exist"""
        return bytes([token]) if 0 <= token < 256 else b""


class GPT2Tokenizer:
    """GPT-2's byte pairs, by tiktoken. A model with a padded vocabulary of 50,304 can produce unknown tokens."""

    name, vocab_size, separator = "gpt2", 50257, 50256

    def __init__(self):
        try:
            import tiktoken
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # a dozen classes: of requests, urllib3, the disk and tiktoken's own checksums
            raise ConfigError(f"tokenizer gpt2: tiktoken or its files are missing ({type(error).__name__}); pip "
                              "install tiktoken, and connect to the network once or set TIKTOKEN_CACHE_DIR to a folder "
                              "that has the files") from None

    def encode(self, text):
        """str -> (n,) uint16; <|endoftext|> in the text is plain text, not the separator. Raises ConfigError."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate has no UTF-8
        try:  # not encode_ordinary, which builds a list of Python ints under the interpreter's lock while threads wait
            return self.bpe.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError as error:  # a million blanks in a row are too much for tiktoken's regular expression
            raise ConfigError(f"tiktoken cannot encode this text ({error}); shorten its runs of blanks") from None

    def token_bytes(self, token):
        """int -> bytes, empty for a token that does not exist"""
        return self.bpe.decode_single_token_bytes(token) if 0 <= token < self.vocab_size else b""


@lru_cache(None)
def load_tokenizer(name):
    """
    The tokenizer called 'bytes' or 'gpt2'. It has name, vocab_size, separator (a token), encode(str) -> (n,) uint16
    and token_bytes(int) -> bytes.
    Raises ConfigError for another name, or if tiktoken's files are missing.
    """
    tokenizers = {"bytes": ByteTokenizer, "gpt2": GPT2Tokenizer}
    if name not in tokenizers:
        raise ConfigError(f"tokenizer {name!r}: unknown; choose one of {', '.join(tokenizers)}")
    return tokenizers[name]()


# ---------------------------------------------------------------------------------------------------------------------
# Batches

class Tokens:
    """
    One split of a dataset, cut into windows of block_size tokens.

    batch() is a pure function of (files, seed, index). So a run that resumes at step s, or ranks that share a batch,
    get what one uninterrupted process would have seen.

    n_tokens: those in files that are long enough for a window · n_windows: how many window() has
    windows_per_epoch: how many an epoch of batch() has · paths: [Path] · tokenizer: its name, or None if unknown
    Raises ConfigError, naming the file, for data that is missing, damaged, too short or of a larger vocabulary.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=0):
        self.folder, self.block_size, self.vocab_size, self.seed = Path(folder), block_size, vocab_size, seed
        self.paths = split_files(self.folder, split)
        if not self.paths:
            raise ConfigError(f"{self.folder}: has no {split} tokens (a .bin file with the word {split} in its name); "
                              f"make them with: {rebuild_command(folder)}")
        meta = read_meta(self.folder)
        # Shards without a meta.json come from other projects: GPT-2 tokens, unless the vocabulary is too small.
        gpt2 = not meta and vocab_size >= GPT2Tokenizer.vocab_size
        self.tokenizer = meta.get("tokenizer", "gpt2" if gpt2 else None)
        if meta.get("vocab_size", 0) > vocab_size:
            raise ConfigError(f"{self.folder}: its tokenizer has {meta['vocab_size']} tokens, the model only "
                              f"{vocab_size}; set --vocab_size={meta['vocab_size']} or more")
        self.lengths = np.array([len(open_tokens(path)[0]) for path in self.paths], np.int64)
        self.n_tokens, longest = int(self.lengths[self.lengths > block_size].sum()), int(self.lengths.max())
        if longest <= block_size:
            shorter = f"set --block_size={longest - 1} or less, or " * (longest > 1)
            raise ConfigError(f"{self.folder}: the longest {split} file has {longest} tokens, and a window of "
                              f"block_size {block_size} needs {block_size + 1}; {shorter}prepare more text")
        # Not all at once: each mapped file takes a file descriptor, and a process often may have only 1024.
        self._open = lru_cache(256)(self._open)

        # In training each shard gives up one window, so that the others can start at an offset that differs by epoch
        # while their number stays the same. A window reads one token more than it advances: the last one's target.
        fixed = (self.lengths - 1) // block_size
        moving = np.minimum(fixed, np.maximum(self.lengths // block_size - 1, 1))
        self.slack = self.lengths - moving * block_size  # possible offsets: 0 … slack - 1
        self.fixed_ends, self.moving_ends = np.cumsum(fixed), np.cumsum(moving)
        self.n_windows, self.windows_per_epoch = int(self.fixed_ends[-1]), int(self.moving_ends[-1])
        # Two, because a batch may span two epochs; each costs 80 MB at 10 million windows.
        self._epoch = lru_cache(2)(self._epoch)

    def _epoch(self, epoch):
        """The offset of each shard (n_shards,) and the order of the windows (windows_per_epoch,) in one epoch."""
        # RandomState, because its streams are frozen; a newer numpy may change what default_rng draws.
        random = np.random.RandomState([self.seed, epoch])
        return random.randint(0, self.slack, dtype=np.int64), random.permutation(self.windows_per_epoch)

    def batch(self, first, count):
        """
        Samples first … first + count - 1 of an endless stream of epochs. Each epoch has its own order and its own
        window borders, and no token twice.
        Returns x, y: (count, block_size) int64, y one token ahead of x. Raises ConfigError for a token >= vocab_size.
        """
        epochs, positions = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        found = []
        for epoch in np.unique(epochs):
            offsets, order = self._epoch(int(epoch))
            shard, start = self._locate(order[positions[epochs == epoch]], self.moving_ends)
            found.append((shard, start + offsets[shard]))
        return self._read(*np.concatenate(found, axis=1))

    def spread(self, n_tokens):
        """
        The numbers of the windows for an evaluation on n_tokens (0 is all), (k,) int64: floor((i + 1/2) n_windows / k)
        for i < k, so that they are spread evenly over the split. At least one.
        """
        n = self.n_windows
        k = min(n, max(1, n_tokens // self.block_size)) if n_tokens else n
        return (2 * np.arange(k) + 1) * n // (2 * k)

    def window(self, windows):
        """
        The windows with these numbers, (k,), counted through the files in order; their borders never move.
        Returns x, y: (k, block_size) int64. Raises ConfigError for a token >= vocab_size.
        """
        return self._read(*self._locate(windows, self.fixed_ends))

    def bytes_per_token(self, windows):
        """
        Mean bytes of text per target of the windows with these numbers, float: it converts their mean loss in nats to
        bits per byte. None if the tokenizer is unknown or its files are missing.
        """
        try:
            tokenizer = load_tokenizer(self.tokenizer)
            lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(65536)])
            lengths[tokenizer.separator] = 0  # predicted like any token, but not text
            step = max(1, 2 ** 20 // self.block_size)
            total = sum(lengths[self.window(windows[first:first + step])[1]].sum()
                        for first in range(0, len(windows), step))
        except ConfigError:
            return None
        return float(total / (len(windows) * self.block_size))

    def _locate(self, windows, ends):
        """Numbers of windows (n,) -> their shards (n,) and first tokens (n,). ends: where each shard's numbers end."""
        shard = np.searchsorted(ends, windows, side="right")
        before = np.concatenate([[0], ends])[shard]
        return shard, (windows - before) * self.block_size

    def _open(self, s):
        """A view of shard s, in which row i is the block_size + 1 tokens from token i on, and the mmap under it."""
        tokens, content = open_tokens(self.paths[s])
        if len(tokens) != self.lengths[s]:
            raise ConfigError(f"{self.paths[s]}: replaced while it was in use; start the run again")
        return np.lib.stride_tricks.sliding_window_view(tokens, self.block_size + 1), content

    def _read(self, shard, start):
        rows = np.empty((len(shard), self.block_size + 1), np.uint16)
        for s in np.unique(shard):
            windows, content = self._open(s)
            # Reading past the end of a truncated file kills the process. (It may still be truncated right after this.)
            if content.size() < len(content):
                raise ConfigError(f"{self.paths[s]}: truncated while it was in use; rebuild it with: "
                                  f"{rebuild_command(self.folder)}, then continue with --resume=True")
            mask = shard == s
            rows[mask] = windows[start[mask]]
        # In the embedding, this would be a device assert on a GPU, and on a CPU an error that names no file.
        if rows.max(initial=0) >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            path = self.paths[shard[row]]
            raise ConfigError(f"{path}: token {rows[row, column]} at position {start[row] + column} is outside the "
                              f"vocabulary of {self.vocab_size}; raise --vocab_size if the tokenizer has more tokens, "
                              f"or delete the file and run: {rebuild_command(self.folder)}")
        return rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)

    def fingerprint(self):
        """
        sha256, hex, of the names, lengths and content of the files, for a resumed run to check that its data is the
        same. Of splits above 64 MB it reads 16 pieces of 64 KB per file, first and last included, so that it takes
        seconds.
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
