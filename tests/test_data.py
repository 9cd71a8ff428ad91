"""The .bin format, the tokenizers and the batches: data/tokens.py."""

import json
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import refused
from conftest import write_bin as write

from data.tokens import (
    HERE,
    UNFINISHED,
    GPT2Tokenizer,
    Tokens,
    data_folder,
    load_tokenizer,
    open_tokens,
    read_meta,
    rebuild_command,
    split_files,
    vocabulary,
    write_bin,
    write_meta,
)

B = 8  # block size


@pytest.fixture
def folder(tmp_path):
    """Shards in which a token's value is its position. The third has room for one window, the fourth for none."""
    tokens = np.arange(1200, dtype=np.uint16)
    for i, (start, end) in enumerate([(0, 1000), (1000, 1137), (1137, 1146), (1146, 1154)]):
        write(tmp_path / f"train_{i}.bin", tokens[start:end])
    write(tmp_path / "val.bin", tokens[:100])
    return tmp_path


@pytest.fixture
def train(folder):
    return Tokens(folder, "train", B, 1200, seed=1)


# --- files -----------------------------------------------------------------------------------------------------------

def test_layout_is_that_of_llm_c(tmp_path):
    path = write(tmp_path / "train.bin", [1, 2, 65535])
    header = np.fromfile(path, "<i4", 256)
    assert header[:3].tolist() == [20240520, 1, 3] and not header[3:].any()
    assert path.read_bytes()[1024:] == b"\1\0\2\0\xff\xff"
    tokens, content = open_tokens(path)
    assert tokens.tolist() == [1, 2, 65535] and tokens.dtype == np.uint16 and content.size() == 1030


def test_writer_refuses_what_does_not_fit(tmp_path):
    with refused("train.bin", "2**31"):
        write_bin(tmp_path / "train.bin", [range(2 ** 31 - 1), range(1)])
    with pytest.raises(TypeError, match="safe"):
        write_bin(tmp_path / "train.bin", [np.array([65536])])


def test_meta_names_the_tokenizer_and_comes_last(tmp_path):
    write(tmp_path / "train.bin", [0, 65])
    write(tmp_path / "val.bin", [0, 65, 66, 67])
    (tmp_path / UNFINISHED).touch()
    meta = write_meta(tmp_path, load_tokenizer("bytes"))
    assert meta == json.loads((tmp_path / "meta.json").read_text()) == read_meta(tmp_path) == {
        "tokenizer": "bytes", "vocab_size": 256, "train_tokens": 2, "val_tokens": 4}
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]


@pytest.mark.parametrize("names, train, val", [
    (["train.bin", "val.bin"], ["train.bin"], ["val.bin"]),
    (["fineweb_val_000000.bin", "fineweb_train_000001.bin"], ["fineweb_train_000001.bin"], ["fineweb_val_000000.bin"]),
    (["retrieval_train.bin", "val1.bin"], ["retrieval_train.bin"], ["val1.bin"]),
    (["interval.bin", "trains.bin", "train.bin.1.part", "train.txt", "x-train-0.bin"], ["x-train-0.bin"], []),
])
def test_the_split_is_a_whole_word_in_a_name(tmp_path, names, train, val):
    for name in names:
        (tmp_path / name).touch()
    for split, wanted in (("train", train), ("val", val)):
        assert [path.name for path in split_files(tmp_path, split)] == wanted
    (tmp_path / "val_of_train.bin").touch()
    with refused("val_of_train.bin: both train and val", "rename"):
        split_files(tmp_path, "val")


def test_folder_of_a_name_and_of_a_path():
    assert data_folder("pysrc_gpt2") == HERE / "pysrc_gpt2"
    assert data_folder("./mine") == Path("mine")
    assert data_folder("~") == Path.home() and data_folder("~/mine") == Path.home() / "mine"
    assert data_folder("~nobody_of_that_name/x") == Path("~nobody_of_that_name/x")


