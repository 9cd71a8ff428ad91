"""The corpora: data/corpus.py and each prepare.py. Downloads come from a server of our own, or from a stand-in."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import data.corpus as corpus
import data.fineweb.prepare as fineweb
import data.pysrc.prepare as pysrc
import data.shakespeare.prepare as shakespeare
import data.text.prepare as text
from configurator import ConfigError
from data.tokens import HERE, UNFINISHED, BinWriter, DataError, Tokens, load_tokenizer, open_tokens


def one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def contents(folder):
    """{name: bytes} of the files in a folder, to see what changed."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


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
    printed = capsys.readouterr().out
    assert "files: 120 (3 skipped" in printed and "too few" not in printed


@pytest.mark.parametrize("prepare", [text.prepare, pysrc.prepare])
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path, monkeypatch, prepare):
    source = tree(tmp_path / "in", {f"{i % 2}/{i}.py": "some text" for i in range(20)})
    monkeypatch.setattr(pysrc.sysconfig, "get_path", lambda name: str(source))
    real = os.scandir

    def scandir(path):
        if os.path.basename(path) == "1":
            raise PermissionError(13, "Permission denied", path)
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError) as error:
        prepare(*[source] * (prepare == text.prepare), out=tmp_path / "out")
    one_line(error, f"{source}/1: Permission denied")
    assert not (tmp_path / "out").exists()


def test_links_and_special_files_are_counted(tmp_path, capsys):
    """A link to a file is text as the file is; one to a folder could lead in a circle."""
    source = tree(tmp_path / "in", TEXTS | {".hidden/a.txt": "x"})
    (source / "file").symlink_to("d0/file 7.txt")
    (source / "circle").symlink_to("circle")
    (source / "d0/up").symlink_to("..")
    (source / ".link").symlink_to("nowhere")
    os.mkfifo(source / "fifo")
    text.prepare(source, out=tmp_path / "out")
    out, err = capsys.readouterr()
    assert "files: 121 (0 skipped" in out
    assert err.startswith(f"{source}: 3 left out, which are links to folders or to nothing, or special files")


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
def test_the_order_of_names_is_that_of_their_bytes(tmp_path):
    """As characters they would be in another order, and in a third one in a locale without Unicode."""
    names = [b"z", "漢".encode(), "\uff71".encode(), b"\xff"]
    tree(tmp_path / "in", {os.fsdecode(name): f"{i}" * 200 for i, name in enumerate(names)})
    out = text.prepare(tmp_path / "in", out=tmp_path / "out")
    tokens = np.concatenate([np.fromfile(out / f"{split}.bin", "<u2", offset=1024) for split in ("train", "val")])
    assert tokens.astype(np.uint8).tobytes() == b"".join(b"\0" + b"%d" % i * 200 for i in range(4))


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
    out = text.prepare(source, glob=["*.txt", "*.md", "a.*"], out=tmp_path / "out")
    train, val = (np.fromfile(out / f"{split}.bin", "<u2", offset=1024) for split in ("train", "val"))
    assert bytes(np.concatenate([train, val]).astype(np.uint8)) == b"\0text\0mark"


def test_text_prepared_where_it_lies_is_the_same_again(tmp_path):
    tree(tmp_path, TEXTS)
    text.prepare(tmp_path, out=tmp_path)
    first = {name: (tmp_path / name).read_bytes() for name in ("train.bin", "val.bin", "meta.json")}
    text.prepare(tmp_path, out=tmp_path)
    assert first == {name: (tmp_path / name).read_bytes() for name in first}


@pytest.mark.parametrize("files, glob, said", [
    (NO_TEXT, "*", "none of 3 files holds UTF-8 text"),
    ({".hidden": "x"}, "*", "no files match *"),
    (TEXTS, "*.py", "no files match *.py"),
    (None, "*", "No such file or directory"),
])
def test_folder_without_text_is_refused_and_the_old_corpus_stays(tmp_path, files, glob, said):
    out = text.prepare(tree(tmp_path / "good", TEXTS), out=tmp_path / "out")
    before = contents(out)
    if files:
        tree(tmp_path / "in", files)
    with pytest.raises(DataError) as error:
        text.prepare(tmp_path / "in", glob=[glob], out=out)
    one_line(error, said)
    assert contents(out) == before


