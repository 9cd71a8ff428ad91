"""The corpora: data/corpus.py, data/download.py and each prepare.py. Downloads come from a server of our own."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import data.c4.prepare as c4
import data.corpus as corpus
import data.download as dl
import data.fineweb.prepare as fineweb
import data.pysrc.prepare as pysrc
import data.text.prepare as text
from data.tokens import HERE, BinWriter, DataError, Tokens, load_tokenizer


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def contents(folder):
    """{name: bytes} of a folder, to see what changed."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(path, tokenizer="bytes"):
    """The texts in a .bin file."""
    tok = load_tokenizer(tokenizer)
    tokens = np.fromfile(path, "<u2", offset=1024)
    assert tokens[0] == tok.separator
    parts = np.split(tokens, np.flatnonzero(tokens == tok.separator))[1:]
    return [b"".join(tok.token_bytes(int(token)) for token in part[1:]).decode() for part in parts]


@pytest.fixture
def gpt2():
    try:
        return load_tokenizer("gpt2")
    except DataError as error:
        pytest.skip(str(error))


def tree(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# --- text and pysrc --------------------------------------------------------------------------------------------------

TEXTS = {f"d{i % 7}/file {i}.txt": f"This is text {i}, naïve 漢字.\r\n" * (1 + i % 3) for i in range(120)}
NO_TEXT = {"latin.txt": "é".encode("latin-1"), "nul.txt": "a\0b", "empty.txt": "", ".hidden/a.txt": "x", ".b.txt": "x"}


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
def test_text_keeps_every_document_once_and_splits_by_name(tmp_path, request, tokenizer, capsys):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")
    out = text.prepare(tree(tmp_path / "in", TEXTS | NO_TEXT), tokenizer=tokenizer, out=tmp_path / "out")
    in_val = [name for name in sorted(TEXTS) if corpus.goes_to_val(name)]
    assert documents(out / "val.bin", tokenizer) == [TEXTS[name] for name in in_val]
    assert documents(out / "train.bin", tokenizer) == [TEXTS[name] for name in sorted(TEXTS) if name not in in_val]
    meta = json.loads((out / "meta.json").read_text())
    assert meta["tokenizer"] == tokenizer and meta["vocab_size"] == load_tokenizer(tokenizer).vocab_size
    val = Tokens(out, "val", 8, 50257)
    assert meta["val_tokens"] == val.n_tokens
    assert meta["bytes_per_token"] == pytest.approx(sum(len(TEXTS[name].encode()) for name in in_val) / val.n_tokens)
    printed = capsys.readouterr().out
    assert "files: 120 (3 skipped" in printed and "too few" not in printed


def test_split_is_about_a_twentieth_and_the_same_everywhere():
    names = [f"package/module_{i}.py" for i in range(20000)]
    assert np.mean([corpus.goes_to_val(name) for name in names]) == pytest.approx(0.05, abs=0.005)
    # A change here would put files that models were trained on into everybody's validation split.
    assert [i for i, name in enumerate(names[:100]) if corpus.goes_to_val(name)] == [6, 59, 64, 65, 71, 99]


@pytest.mark.parametrize("names", [["a.txt"], ["val.txt"]])
def test_few_files_give_their_last_twentieth_to_val(tmp_path, capsys, monkeypatch, names):
    monkeypatch.setattr(corpus, "goes_to_val", lambda key: key == "val.txt")
    out = text.prepare(tree(tmp_path / "in", dict.fromkeys(names, "0123456789" * 20)), out=tmp_path / "out")
    train, val = (np.fromfile(out / f"{split}.bin", "<u2", offset=1024) for split in ("train", "val"))
    assert len(val) == 10 and len(train) == 191
    assert bytes(np.concatenate([train, val]).astype(np.uint8)) == b"\0" + b"0123456789" * 20
    assert "val is the last 5% of the tokens" in capsys.readouterr().out


def test_globs_choose_the_files(tmp_path):
    source = tree(tmp_path / "in", {"a.txt": "text", "b.md": "mark", "c.rst": "rest"})
    out = text.prepare(source, glob=["*.txt", "*.md", "a.*"], out=tmp_path / "out", quiet=True)
    train, val = (np.fromfile(out / f"{split}.bin", "<u2", offset=1024) for split in ("train", "val"))
    assert bytes(np.concatenate([train, val]).astype(np.uint8)) == b"\0text\0mark"


def test_text_prepared_where_it_lies_is_the_same_again(tmp_path):
    tree(tmp_path, TEXTS)
    text.prepare(tmp_path, out=tmp_path, quiet=True)
    first = {name: (tmp_path / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}
    text.prepare(tmp_path, out=tmp_path, quiet=True)
    assert first == {name: (tmp_path / name).read_bytes() for name in first}


@pytest.mark.parametrize("files, glob, said", [
    (NO_TEXT, "*", "none of 3 files holds UTF-8 text"),
    ({".hidden": "x"}, "*", "no files match *"),
    (TEXTS, "*.py", "no files match *.py"),
    (None, "*", "not a folder"),
])
def test_folder_without_text_is_refused_and_the_old_corpus_stays(tmp_path, files, glob, said):
    out = text.prepare(tree(tmp_path / "good", TEXTS), out=tmp_path / "out", quiet=True)
    before = contents(out)
    if files:
        tree(tmp_path / "in", files)
    with pytest.raises(DataError) as error:
        text.prepare(tmp_path / "in", glob=[glob], out=out)
    one_line(error, said)
    assert contents(out) == before


def test_a_failure_midway_leaves_the_old_corpus(tmp_path, monkeypatch):
    out = text.prepare(tree(tmp_path / "in", TEXTS), out=tmp_path / "out", quiet=True)
    before = contents(out)

    def fail(name, path):
        if path.name == "file 77.txt":
            raise OSError(28, "No space left on device")
        return np.ones(10, np.uint16)
    monkeypatch.setattr(corpus, "encode_file", fail)
    with pytest.raises(OSError):
        text.prepare(tmp_path / "in", out=out, quiet=True)
    assert contents(out) == before


@pytest.fixture
def installation(tmp_path, monkeypatch):
    """A standard library and installed packages; lib64 is a link, as in a virtual environment."""
    library = {f"module_{i}.py": f"library = {i}\n" for i in range(60)}
    other = {"site-packages/p.py": "no", "dist-packages/q.py": "no", "__pycache__/r.py": "no", "LICENSE.txt": "no"}
    packages = {f"package/module_{i}.py": f"package = {i}\n" for i in range(60)} | {"package/__pycache__/x.py": "no"}

    def install(root):
        tree(root / "stdlib", library | other)
        tree(root / "lib", packages)
        (root / "lib64").symlink_to("lib")
        paths = {"stdlib": root / "stdlib", "purelib": root / "lib", "platlib": root / "lib64"}
        monkeypatch.setattr(pysrc.sysconfig, "get_path", lambda name: str(paths[name]))
    return install


def test_pysrc_takes_the_library_and_on_request_the_packages(tmp_path, installation):
    installation(tmp_path / "a")
    library = {f"library = {i}\n" for i in range(60)}
    for site_packages, wanted in [(False, library), (True, library | {f"package = {i}\n" for i in range(60)})]:
        out = pysrc.prepare(tmp_path / f"out{site_packages}", site_packages=site_packages, quiet=True)
        found = documents(out / "train.bin") + documents(out / "val.bin")
        assert len(found) == len(wanted) and set(found) == wanted


def test_pysrc_is_the_same_wherever_python_is_installed(tmp_path, installation):
    made = []
    for root in ("here", "there/and/deeper"):
        installation(tmp_path / root)
        made.append(contents(pysrc.prepare(tmp_path / root / "out", site_packages=True, quiet=True)))
    assert made[0] == made[1] and set(made[0]) == {"train.bin", "val.bin", "meta.json"}


def test_pysrc_folders_and_a_python_without_source(tmp_path, installation, monkeypatch, gpt2):
    installation(tmp_path / "a")
    monkeypatch.setattr(pysrc, "HERE", tmp_path)
    names = [pysrc.prepare(None, tokenizer, site, quiet=True).name
             for tokenizer, site in [("bytes", False), ("bytes", True), ("gpt2", True)]]
    assert names == ["pysrc", "pysrc_site", "pysrc_gpt2_site"]
    monkeypatch.setattr(pysrc.sysconfig, "get_path", lambda name: str(tmp_path / "zip"))
    with pytest.raises(DataError) as error:
        pysrc.prepare(tmp_path / "none")
    one_line(error, str(tmp_path / "zip"), "no Python source")


# --- downloads -------------------------------------------------------------------------------------------------------

class Server(ThreadingHTTPServer):
    """
    Serves .files, with Range and If-Range. .plan says what goes wrong with the next requests, one word each:
    break (after half of the body), no_etag and weak_etag (and break), slam (without an answer), ignore_range,
    ignore_if_range, no_length, short_total, or a status code. .asked is what was asked for: (name, Range).
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.plan, self.asked = {}, [], []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, name = self.server, self.path.strip("/")
        plan = server.plan.pop(0) if server.plan else ""
        server.asked.append((name, self.headers.get("Range")))
        if plan == "slam":
            return
        if plan.isdigit() or name not in server.files:
            return self.send_error(int(plan or 404))
        content = server.files[name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        start = 0
        if "Range" in self.headers and plan != "ignore_range":
            if plan == "ignore_if_range" or self.headers["If-Range"] == etag:
                start = int(self.headers["Range"][len("bytes="):-1])
                if start >= len(content):
                    return self.send_error(416)
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            total = len(content) - (plan == "short_total")
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{total}")
        if plan != "no_length":
            self.send_header("Content-Length", str(len(body)))
        if plan != "no_etag":
            self.send_header("ETag", 'W/"same"' if plan == "weak_etag" else etag)
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if plan in ("break", "no_etag", "weak_etag") else body)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(dl, "WAIT", 0)
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


OLD, NEW = (np.random.default_rng(i).bytes(100_000) for i in (1, 2))


@pytest.mark.parametrize("plan, ranges", [
    ([], [None]),
    (["break"], [None, "bytes=50000-"]),
    # More often than TRIES, but each time something came.
    (["break"] * 6, [None] + [f"bytes={n}-" for n in (50000, 75000, 87500, 93750, 96875, 98437)]),
    (["break", "503", "slam"], [None, "bytes=50000-", "bytes=50000-", "bytes=50000-"]),
    (["503", "429", "slam"], [None, None, None, None]),
    (["break", "ignore_range"], [None, "bytes=50000-"]),
    (["break", "416"], [None, "bytes=50000-", None]),
    (["no_etag"], [None, None]),  # nothing vouches for the part being of the same file
    (["weak_etag"], [None, None]),
])
def test_download_survives(server, tmp_path, plan, ranges):
    server.files["f"], server.plan = OLD, plan
    dl.download(f"{server.url}/f", tmp_path / "f", quiet=True)
    assert server.asked == [("f", range_) for range_ in ranges]
    assert contents(tmp_path) == {"f": OLD}


@pytest.mark.parametrize("history", [
    [(OLD, "break"), (NEW, "")],
    [(OLD, "break"), (NEW, "ignore_range")],
    [(OLD, "break"), (NEW, "ignore_if_range"), (NEW, "")],
    [(OLD, "break"), (NEW, "no_etag"), (OLD, "")],
])
def test_file_that_changed_on_the_server_is_not_spliced(server, tmp_path, monkeypatch, history):
    monkeypatch.setattr(dl, "TRIES", 1)
    for content, plan in history:
        server.files["f"], server.plan = content, [plan]
        if (content, plan) == history[-1]:
            dl.download(f"{server.url}/f", tmp_path / "f", quiet=True)
        else:
            with pytest.raises(DataError):
                dl.download(f"{server.url}/f", tmp_path / "f", quiet=True)
    assert contents(tmp_path) == {"f": history[-1][0]}


def test_broken_off_download_goes_on_in_the_next_run(server, tmp_path):
    server.files["f"], server.plan = OLD, ["break"] + ["slam"] * (dl.TRIES - 1)
    with pytest.raises(DataError) as error:
        dl.download(f"{server.url}/f", tmp_path / "f")
    one_line(error, f"{server.url}/f", "broke off at 50000 bytes", "run the same command again to go on")
    assert (tmp_path / "f.part").read_bytes() == OLD[:50000] and not (tmp_path / "f").exists()
    server.asked.clear()
    dl.download(f"{server.url}/f", tmp_path / "f", quiet=True)
    assert server.asked == [("f", "bytes=50000-")]
    assert contents(tmp_path) == {"f": OLD}


@pytest.mark.parametrize("name, plan, said, left", [
    ("missing", [], "HTTP 404", set()),
    ("f", ["403"], "HTTP 403", set()),
    ("f", ["no_length"], "announces no length", set()),
    ("f", ["break", "short_total"], "100000 bytes came and 99999 were announced", set()),
    ("f", ["503"] * 5, "broke off at 0 bytes (HTTP 503", set()),
])
def test_download_is_refused(server, tmp_path, name, plan, said, left):
    server.files["f"], server.plan = OLD, list(plan)
    with pytest.raises(DataError) as error:
        dl.download(f"{server.url}/{name}", tmp_path / name, quiet=True)
    one_line(error, f"{server.url}/{name}", said)
    assert set(contents(tmp_path)) == left  # and never a file under the final name
    assert len(server.asked) == max(1, len(plan))


@pytest.mark.parametrize("url", ["nonsense", "http://127.0.0.1:9", "gopher://host"])
def test_url_that_does_not_work(server, tmp_path, url):
    with pytest.raises(DataError) as error:
        dl.download(f"{url}/f", tmp_path / "f", quiet=True)
    one_line(error, url)


# --- fineweb ---------------------------------------------------------------------------------------------------------

def shard(tmp_path, tokens):
    with BinWriter(tmp_path / "shard.bin") as out:
        out.write(tokens)
    return (tmp_path / "shard.bin").read_bytes()


@pytest.fixture
def shards(server, tmp_path):
    for i, name in enumerate(["val_000000", "train_000001", "train_000002", "train_000003"]):
        server.files[f"fineweb_{name}.bin"] = shard(tmp_path, [50256] + [1000 + i] * (50 + i))
    return server


def test_fineweb_fetches_what_is_missing_and_only_that(shards, tmp_path):
    out = fineweb.prepare(1, tmp_path / "out", shards.url, quiet=True)
    assert [name for name, _ in shards.asked] == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    (out / "fineweb_train_000001.bin").write_bytes(b"damaged")
    shards.asked.clear()
    fineweb.prepare(2, out, shards.url, quiet=True)
    assert [name for name, _ in shards.asked] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert Tokens(out, "train", 8, 50304).n_tokens == 52 + 53
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["tokenizer"], meta["vocab_size"], meta["train_tokens"], meta["val_tokens"]) == ("gpt2", 50257, 105, 51)


def test_fineweb_measures_bytes_per_token_where_it_can(shards, tmp_path, monkeypatch, gpt2):
    out = fineweb.prepare(1, tmp_path / "out", shards.url, quiet=True)
    length = len(gpt2.token_bytes(1000))
    assert json.loads((out / "meta.json").read_text())["bytes_per_token"] == pytest.approx(50 * length / 51)

    def offline(name):
        raise DataError("offline")
    monkeypatch.setattr(fineweb, "load_tokenizer", offline)
    fineweb.prepare(1, out, shards.url, quiet=True)
    assert json.loads((out / "meta.json").read_text())["bytes_per_token"] is None


@pytest.mark.parametrize("damage, said", [
    (lambda content: content[:-2], "truncated or damaged"),
    (lambda content: b"<html>" + content, "not a file of tokens"),
])
def test_fineweb_refuses_a_shard_that_contradicts_its_header(shards, tmp_path, damage, said):
    shards.files["fineweb_train_000001.bin"] = damage(shards.files["fineweb_train_000001.bin"])
    with pytest.raises(DataError) as error:
        fineweb.prepare(1, tmp_path / "out", shards.url, quiet=True)
    one_line(error, "fineweb_train_000001.bin", said)
    assert set(contents(tmp_path / "out")) == {"fineweb_val_000000.bin"}


# --- c4 --------------------------------------------------------------------------------------------------------------

C4_TEXTS = {name: [f"{name} document {i}. 漢字 <|endoftext|>\n" * (1 + i % 4) for i in range(1200)]
            for name in ("c4-validation.00000-of-00008.json.gz", "c4-train.00000-of-01024.json.gz",
                         "c4-train.00001-of-01024.json.gz")}


@pytest.fixture
def c4_server(server, gpt2):
    for name, texts in C4_TEXTS.items():
        lines = "\n".join(json.dumps({"text": text, "url": "x"}) for text in texts)
        server.files[name] = gzip.compress(lines.encode())
    return server


def test_c4_keeps_documents_in_order_and_finished_shards(c4_server, tmp_path):
    out = c4.prepare(1, tmp_path / "out", c4_server.url, quiet=True)
    assert set(contents(out)) == {"val_00000.bin", "train_00000.bin", "meta.json"}
    before = (out / "train_00000.bin").stat().st_mtime_ns
    c4_server.asked.clear()
    c4.prepare(2, out, c4_server.url, quiet=True)
    assert c4_server.asked == [("c4-train.00001-of-01024.json.gz", None)]
    assert (out / "train_00000.bin").stat().st_mtime_ns == before
    for name, texts in zip(["val_00000", "train_00000", "train_00001"], C4_TEXTS.values()):
        assert documents(out / f"{name}.bin", "gpt2") == texts
    meta = json.loads((out / "meta.json").read_text())
    assert meta["train_tokens"] == Tokens(out, "train", 8, 50257).n_tokens
    n_bytes = sum(len(text.encode()) for text in C4_TEXTS["c4-validation.00000-of-00008.json.gz"])
    assert meta["bytes_per_token"] == pytest.approx(n_bytes / meta["val_tokens"])


def test_c4_interrupted_conversion_downloads_nothing_twice(c4_server, tmp_path, monkeypatch):
    class Interrupted(BinWriter):
        def write(self, tokens):
            if self.count:
                raise KeyboardInterrupt
            super().write(tokens)
    with monkeypatch.context() as patch:
        patch.setattr(c4, "BinWriter", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            c4.prepare(1, tmp_path / "out", c4_server.url, quiet=True)
    assert set(contents(tmp_path / "out")) == {"c4-validation.00000-of-00008.json.gz"}
    c4_server.asked.clear()
    out = c4.prepare(1, tmp_path / "out", c4_server.url, quiet=True)
    assert [name for name, _ in c4_server.asked] == ["c4-train.00000-of-01024.json.gz"]
    assert set(contents(out)) == {"val_00000.bin", "train_00000.bin", "meta.json"}


@pytest.mark.parametrize("content", [gzip.compress(b'{"text": "a"}\n' * 10)[:-9], b"no gzip", gzip.compress(b'{"te'),
                                     gzip.compress(b'{"no text": 1}'), gzip.compress(b"[1]")])
def test_c4_damaged_source_is_refused_and_removed(tmp_path, content):
    class Pool:  # the real one would take a second a case
        def imap(self, function, items):
            return map(function, items)
    source = tmp_path / "c4.json.gz"
    source.write_bytes(content)
    with pytest.raises(DataError) as error:
        c4.convert(source, tmp_path / "train.bin", Pool(), quiet=True)
    one_line(error, str(source), "damaged", "run the same command again")
    assert not contents(tmp_path)


# --- command lines ---------------------------------------------------------------------------------------------------

def run(corpus_, *arguments, cwd):
    return subprocess.run([sys.executable, str(HERE / corpus_ / "prepare.py"), *arguments], cwd=cwd,
                          capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"})


@pytest.mark.parametrize("module", [pysrc, text, fineweb, c4])
def test_help_shows_the_docstring_and_the_defaults(tmp_path, module):
    done = run(module.__name__.split(".")[1], "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert module.__doc__.strip() in done.stdout
    assert "--out" in done.stdout and f"(default: data/{module.__name__.split('.')[1]}" in done.stdout


@pytest.mark.parametrize("corpus_, arguments, said", [
    ("pysrc", ["--tokenizer", "words"], "'words'"),
    ("pysrc", ["--out", "file"], "file"),
    ("text", [], "FOLDER"),
    ("text", ["nowhere"], "nowhere: not a folder"),
    ("fineweb", ["--shards", "104"], "1 to 103"),
    ("c4", ["--shards", "x"], "--shards"),
])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, corpus_, arguments, said):
    (tmp_path / "file").write_text("in the way")
    done = run(corpus_, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.count("\n") == 1 and said in done.stderr
    assert os.listdir(tmp_path) == ["file"]


def test_text_says_what_it_did(tmp_path):
    tree(tmp_path / "in", TEXTS | NO_TEXT)
    done = run("text", "in", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr  # no bar where nobody looks
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "files", "train_tokens", "val_tokens", "bytes_per_token", "val_unigram_entropy", "folder"]


def test_pysrc_on_the_python_that_runs_the_tests(tmp_path):
    done = run("pysrc", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert int(printed["train_tokens"]) > 5e6
    assert 0.02 < int(printed["val_tokens"]) / int(printed["train_tokens"]) < 0.1
    assert 0.99 < float(printed["bytes_per_token"]) < 1
    assert 2 < float(printed["val_unigram_entropy"].split()[0]) < 5
    assert set(os.listdir(tmp_path / "out")) == {"train.bin", "val.bin", "meta.json"}
