"""Killed, starved of disk, left by its reader, fed with damaged files: a run loses nothing and says one line."""

import os
import pickle
import random
import resource
import signal
import subprocess
from pathlib import Path

import faults
import pytest
import torch
from conftest import snapshot

import configurator
import train
from configurator import ConfigError
from runlog import LOG_COLUMNS
from runs import CSVLog, load_checkpoint
from train import main


def test_killed_runs_end_as_an_undisturbed_one(tmp_path):
    """The short form of `python tests/faults.py`."""
    done = faults.torment(tmp_path / "faults", kills=2, steps=20)
    assert done["kills"] == 2 and done["runs compared"] >= 1


def test_the_comparison_of_runs_can_fail(finished):
    first, second = (faults.outcome(finished) for _ in range(2))
    assert faults.same(first, second)
    second[0]["wte"] = second[0]["wte"].clone()
    second[0]["wte"][0, 0] += 1e-7
    assert not faults.same(first, second)


@pytest.mark.parametrize("limit, file", [(20_000, "ckpt.pt"), (500, "log.csv")])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(settings, finished, capsys, limit, file):
    """No file can grow past `limit` bytes, which a program meets as a full disk."""
    before = (finished / "ckpt.pt").read_bytes()
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        with pytest.raises(SystemExit) as stop:
            train.run(settings(resume=True, max_steps=12))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1 and "ckpt.pt is kept: fix that" in error, error
    assert (finished / "ckpt.pt").read_bytes() == before and not (finished / "ckpt.pt.tmp").exists()
    main(settings(resume=True, max_steps=12))
    assert load_checkpoint(finished / "ckpt.pt")["step"] == 12


def test_a_checkpoint_cut_anywhere_is_refused(finished):
    path, rng = finished / "ckpt.pt", random.Random(0)
    whole = path.read_bytes()
    for keep in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(30))]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ConfigError, match="cut off or not ours"):
            load_checkpoint(path)


def test_a_flipped_bit_in_a_tensor_is_refused(finished):
    path = finished / "ckpt.pt"
    ckpt, content = torch.load(path, weights_only=True), path.read_bytes()
    tensors = [ckpt["model"]["wte"], *(x for x in ckpt["optimizers"][0]["state"][1].values() if x.numel() > 1)]
    for tensor in tensors:
        flipped = bytearray(content)
        flipped[content.index(tensor.numpy().tobytes()) + 5] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ConfigError, match="checksum"):
            load_checkpoint(path)


def test_a_log_cut_anywhere_keeps_its_whole_rows(finished):
    path = finished / "log.csv"
    whole = path.read_bytes()
    for keep in range(0, len(whole) + 1, 7):
        path.write_bytes(whole[:keep])
        CSVLog(path, LOG_COLUMNS, 5).file.close()
        kept = path.read_bytes().splitlines()
        complete = whole[:keep].rpartition(b"\n")[0].splitlines()
        assert kept[0].decode() == ",".join(LOG_COLUMNS) and kept[1:] == complete[1:7]  # steps 0 to 5


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_checkpoint_cannot_run_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Bomb()}, "ckpt.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    before = snapshot(tmp_path)
    for name in ("ckpt.pt", "plain.pt"):
        with pytest.raises(ConfigError, match="not ours"):
            load_checkpoint(tmp_path / name)
    assert snapshot(tmp_path) == before and not (tmp_path / "ran").exists()


def test_a_reader_that_goes_away_stops_a_run_as_a_signal_does(corpus, tmp_path):
    """`| head -1`. test_configurator.py has the other ways to lose a stream."""
    ours, theirs = os.pipe()
    command = [*faults.command(tmp_path / "run", corpus, 10**6), "--eval_interval=10", "--save_interval=1000000"]
    run = subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, text=True)
    os.close(theirs)
    while os.read(ours, 1) != b"\n":
        pass
    os.close(ours)
    error = run.communicate(timeout=600)[1]
    assert (run.returncode, error) == (128 + 13, "")
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] >= 1


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory\nand more"),
                                   RuntimeError("[enforce fail] can't allocate memory: you tried to allocate")])
def test_no_memory_is_one_line(settings, monkeypatch, capsys, error):
    def fail(*args):
        raise error
    monkeypatch.setattr(train, "make_model", fail)
    with pytest.raises(SystemExit) as stop:
        train.run(settings())
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and "out of memory. A smaller --micro_batch" in said


def test_a_model_larger_than_a_tensor_can_be_is_one_line(settings, capsys):
    with pytest.raises(SystemExit) as stop:
        train.run(settings(n_embd=2**31 - 4, n_head=1, dry_run=True))
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and "out of memory" in said


def test_ctrl_c_before_there_is_a_run_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(configurator.sys, "argv", ["/some/train.py"])
    configurator._ended(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "train.py: interrupted\n"


def test_a_terminal_that_hangs_up_is_a_signal_like_others(settings, monkeypatch):
    s, real = settings(), train.lr_at
    monkeypatch.setattr(train, "lr_at", lambda i, *a: (i == 2 and os.kill(os.getpid(), signal.SIGHUP), real(i, *a))[1])
    outer = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
    try:
        with pytest.raises(SystemExit) as stop:
            main(s)
    finally:
        signal.signal(signal.SIGHUP, outer)
    assert stop.value.code == 128 + signal.SIGHUP and load_checkpoint(Path(s.out_dir) / "ckpt.pt")["step"] == 3