@pytest.mark.parametrize("folder, command", [
    (HERE / "pysrc", "python data/pysrc/prepare.py"),
    (HERE / "pysrc_gpt2_site", "python data/pysrc/prepare.py --tokenizer gpt2 --site_packages"),
    (HERE / "fineweb", "python data/fineweb/prepare.py"),
    (HERE / "text", "python data/text/prepare.py FOLDER"),
    (Path("my/pysrc"), "python data/text/prepare.py FOLDER --out my/pysrc"),
])
def test_rebuild_command(folder, command):
    assert rebuild_command(folder) == command


# --- tokenizers ------------------------------------------------------------------------------------------------------

@pytest.fixture(params=["bytes", "gpt2"])
def tokenizer(request):
    return request.getfixturevalue("gpt2") if request.param == "gpt2" else load_tokenizer("bytes")


def test_tokenizer_round_trip(tokenizer):
    text = 'def f(x):\n\treturn "naïve 漢字 🙂 <|endoftext|>"\r\n'
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.uint16 and tokens.max() < tokenizer.vocab_size
    assert tokenizer.separator not in tokens
    assert b"".join(tokenizer.token_bytes(int(token)) for token in tokens) == text.encode()


def test_tokens_that_do_not_exist_have_no_bytes(tokenizer):
    assert len(tokenizer.token_bytes(tokenizer.vocab_size - 1)) > 0
    assert [tokenizer.token_bytes(token) for token in (tokenizer.vocab_size, 65535, -1)] == [b"", b"", b""]


def test_a_lone_surrogate_is_replaced_and_bytes_drop_the_separator(tokenizer):
    tokens = tokenizer.encode("a\ud800b")
    assert b"".join(tokenizer.token_bytes(int(token)) for token in tokens) == b"a?b"
    assert load_tokenizer("bytes").encode("a\0b").tolist() == [97, 98]


@pytest.mark.parametrize("tiktoken", [None, SimpleNamespace(get_encoding=lambda name: open("/nowhere"))])
def test_tokenizers_that_are_unknown_or_missing_are_refused(monkeypatch, tiktoken):
    with refused("gpt3", "bytes, gpt2"):
        load_tokenizer("gpt3")
    monkeypatch.setitem(sys.modules, "tiktoken", tiktoken)
    with refused("pip install tiktoken", "TIKTOKEN_CACHE_DIR"):
        GPT2Tokenizer()


# --- batches ---------------------------------------------------------------------------------------------------------

def test_batch_has_targets_one_ahead_within_one_shard(train):
    x, y = train.batch(0, 2 * train.windows_per_epoch)
    assert x.shape == y.shape == (2 * train.windows_per_epoch, B)
    assert x.dtype == y.dtype == np.int64
    assert (y == x + 1).all()  # holds in this data only where a window is one run of tokens …
    borders = np.searchsorted([1000, 1137, 1146], np.stack([x[:, 0], y[:, -1]]), side="right")
    assert (borders[0] == borders[1]).all()  # … of one shard


def test_batch_is_a_pure_function_of_the_index(folder, train):
    total = 3 * train.windows_per_epoch + 5
    x, y = train.batch(0, total)
    other = Tokens(folder, "train", B, 1200, seed=1)
    for i in np.random.default_rng(0).permutation(total):  # any order, back and forth between epochs
        assert (other.batch(i, 1)[0][0] == x[i]).all()
    for ranks in (2, 5):  # however a batch is split
        size = total // ranks
        parts = [other.batch(rank * size, size) for rank in range(ranks)]
        assert (np.concatenate([part[0] for part in parts]) == x[:size * ranks]).all()
        assert (np.concatenate([part[1] for part in parts]) == y[:size * ranks]).all()


