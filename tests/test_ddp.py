"""Several processes compute what one does, from the same tokens; a rank that dies takes the job down."""

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
import worlds
from conftest import ROOT, UNIFIED, flags, read_log

from runs import load_checkpoint
from train import main

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def torchrun(n, *args):
    return subprocess.run([*TORCHRUN, "--standalone", f"--nproc_per_node={n}", *map(str, args)], capture_output=True,
                          text=True, timeout=600)


def losses(out):
    return [float(row[column]) for row in read_log(out) for column in ("train_loss", "val_loss") if row[column]]


def furthest(a, b):
    assert len(a) == len(b) > 8
    return max(abs(x - y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def world(corpus, tmp_path_factory):
    """(folder, what became of each of worlds.py's cases in each process, what they printed)"""
    out = tmp_path_factory.mktemp("world")
    main(worlds.settings(out / "resumed", corpus, stop_at=8, **UNIFIED))
    other = shutil.copytree(corpus, out / "other")
    with open(other / "train.bin", "r+b") as f:
        f.seek(5000)
        f.write(b"!!")
    run = torchrun(2, ROOT / "tests" / "worlds.py", out, corpus, other)
    assert run.returncode == 0 and "FutureWarning" not in run.stderr, run.stderr
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(2)], run.stdout


@pytest.mark.parametrize("name, kw", [("baseline", {}), ("unified", UNIFIED)])
def test_losses_do_not_depend_on_the_world_size(name, kw, world, corpus, tmp_path):
    out, _, printed = world
    main(worlds.settings(tmp_path / name, corpus, **kw))
    assert furthest(losses(out / name), losses(tmp_path / name)) <= 1e-5
    assert printed.count(f"out_dir: {out / name}\n") == 1  # only rank 0 prints


def test_a_run_goes_from_one_process_to_two_and_back(world, corpus, tmp_path):
    """Two that accumulate and have a share of the optimizer's state each, and of which one hears a signal."""
    out, (first, second), printed = world
    assert (first["resumed"], second["resumed"]) == ("exit 143", "exit 143") and "a signal at step 17" in printed
    assert load_checkpoint(out / "resumed" / "ckpt.pt")["step"] == 17
    shutil.copytree(out / "resumed", tmp_path / "resumed")
    main(worlds.settings(tmp_path / "resumed", corpus, resume=True, **UNIFIED))
    assert furthest(losses(tmp_path / "resumed"), losses(out / "unified")) <= 1e-5


@pytest.mark.parametrize("case, said", [
    ("lr", "process 1 has lr 0.1 (process 0: 0.006): start all"),
    ("max_steps", f"process 1 has max_steps 9 (process 0: {worlds.STEPS}): start all"),  # it would wait for ever
    ("data", ", data {")])
def test_processes_that_differ_do_not_train_and_the_first_says_why(world, case, said):
    out, (first, second), _ = world
    assert said in first[case] and second[case] == "exit 2" and not (out / case).exists()


def test_a_world_that_does_not_divide_the_batch_is_refused(world):
    out, became, _ = world
    assert all("not divisible by block_size 16 times 2 processes" in each["uneven"] for each in became)
    assert not (out / "uneven").exists()


def test_a_compiled_model_is_cut_at_ddps_buckets(world):
    """So that gradients are sent while the backward pass goes on: one graph for all of it sends them at its end."""
    _, (became, _), _ = world
    assert became["small buckets"] >= 3 * became["large buckets"] > 0


HOOKED = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / 'tests')!r})
import conftest, train
from configurator import configure
real = train.lr_at
def lr_at(step, *a):
    if step == 6 and os.environ['RANK'] == '1' and os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0':
        os.kill(os.getpid(), signal.NAME)
    return real(step, *a)
train.lr_at = lr_at
train.run(configure(train.Settings, sys.argv[1:])[0])
"""


def test_a_rank_that_dies_takes_the_job_down_and_a_restart_goes_on(settings, tmp_path):
    """torchrun then starts all processes anew with the same line."""
    (tmp_path / "dies.py").write_text(HOOKED.replace("NAME", "SIGKILL"))
    run = torchrun(2, "--max-restarts=1", tmp_path / "dies.py", *flags(settings(resume="auto", vocab_size=0)))
    assert run.returncode == 0 and "exitcode: -9" in run.stderr, run.stderr
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 8
    assert json.loads((tmp_path / "run" / "config.json").read_text())["resumed"][0]["step"] == 4


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


def test_a_stalled_process_ends_the_others_in_one_line(settings, tmp_path, start):
    (tmp_path / "stands.py").write_text(HOOKED.replace("NAME", "SIGSTOP"))
    first, _ = (start(rank, tmp_path / "stands.py", *flags(settings(dist_timeout=0.3))) for rank in range(2))
    error = first.communicate(timeout=600)[1]
    assert first.returncode == 1 and error.count("\n") == 1, error
    assert "did not answer for 0.3 minutes (--dist_timeout)" in error and "ckpt.pt is kept" in error


def test_a_process_whose_data_is_missing_ends_all_of_them_each_in_one_line(settings, tmp_path, start):
    """As on a machine to which the data was not copied."""
    both = [start(rank, ROOT / "train.py", *flags(settings(dataset=data)))
            for rank, data in enumerate((settings().dataset, str(tmp_path / "nowhere")))]
    first, second = (process.communicate(timeout=600)[1] for process in both)
    assert [process.returncode for process in both] == [1, 2] and second.count("\n") == 1, first + second
    assert "process 1: " in second and "nowhere: has no train tokens" in second
    assert first.count("\n") == 1 and "another process has ended" in first, first


def test_a_process_that_never_comes_is_one_line(settings, start):
    alone = start(0, ROOT / "train.py", *flags(settings(dist_timeout=0.02)))
    error = alone.communicate(timeout=600)[1]  # with torch's own, which may say that a socket was not answered
    assert alone.returncode == 1 and "Traceback" not in error, error
    assert sum("did not answer for 0.02 minutes" in line for line in error.splitlines()) == 1, error