def test_a_failure_midway_leaves_the_old_corpus(tmp_path, monkeypatch):
    out = text.prepare(tree(tmp_path / "in", TEXTS), out=tmp_path / "out")
    before = contents(out)

    def fail(path, tokenizer):
        if path.name == "file 77.txt":
            raise OSError(28, "No space left on device")
        return np.ones(10, np.uint16)
    monkeypatch.setattr(corpus, "encode_file", fail)
    with pytest.raises(OSError):
        text.prepare(tmp_path / "in", out=out)
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
        out = pysrc.prepare(tmp_path / f"out{site_packages}", site_packages=site_packages)
        found = documents(out / "train.bin") + documents(out / "val.bin")
        assert len(found) == len(wanted) and set(found) == wanted


def test_pysrc_is_the_same_wherever_python_is_installed(tmp_path, installation):
    made = []
    for root in ("here", "there/and/deeper"):
        installation(tmp_path / root)
        made.append(contents(pysrc.prepare(tmp_path / root / "out", site_packages=True)))
    assert made[0] == made[1] and set(made[0]) == {"train.bin", "val.bin", "meta.json"}


def test_near_duplicates_stay_on_one_side_of_the_split(tmp_path, installation):
    """Many of these would be in val by the hash of their own path."""
    installation(tmp_path / "a")
    for folder in ("encodings", "lib2to3/tests"):
        tree(tmp_path / "a/stdlib" / folder, {f"table_{i}.py": f"table = {i}\n" for i in range(100)})
    out = pysrc.prepare(tmp_path / "out")
    assert sum("table" in document for document in documents(out / "train.bin")) == 200
    assert any("library" in document for document in documents(out / "val.bin"))


def test_pysrc_folders_and_a_python_without_source(tmp_path, installation, monkeypatch, gpt2):
    installation(tmp_path / "a")
    monkeypatch.setattr(pysrc, "HERE", tmp_path)
    names = [pysrc.prepare(None, tokenizer, site).name
             for tokenizer, site in [("bytes", False), ("bytes", True), ("gpt2", True)]]
    assert names == ["pysrc", "pysrc_site", "pysrc_gpt2_site"]
    monkeypatch.setattr(pysrc.sysconfig, "get_path", lambda name: str(tmp_path / "zip"))
    with pytest.raises(DataError) as error:
        pysrc.prepare(tmp_path / "none")
    one_line(error, str(tmp_path / "none"), "none of 0 files")


def test_what_only_looks_like_source_is_no_source(tmp_path, installation):
    """Links to nothing, as an editor leaves them, folders and FIFOs called *.py."""
    installation(tmp_path / "a")
    (tmp_path / "a/stdlib/.#lock.py").symlink_to("someone@somewhere")
    (tmp_path / "a/stdlib/folder.py").mkdir()
    os.mkfifo(tmp_path / "a/stdlib/fifo.py")
    out = pysrc.prepare(tmp_path / "out")
    assert len(documents(out / "train.bin") + documents(out / "val.bin")) == 60


@pytest.mark.parametrize("tokenizer", ["bytes", "gpt2"])
@pytest.mark.parametrize("happens", [os.remove, lambda path: (os.remove(path), os.mkfifo(path))])
def test_a_file_that_vanishes_is_no_file_that_is_skipped(tmp_path, request, monkeypatch, tokenizer, happens):
    if tokenizer == "gpt2":
        request.getfixturevalue("gpt2")
    out = text.prepare(tree(tmp_path / "in", TEXTS), tokenizer=tokenizer, out=tmp_path / "out")
    before = contents(out)
    listed = corpus.write_corpus

    def list_then_lose(files, *rest):
        happens(tmp_path / "in/d0/file 77.txt")
        listed(files, *rest)
    monkeypatch.setattr(text, "write_corpus", list_then_lose)
    with pytest.raises(DataError) as error:
        text.prepare(tmp_path / "in", tokenizer=tokenizer, out=out)
    one_line(error, "d0/file 77.txt", "nothing was written")
    assert contents(out) == before