def test_an_epoch_has_every_window_once_and_epochs_differ(train):
    n = train.windows_per_epoch
    epochs = [train.batch(epoch * n, n)[0] for epoch in range(30)]
    for x in epochs:
        assert len(np.unique(x)) == x.size  # no token twice
        starts = np.sort(x[:, 0])
        for shard in (starts[starts < 1000], starts[(starts >= 1000) & (starts < 1137)]):
            assert (np.diff(shard) == B).all()  # no gap between windows
    assert n == (1000 // B - 1) + (137 // B - 1) + 1
    assert (np.diff(epochs[0][:, 0]) == B).mean() < 0.1  # not the order of the file
    assert len({tuple(x[:, 0]) for x in epochs}) == 30
    assert len({x.min() for x in epochs}) > 5  # the borders move
    seen = np.unique(epochs)
    assert len(seen) > 0.98 * 1146  # so no token is left out for good


def test_the_order_depends_on_the_seed_and_on_no_machine_or_numpy(folder, train):
    assert train.batch(0, 5)[0][:, 0].tolist() == [861, 149, 101, 869, 725]
    other = Tokens(folder, "train", B, 1200, seed=2)
    assert not (other.batch(0, 50)[0] == train.batch(0, 50)[0]).all(1).any()


@pytest.mark.parametrize("length", [B + 1, B + 2, 2 * B, 2 * B + 1, 3 * B - 1, 3 * B])
def test_the_shortest_files_have_windows(tmp_path, length):
    write(tmp_path / "train.bin", np.arange(length))
    data = Tokens(tmp_path, "train", B, length)
    assert data.n_windows == (length - 1) // B and data.n_tokens == length
    for i in range(200):
        x, y = data.batch(i, 1)
        assert (x[0] == np.arange(x[0, 0], x[0, 0] + B)).all() and (y == x + 1).all()


def test_evaluation_windows_are_in_order_and_apart(train):
    x, y = train.window(np.arange(train.n_windows))
    # (1000 - 1) // 8, (137 - 1) // 8 and one window, since the last one needs its target too
    assert x[:, 0].tolist() == list(range(0, 992, B)) + list(range(1000, 1136, B)) + [1137]
    assert (y == x + 1).all()
    assert (train.window(np.array([120, 3]))[0] == x[[120, 3]]).all()
    assert train.n_tokens == 1000 + 137 + 9  # not those of the file that is too short for a window


def test_evaluation_is_spread_evenly_over_the_whole_split(train):
    assert train.n_windows == 142
    assert train.spread(5 * B).tolist() == train.spread(6 * B - 1).tolist() == [14, 42, 71, 99, 127]
    assert train.spread(1).tolist() == [71]
    for everything in (0, 142 * B, 10 ** 400):
        assert train.spread(everything).tolist() == list(range(142))
    for k in range(1, 143):
        assert np.diff(train.spread(k * B), prepend=-1, append=142).min() >= 142 // k // 2


def test_bytes_per_token_is_that_of_the_evaluated_windows(tmp_path, tokenizer):
    """Two texts, of which the first has much longer tokens: the mean over both is wrong for either."""
    first, then = " international" * 400, "é" * 4000
    for name, text in (("val_0", first), ("val_1", then), ("train", first)):
        write(tmp_path / f"{name}.bin", [tokenizer.separator, *tokenizer.encode(text)])
    write_meta(tmp_path, tokenizer)
    data = Tokens(tmp_path, "val", B, 50257)
    for windows in (data.spread(1), np.arange(7), data.spread(7 * B), data.spread(0)):
        targets = data.window(windows)[1].ravel().tolist()
        text = b"".join(tokenizer.token_bytes(token) for token in targets if token != tokenizer.separator)
        assert data.bytes_per_token(windows) == len(text) / len(targets)
    if tokenizer.name == "gpt2":
        assert data.bytes_per_token(np.arange(7)) == len(" international") != data.bytes_per_token(data.spread(0))


def test_bytes_per_token_does_not_count_separators(tmp_path):
    """More windows than one piece of the count."""
    tokens = np.random.default_rng(0).integers(0, 3, 2 ** 21 + 1)
    write(tmp_path / "val.bin", tokens)
    write_meta(tmp_path, load_tokenizer("bytes"))
    data = Tokens(tmp_path, "val", 1024, 256)
    assert data.n_windows == 2048
    assert data.bytes_per_token(np.arange(2048)) == (tokens[1:] != 0).mean()
    assert data.bytes_per_token(np.arange(1500)) == (tokens[1:1500 * 1024 + 1] != 0).mean()


@pytest.mark.parametrize("meta", ['{"tokenizer": "mine", "bytes_per_token": 4}', '{"vocab_size": 9}', None])
def test_bytes_per_token_of_an_unknown_tokenizer_is_none(folder, meta):
    if meta:
        (folder / "meta.json").write_text(meta)
    assert Tokens(folder, "val", B, 1200).bytes_per_token(np.arange(2)) is None


# --- refusals --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("header, size, said", [
    ((20240520, 1, 137), 1297, "truncated or damaged"),
    ((20240520, 1, 137), 1300, "truncated or damaged"),
    ((20240520, 1, -1), 1298, "header counts -1 tokens"),
    ((20240520, 1, 0), 1024, "header counts 0 tokens"),
    ((20240801, 1, 137), 1298, "magic 20240801"),
    ((20240520, 2, 137), 1298, "version 2"),
    ((20240520, 1, 137), 5, "truncated or damaged"),
])
def test_damaged_file_is_refused_by_name(folder, header, size, said):
    path = folder / "train_1.bin"
    damaged = (np.array(header, "<i4").tobytes() + path.read_bytes()[12:] + b"\0\0")[:size]
    path.write_bytes(damaged)
    with refused(str(path), said, "python data/text/prepare.py FOLDER --out"):
        Tokens(folder, "train", B, 1200)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("folder", [HERE / "fineweb", Path("elsewhere")])
