"""train.py: the same run twice, stopped, resumed, refused; what it prints and leaves."""

import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, UNIFIED, checkpoint, read_log, snapshot, write_bin

import runlog
import train
from configurator import ConfigError, configure
from data.tokens import load_tokenizer, write_meta
from norms import ScaleVector
from settings import Settings, batch_plan
from train import Diverged, main


def log(s, column="train_loss"):
    return {int(row["step"]): row[column] for row in read_log(s.out_dir) if row[column]}


def weights(s):
    return checkpoint(s)["model"]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_at(monkeypatch, step, *signals):
    """Let signals arrive while step + 1 is being computed."""
    real = train.lr_at

    def lr_at(i, *args):
        for sig in signals if i == step else ():
            os.kill(os.getpid(), sig)
        return real(i, *args)
    monkeypatch.setattr(train, "lr_at", lr_at)
    monkeypatch.setattr(signal, "getsignal", lambda sig: None)  # under nohup or in the background some are ignored


# what a run leaves and prints

def test_a_run_learns_and_leaves_what_the_readme_says(settings, capsys):
    s = settings(max_steps=60, lr=1e-2, sample_tokens=20, **UNIFIED)
    main(s)
    losses = log(s)
    assert list(losses) == list(range(1, 61)) and list(log(s, "val_loss")) == list(range(0, 61, 4))
    assert float(losses[1]) > 5.4 and float(losses[60]) < 3.6  # ln 256 = 5.55
    out, err = capsys.readouterr()
    assert "a sample:" in out and err == ""  # no bar in a pipe
    printed = dict(line.split(": ", 1) for line in out.splitlines() if re.match(r"\w+: ", line))
    assert set(printed) >= {"val_loss", "val_bpb", "steps", "tokens", "tokens_per_second", "peak_memory_mb", "params",
                            "active_params", "scale_params", "out_dir"}
    assert printed["steps"] == "60" and printed["tokens"] == str(60 * 64)
    assert float(printed["val_bpb"]) == pytest.approx(float(printed["val_loss"]) / math.log(2), rel=0.01)
    config = json.loads((Path(s.out_dir) / "config.json").read_text())
    assert config["device"].endswith(f", {os.cpu_count()} cores")
    assert config["settings"]["heterogeneous"] is True and config["versions"]["torch"] == torch.__version__
    assert not list(Path(s.out_dir).glob("*.tmp"))


@pytest.mark.parametrize("reparam", ["direct", "or"])
def test_scales_csv_holds_every_effective_gamma(settings, reparam):
    s = settings(lr=0.03, arch="gemma", reparam=reparam)
    main(s)
    rows = read_log(s.out_dir, "scales.csv")
    model = train.GPT(train.gpt_config(s))
    names = {n for n, m in model.named_modules() if isinstance(m, ScaleVector)}
    assert {r["step"] for r in rows} == {"0", "4", "8"} and {r["name"] for r in rows} == names
    assert all(float(r["mean"]) == pytest.approx(1, abs=1e-6) and float(r["cosine"]) == pytest.approx(1, abs=1e-6)
               for r in rows if r["step"] == "0")
    model.load_state_dict(weights(s))
    for row in rows:
        if row["step"] == "8":
            g = model.get_submodule(row["name"])().detach().double()
            assert float(row["std"]) == pytest.approx(g.std(correction=0).item(), rel=1e-6) and float(row["std"]) > 0
            assert float(row["norm"]) == pytest.approx(g.norm().item(), rel=1e-6)
            cosine = torch.nn.functional.cosine_similarity(g, torch.ones_like(g), dim=0).item()
            assert float(row["cosine"]) == pytest.approx(cosine, abs=1e-8) and cosine < 1 - 1e-6


# the same numbers, however a run goes

@pytest.mark.parametrize("kw", [UNIFIED, dict(optimizer="muon", schedule="wsd", arch="gemma")], ids=str)
def test_stopped_and_resumed_and_evaluated_often_are_bit_for_bit_the_same(settings, tmp_path, monkeypatch, capsys, kw):
    reference = settings(**kw)
    main(reference)
    again = settings(out_dir=str(tmp_path / "again"), eval_interval=1, save_interval=3, **kw)
    main(again)
    assert log(again) == log(reference) and equal(weights(again), weights(reference))

    resumed = settings(out_dir=str(tmp_path / "resumed"), **kw)
    for step, sig in ((0, signal.SIGTERM), (4, signal.SIGHUP)):
        with monkeypatch.context() as m:
            stop_at(m, step, sig)
            with pytest.raises(SystemExit) as stop:
                main(resumed)
        assert stop.value.code == 128 + sig
        assert checkpoint(resumed)["step"] == step + 1
        resumed.resume = True
    main(resumed)
    finished = snapshot(resumed.out_dir)
    main(resumed)
    assert "is finished: step 8 of 8" in capsys.readouterr().out and snapshot(resumed.out_dir) == finished
    assert log(resumed) == log(reference) and log(resumed, "val_loss") == log(reference, "val_loss")
    assert equal(weights(resumed), weights(reference))
    scales = [(Path(s.out_dir) / "scales.csv").read_text() for s in (resumed, reference)]
    assert scales[0] == scales[1]


