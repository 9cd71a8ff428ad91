"""Several processes compute what one does, from the same tokens; a rank that dies takes the job down."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import worlds
from conftest import ROOT

from runs import load_checkpoint
from train import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
STRATEGIES = ["baseline", "unified"]


def torchrun(n, *args, **kw):
    return subprocess.run([*TORCHRUN, "--standalone", f"--nproc_per_node={n}", *map(str, args)], capture_output=True,
                          text=True, timeout=300, **kw)


def flags(s):
    """Settings as a command line."""
    return [f"--{name}={value}" for name, value in vars(s).items()]


def losses(out):
    with open(Path(out) / "log.csv", newline="") as f:
        return [float(row[column]) for row in csv.DictReader(f) for column in ("train_loss", "val_loss") if row[column]]


def furthest(a, b):
    assert len(a) == len(b) > 50
    return max(abs(x - y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Runs of one process to compare with."""
    out = tmp_path_factory.mktemp("alone")
    for name in STRATEGIES:
        main(worlds.settings(name, out, corpus, 50))
    return out


@pytest.mark.parametrize("n", [2, 4])
def test_losses_do_not_depend_on_the_world_size(n, corpus, tmp_path, alone):
    run = torchrun(n, ROOT / "tests" / "worlds.py", tmp_path, corpus, 50, *STRATEGIES)
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr
    for name in STRATEGIES:
        assert furthest(losses(tmp_path / name), losses(alone / name)) <= 1e-5
        assert run.stdout.count(f"out_dir: {tmp_path / name}") == 1  # rank 0 alone prints


def test_micro_batches_on_two_processes_sharding_and_resuming_at_other_world_sizes(corpus, tmp_path, alone):
    """Two processes, accumulating, with the optimizer's state shared out; then one; then two again without sharding."""
    accumulating = ["--micro_batch=2", "--shard_optimizer=True"]
    s = worlds.settings("unified", tmp_path, corpus, 50, "--save_interval=10", *accumulating)
    stopper = tmp_path / "stop.py"
    stopper.write_text("import os, signal, sys\n"
                       f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
                       "import worlds, train\n"
                       "real, last = train.lr_at, int(sys.argv.pop())\n"
                       "def lr_at(step, *a):\n"
                       "    if step == last and os.environ.get('RANK') == '1':\n"  # one rank alone hears the signal
                       "        os.kill(os.getpid(), signal.SIGTERM)\n"
                       "    return real(step, *a)\n"
                       "train.lr_at = lr_at\n"
                       "train.run(worlds.configure(train.Settings, sys.argv[1:])[0])\n")
    run = torchrun(2, stopper, *flags(s), 16)
    assert "stopped by a signal at step 17" in run.stdout, run.stderr
    ckpt = load_checkpoint(tmp_path / "unified" / "ckpt.pt")
    assert ckpt["step"] == 17

    s.resume, s.shard_optimizer, s.max_steps = True, False, 50
    import train
    real = train.lr_at
    train.lr_at = lambda i, *a: (os.kill(os.getpid(), signal.SIGTERM) if i == 30 else None, real(i, *a))[1]
    try:
        with pytest.raises(SystemExit):
            main(s)
    finally:
        train.lr_at = real
    run = torchrun(2, ROOT / "train.py", *flags(s))
    assert run.returncode == 0, run.stderr
    assert furthest(losses(tmp_path / "unified"), losses(alone / "unified")) <= 1e-5


def test_a_world_that_does_not_divide_the_batch_is_refused(settings):
    """In one line of each process that came to it: whoever fails speaks, and says who it is."""
    s = settings(batch_tokens=80, micro_batch=5)
    run = torchrun(2, ROOT / "train.py", *flags(s))
    said = re.findall(r"^train.py: .*$", run.stderr, re.MULTILINE)
    assert run.returncode != 0 and 1 <= len(said) <= 2 and len(set(said)) == len(said)
    assert all("which 2 processes cannot share equally" in line for line in said)
    assert not Path(s.out_dir).exists()


