"""runs.py: a folder belongs to one run at a time, what is in it is replaced whole, and what is read is checked."""

import json
import os
import types
from pathlib import Path

import pytest
import torch
from conftest import snapshot

import runs
import train
from configurator import ConfigError
from optim import expected_state
from runs import CSVLog, check_tensors, load_checkpoint, lock, run_folder, write_whole
from train import Diverged, main

COLUMNS = ["step", "loss"]


# the lock

@pytest.mark.parametrize("change", [dict(), dict(resume=True), dict(resume="auto"), dict(overwrite=True)], ids=str)
def test_one_run_at_a_time(settings, change):
    if change:
        main(settings())
    folder = Path(settings().out_dir)
    folder.mkdir(exist_ok=True)
    s = settings(max_steps=12, **change) if "resume" in change else settings(**change)
    with lock(folder):
        before = snapshot(folder)
        with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on .*: wait for it") as e:
            main(s)
        assert "\n" not in str(e.value) and snapshot(folder) == before
    main(s)


def test_a_folder_is_looked_at_again_once_it_is_locked(settings, monkeypatch):
    """Another run may have begun and ended between the first look and the lock."""
    s, real = settings(), train.open_data

    def slow(*args):
        monkeypatch.setattr(train, "open_data", real)
        main(settings())
        return real(*args)
    monkeypatch.setattr(train, "open_data", slow)
    with pytest.raises(ConfigError, match="holds this run already"):
        main(s)


def test_a_file_system_without_locks_is_no_reason_not_to_train(settings, monkeypatch):
    def refused(file, how):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(runs, "fcntl", types.SimpleNamespace(flock=refused, LOCK_EX=0, LOCK_NB=0))
    main(settings())
    monkeypatch.setattr(runs, "fcntl", None)  # Windows
    main(settings(resume=True, max_steps=9))


# --overwrite=True

def test_a_new_run_takes_the_place_of_an_old_one_with_its_first_checkpoint(settings, tmp_path, monkeypatch):
    main(settings())
    folder = Path(settings().out_dir)
    (folder / "notes.txt").write_text("mine")
    before = snapshot(folder)
    s, real, seen = settings(overwrite=True, lr=0.01, save_interval=6), train.lr_at, []

    def watched(step, *args):
        seen.append(snapshot(folder) == before)
        return real(step, *args)
    monkeypatch.setattr(train, "lr_at", watched)
    main(s)
    assert seen == [True] * 6 + [False] * 2
    assert load_checkpoint(folder / "ckpt.pt")["settings"]["lr"] == 0.01
    assert (folder / "notes.txt").read_text() == "mine" and len((folder / "log.csv").read_text().splitlines()) == 10
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # nothing hidden is left
    main(settings(resume=True, lr=0.01, max_steps=10))


def test_an_old_run_outlives_a_new_one_that_fails(settings, tmp_path, monkeypatch):
    main(settings())
    before = snapshot(tmp_path)
    real = train.lr_at
    monkeypatch.setattr(train, "lr_at", lambda i, *a: float("nan") if i == 2 else real(i, *a))
    with pytest.raises(Diverged, match=f"; {settings().out_dir} keeps"):
        main(settings(overwrite=True, lr=0.01))
    assert snapshot(tmp_path) == before


