"""The corpora: data/corpus.py and each prepare.py. Downloads come from a local server or from a stand-in."""

import hashlib
import inspect
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import refused, snapshot, write_bin

import data.corpus as corpus
import data.fineweb.prepare as fineweb
import data.pysrc.prepare as pysrc
import data.shakespeare.prepare as shakespeare
import data.text.prepare as text
from data.tokens import HERE, UNFINISHED, Tokens, load_tokenizer, open_tokens, vocabulary

WHOLE = {"train.bin", "val.bin", "meta.json"}


def texts(out, tokenizer="bytes"):
    """The documents in train.bin and in val.bin of a folder, two lists of str."""
    tok, splits = load_tokenizer(tokenizer), []
    for split in ("train", "val"):
        tokens = open_tokens(out / f"{split}.bin")[0]
        assert tokens[0] == tok.separator
        parts = np.split(tokens, np.flatnonzero(tokens == tok.separator))[1:]
        splits.append([b"".join(tok.token_bytes(int(token)) for token in part[1:]).decode() for part in parts])
    return splits


def content(out):
    """Both splits of a folder of byte tokens, one after the other, as bytes."""
    tokens = np.concatenate([open_tokens(out / f"{split}.bin")[0] for split in ("train", "val")])
    return tokens.astype(np.uint8).tobytes()


def tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a prepare.py as a command, but in this process: run("text", "in").stdout; .stderr and .code."""
    def command(name, *arguments):
        script, code = str(HERE / name / "prepare.py"), 0
        with monkeypatch.context() as patch:
            for attribute in ("stdout", "stderr", "excepthook"):
                patch.setattr(sys, attribute, getattr(sys, attribute))  # undoes what the script replaces
            patch.setattr(sys, "path", [*sys.path])
            patch.setattr(sys, "argv", [script, *arguments])
            try:
                runpy.run_path(script, run_name="__main__")
            except SystemExit as error:
                code = error.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, stdout=out, stderr=err)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return command


# --- text and pysrc --------------------------------------------------------------------------------------------------

TEXTS = {f"d{i % 7}/file {i}.txt": f"This is text {i}, naïve 漢字.\r\n" * (1 + i % 3) for i in range(120)}
NO_TEXT = {"latin.txt": "é".encode("latin-1"), "nul.txt": "a\0b", "empty.txt": "", ".hidden/a.txt": "x", ".b.txt": "x"}


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_text_keeps_every_document_once_and_splits_by_name(tmp_path, run, request, tokenizer):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")
    tree(tmp_path / "in", TEXTS | NO_TEXT)
    done, out = run("text", "in", "--out", "out", "--tokenizer", tokenizer), tmp_path / "out"
    in_val = [name for name in sorted(TEXTS) if corpus.goes_to_val(name)]
    assert texts(out, tokenizer) == [[TEXTS[name] for name in sorted(TEXTS) if name not in in_val],
                                     [TEXTS[name] for name in in_val]]
    meta = json.loads((out / "meta.json").read_text())
    assert meta["tokenizer"] == tokenizer and meta["vocab_size"] == load_tokenizer(tokenizer).vocab_size
    assert meta["val_tokens"] == Tokens(out, "val", 8, 50257).n_tokens
    assert done.code == 0 and not done.stderr  # no progress bar in a pipe
    assert done.stdout.startswith("files: 120 (3 skipped: empty or not UTF-8 text)\n")
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["files", *meta, "folder"]


def test_a_million_blanks_in_a_row_are_no_text_for_gpt2(tmp_path, gpt2):
    (tmp_path / "a.txt").write_text(" " * 1_100_000 + "x")
    assert corpus.encode_file(tmp_path / "a.txt", gpt2) is None
    with refused("tiktoken cannot encode this text", "blanks"):
        gpt2.encode(" " * 1_100_000 + "x")


def test_a_folder_that_cannot_be_listed_is_refused(nobody):
    (tree(nobody / "in", {"a.txt": "some text"}) / "closed").mkdir(mode=0)
    with refused(f"{nobody}/in/closed: Permission denied"):
        text.prepare(nobody / "in", out=nobody / "out")
    assert not (nobody / "out").exists()


def test_links_and_special_files_are_counted(tmp_path, capsys):
    """A link to a file is the file once more, and would be in both splits; one to a folder could lead in a circle."""
    source = tree(tmp_path / "in", TEXTS | {".hidden/a.txt": "x"})
    for i, name in enumerate(TEXTS):
        (source / f"link {i}").symlink_to(name)
    (source / "outside").symlink_to(tree(tmp_path, {"b.txt": "another text"}) / "b.txt")
    (source / "circle").symlink_to("circle")
    (source / "d0/up").symlink_to("..")
    (source / ".link").symlink_to("nowhere")
    os.mkfifo(source / "fifo")
    text.prepare(source, out=tmp_path / "out")
    out, err = capsys.readouterr()
    assert "files: 121 (0 skipped" in out
    assert err.startswith(f"{source}: left out 3 links to folders, dangling links and special files; the first is ")


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_files_are_in_the_order_of_their_names_bytes(tmp_path):
    """By characters the order would be another, and a third in a locale without Unicode."""
    names = [b"z", "漢".encode(), "\uff71".encode(), b"\xff"]
    tree(tmp_path / "in", {os.fsdecode(name): f"{i}" * 200 for i, name in enumerate(names)})
    out = text.prepare(tmp_path / "in", out=tmp_path / "out")
    assert content(out) == b"".join(b"\0" + b"%d" % i * 200 for i in range(4))


def test_the_split_is_about_a_twentieth_and_the_same_everywhere():
    names = [f"package/module_{i}.py" for i in range(20000)]
    assert np.mean([corpus.goes_to_val(name) for name in names]) == pytest.approx(0.05, abs=0.005)
    # A change here would put files that models were trained on into everybody's validation split.
    assert [i for i, name in enumerate(names[:100]) if corpus.goes_to_val(name)] == [6, 59, 64, 65, 71, 99]


@pytest.mark.parametrize("name", ["a.txt", "val.txt"])
def test_with_too_few_files_val_is_the_last_twentieth(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(corpus, "goes_to_val", lambda key: key == "val.txt")
    out = text.prepare(tree(tmp_path / "in", {name: "0123456789" * 20}), out=tmp_path / "out")
    assert content(out) == b"\0" + b"0123456789" * 20 and len(open_tokens(out / "val.bin")[0]) == 10
    assert "val is the last 5% of the tokens" in capsys.readouterr().out


@pytest.mark.parametrize("out", [".", "out"])
def test_text_prepared_in_its_own_folder_is_the_same_again(tmp_path, monkeypatch, out):
    tree(tmp_path / "in", TEXTS)
    monkeypatch.chdir(tmp_path / "in")
    first, second = (snapshot(text.prepare(Path("../in"), out=Path(out))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("files, said", [
    (NO_TEXT, "none of 3 files holds UTF-8 text"),
    ({".hidden": "x"}, "none of 0 files"),
    (None, "No such file or directory"),
])
def test_a_folder_without_text_is_refused_and_the_old_corpus_stays(tmp_path, files, said):
    out = text.prepare(tree(tmp_path / "good", TEXTS), out=tmp_path / "out")
    before = snapshot(out)
    if files:
        tree(tmp_path / "in", files)
    with refused(said):
        text.prepare(tmp_path / "in", out=out)
    assert snapshot(out) == before


@pytest.fixture
def stdlib(tmp_path, monkeypatch):
    """The folder of a standard library; there are installed packages too, and lib64 is a link, as in a venv."""
    library = {f"module_{i}.py": f"library = {i}\n" for i in range(60)}
    other = {"site-packages/p.py": "no", "dist-packages/q.py": "no", "__pycache__/r.py": "no", "LICENSE.txt": "no"}
    packages = {f"package/module_{i}.py": f"package = {i}\n" for i in range(60)} | {"package/__pycache__/x.py": "no"}
    tree(tmp_path / "purelib", packages)
    (tmp_path / "platlib").symlink_to("purelib")
    monkeypatch.setattr(pysrc.sysconfig, "get_path", lambda name: str(tmp_path / name))
    return tree(tmp_path / "stdlib", library | other)


@pytest.mark.usefixtures("stdlib")
def test_pysrc_takes_the_library_and_on_request_the_packages(tmp_path):
    library = {f"library = {i}\n" for i in range(60)}
    for site_packages, wanted in [(False, library), (True, library | {f"package = {i}\n" for i in range(60)})]:
        found = sum(texts(pysrc.prepare(tmp_path / f"out{site_packages}", site_packages=site_packages)), [])
        assert len(found) == len(wanted) and set(found) == wanted


def test_near_duplicates_stay_on_one_side_of_the_split(tmp_path, stdlib):
    """Many of these files would be in val by the hash of their own path."""
    for folder in ("encodings", "lib2to3/tests"):
        tree(stdlib / folder, {f"table_{i}.py": f"table = {i}\n" for i in range(100)})
    train, val = texts(pysrc.prepare(tmp_path / "out"))
    assert sum("table" in document for document in train) == 200 and any("library" in document for document in val)


@pytest.mark.usefixtures("stdlib")
def test_pysrc_has_a_folder_per_variant_and_refuses_a_python_without_source(tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(pysrc, "HERE", tmp_path)
    names = [pysrc.prepare(None, tokenizer, site).name
             for tokenizer, site in [("bytes", False), ("bytes", True), ("gpt2", True)]]
    assert names == ["pysrc", "pysrc_site", "pysrc_gpt2_site"]
    monkeypatch.setattr(pysrc.sysconfig, "get_path", lambda name: str(tmp_path / "zip"))
    with refused(str(tmp_path / "none"), "none of 0 files"):
        pysrc.prepare(tmp_path / "none")


def test_a_file_that_vanishes_ends_the_corpus_and_the_old_one_stays(tmp_path):
    out = text.prepare(tree(tmp_path / "in", TEXTS), out=tmp_path / "out")
    before = snapshot(out)
    with refused("in/gone.txt", "nothing was written"):
        corpus.write_corpus([(name, tmp_path / "in" / name) for name in [*TEXTS, "gone.txt"]], out, "bytes")
    assert snapshot(out) == before


@pytest.mark.parametrize("name", ["other_train_000001.bin", "fineweb_val_000000.bin"])
def test_a_folder_with_files_of_another_corpus_is_refused(tmp_path, name):
    """They would be counted in meta.json, and GPT-2 tokens would be read as bytes."""
    source, out = tree(tmp_path / "in", TEXTS), tmp_path / "out"
    write_bin(tree(out, {"firmware.bin": "no data"}) / name, [1] * 99)
    before = snapshot(out)
    with refused(f"{out / name}: would be read as part of this corpus"):
        text.prepare(source, out=out)
    assert snapshot(out) == before
    (out / name).unlink()
    assert Tokens(text.prepare(source, out=out), "train", 8, 256).tokenizer == "bytes"


@pytest.mark.parametrize("stopped_at", ["val.bin", "train.bin", "meta.json"])
def test_a_corpus_stopped_between_the_renames_is_refused_until_it_is_complete(tmp_path, monkeypatch, stopped_at):
    """GPT-2 tokens next to an old meta.json that says bytes would train, and report nonsense."""
    source, out, real = tree(tmp_path / "in", TEXTS), tmp_path / "out", os.replace
    text.prepare(source, out=out)
    meta = (out / "meta.json").read_bytes()
    tree(source, {"more.txt": "more " * 5000})

    def replace(old, new):
        assert Path(old).suffix == ".part"  # which is not data, should a kill leave it behind
        if Path(new).name == stopped_at:
            raise KeyboardInterrupt
        real(old, new)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        text.prepare(source, out=out)
    assert not (out / "meta.json").exists() and (out / UNFINISHED).exists()
    for read in (lambda: Tokens(out, "train", 8, 50304), lambda: vocabulary(out)):
        with refused(str(out), "incomplete", "python data/text/prepare.py FOLDER --out"):
            read()
    text.prepare(source, out=out)
    assert Tokens(out, "train", 8, 256).tokenizer == "bytes" and (out / "meta.json").read_bytes() != meta
    assert set(os.listdir(out)) == WHOLE


# --- fineweb ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for hf_hub_download. files: {name: content, or an error to raise}. asked: the names requested."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    hub = SimpleNamespace(asked=[], files={})
    for i, name in enumerate(["val_000000", "train_000001", "train_000002"]):
        shard = write_bin(tmp_path / "shard.bin", [50256] + [1000 + i] * (50 + i))
        hub.files[f"fineweb_{name}.bin"] = shard.read_bytes()
    real = inspect.signature(huggingface_hub.hf_hub_download)

    def hf_hub_download(*args, **kw):
        call = real.bind(*args, **kw).arguments
        assert call["repo_type"] == "dataset" and call["repo_id"] == fineweb.REPO
        name, folder = call["filename"], call["local_dir"]
        hub.asked.append(name)
        tree(folder, {"begun": ""})
        if isinstance(hub.files[name], Exception):
            raise hub.files[name]
        return str(tree(folder, {name: hub.files[name]}) / name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return hub


def test_fineweb_fetches_only_what_is_missing(hub, tmp_path):
    out = tmp_path / "out"
    fineweb.prepare(1, out)
    assert hub.asked == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    (out / "fineweb_train_000001.bin").write_bytes(b"damaged")
    hub.asked.clear()
    fineweb.prepare(2, out)
    assert hub.asked == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert sorted(os.listdir(out)) == ["fineweb_train_000001.bin", "fineweb_train_000002.bin",
                                       "fineweb_val_000000.bin", "meta.json"]
    assert Tokens(out, "train", 8, 50304).n_tokens == 52 + 53
    assert json.loads((out / "meta.json").read_text()) == {
        "tokenizer": "gpt2", "vocab_size": 50257, "train_tokens": 105, "val_tokens": 51}


def test_fineweb_refuses_a_damaged_shard_and_fetches_it_again_next_time(hub, tmp_path):
    name, out = "fineweb_val_000000.bin", tmp_path / "out"
    good, hub.files[name] = hub.files[name], b"<html>"
    with refused(str(out / name), "not a file of tokens"):
        fineweb.prepare(1, out)
    assert not (out / "meta.json").exists() and hub.asked == [name]
    hub.files[name] = good
    fineweb.prepare(1, out)
    assert (out / name).read_bytes() == good


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), "No space left on device)"),
    (RuntimeError("storage\nand more"), "(storage)"),
    (ValueError(), "not downloaded"),
])
def test_a_download_that_fails_is_one_line(hub, tmp_path, error, said):
    hub.files["fineweb_val_000000.bin"] = error
    with refused(fineweb.REPO, "fineweb_val_000000.bin", said, "run the same command again"):
        fineweb.prepare(1, tmp_path / "out")
    error.__cause__ = OSError("the cause")  # of what the client raises, it says more than the error
    with refused("(the cause)"):
        fineweb.prepare(1, tmp_path / "out")
    assert (tmp_path / "out/download.part/begun").exists()  # the client continues from what it has


# --- shakespeare -----------------------------------------------------------------------------------------------------

def test_shakespeare_is_split_as_nanogpt_does(tmp_path, monkeypatch):
    source, characters = tmp_path / "input.txt", bytes(range(1, 116)) * 9
    source.write_bytes(characters)
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(characters).hexdigest())
    monkeypatch.setattr(shakespeare, "URL", source.as_uri())
    for given in (None, source):
        out = tmp_path / f"out{given is None}"
        shakespeare.prepare(given, out)
        assert content(out) == characters and Tokens(out, "train", 8, 256).n_tokens == int(len(characters) * 0.9)
        assert Tokens(out, "val", 8, 256).tokenizer == "bytes"


@pytest.mark.parametrize("source, said", [("other", "not tiny Shakespeare"), ("none", "no such file"),
                                          (None, "cannot be read")])
def test_what_is_not_shakespeare_is_refused(tmp_path, monkeypatch, source, said):
    (tmp_path / "other").write_text("another text")
    monkeypatch.setattr(shakespeare, "URL", (tmp_path / "nowhere").as_uri())
    with refused(str(tmp_path / (source or "nowhere")), said):
        shakespeare.prepare(source and tmp_path / source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- command lines ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [pysrc, text, fineweb, shakespeare])
def test_help_shows_the_docstring_and_the_defaults(run, module):
    name = module.__name__.split(".")[1]
    printed = run(name, "--help").stdout
    assert module.__doc__.strip() in printed and f"(default: data/{name}" in printed


@pytest.mark.parametrize("corpus_, arguments, said", [
    ("pysrc", ["--tokenizer", "words"], "'words'"),
    ("text", [], "FOLDER"),
    ("text", [".", "--out", "file"], "file: File exists"),
    ("text", ["nowhere"], "nowhere: No such file or directory"),
    ("text", ["circle"], "circle: Too many levels of symbolic links"),
    ("text", [".", "--out", "circle"], "circle: File exists"),
    ("fineweb", ["--shards", "0"], "1 to 103"),
])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, run, corpus_, arguments, said):
    (tmp_path / "file").write_text("a text")
    (tmp_path / "circle").symlink_to("circle")
    done = run(corpus_, *arguments)
    assert done.code == 2 and not done.stdout
    lines = [line for line in done.stderr.splitlines() if "left out" not in line]
    assert len(lines) == 1 and said in lines[0]
    assert sorted(os.listdir(tmp_path)) == ["circle", "file"]


def test_a_tilde_is_the_home_folder(tmp_path, run, monkeypatch):
    tree(tmp_path / "in", TEXTS)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert run("text", "~/in", "--out", "~/out").code == 0
    assert set(os.listdir(tmp_path / "out")) == WHOLE and os.listdir(tmp_path / "else") == []


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    tree(tmp_path / "in", {"a.txt": "text " * 2 ** 20})
    before = snapshot(text.prepare(tmp_path / "in", out=tmp_path / "out"))
    script = HERE / "text/prepare.py"
    code = f"ulimit -f 1024; trap '' XFSZ; exec {sys.executable} {script} in --out out"  # no file above 1 MB
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("prepare.py: out: ") and "make room" in done.stderr
    assert snapshot(tmp_path / "out") == before


def test_pysrc_on_the_python_that_runs_the_tests(tmp_path, run):
    done = run("pysrc", "--out", "out")
    assert done.code == 0, done.stderr
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert int(printed["train_tokens"]) > 5e6
    assert 0.02 < int(printed["val_tokens"]) / int(printed["train_tokens"]) < 0.1
    assert set(os.listdir(tmp_path / "out")) == WHOLE