def test_a_step_is_waited_for_when_the_next_one_is_under_way(settings, monkeypatch, capsys):
    done, update, finish = [], train.update, train.finish
    monkeypatch.setattr(train, "update", lambda *args: done.append("update") or update(*args))
    monkeypatch.setattr(train, "finish", lambda step, *args: done.append(step) or finish(step, *args))
    s = settings(max_steps=10, log_interval=5, eval_interval=10, save_interval=10)
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        stop_at(m, 5, signal.SIGTERM)
        main(s)
    u = "update"
    assert done == [u, u, 0, u, 1, u, 2, u, 3, 4, u, u, 5, 6]
    assert "stopped by a signal at step 7" in capsys.readouterr().out
    s.resume = True
    main(s)
    often = settings(max_steps=10, out_dir=s.out_dir + "-often")
    main(often)
    assert log(s) == {step: log(often)[step] for step in (5, 7, 10)} and equal(weights(s), weights(often))
    assert list(log(s, "step")) == [0, 5, 7, 10]


def test_stop_at_ends_a_run_in_the_middle_of_its_schedule(settings, tmp_path, capsys):
    whole, parts = settings(schedule="wsd"), settings(schedule="wsd", out_dir=str(tmp_path / "parts"))
    main(whole)
    parts.stop_at = 3
    main(parts)
    assert "stopped by --stop_at at step 3" in capsys.readouterr().out
    assert checkpoint(parts)["step"] == 3
    parts.resume = True
    main(parts)
    assert "is at step 3 already, and --stop_at is 3" in capsys.readouterr().out
    parts.stop_at = 0
    main(parts)
    assert log(parts) == log(whole) and log(parts, "lr") == log(whole, "lr") and equal(weights(parts), weights(whole))


def test_wandb_gets_the_rows_of_the_log(settings, monkeypatch):
    """With a stub: the package itself is a large one. In its offline mode it was tried by hand."""
    started, rows, finished = [], {}, []
    run = SimpleNamespace(log=lambda row, step: rows.update({step: row}), finish=lambda: finished.append(1))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **kw: started.append(kw) or run))
    main(settings(wandb="gammas"))
    assert started[0]["project"] == "gammas" and started[0]["config"]["n_embd"] == 16 and finished
    assert {step: row["train_loss"] for step, row in rows.items() if step} == {
        step: float(loss) for step, loss in log(settings()).items()}
    assert set(rows[4]) == set(runlog.LOG_COLUMNS)


@pytest.mark.parametrize("router, said", [("softmax", True), ("sigmoid", True), ("softmax_all", False)])
def test_a_router_that_the_loss_cannot_train_is_reported(settings, capsys, router, said):
    """With one expert per token its weight is 1, whatever the logits are."""
    s = settings(n_experts=4, expert_dim=8, experts_per_token=1, router=router, router_aux=0.0, router_z=0.0,
                 max_steps=1)
    main(s)
    assert ("With one expert per token" in capsys.readouterr().out) == said
    model, tokens = train.GPT(train.gpt_config(s)), torch.randint(256, (4, 16))
    model(tokens, tokens)[1].backward()
    gradients = [p.grad.abs().max() for name, p in model.named_parameters() if "router.weight" in name]
    assert (max(gradients) < 1e-7) == said


def test_ctrl_c_saves_and_a_second_one_stops_at_once(settings, monkeypatch, capsys):
    s, before = settings(max_steps=50), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stop:
        stop_at(m, 2, signal.SIGINT)
        main(s)
    assert stop.value.code == 130 and "at step 3" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before  # a caller gets its own handlers back
    s.resume = True
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        stop_at(m, 5, signal.SIGINT, signal.SIGINT)
        main(s)
    assert checkpoint(s)["step"] == 4  # what save_interval had left


# evaluation