def test_missing_data_is_refused_with_the_command_that_makes_it(folder):
    with refused(str(folder), "no nosplit tokens", rebuild_command(folder)):
        Tokens(folder, "nosplit", B, 256)


@pytest.mark.parametrize("name", ["train_1.bin", "meta.json"])
def test_only_regular_files_are_data(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)  # to open it would wait for ever
    with refused(str(folder / name), "not a regular file"):
        Tokens(folder, "train", B, 1200)


def test_a_file_truncated_while_it_is_in_use_is_refused(tmp_path):
    """Reading past the end of a mapped file would be a SIGBUS."""
    path = write(tmp_path / "train.bin", np.arange(50_000))
    data = Tokens(tmp_path, "train", B, 50_000)
    reads = lambda: data.batch(0, 1000), lambda: data.window(np.arange(data.n_windows))
    for read in reads:
        read()
    os.truncate(path, 1024)
    for read in reads:
        with refused(f"{path}: truncated while it was in use", "--resume=True"):
            read()


def test_an_open_file_that_is_replaced_is_read_as_it_was_and_others_are_refused(folder, train):
    other = Tokens(folder, "train", B, 1200)
    x, y = train.batch(0, 100)
    write(folder / "train_0.bin", [1, 2, 3])
    assert (train.batch(0, 100)[0] == x).all()
    with refused(str(folder / "train_0.bin"), "replaced while it was in use"):
        other.batch(0, 100)


def test_more_files_than_a_process_may_open(tmp_path):
    header = write(tmp_path / "train_000.bin", np.arange(2 * B + 1)).read_bytes()[:1024]
    for i in range(1, 300):
        (tmp_path / f"train_{i:03d}.bin").write_bytes(header + np.arange(i, i + 2 * B + 1).astype("<u2").tobytes())
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 270, limit[1]))
    try:
        data = Tokens(tmp_path, "train", B, 1200)
        assert data.window(np.arange(600))[0][:, 0].tolist() == [i + j for i in range(300) for j in (0, B)]
        assert len(data.fingerprint()) == 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    for name, reason in (("circle", "symbolic links"), ("file", "Not a directory")):
        with refused(str(tmp_path / name), reason, "choose a folder"):
            Tokens(tmp_path / name, "train", B, 1200)
        assert vocabulary(tmp_path / name) == 50257


def test_too_short_for_a_block_is_refused(folder):
    assert Tokens(folder, "val", 99, 1200).n_windows == 1
    with refused(str(folder), "longest val file has 100 tokens", "--block_size=99"):
        Tokens(folder, "val", 100, 1200)
    write(folder / "val.bin", [7])
    with refused(str(folder), "block_size 1 needs 2; prepare more text"):
        Tokens(folder, "val", 1, 1200)


