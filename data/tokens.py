"""Tokens on disk and the batches made of them.

A .bin file is a header of 256 int32 (magic 20240520, version 1, number of tokens, zeros) and then the tokens as
uint16, all little endian: the layout of llm.c and modded-nanogpt, so their shards work here unchanged and ours there.
A document is a separator token followed by the document's tokens. A folder holds *train*.bin and *val*.bin files and,
when our scripts made it, a meta.json that names the tokenizer.
"""

import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024


class DataError(ValueError):
    """One line for the user: which file, what is wrong with it, what to do about it."""


def data_folder(dataset):
    """The folder of a dataset: data/<name> for a name, the path itself for anything with a path separator in it."""
    is_path = any(sep in dataset for sep in {"/", os.sep})
    return Path(dataset).expanduser() if is_path else HERE / dataset


def rebuild_command(folder):
    """The command that makes what should be in this folder, for error messages."""
    folder = Path(folder)
    corpus, *variant = folder.name.split("_")
    flags = {"gpt2": " --tokenizer gpt2", "site": " --site_packages"}
    ours = folder.resolve().parent == HERE and (HERE / corpus / "prepare.py").exists()
    if ours and not variant:
        return f"python data/{corpus}/prepare.py" + (" FOLDER" if corpus == "text" else "")
    if ours and corpus == "pysrc" and flags.keys() >= set(variant):
        return "python data/pysrc/prepare.py" + "".join(flags[word] for word in variant)
    return f"python data/text/prepare.py FOLDER --out {folder}"


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read_header(path):
    """
    The number of tokens in a .bin file, int.
    Raises DataError if the file is not a whole one of our format.
    """
    path = Path(path)
    again = f"delete it and run: {rebuild_command(path.parent)}"
    size = path.stat().st_size
    header = np.fromfile(path, "<i4", 256)
    if len(header) < 256:
        raise DataError(f"{path}: {size} bytes are too few for the header; {again}")
    magic, version, n_tokens = (int(value) for value in header[:3])
    if magic != MAGIC:
        raise DataError(f"{path}: not a file of tokens (magic {magic}, not {MAGIC}); {again}")
    if version != VERSION:
        raise DataError(f"{path}: format version {version}, and only {VERSION} is known; {again}")
    if size != HEADER_BYTES + 2 * n_tokens:
        raise DataError(f"{path}: truncated or damaged: the header counts {n_tokens} tokens, the file has room for "
                        f"{(size - HEADER_BYTES) / 2:g}; {again}")
    return n_tokens