def test_evaluation_covers_the_whole_validation_split(settings, tmp_path, monkeypatch):
    """The halves of this split differ, and so would the loss of either; here a target's loss is the target itself."""
    write_bin(tmp_path / "val.bin", np.repeat([10, 30], 6400))
    s = settings(vocab_size=256, micro_batch=3)
    data = train.Tokens(tmp_path, "val", s.block_size, s.vocab_size)
    monkeypatch.setattr(train.dist, "all_reduce", lambda total: None)  # of two processes each returns its own part

    def model(x, y):  # a token's logits are ±3
        return x[..., None] % 2 + torch.tensor([-3.0, 3.0]).repeat(500), y.double().mean()

    def loss(rank, world):
        loss, logit_std = train.evaluate(model, data, s, torch.device("cpu"), rank, world)
        assert logit_std == pytest.approx(3, rel=1e-2) if rank == 0 else math.isnan(logit_std)
        return loss
    for s.eval_tokens in (0, 8 * s.block_size, 100 * s.block_size):
        assert loss(0, 1) == pytest.approx(20, abs=0.1)
        assert loss(0, 2) + loss(1, 2) == pytest.approx(loss(0, 1), abs=1e-9)


def test_bits_per_byte_are_those_of_the_tokens_that_were_evaluated(settings, corpus, tmp_path, capsys):
    """The second half of these validation tokens are separators, which are not text."""
    text = np.tile(np.arange(97, 105), 100)
    write_bin(tmp_path / "train.bin", text)
    write_bin(tmp_path / "val.bin", np.concatenate([text, 0 * text]))
    write_meta(tmp_path, load_tokenizer("bytes"))
    # all are 99 windows of 16, the first token is not a target, and the middle window is half text but for one byte
    for eval_tokens, bytes_per_token in ((1, 15 / 16), (0, 799 / 1584)):
        out_dir = str(tmp_path / str(eval_tokens))
        main(settings(dataset=str(tmp_path), eval_tokens=eval_tokens, max_steps=2, out_dir=out_dir))
        printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if ": " in line)
        expected = float(printed["val_loss"]) / math.log(2) / bytes_per_token
        assert float(printed["val_bpb"]) == pytest.approx(expected, abs=2e-4)


def test_shards_without_a_meta_json_need_no_tokenizer(settings, corpus, tmp_path, capsys):
    """Their tokenizer is taken for GPT-2's if the vocabulary is large enough, and is unknown otherwise."""
    for name in ("train.bin", "val.bin"):
        shutil.copy(corpus / name, tmp_path)
    s = settings(dataset=str(tmp_path), vocab_size=256, sample_tokens=5)
    main(s)
    printed = capsys.readouterr().out
    assert "val_loss: " in printed and "val_bpb" not in printed
    assert checkpoint(s)["tokenizer"] is None


# faults

