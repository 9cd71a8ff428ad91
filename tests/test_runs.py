"""runs.py: a folder belongs to one run at a time, what is in it is replaced whole, and what is read is checked."""

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import snapshot

import runlog
import runs
import train
from configurator import ConfigError
from hf import take_shape
from runs import CSVLog, check_tensors, load_checkpoint, lock, run_folder, write_whole
from settings import Settings
from train import main

COLUMNS = ["step", "loss"]


# the lock

def test_one_run_at_a_time(settings, finished):
    with lock(finished):
        before = snapshot(finished)
        for change in (dict(resume=True), dict(overwrite=True)):
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .*: wait for it"):
                main(settings(**change))
        assert snapshot(finished) == before
    main(settings(overwrite=True))


def test_a_folder_is_checked_again_once_it_is_locked(settings, monkeypatch):
    """Another run may have begun and ended between the first look and the lock."""
    s, real = settings(), train.open_data

    def slow(*args):
        monkeypatch.setattr(train, "open_data", real)
        main(settings())
        return real(*args)
    monkeypatch.setattr(train, "open_data", slow)
    with pytest.raises(ConfigError, match="holds a run already"):
        main(s)


def test_training_works_on_a_file_system_without_locks(settings, monkeypatch):
    def refused(file, how):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(runs, "fcntl", types.SimpleNamespace(flock=refused, LOCK_EX=0, LOCK_NB=0))
    main(settings())
    monkeypatch.setattr(runs, "fcntl", None)  # as on Windows
    main(settings(overwrite=True))


# --overwrite=True

def test_overwrite_moves_the_old_run_and_starts_over(settings, finished, tmp_path, capsys):
    before = {path.name: content for path, content in snapshot(finished).items() if path.name != "train.lock"}
    (finished / "notes.txt").write_text("mine")
    for old in ("run.1", "run.2"):
        main(settings(overwrite=True, lr=0.01))
        assert f"{finished} held a run, which is now in {tmp_path / old}\n" in capsys.readouterr().out
    assert {path.name: content for path, content in snapshot(tmp_path / "run.1").items()} == before
    assert load_checkpoint(finished / "ckpt.pt")["settings"]["lr"] == 0.01
    main(settings(resume=True, lr=0.01, max_steps=10))
    assert (finished / "notes.txt").read_text() == "mine"


def test_overwrite_killed_between_two_files_loses_none_and_can_be_repeated(settings, finished, tmp_path, monkeypatch):
    before, rename, left = sorted(snapshot(finished).values()), os.rename, [2]

    def killed(*paths):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        rename(*paths)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "rename", killed)
        main(settings(overwrite=True))
    assert sorted(snapshot(tmp_path).values()) == before
    main(settings(overwrite=True))
    assert len(snapshot(tmp_path / "run.1")) == 2 and (tmp_path / "run.2" / "config.json").exists()