@pytest.mark.parametrize("killed_at", ["val.bin", "train.bin", "meta.json"])
def test_killed_between_the_renames_is_refused_until_it_is_whole(tmp_path, killed_at):
    """New GPT-2 tokens beside an old meta.json that says bytes would train, and report nonsense."""
    source, out = tree(tmp_path / "in", TEXTS), tmp_path / "out"
    text.prepare(source, out=out)
    meta = (out / "meta.json").read_bytes()
    tree(tmp_path / "in", {"more.txt": "more " * 5000})
    code = f"""
import os, signal
from pathlib import Path
import data.text.prepare as text
real = os.replace
def replace(source, target):
    if Path(target).name == {killed_at!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
text.prepare(Path({str(source)!r}), out=Path({str(out)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=HERE.parent, stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert not (out / "meta.json").exists() and (out / UNFINISHED).exists()
    with pytest.raises(DataError) as error:
        Tokens(out, "train", 8, 50304)
    one_line(error, str(out), "not whole")
    text.prepare(source, out=out)
    assert Tokens(out, "train", 8, 256).tokenizer == "bytes" and (out / "meta.json").read_bytes() != meta
    assert not (out / UNFINISHED).exists()


def test_threads_keep_the_order_and_do_not_run_ahead():
    taken = []
    results = corpus.in_threads(lambda i: time.sleep(0.001 * (i % 3)) or i, (taken.append(i) or i for i in range(1000)))
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    assert len(taken) <= 5 + 4 * os.cpu_count()
    assert list(results) == list(range(5, 1000))


def test_an_error_in_a_thread_ends_the_corpus_and_begins_nothing_more():
    done = []

    def fail_first(i):
        if i == 0:
            raise MemoryError
        time.sleep(0.5)
        done.append(i)
    with pytest.raises(MemoryError):
        list(corpus.in_threads(fail_first, range(1000)))
    assert len(done) < 4 * os.cpu_count()


# --- downloads -------------------------------------------------------------------------------------------------------

def shard(tmp_path, tokens):
    with BinWriter(tmp_path / "shard.bin") as out:
        out.write(tokens)
    return (tmp_path / "shard.bin").read_bytes()


@pytest.fixture
def hub(monkeypatch):
    """In place of hf_hub_download: .files, {name: content}, and .asked, what was asked for. It keeps what it has."""
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Hub:
        files, asked = {}, []

    def hf_hub_download(repo, name, repo_type, local_dir):
        assert repo_type == "dataset" and repo == fineweb.REPO
        path = local_dir / name
        if not path.exists():
            Hub.asked.append(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(Hub.files[name])
        return str(path)
    Hub.asked.clear()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return Hub


@pytest.fixture
def shards(hub, tmp_path):
    hub.files = {f"fineweb_{name}.bin": shard(tmp_path, [50256] + [1000 + i] * (50 + i)) for i, name in enumerate(
        ["val_000000", "train_000001", "train_000002", "train_000003"])}
    return hub


def test_fineweb_fetches_what_is_missing_and_only_that(shards, tmp_path):
    out = tmp_path / "out"
    fineweb.prepare(1, out)
    assert shards.asked == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    (out / "fineweb_train_000001.bin").write_bytes(b"damaged")
    shards.asked.clear()
    fineweb.prepare(2, out)
    assert shards.asked == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert sorted(os.listdir(out)) == ["fineweb_train_000001.bin", "fineweb_train_000002.bin",
                                       "fineweb_val_000000.bin", "meta.json"]
    assert Tokens(out, "train", 8, 50304).n_tokens == 52 + 53
    assert json.loads((out / "meta.json").read_text()) == {
        "tokenizer": "gpt2", "vocab_size": 50257, "train_tokens": 105, "val_tokens": 51}


@pytest.mark.parametrize("damage, said", [
    (lambda content: content[:-2], "truncated or damaged"),
    (lambda content: b"<html>" + content, "not a file of tokens"),
])
def test_fineweb_refuses_a_shard_that_contradicts_its_header(shards, tmp_path, damage, said):
    name, out = "fineweb_val_000000.bin", tmp_path / "out"
    good = shards.files[name]
    shards.files[name] = damage(good)
    with pytest.raises(DataError) as error:
        fineweb.prepare(1, out)
    one_line(error, str(out / name), said)
    assert not (out / "meta.json").exists() and shards.asked == [name]  # and nothing more was fetched
    shards.files[name] = good  # the next run does not take it for whole
    fineweb.prepare(1, out)
    assert contents(out)[name] == good


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device"), "No space left on device"),
    (RuntimeError("storage\nand more"), "storage"),
    (ValueError(), "not downloaded"),
])
def test_a_download_that_fails_is_one_line(shards, tmp_path, monkeypatch, error, said):
    import huggingface_hub

    def fail(*_, **__):
        raise error
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(DataError) as refused:
        fineweb.prepare(1, tmp_path / "out")
    one_line(refused, fineweb.REPO, "fineweb_val_000000.bin", said, "run the same command again")


def test_without_huggingface_hub_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DataError) as error:
        fineweb.prepare(1, tmp_path / "out")
    one_line(error, "pip install huggingface_hub")
    code = "import data.fineweb.prepare, sys; assert 'huggingface_hub' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE.parent).returncode == 0


class Handler(BaseHTTPRequestHandler):
    """
    Answers as the Hub does where a file is asked for. server.plan says what goes wrong with the next ones, a word each:
    break (after half of the body), slam (without an answer) or a status code. server.asked: what came, (name, Range).
    """

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        if self.path.startswith(f"/datasets/{fineweb.REPO}/resolve/main/"):
            self.answer(self.path.rpartition("/")[2])
        else:  # the client has questions of its own
            self.send_error(404)

    do_GET = do_HEAD

    def answer(self, name):
        server, get = self.server, self.command == "GET"
        plan = server.plan.pop(0) if get and server.plan else ""
        if get:
            server.asked.append((name, self.headers.get("Range")))
        if plan == "slam":
            return
        if plan.isdigit() or name not in server.files:
            self.send_response(int(plan or 404))
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        content = server.files[name]
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes="):-1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        body = content[start:]
        if get:
            self.wfile.write(body[:len(body) // 2] if plan == "break" else body)


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("huggingface_hub")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.plan, server.asked = {}, [], []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        server.environ = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
                          "no_proxy": "127.0.0.1"}
        yield server
        server.shutdown()


def test_the_real_client_goes_on_where_a_connection_broke(server, tmp_path):
    large = shard(tmp_path, np.arange(12 * 2 ** 20).astype(np.uint16))  # 24 MB; the client writes 10 at a time
    server.files = {"fineweb_val_000000.bin": large, "fineweb_train_000001.bin": shard(tmp_path, [50256] * 60)}
    server.plan = ["break", "slam"]
    done = run("fineweb", "--shards", "1", "--out", "~/out", cwd=tmp_path, HOME=str(tmp_path), **server.environ)
    assert done.returncode == 0, done.stderr
    names, ranges = zip(*server.asked)
    assert names == ("fineweb_val_000000.bin",) * 3 + ("fineweb_train_000001.bin",)
    assert ranges[0] is None and ranges[1] == ranges[2] and int(ranges[1][len("bytes="):-1]) > 0 and ranges[3] is None
    assert sorted(os.listdir(tmp_path / "out")) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin", "meta.json"]
    assert (tmp_path / "out/fineweb_val_000000.bin").read_bytes() == large
    assert "train_tokens: 60\n" in done.stdout and f"folder: {tmp_path}/out\n" in done.stdout


@pytest.mark.parametrize("plan, offline, said", [([], "0", "404"), (["403"], "0", "403"), ([], "1", "offline")])
def test_the_real_client_fails_in_one_line_and_keeps_what_is_whole(server, tmp_path, plan, offline, said):
    whole = shard(tmp_path, [50256] * 60)
    tree(tmp_path / "out", {"fineweb_val_000000.bin": whole})
    server.files = {"fineweb_train_000001.bin": whole} if plan else {}
    server.plan = plan
    done = run("fineweb", "--shards", "1", "--out", "out", cwd=tmp_path, HF_HUB_OFFLINE=offline, **server.environ)
    assert done.returncode == 2 and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert fineweb.REPO in last and "fineweb_train_000001.bin" in last and said in last, done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "out") == {"fineweb_val_000000.bin": whole}


# --- shakespeare -----------------------------------------------------------------------------------------------------

def test_shakespeare_is_split_as_nanogpt_does(tmp_path, monkeypatch):
    content = bytes(range(1, 116)) * 9
    (tmp_path / "input.txt").write_bytes(content)
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(shakespeare, "URL", (tmp_path / "input.txt").as_uri())
    for source in (None, tmp_path / "input.txt"):
        out = tmp_path / str(source is None)
        shakespeare.prepare(source, out)
        assert [open_tokens(out / f"{split}.bin")[0].astype(np.uint8).tobytes() for split in ("train", "val")] == [
            content[:int(len(content) * 0.9)], content[int(len(content) * 0.9):]]
        assert Tokens(out, "val", 8, 256).tokenizer == "bytes"


@pytest.mark.parametrize("source, said", [("other", "not tiny Shakespeare"), ("none", "no such file"),
                                          (None, "cannot be read")])
def test_what_is_not_shakespeare_is_refused(tmp_path, monkeypatch, source, said):
    (tmp_path / "other").write_text("another text")
    monkeypatch.setattr(shakespeare, "URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(ConfigError) as error:
        shakespeare.prepare(source and tmp_path / source, tmp_path / "out")
    one_line(error, str(tmp_path / (source or "nowhere")), said)
    assert not (tmp_path / "out").exists()


# --- command lines ---------------------------------------------------------------------------------------------------

def run(corpus_, *arguments, cwd, **environ):
    return subprocess.run([sys.executable, str(HERE / corpus_ / "prepare.py"), *arguments], cwd=cwd,
                          capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"} | environ)


@pytest.mark.parametrize("module", [pysrc, text, fineweb, shakespeare])
def test_help_shows_the_docstring_and_the_defaults(tmp_path, module):
    done = run(module.__name__.split(".")[1], "--help", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert module.__doc__.strip() in done.stdout
    assert "--out" in done.stdout and f"(default: data/{module.__name__.split('.')[1]}" in done.stdout


@pytest.mark.parametrize("corpus_, arguments, said", [
    ("pysrc", ["--tokenizer", "words"], "'words'"),
    ("pysrc", ["--out", "file"], "file"),
    ("text", [], "FOLDER"),
    ("text", ["nowhere"], "nowhere: No such file or directory"),
    ("text", ["circle"], "circle: Too many levels of symbolic links"),
    ("text", [".", "--out", "circle"], "circle: File exists"),
    ("fineweb", ["--shards", "9" * 400], "1 to 103"),
    ("fineweb", ["--shards", "104"], "1 to 103"),
    ("fineweb", ["--shards", "x"], "--shards"),
    ("fineweb", ["--shards", "0"], "1 to 103"),
    ("shakespeare", ["--from", "file"], "not tiny Shakespeare"),
    ("text", [".", "--glob", ""], "--glob"),
    ("text", [".", "--glob", "/etc/*"], "--glob"),
])
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, corpus_, arguments, said):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "circle").symlink_to("circle")
    done = run(corpus_, *arguments, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].count(said) == 1 and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["circle", "file"]


def test_text_says_what_it_did(tmp_path):
    tree(tmp_path / "in", TEXTS | NO_TEXT)
    done = run("text", "in", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr  # no bar where nobody looks
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "files", "tokenizer", "vocab_size", "train_tokens", "val_tokens", "folder"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("stdout, said", [("/dev/full", "what it prints is lost: No space left on device"), (None, "")])
def test_a_stdout_that_fails_loses_nothing(tmp_path, stdout, said):
    """A full disk behind it, and a pipe that nobody reads, as after `| head -1`."""
    tree(tmp_path / "in", {"a.txt": "text" * 100})
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, HERE / "text/prepare.py", "in", "--out", "out"]
    with open(stdout or writer, "w") as out:
        done = subprocess.run(command, cwd=tmp_path, stdout=out, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and said in done.stderr and "make room" not in done.stderr
    assert Tokens(tmp_path / "out", "train", 8, 256).tokenizer == "bytes"


def test_home_is_where_it_is(tmp_path):
    tree(tmp_path / "in", TEXTS)
    (tmp_path / "else").mkdir()
    done = run("text", "~/in", "--out", "~/out", cwd=tmp_path / "else", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert set(contents(tmp_path / "out")) == {"train.bin", "val.bin", "meta.json"}
    assert os.listdir(tmp_path / "else") == []


def test_a_million_blanks_in_one_file_do_not_hang(tmp_path, gpt2):
    tree(tmp_path / "in", TEXTS | {"blank.txt": " " * 1_100_000 + "x"})
    done = run("text", "in", "--out", "out", "--tokenizer", "gpt2", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert "files: 121 (0 skipped" in done.stdout


def test_a_full_disk_is_one_line_that_names_the_folder(tmp_path):
    tree(tmp_path / "in", {"a.txt": "text " * 2 ** 20})
    text.prepare(tmp_path / "in", out=tmp_path / "out")
    before = contents(tmp_path / "out")
    script = HERE / "text/prepare.py"
    code = f"ulimit -f 1024; trap '' XFSZ; exec {sys.executable} {script} in --out out"  # no file above 1 MB
    done = subprocess.run(["bash", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("out: ") and "make room" in done.stderr
    assert contents(tmp_path / "out") == before


def test_pysrc_on_the_python_that_runs_the_tests(tmp_path):
    done = run("pysrc", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert int(printed["train_tokens"]) > 5e6
    assert 0.02 < int(printed["val_tokens"]) / int(printed["train_tokens"]) < 0.1
    assert set(os.listdir(tmp_path / "out")) == {"train.bin", "val.bin", "meta.json"}
