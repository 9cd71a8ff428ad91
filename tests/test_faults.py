"""A kill, a full disk, a closed stdout, a damaged file: a run loses nothing and prints one line."""

import os
import pickle
import random
import resource
import signal
from pathlib import Path

import faults
import pytest
import torch
from conftest import reader_that_left, snapshot

import configurator
import train
from configurator import ConfigError
from runs import load_checkpoint
from train import main


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(tmp_path):
    """The short form of `python tests/faults.py`."""
    done = faults.torment(tmp_path / "faults", kills=2, steps=20)
    assert done["kills"] == 2 and done["runs compared"] >= 1


def test_the_comparison_of_runs_can_fail(finished):
    first, second = (faults.outcome(finished) for _ in range(2))
    assert faults.same(first, second)
    second[0]["wte"] = second[0]["wte"].clone()
    second[0]["wte"][0, 0] += 1e-7
    assert not faults.same(first, second)


@pytest.mark.parametrize("limit, file", [(20_000, "ckpt.pt"), (500, "config.json")])
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
    assert stop.value.code == 1 and error.count("\n") == 1, error
    assert f"{file} cannot be written: " in error and "ckpt.pt is kept: fix that" in error, error
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


@pytest.mark.parametrize("pair", [os.pipe, os.openpty])
def test_a_closed_stdout_stops_a_run_as_a_signal_does(settings, printing_to, pair):
    """`| head`, or a terminal whose window is closed. test_configurator.py has the other ways to lose a stream."""
    printing_to(reader_that_left(pair))
    with pytest.raises(SystemExit) as stop:
        main(settings())
    assert stop.value.code == 128 + signal.SIGPIPE
    assert load_checkpoint(Path(settings().out_dir) / "ckpt.pt")["step"] == 1


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory\nand more"),
                                   RuntimeError("[enforce fail] can't allocate memory: you tried to allocate")])
def test_out_of_memory_is_one_line(settings, monkeypatch, capsys, error):
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
