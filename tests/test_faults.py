"""Killed, starved of disk, left by its reader, fed with damaged files: a run loses nothing and says one line."""

import os
import pickle
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import torch
from conftest import ROOT, snapshot

import train
from configurator import ConfigError
from runs import CSVLog, load_checkpoint
from train import LOG_COLUMNS, main


def test_killed_runs_end_as_an_undisturbed_one(tmp_path):
    """The short form of `python tests/faults.py`."""
    done = faults.torment(tmp_path / "faults", kills=3, steps=60)
    assert done["kills"] == 3 and done["runs compared"] >= 1


def test_the_comparison_of_runs_can_fail(settings, tmp_path):
    a, b = settings(), settings(seed=2, out_dir=str(tmp_path / "b"))
    main(a)
    main(b)
    first, second = (faults.outcome(Path(s.out_dir)) for s in (a, b))
    assert faults.same(first, first) and not faults.same(first, second)
    first[0]["wte"] = first[0]["wte"].clone()
    first[0]["wte"][0, 0] += 1e-7
    assert not faults.same(first, faults.outcome(Path(a.out_dir)))


def limited(args, limit):
    """Run args where no file can grow past `limit` bytes, which a program meets as a full disk."""
    def limits():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run(args, capture_output=True, text=True, preexec_fn=limits)


@pytest.mark.parametrize("limit,file", [(200_000, "ckpt.pt"), (8_000, "")])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(corpus, tmp_path, limit, file):
    out = tmp_path / "run"
    subprocess.run(faults.command(out, corpus, 5), check=True, capture_output=True)
    before = (out / "ckpt.pt").read_bytes()
    run = limited(faults.command(out, corpus, 10) + ["--resume=True"], limit)
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and file in run.stderr, run.stderr
    assert (out / "ckpt.pt").read_bytes() == before and not (out / "ckpt.pt.tmp").exists()
    subprocess.run(faults.command(out, corpus, 10) + ["--resume=True"], check=True, capture_output=True)
    assert load_checkpoint(out / "ckpt.pt")["step"] == 10


def test_a_checkpoint_cut_anywhere_is_refused(settings):
    s = settings()
    main(s)
    path = Path(s.out_dir) / "ckpt.pt"
    whole = path.read_bytes()
    rng = random.Random(0)
    for keep in [0, 1, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(whole[:keep])
        with pytest.raises(ConfigError, match="cut off or not ours"):
            load_checkpoint(path)


def test_a_flipped_bit_anywhere_is_refused_or_without_effect(settings):
    s = settings()
    main(s)
    path = Path(s.out_dir) / "ckpt.pt"
    whole, expected = path.read_bytes(), faults.outcome(Path(s.out_dir))
    rng, refused = random.Random(0), 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            load_checkpoint(path)
        except ConfigError:
            refused += 1
        else:  # the bit was in padding or in one of the zip's unused fields
            assert faults.same(faults.outcome(Path(s.out_dir)), expected)
    assert refused > 20


def test_a_log_cut_anywhere_keeps_its_whole_rows(settings):
    s = settings()
    main(s)
    path = Path(s.out_dir) / "log.csv"
    whole = path.read_bytes()
    for keep in range(0, len(whole) + 1, 3):
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


# nobody reads any more

LONG = ["--max_steps=1000000", "--save_interval=1000000", "--eval_interval=10"]


@pytest.mark.parametrize("terminal, unbuffered", [(False, ""), (False, "1"), (True, "1")])
def test_a_reader_that_goes_away_stops_a_run_as_a_signal_does(corpus, tmp_path, terminal, unbuffered):
    """`| head -1`, and a terminal that is lost without a SIGHUP."""
    ours, theirs = os.openpty() if terminal else os.pipe()
    run = subprocess.Popen(faults.command(tmp_path / "run", corpus, 1) + LONG, stdout=theirs, start_new_session=True,
                           stderr=theirs if terminal else subprocess.PIPE, text=True,
                           env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    os.close(theirs)
    while os.read(ours, 1) != b"\n":  # a line, as head reads it; unbuffered, it comes in two pieces
        pass
    os.close(ours)
    error = run.communicate(timeout=300)[1]
    assert run.returncode == 128 + 13 and not (error or "").strip()
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] >= 1


@pytest.mark.parametrize("how", [">&- 2>&-", "<&- >&-"])
def test_a_stream_that_is_closed_from_the_start_is_no_reason_to_stop(corpus, tmp_path, how):
    command = faults.command(tmp_path / "run", corpus, 5)
    assert subprocess.run(["bash", "-c", f'exec "$@" {how}', "bash", *command]).returncode == 0
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 5


def test_an_export_to_a_full_disk_is_one_line_and_leaves_nothing(corpus, tmp_path):
    run = tmp_path / "run"
    subprocess.run(faults.command(run, corpus, 1), check=True, capture_output=True)
    before = snapshot(tmp_path)
    export = [sys.executable, str(faults.ROOT / "export.py"), str(run), "--to", "hf", "--out", str(tmp_path / "out")]
    said = limited(export, 20_000)
    assert said.returncode != 0 and said.stderr.count("\n") == 1 and str(tmp_path / "out") in said.stderr, said.stderr
    assert snapshot(tmp_path) == before


def small(corpus, tmp_path, *more, **env):
    return subprocess.run([*faults.command(tmp_path / "run", corpus, 5), *more], capture_output=True, text=True,
                          env={**os.environ, **env})


@pytest.mark.parametrize("env", [dict(RANK="0"), dict(WORLD_SIZE="2"), dict(RANK="abc", LOCAL_RANK="0", WORLD_SIZE="2",
                                                                            MASTER_ADDR="a", MASTER_PORT="1")], ids=str)
def test_half_of_torchruns_environment_is_one_line(corpus, tmp_path, env):
    run = small(corpus, tmp_path, **env)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "unset it" in run.stderr, run.stderr


def test_no_memory_is_one_line(corpus, tmp_path):
    run = small(corpus, tmp_path, f"--vocab_size={2**40}")
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "out of memory" in run.stderr, run.stderr


def test_ctrl_c_before_there_is_a_run_is_one_line(tmp_path):
    code = "import sys; sys.argv = ['train.py']; import configurator; configurator.streams(); raise KeyboardInterrupt"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode in (130, -signal.SIGINT) and run.stderr == "train.py: interrupted\n"


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