def test_out_dir_may_be_a_symlink(settings, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    main(settings())
    main(settings(overwrite=True, lr=0.01))
    assert (tmp_path / "run").is_symlink()
    assert load_checkpoint(tmp_path / "elsewhere" / "ckpt.pt")["settings"]["lr"] == 0.01


def test_a_failed_start_leaves_no_folder_of_its_own_and_the_users(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for mine, name in ((False, "new"), (True, "mine")):
        if mine:
            (tmp_path / name).mkdir()
        with pytest.raises(ConfigError, match="--wandb=x"):
            main(settings(out_dir=str(tmp_path / name), wandb="x"))
        assert (tmp_path / name).exists() == mine


# folders that cannot be

def test_symlinks_in_a_circle_are_refused(settings, tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "run")
    for name in ("run", "run/below"):
        with pytest.raises(ConfigError, match="out_dir .* cannot be used"):
            main(settings(out_dir=str(tmp_path / name)))


@pytest.mark.parametrize("mode", [0o000, 0o200, 0o500])
@pytest.mark.parametrize("name", ["closed", "closed/run", "closed/a/run"])
def test_a_folder_without_permission_is_named(settings, nobody, name, mode):
    (nobody / "closed").mkdir(mode=mode)
    s = settings(out_dir=str(nobody / name))
    runs.claim_out_dir(s)  # which looks, and does not write
    with pytest.raises(ConfigError, match=f"{nobody}/{name} cannot be used: Permission denied"), run_folder(s):
        pass
    (nobody / "closed").chmod(0o700)


def test_out_dir_need_not_be_utf8(settings, tmp_path, capsys):
    sys.stdout.reconfigure(errors="replace")  # as configurator.streams() does
    out_dir = os.fsdecode(os.fsencode(tmp_path) + b"/\xff run")
    main(settings(out_dir=out_dir))
    main(settings(out_dir=out_dir, resume=True, max_steps=10))
    assert load_checkpoint(Path(out_dir) / "ckpt.pt")["step"] == 10
    assert f"python plot.py '{tmp_path}/? run'\n" in capsys.readouterr().out  # a command for a shell


# the same command again

@pytest.mark.parametrize("kw", [dict(vocab_size=0), dict(vocab_size=0, init_from="START")], ids=str)
def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(settings, tmp_path, monkeypatch, kw):
    """Its config.json holds settings that were completed, and the command line holds them as they were typed."""
    if "init_from" in kw:  # whose shape is no default
        monkeypatch.setattr(train, "adopt", lambda s: take_shape(s, dict(n_embd=32, vocab_size=256), "") or (None, ""))
        monkeypatch.setattr(train, "read_tensors", lambda folder: {})
        kw = {**kw, "n_embd": Settings().n_embd}

    def killed(*args):
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(train, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            main(settings(resume="auto", **kw))
    assert (tmp_path / "run" / "config.json").exists()
    for max_steps in (8, 10):
        main(settings(resume="auto", **kw, max_steps=max_steps))
    assert load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 10
    assert {path.name for path in snapshot(tmp_path / "run.1")} == {"config.json", "log.csv", "scales.csv"}


# the commit

def git(folder, *args):
    subprocess.run(("git", "-c", "user.name=x", "-c", "user.email=x", *args), cwd=folder, check=True,
                   capture_output=True, env={k: v for k, v in os.environ.items() if not k.startswith("GIT_")})


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository that runs.py believes to be in, with one commit."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "runs.py").write_text("")
    git(tmp_path / "checkout", "init")
    git(tmp_path / "checkout", "add", "runs.py")
    git(tmp_path / "checkout", "commit", "-m", "first")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "checkout" / "runs.py"))
    return tmp_path / "checkout"


def test_the_commit_is_that_of_this_code(checkout, tmp_path, monkeypatch):
    commit = runs.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (tmp_path / "other").mkdir()
    git(tmp_path / "other", "init")
    git(tmp_path / "other", "commit", "--allow-empty", "-m", "another")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))  # as in a hook of that repository
    assert runs.git_commit() == commit
    (checkout / "runs.py").write_text("changed = True")
    assert runs.git_commit() == commit + " with changes"


def test_an_unknown_commit_says_why(checkout, tmp_path, monkeypatch):
    inner = checkout / "inner"  # the code, unpacked into another project's checkout
    inner.mkdir()
    (inner / "runs.py").write_text("")
    monkeypatch.setattr(runs, "__file__", str(inner / "runs.py"))
    assert re.match("unknown: .*did not match any file", runs.git_commit())
    (tmp_path / "git").write_text("#!/bin/sh\necho 'fatal: dubious ownership' >&2\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.git_commit() == "unknown: fatal: dubious ownership"
    monkeypatch.setattr(runs.subprocess, "run", lambda args, timeout, **kw: (_ for _ in ()).throw(
        subprocess.TimeoutExpired(args, timeout)))
    assert re.match("unknown: .*timed out after 10 seconds", runs.git_commit())


# logs

def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = CSVLog(tmp_path / "log.csv", COLUMNS, 0)
    log.file.close()
    log.file = open("/dev/full", "a")
    with pytest.raises(OSError, match="log.csv cannot be written: No space left"):
        log.write({"step": 1, "loss": 2.0})


def test_a_resumed_log_keeps_the_valid_rows_up_to_its_step(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"step,loss\n0,3\n1,{'9' * 200_000}\n\n2\n{'7' * 5000},1\n²,1\n2,\"\n3,1,1\n4,1\n2,cut")
    CSVLog(path, COLUMNS, 3).file.close()
    assert path.read_text() == f"step,loss\n0,3\n1,{'9' * 200_000}\n2,\"\n"


def test_a_log_with_other_columns_is_not_thrown_away(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("step,other\n1,2\n")
    with pytest.raises(ConfigError, match="log.csv has other columns"):
        CSVLog(path, COLUMNS, 1)
    assert path.read_text() == "step,other\n1,2\n"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("PytorchStreamWriter failed")])