class BinWriter:
    """
    Writes a .bin file: `with BinWriter(path) as out: out.write(tokens)`.

    The path holds either what it held before or the whole new file, never a part: everything goes to a temporary file
    beside it, renamed at the end. The process id in its name lets two first runs prepare the same corpus at once, and
    the suffix .part keeps what a kill leaves behind from being read as data.
    """

    def __init__(self, path):
        self.path, self.count = Path(path), 0
        self.temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")

    def __enter__(self):
        self.file = open(self.temporary, "wb+")
        self.file.write(bytes(HEADER_BYTES))
        return self

    def write(self, tokens):
        """
        Appends tokens: a uint16 array, or any integers that fit.
        Raises DataError for a token that does not, or for more tokens than the header can count.
        """
        tokens = np.asarray(tokens)
        if tokens.dtype != np.uint16 and tokens.size:
            if tokens.dtype.kind not in "iu" or tokens.min() < 0 or tokens.max() > 65535:
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
    Writes meta.json for the .bin files of a folder and returns its content. It comes last, so its presence says that
    the folder is complete. `tokenizer` is a Tokenizer, or None for GPT-2's where tiktoken is not to be had.

    bytes_per_token turns nats per token into bits per byte. It is the mean over the validation tokens, separators
    included: a separator is a token to predict, and 0 bytes of text.
    """
    folder = Path(folder)
    meta = {"tokenizer": tokenizer.name if tokenizer else "gpt2",
            "vocab_size": tokenizer.vocab_size if tokenizer else 50257}
    for split in ("train", "val"):
        meta[f"{split}_tokens"] = sum(read_header(path) for path in sorted(folder.glob(f"*{split}*.bin")))
    meta["bytes_per_token"] = None
    if tokenizer:
        counts = token_counts(folder, "val")
        lengths = np.array([len(tokenizer.token_bytes(i)) for i in range(len(counts))])
        lengths[tokenizer.separator] = 0
        meta["bytes_per_token"] = float(counts @ lengths / counts.sum())
    temporary = folder / f"meta.json.{os.getpid()}.part"
    temporary.write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(temporary, folder / "meta.json")
    return meta


def token_counts(folder, split):
    """How often each of the 65,536 possible tokens occurs in a split, (65536,) int64."""
    counts = np.zeros(65536, np.int64)
    for path in sorted(Path(folder).glob(f"*{split}*.bin")):
        # In pieces, because bincount makes an int64 of each token.
        tokens = np.memmap(path, "<u2", "r", HEADER_BYTES, (read_header(path),))
        for start in range(0, len(tokens), 2 ** 24):
            counts += np.bincount(tokens[start:start + 2 ** 24], minlength=65536)
    return counts


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

    def __init__(self):
        try:
            import tiktoken
        except ImportError:
            raise DataError("tokenizer gpt2: tiktoken is not installed; run: pip install tiktoken") from None
        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as error:  # a dozen kinds, of requests, urllib3, the disk and tiktoken's own checksums
            raise DataError(f"tokenizer gpt2: tiktoken cannot get its files ({type(error).__name__}); connect to the "
                            "network once, or set TIKTOKEN_CACHE_DIR to a folder that has them") from None

    def encode(self, text):
        """str -> (n,) uint16; the text <|endoftext|> is text here, never the separator"""
        return np.array(self.bpe.encode_ordinary(text), np.uint16)

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

    n_tokens int · n_windows int, for window() · windows_per_epoch int, for batch() · paths [Path] · meta dict, {} if
    the folder has no meta.json
    Raises DataError, naming the file, for data that is missing, damaged, too short or of a larger vocabulary.
    """

    def __init__(self, folder, split, block_size, vocab_size, seed=0):
        self.folder, self.split, self.seed = Path(folder), split, seed
        self.block_size, self.vocab_size = block_size, vocab_size
        again = rebuild_command(self.folder)
        self.paths = sorted(self.folder.glob(f"*{split}*.bin"))
        if not self.paths:
            raise DataError(f"{self.folder}: no {split} tokens there (*{split}*.bin); make them with: {again}")
        self.meta = self._read_meta(again)
        if self.meta.get("vocab_size", 0) > vocab_size:
            raise DataError(f"{self.folder}: its tokenizer has {self.meta['vocab_size']} tokens and the model only "
                            f"{vocab_size}; set --vocab_size={self.meta['vocab_size']} or more")
        self.lengths = np.array([read_header(path) for path in self.paths], np.int64)
        for path, length in zip(self.paths, self.lengths):
            if length == 0:
                raise DataError(f"{path}: empty; delete it and run: {again}")
        self.n_tokens = int(self.lengths.sum())
        if self.lengths.max() <= block_size:
            raise DataError(f"{self.folder}: the longest {split} file has {self.lengths.max()} tokens, and block_size "
                            f"{block_size} needs one more than itself; set --block_size={self.lengths.max() - 1} or "
                            "less, or prepare more text")
        # Every window of every shard as a row of block_size + 1 tokens; a view, nothing is read yet.
        self.rows = [np.lib.stride_tricks.sliding_window_view(
            np.memmap(path, "<u2", "r", HEADER_BYTES, (int(n),)), block_size + 1) if n > block_size else None
            for path, n in zip(self.paths, self.lengths)]

        # In training a shard gives up one window, so that the rest can start at an offset that differs by epoch and
        # the number of windows does not. A window reads one token more than it advances: the last one's target.
        fixed = (self.lengths - 1) // block_size
        moving = np.where(fixed > 0, np.maximum(self.lengths // block_size - 1, 1), 0)
        self.slack = np.maximum(self.lengths - moving * block_size, 1)  # possible offsets: 0 … slack - 1
        self.fixed_ends, self.moving_ends = np.cumsum(fixed), np.cumsum(moving)
        self.n_windows, self.windows_per_epoch = int(self.fixed_ends[-1]), int(self.moving_ends[-1])
        # Two, because a batch may straddle epochs; more would cost 80 MB each at 10 million windows.
        self._epoch = lru_cache(2)(self._epoch)

    def _read_meta(self, again):
        path = self.folder / "meta.json"
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise DataError(f"{path}: not a JSON object; delete it and run: {again}") from None

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
            here = epochs == epoch
            offsets, order = self._epoch(int(epoch))
            shard[here], start[here] = self._locate(order[positions[here]], self.moving_ends)
            start[here] += offsets[shard[here]]
        return self._read(shard, start)

    def window(self, first, count):
        """
        Windows first … first + count - 1 of n_windows, in the order of the files, for evaluation.
        Returns x, y: (count, block_size) int64. Raises IndexError past the end, DataError for a token >= vocab_size.
        """
        if not 0 <= first <= first + count <= self.n_windows:
            raise IndexError(f"windows {first} to {first + count - 1} of {self.n_windows}")
        return self._read(*self._locate(np.arange(first, first + count), self.fixed_ends))

    def _locate(self, windows, ends):
        """Numbers of windows (n,) -> their shards (n,) and first tokens (n,), given where each shard's windows end."""
        shard = np.searchsorted(ends, windows, side="right")
        before = np.concatenate([[0], ends])[shard]
        return shard, (windows - before) * self.block_size

    def _read(self, shard, start):
        rows = np.empty((len(shard), self.block_size + 1), np.uint16)
        for s in np.unique(shard):
            here = shard == s
            rows[here] = self.rows[s][start[here]]
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
        whole = 2 * self.n_tokens <= 64 * 2 ** 20
        for path, length in zip(self.paths, self.lengths):
            digest.update(f"{path.name} {length}\n".encode())
            content = np.memmap(path, np.uint8, "r", HEADER_BYTES, (int(2 * length),))
            if whole or len(content) <= 16 * piece:
                digest.update(content)
            else:
                for start in np.linspace(0, len(content) - piece, 16).astype(np.int64):
                    digest.update(content[start:start + piece])
        return digest.hexdigest()