def test_a_rank_that_dies_takes_the_job_down(settings, tmp_path):
    s = settings(max_steps=100000, save_interval=5, eval_interval=1000)
    process = subprocess.Popen([*TORCHRUN, "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"), *flags(s)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (Path(s.out_dir) / "ckpt.pt").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        workers = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode != 0 and "SIGKILL" in error
    assert load_checkpoint(Path(s.out_dir) / "ckpt.pt")["step"] % 5 == 0


def test_two_nodes(settings, tmp_path):
    """As on two machines: two torchruns that meet at one address."""
    s = settings(out_dir=str(tmp_path / "nodes"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    node = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
            "--rdzv_id=1", str(ROOT / "train.py"), *flags(s)]
    nodes = [subprocess.Popen(node, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [p.communicate(timeout=200)[0] for p in nodes]
    assert [p.returncode for p in nodes] == [0, 0], said
    one = settings(out_dir=str(tmp_path / "one"))
    main(one)
    a, b = losses(s.out_dir), losses(one.out_dir)
    assert len(a) == len(b) and max(abs(x - y) for x, y in zip(a, b)) <= 1e-5


HOOKED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / 'tests')!r})
import worlds, train
real = train.lr_at
def lr_at(step, *a):
    if step == 6 and os.environ['RANK'] == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        os.kill(os.getpid(), signal.NAME)
    return real(step, *a)
train.lr_at = lr_at
train.run(worlds.configure(train.Settings, sys.argv[1:])[0])
"""


def test_one_command_survives_a_restart(settings, tmp_path):
    """torchrun starts all processes anew with the same line when one dies, before or after a checkpoint."""
    (tmp_path / "dies.py").write_text(HOOKED.replace("NAME", "SIGKILL"))
    s = settings(resume="auto")
    run = subprocess.run([*TORCHRUN, "--standalone", "--max-restarts=1", "--nproc_per_node=2",
                          str(tmp_path / "dies.py"), *flags(s)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert load_checkpoint(Path(s.out_dir) / "ckpt.pt")["step"] == 8
    assert json.loads((Path(s.out_dir) / "config.json").read_text())["resumed"][0]["step"] == 4


@pytest.fixture
def start():
    """A function that starts one of two processes as torchrun would, with a script and its arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        world = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
    started = []

    def start(rank, *args):
        env = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(subprocess.Popen([sys.executable, *map(str, args)], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.PIPE, text=True, env=env))
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_process_that_stands_still_ends_the_others_in_one_line(settings, tmp_path, start):
    (tmp_path / "stands.py").write_text(HOOKED.replace("NAME", "SIGSTOP"))
    first, _ = (start(rank, tmp_path / "stands.py", *flags(settings(dist_timeout=0.5))) for rank in range(2))
    error = first.communicate(timeout=300)[1]
    assert first.returncode == 1 and error.count("\n") == 1, error
    assert "stood still for 0.5 minutes (--dist_timeout)" in error and "ckpt.pt is kept" in error


def test_a_process_that_never_comes_is_one_line(settings, start):
    alone = start(0, ROOT / "train.py", *flags(settings(dist_timeout=0.02)))
    error = alone.communicate(timeout=300)[1]  # with torch's own, which may say that a socket was not answered
    assert alone.returncode == 1 and "Traceback" not in error, error
    assert sum("stood still for 0.02 minutes" in line for line in error.splitlines()) == 1, error


@pytest.mark.parametrize("flag, speaks, said", [
    ("--lr=0.1", 0, "process 1 has lr 0.1 (process 0: 0.002): start all"),
    ("--max_steps=9", 0, "process 1 has max_steps 9 (process 0: 8): start all"),  # it would wait for ever
    ("--dataset=OTHER", 0, "data {"),
    ("--dataset=/nothing/there", 1, "process 1: /nothing/there: no train tokens")])
def test_processes_compare_notes_and_the_one_that_fails_speaks(settings, corpus, tmp_path, start, flag, speaks, said):
    other = shutil.copytree(corpus, tmp_path / "other")
    with open(other / "train.bin", "r+b") as f:
        f.seek(5000)
        f.write(b"!!")
    s = flags(settings())
    both = start(0, ROOT / "train.py", *s), start(1, ROOT / "train.py", *s, flag.replace("OTHER", str(other)))
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert all(process.returncode for process in both) and said in errors[speaks], errors
    assert errors[speaks].count("\n") == 1 and not Path(settings().out_dir).exists()