def test_a_file_that_cannot_be_written_is_named_and_leaves_no_tmp(tmp_path, monkeypatch, error):
    write_whole(tmp_path / "a", "before")

    def full(fd):
        raise error
    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(OSError, match=f"{tmp_path}/a cannot be written: (No space|Pytorch)"):
        write_whole(tmp_path / "a", "after")
    assert snapshot(tmp_path) == {tmp_path / "a": b"before"}


# what is read

def test_tensors_are_checked_by_name_shape_and_dtype():
    wanted = {"a": torch.empty(2, 3, device="meta")}
    check_tensors({"a": torch.zeros(2, 3)}, wanted, "file")
    for found in ({}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3).double()},
                  {"a": [[0, 0, 0]] * 2}, {"a": torch.zeros(2, 3), "b": torch.zeros(1)}):
        with pytest.raises(ConfigError, match="^file: (a|b) is .*, and the run has"):
            check_tensors(found, wanted, "file")


def change(path, edit):
    ckpt = torch.load(path, weights_only=True)
    edit(ckpt)
    torch.save(ckpt, path)


def first(ckpt):
    return ckpt["optimizers"][0]["state"][0]


@pytest.mark.parametrize("edit, message", [
    (lambda c: first(c).update(exp_avg=torch.zeros(2)), "exp_avg of optimizer 0's parameter 0 is .2. in"),
    (lambda c: c["optimizers"][0]["state"].clear(), "parameter 0 is no tensor"),
    (lambda c: c["optimizers"].clear(), "parameter 0 is no tensor"),
    (lambda c: c["model"].update(wte=torch.zeros(3, 16)), r"wte is \[3, 16\] .*the run has \[256, 16\]"),
    (lambda c: c.update(rng=[]), "rng is no tensor"),
    (lambda c: c.update(model=[[[]]]), "not ours"),
    (lambda c: c.pop("step"), "not ours"),
    (lambda c: c.update(settings=[]), "not a run's"),
    (lambda c: c["settings"].update(n_layer=1e9), "n_layer must be an int"),
    (lambda c: c["settings"].update(n_layer=10 ** 9), "n_layer must be at most 10000"),
])
def test_a_checkpoint_is_checked_before_anything_is_made_of_it(settings, finished, edit, message):
    change(Path(settings().out_dir) / "ckpt.pt", edit)
    before = snapshot(settings().out_dir)
    with pytest.raises(ConfigError, match=f"ckpt.pt.*{message}"):
        main(settings(resume=True, max_steps=10))
    assert snapshot(settings().out_dir) == before


def test_a_resumed_run_reports_changed_code_and_both_commits_stay_in_config_json(settings, monkeypatch, capsys):
    monkeypatch.setattr(runlog, "git_commit", lambda: "first")
    main(settings())
    monkeypatch.setattr(runlog, "git_commit", lambda: "second")
    main(settings(resume=True, max_steps=10))
    assert "it was first, and is second" in capsys.readouterr().out
    main(settings(resume=True, max_steps=12))
    assert "has changed" not in capsys.readouterr().out
    config = json.loads(Path(settings().out_dir, "config.json").read_text())
    assert config["git_commit"] == "first"
    assert config["resumed"] == [{"step": step, "git_commit": "second"} for step in (8, 10)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
def test_a_resumed_run_unmaps_the_checkpoint_that_it_will_replace(settings, monkeypatch):
    """Mapped, what it trains would change with the file, and a disk would have to hold one checkpoint more."""
    main(settings())
    real, mapped = train.lr_at, []

    def lr_at(*args):
        mapped.append(str(Path(settings().out_dir) / "ckpt.pt") in Path("/proc/self/maps").read_text())
        return real(*args)
    monkeypatch.setattr(train, "lr_at", lr_at)
    main(settings(resume=True, max_steps=10))
    assert mapped == [False, False]


def test_only_the_master_makes_the_folder(settings):
    with run_folder(settings(), master=False) as out:
        assert not out.exists()