def test_meta_of_a_larger_vocabulary_is_refused_and_its_other_entries_may_be_anything(folder):
    (folder / "meta.json").write_text('{"vocab_size": 1201, "tokenizer": "bytes", "bytes_per_token": "bad", "x": [{}]}')
    data = Tokens(folder, "train", B, 1201)
    assert data.tokenizer == "bytes" and data.bytes_per_token(np.arange(3)) > 0
    with refused(str(folder), "--vocab_size=1201"):
        Tokens(folder, "train", B, 1200)


@pytest.mark.parametrize("content", [
    "{", '{"vocab_size": "256"}', '{"vocab_size": 0}', '{"vocab_size": 65537}', '{"vocab_size": NaN}',
    '{"vocab_size": null}', '{"tokenizer": ["bytes"]}'])
def test_impossible_values_in_meta_are_refused(folder, content):
    (folder / "meta.json").write_text(content)
    for read in (lambda: Tokens(folder, "train", B, 1200), lambda: vocabulary(folder)):
        with refused(str(folder / "meta.json"), "delete it"):
            read()


def test_vocabulary_and_tokenizer_of_a_folder(folder):
    assert vocabulary(folder) == 50257  # shards of other projects have no meta.json
    # a model with a smaller vocabulary cannot have GPT-2's tokens
    assert [Tokens(folder, "val", B, n).tokenizer for n in (256, 50256, 50257, 50304)] == [None, None, "gpt2", "gpt2"]
    (folder / "meta.json").write_text('{"vocab_size": 1200}')
    assert vocabulary(str(folder)) == 1200 and Tokens(folder, "val", B, 50257).tokenizer is None
    write_meta(folder, load_tokenizer("bytes"))
    assert vocabulary(folder) == 256 and Tokens(folder, "val", B, 256).tokenizer == "bytes"


@pytest.mark.parametrize("read", ["batch", "window"])
def test_token_outside_the_vocabulary_is_refused_with_its_position(folder, read):
    tokens = np.arange(1000, 1137)
    tokens[77] = 5000
    write(folder / "train_1.bin", tokens)
    data = Tokens(folder, "train", B, 1200)
    with refused(str(folder / "train_1.bin"), "token 5000 at position 77", "1200", "python data/text/prepare.py"):
        data.window(np.arange(data.n_windows)) if read == "window" else data.batch(0, 2 * data.windows_per_epoch)


# --- fingerprint -----------------------------------------------------------------------------------------------------

def test_fingerprint_depends_on_content_names_and_lengths(folder, train):
    prints = [train.fingerprint(), Tokens(folder, "val", B, 1200).fingerprint()]
    assert Tokens(folder, "train", 2 * B, 1200, seed=9).fingerprint() == prints[0]
    name = b"train.bin" if sys.platform == "darwin" else b"train_\xff.bin"  # a name need not be UTF-8 elsewhere
    (folder / "train_3.bin").rename(folder / os.fsdecode(name))
    prints.append(Tokens(folder, "train", B, 1200).fingerprint())
    write(folder / "train_0.bin", np.arange(1000) + (np.arange(1000) == 500))
    prints.append(Tokens(folder, "train", B, 1200).fingerprint())
    assert len(set(prints)) == len(prints)
    assert len(prints[0]) == 64


def test_fingerprint_samples_large_files_at_both_ends(tmp_path):
    n = 33 * 2 ** 20  # 66 MB, all zeros
    with open(tmp_path / "train.bin", "wb") as file:
        file.write(np.array([20240520, 1, n], "<i4").tobytes())
        file.truncate(1024 + 2 * n)
    data = Tokens(tmp_path, "train", B, 10)
    prints = [data.fingerprint()]
    for position in (0, n - 1, 2 ** 15 + 10):
        with open(tmp_path / "train.bin", "rb+") as file:
            file.seek(1024 + 2 * position)
            file.write(b"\1")
        prints.append(data.fingerprint())
    assert len(set(prints[:3])) == 3 and prints[3] == prints[2]  # the last position is between two samples