@pytest.mark.parametrize("log_interval, save_interval, saved", [(1, 1, 4), (50, 3, 3)])
def test_a_nan_in_one_gradient_is_never_saved(settings, monkeypatch, log_interval, save_interval, saved):
    s = settings(max_steps=20, eval_interval=20, log_interval=log_interval, save_interval=save_interval)
    real = torch.nn.utils.clip_grad_norm_
    calls = []

    def poisoned(parameters, *args):
        parameters = list(parameters)
        calls.append(1)
        if len(calls) == 5:
            parameters[3].grad.view(-1)[0] = math.nan
        return real(parameters, *args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", poisoned)
    with pytest.raises(Diverged, match="step 4: loss .*, gradient norm nan. Try a lower --lr"):
        main(s)
    assert checkpoint(s)["step"] == saved


def test_an_update_after_which_the_model_has_no_loss_is_neither_saved_nor_a_result(settings):
    s = settings(max_steps=2, eval_interval=2, save_interval=1, schedule="constant", warmup_steps=0, lr=1e38,
                 weight_decay=10.0)
    with pytest.raises(Diverged, match="step .: loss "):
        main(s)
    s = settings(max_steps=1, eval_interval=1, schedule="constant", warmup_steps=0, lr=1e38, weight_decay=10.0,
                 overwrite=True)
    with pytest.raises(Diverged, match="step 1: loss nan on the validation split. Try a lower --lr"):
        main(s)
    assert not Path(s.out_dir, "ckpt.pt").exists()


@pytest.mark.parametrize("change,message", [
    (dict(), "holds a run already: go on with --resume=True"),
    (dict(resume=True, lr=0.5, max_steps=20), r"has other settings: lr 0.006 \(here 0.5\)"),
])
def test_a_folder_with_a_run_is_not_touched(settings, finished, change, message):
    before = snapshot(settings().out_dir)
    with pytest.raises(ConfigError, match=message):
        main(settings(**change))
    assert snapshot(settings().out_dir) == before


def test_a_run_older_than_a_setting_resumes_with_its_default(settings, finished):
    s = settings()
    path = Path(s.out_dir) / "ckpt.pt"
    ckpt = torch.load(path, weights_only=True)
    del ckpt["settings"]["qkv_norm"]
    torch.save(ckpt, path)
    s.resume, s.max_steps = True, 10
    main(s)
    s.qkv_norm, s.max_steps = "full", 12
    with pytest.raises(ConfigError, match="qkv_norm 'head' .here 'full'."):
        main(s)


def test_a_run_that_fails_before_its_first_file_leaves_everything_as_it_was(settings, monkeypatch, tmp_path):
    def fail(*args):
        raise ConfigError("weights of another model")

    def fails(**kw):
        before = snapshot(tmp_path)
        with monkeypatch.context() as m, pytest.raises(ConfigError, match="another model"):
            m.setattr(train, "make_model", fail)
            main(settings(**kw))
        assert {path: held for path, held in snapshot(tmp_path).items() if path.name != "train.lock"} == before
    fails()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    fails()
    main(settings())
    (tmp_path / "run" / "train.lock").unlink()
    fails(overwrite=True)


def test_foreign_folders_are_not_touched(settings, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log.csv").write_text("mine")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    before = snapshot(tmp_path)
    for name, message in (("file", "used: File exists"), ("a", "without a config.json"), ("b", "is not a run's")):
        with pytest.raises(ConfigError, match=message):
            main(settings(out_dir=str(tmp_path / name)))
    assert snapshot(tmp_path) == before


def test_a_tilde_in_out_dir_is_the_home_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    main(settings(out_dir="~/run", max_steps=1))
    assert (tmp_path / "run" / "ckpt.pt").exists() and not (tmp_path / "~").exists()


def test_other_data_is_refused_on_resume(settings, corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "data")
    s = settings(dataset=str(folder))
    main(s)
    s.resume, s.max_steps = True, 12
    write_bin(folder / "train.bin", np.arange(200))
    with pytest.raises(ConfigError, match="its content differs"):
        main(s)
    shutil.copy(corpus / "train.bin", folder)
    main(s)


@pytest.mark.parametrize("kw,message", [
    (dict(n_embd=15), "n_embd 15 is not divisible by n_head 2"),
    (dict(batch_tokens=65), "batch_tokens 65 is not divisible by block_size 16"),
    (dict(batch_tokens=96), "micro_batch 4 does not divide"),
    (dict(block_size=10**6, batch_tokens=10**6), "block_size"),
    (dict(vocab_size=255), "--vocab_size=256"),
    (dict(dataset="nowhere"), "nowhere.*make them with"),
    (dict(dataset="./no such/folder"), "no train tokens.* --out 'no such/folder'"),
    (dict(device="gpu"), "device must be auto"),
    (dict(device="cuda:77"), "cannot be used here"),
    (dict(device="mps:77"), "cannot be used here: .{,150}$"),
    (dict(wandb="gammas"), "--wandb=gammas: .*wandb"),  # which is not installed
])
def test_impossible_settings_are_refused_before_anything_is_written(settings, kw, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    s = settings(**kw)
    with pytest.raises(SystemExit) as stop:
        train.run(s)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.search(message, error) and error.count("\n") == 1
    assert not Path(s.out_dir).exists()


# the command line

def test_batch_plan(settings):
    plan = lambda world, **kw: batch_plan(settings(**kw), world)
    assert plan(1) == (4, 4, 1) and plan(2) == (2, 2, 1) and plan(1, micro_batch=2) == (4, 2, 2)
    with pytest.raises(ConfigError, match="not divisible by block_size 16 times 3 processes"):
        plan(3)


CONFIGS = sorted((ROOT / "config").rglob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_dry_runs(path, capsys):
    s, files = configure(Settings, [str(path), "--dry_run=True"])
    main(s, files)
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert int(printed["scale_params"]) == 0 if path.stem == "no_scale" else int(printed["scale_params"]) > 0
    if path.parent.name == "size" and path.stem[-1] == "b" and path.stem[-2].isdigit():
        # the paper's steps: about 100 tokens per active parameter
        assert s.max_steps * s.batch_tokens / int(printed["active_params"]) == pytest.approx(100, rel=0.2)
        size = re.search(r"_([\d.]+)b", path.stem).group(1)
        assert int(printed["params"]) / 1e9 == pytest.approx(float(size), rel=0.1)


def test_a_dry_run_ignores_the_run_in_its_folder(settings, finished, capsys):
    before = log(settings())
    main(settings(dry_run=True))
    assert "scale_params: " in capsys.readouterr().out and log(settings()) == before


def test_no_two_config_files_are_the_same_but_quickstart_and_baseline_which_are_the_defaults():
    seen = {}
    for path in CONFIGS:
        seen.setdefault(str(configure(Settings, [str(path)])[0]), []).append(path.stem)
    assert {key: sorted(names) for key, names in seen.items() if len(names) > 1} == {
        str(Settings()): ["baseline", "quickstart"]}
