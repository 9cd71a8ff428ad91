import contextlib
import csv
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Models of a few thousand parameters are quickest on one thread, and on a busy machine two threads spend their time
# waiting for each other. Read by torch as it is imported, here and in the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402, after the line above

import configurator  # noqa: E402, found by ROOT
from configurator import ConfigError  # noqa: E402

# Without a GPU, Triton's kernels run in its interpreter where a test asks for them. Read as kernels.py is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def write_bin(path, tokens):
    """Write a .bin file, a new one where there is one, and return its path."""
    import data.tokens
    path.unlink(missing_ok=True)
    data.tokens.write_bin(path, [np.asarray(tokens, np.uint16)])
    return path


def read_log(out, name="log.csv"):
    """The rows of a run's CSV file, without how long a step took, which no two runs share."""
    with open(Path(out) / name, newline="") as f:
        return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in csv.DictReader(f)]


def checkpoint(s):
    from runs import load_checkpoint
    return load_checkpoint(Path(s.out_dir) / "ckpt.pt")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of data with some structure to learn: words drawn from a list of 200, as bytes; the same every time."""
    from data.tokens import load_tokenizer, write_meta
    folder = tmp_path_factory.mktemp("corpus")
    random = np.random.RandomState(0)
    words = [bytes(random.randint(ord("a"), ord("z") + 1, random.randint(1, 9), np.uint8)) for _ in range(200)]
    often = 1 / np.arange(1, 201)  # Zipf's law
    text = b" ".join(words[i] for i in random.choice(200, 30000, p=often / often.sum()))
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16)
    write_bin(folder / "train.bin", tokens[: len(tokens) * 9 // 10])
    write_bin(folder / "val.bin", tokens[len(tokens) * 9 // 10:])
    write_meta(folder, load_tokenizer("bytes"))
    return folder


UNIFIED = dict(heterogeneous=True, placement="dual_norm", reparam="or", scale_decay="input")


def small(corpus, **kw):
    """Settings of a run of a second or so."""
    from settings import Settings
    few = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_tokens=64, micro_batch=4, max_steps=8,
               warmup_steps=2, eval_interval=4, eval_tokens=512, log_interval=1, save_interval=4, sample_tokens=0,
               device="cpu")
    return Settings(**{**few, "dataset": str(corpus), **kw})


def flags(s):
    """Settings as a command line."""
    return [f"--{name}={value}" for name, value in vars(s).items()]


@pytest.fixture
def gpt2():
    """GPT-2's tokenizer; the test is skipped where its files are missing."""
    from data.tokens import load_tokenizer
    try:
        return load_tokenizer("gpt2")
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture
def settings(corpus, tmp_path):
    """A function that makes such settings, with out_dir in tmp_path; keywords change them."""
    return lambda **kw: small(corpus, **{"out_dir": str(tmp_path / "run"), **kw})


@pytest.fixture(scope="session")
def finished_once(corpus, tmp_path_factory):
    from train import main
    out = tmp_path_factory.mktemp("finished") / "run"
    main(small(corpus, out_dir=str(out)))
    return out


@pytest.fixture
def finished(finished_once, settings):
    """The folder of settings(), where its run has ended."""
    return Path(shutil.copytree(finished_once, settings().out_dir))


@pytest.fixture
def printing_to(monkeypatch):
    """A function that makes a file the standard output of a script that has just begun."""
    def begin(file):
        for name in ("stdin", "stdout", "stderr", "excepthook"):
            monkeypatch.setattr(sys, name, getattr(sys, name))
        monkeypatch.setattr(sys, "argv", ["/some/script.py"])
        monkeypatch.setattr(sys, "stdout", file)
        configurator.streams()
    return begin


def reader_that_left(pair):
    """A stream to write to, whose other end is closed. pair: os.pipe or os.openpty."""
    ours, theirs = pair()
    os.close(ours)
    return open(theirs, "w")


@pytest.fixture
def nobody():
    """A folder for anyone; while the test runs, this process is not root's, to whom no folder is closed."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    root = os.geteuid() == 0
    if root:
        os.setresuid(65534, 65534, 0)
    yield folder
    if root:
        os.setresuid(0, 0, 0)
    shutil.rmtree(folder)


def snapshot(folder):
    """What every file of a folder holds, to see that nothing changed."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@contextlib.contextmanager
def refused(*parts):
    """What happens inside raises a ConfigError of one line, which holds these parts."""
    with pytest.raises(ConfigError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