def test_a_link_is_followed(settings, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    main(settings())
    main(settings(overwrite=True, lr=0.01))
    assert (tmp_path / "run").is_symlink()
    assert load_checkpoint(tmp_path / "elsewhere" / "ckpt.pt")["settings"]["lr"] == 0.01


@pytest.mark.parametrize("calls", range(4))
def test_a_kill_while_a_run_takes_its_place_loses_nothing(settings, tmp_path, monkeypatch, calls):
    main(settings())
    folder = Path(settings().out_dir)
    for name in "ab":
        (folder / name).write_text(name)
    real, done = os.rename, []

    def until(*args):
        if len(done) == calls:
            raise KeyboardInterrupt  # as if there had been no time for anything more
        done.append(real(*args))
    with monkeypatch.context() as m:
        m.setattr(os, "rename", until)
        m.setattr(runs.shutil, "rmtree", lambda *args, **kw: None)
        with pytest.raises(KeyboardInterrupt):
            main(settings(overwrite=True, lr=0.01))
    with pytest.raises(ConfigError, match="holds a run with other settings" if calls < 1 else "holds this run already"):
        main(settings(lr=0.002 if calls < 0 else 0.01))
    assert load_checkpoint(folder / "ckpt.pt")["settings"]["lr"] == (0.01 if calls else 0.002)
    main(settings(overwrite=True, lr=0.02))
    assert [(folder / name).read_text() for name in "ab"] == ["a", "b"]
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


# logs

def test_a_log_that_cannot_be_written_is_named(tmp_path):
    log = CSVLog(tmp_path / "log.csv", COLUMNS, 0)
    log.file.close()
    log.file = open("/dev/full", "a")
    with pytest.raises(OSError, match="log.csv cannot be written: No space left"):
        log.write({"step": 1, "loss": 2.0})


def test_a_log_takes_whatever_is_in_the_file(tmp_path):
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


def test_on_windows_a_folder_cannot_be_opened(settings, monkeypatch):
    def refused(*args):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(runs, "os", types.SimpleNamespace(**{**vars(os), "name": "nt", "open": refused}))
    main(settings())


# what is read

def test_tensors_are_checked_by_name_shape_dtype_and_layout():
    wanted = {"a": torch.empty(2, 3, device="meta")}
    check_tensors({"a": torch.zeros(2, 3)}, wanted, "file")
    for found in ({}, {"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3).double()}, {"a": torch.zeros(2, 3).to_sparse()},
                  {"a": [[0, 0, 0]] * 2}, {"a": None}, {"a": torch.zeros(2, 3), "b": torch.zeros(1)}, {1: None}):
        with pytest.raises(ConfigError, match="^file: (a|b|1) is .*, and the run has") as e:
            check_tensors(found, wanted, "file")
        assert "\n" not in str(e.value)


def change(path, edit):
    ckpt = torch.load(path, weights_only=True)
    edit(ckpt)
    torch.save(ckpt, path)


def first(ckpt):
    return ckpt["optimizers"][0]["state"][0]


@pytest.mark.parametrize("edit, message", [
    (lambda c: first(c).update(exp_avg=torch.zeros(2)), "exp_avg of optimizer 0's parameter 0 is .2. in"),
    (lambda c: first(c).update(exp_avg=first(c)["exp_avg"].half()), "exp_avg of .* in torch.float16"),
    (lambda c: first(c).pop("exp_avg_sq"), "exp_avg_sq of .* is no tensor"),
    (lambda c: first(c).update(more=torch.zeros(1)), "more of .* and the run has no tensor"),
    (lambda c: c["optimizers"][0]["state"].clear(), "parameter 0 is no tensor"),
    (lambda c: c["optimizers"].clear(), "parameter 0 is no tensor"),
    (lambda c: c["model"].update(wte=torch.zeros(3, 16)), r"wte is \[3, 16\] .*the run has \[256, 16\]"),
    (lambda c: c["model"].pop("wte"), "wte is no tensor"),
    (lambda c: c["model"].update(wte=[[0.0] * 16] * 256), "wte is no tensor"),
    (lambda c: c.update(rng=torch.zeros(3)), "rng is "),
    (lambda c: c.update(rng=[]), "rng is no tensor"),
    (lambda c: c.update(model=[[[]]]), "not ours"),
    (lambda c: c.update(optimizers=[[]]), "not ours"),
    (lambda c: c.update(optimizers=[{"state": {0: []}}]), "not ours"),
    (lambda c: c.update(step="4"), "not ours"),
    (lambda c: c.update(settings=[]), "not a run's"),
    (lambda c: c["settings"].update(n_layer=1e9), "n_layer must be an int"),
    (lambda c: c["settings"].update(n_layer=10 ** 9), "n_layer must be between 1 and 10000"),
    (lambda c: c["settings"].update(n_layer=9999), "not ours"),
    (lambda c: c["settings"].update(lr=[[]]), "lr must be a float"),
])
def test_a_checkpoint_is_checked_before_anything_is_made_of_it(settings, edit, message, monkeypatch):
    main(settings())
    change(Path(settings().out_dir) / "ckpt.pt", edit)
    before = snapshot(settings().out_dir)
    with pytest.raises(ConfigError, match=message) as e:
        main(settings(resume=True, max_steps=10))
    assert "\n" not in str(e.value) and "ckpt.pt" in str(e.value) and snapshot(settings().out_dir) == before


def test_hyperparameters_are_the_settings_not_the_files(settings):
    """A checkpoint cannot make AdamW maximise."""
    main(settings())
    reference = settings(max_steps=10)
    path = Path(reference.out_dir) / "ckpt.pt"
    content = path.read_bytes()
    losses = []
    for edit in (lambda c: None, lambda c: c["optimizers"][0]["param_groups"][0].update(maximize=True, eps=1.0)):
        path.write_bytes(content)
        change(path, edit)
        main(settings(resume=True, max_steps=10))
        losses.append(load_checkpoint(path)["model"]["wte"].clone())  # not a view of the file, which changes
    assert torch.equal(*losses)


@pytest.mark.parametrize("kw", [dict(), dict(optimizer="muon"), dict(optimizer="muon", n_experts=2)], ids=str)
def test_expected_state_is_what_a_step_leaves(settings, kw):
    s = settings(**kw)
    main(s)
    _, optimizers = train.make_model(s, train.gpt_config(s), torch.device("cpu"), False)
    for saved, optimizer in zip(load_checkpoint(Path(s.out_dir) / "ckpt.pt")["optimizers"], optimizers, strict=True):
        wanted = expected_state(optimizer)
        assert saved["state"].keys() == wanted.keys()
        for i in wanted:
            check_tensors(saved["state"][i], wanted[i], "")


def test_settings_of_a_damaged_config_json_are_refused(settings):
    main(settings())
    path = Path(settings().out_dir) / "config.json"
    whole = json.loads(path.read_text())
    for there, message in (([], "not a run's"), ({"n_layer": 1e9}, "config.json: n_layer must be an int"),
                           ({"lr": None}, "config.json: lr must be a float")):
        path.write_text(json.dumps({**whole, "settings": there}))
        with pytest.raises(ConfigError, match=message):
            main(settings())


def test_a_resumed_run_says_what_is_not_as_it_was(settings, monkeypatch, capsys):
    """Other code, or a log that is gone: both commits stay in config.json."""
    monkeypatch.setattr(train, "git_commit", lambda: "first")
    main(settings())
    folder = Path(settings().out_dir)
    monkeypatch.setattr(train, "git_commit", lambda: "second")
    (folder / "log.csv").unlink()
    capsys.readouterr()
    main(settings(resume=True, max_steps=10))
    said = capsys.readouterr().out
    assert "log.csv of the first 8 steps are missing" in said and "it was first, and is second" in said
    main(settings(resume=True, max_steps=12))
    assert "has changed" not in capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert config["git_commit"] == "first"
    assert config["resumed"] == [{"step": step, "git_commit": "second"} for step in (8, 10)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux lists what is mapped")
@pytest.mark.parametrize("kw", [dict(), dict(optimizer="muon")], ids=str)
def test_a_resumed_run_lets_go_of_the_file_that_it_will_replace(settings, monkeypatch, kw):
    """Mapped, what it trains would change with the file, and a disk would have to hold one checkpoint more."""
    main(settings(**kw))
    real, mapped = train.lr_at, []

    def lr_at(*args):
        mapped.append(str(Path(settings().out_dir) / "ckpt.pt") in Path("/proc/self/maps").read_text())
        return real(*args)
    monkeypatch.setattr(train, "lr_at", lr_at)
    main(settings(resume=True, max_steps=10, **kw))
    assert mapped == [False, False]


def test_a_run_folder_is_the_masters(settings):
    with run_folder(settings(), master=False) as out:
        assert not out.exists()
