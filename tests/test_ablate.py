"""ablate.py: which cells there are, which rate is chosen, and that no cell is lost, mixed up or run twice."""

import ast
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import ablate
import runs
from configurator import ConfigError
from data.tokens import load_tokenizer, write_bin, write_meta
from suites import SUITES

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_tokens=64", "--eval_tokens=256",
        "--warmup_steps=2", "--eval_interval=50", "--log_interval=10", "--save_interval=20", "--ffn_dim=40"]
ONE, BOTH = str(ROOT / "config/unified.py"), f"{ROOT / 'config/baseline.py'},{ROOT / 'config/unified.py'}"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Flags of a tiny cell, in a folder where out/ may be written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 4000), ("val", 600)):
        write_bin(folder / f"{split}.bin", [rng.integers(1, 60, n).astype(np.uint16)])
    write_meta(folder, load_tokenizer("bytes"))
    return [*TINY, f"--dataset={folder}"]


def folders(*args):
    return {cell.folder for cell in ablate.Suite(args).plan()[0]}


# ---------------------------------------------------------------------------------------------------------------
# cells


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_their_references(name, tiny):
    suite = ablate.Suite([name, *(["--sizes=1,2,1@100"] if name in ablate.SIZES else []),
                          *(flag for flag in tiny if name not in ablate.SIZES or "n_" not in flag)])
    arms = [cell.arm for cell in suite.arms.values()]
    assert {name for arm in arms for name in (arm.reference, arm.rate)} - {None, ""} <= suite.arms.keys()
    assert len(suite.plan()[0]) == 3 * len(SUITES[name]) * (3 if name in ablate.SIZES else 1)  # no name twice


def test_equal_settings_are_one_cell_in_every_suite(tiny):
    cells = {cell.arm.name: cell.folder for cell in ablate.Suite(["figure5", "--seeds=1", *tiny]).plan()[0]}
    assert len(set(cells.values())) == len(cells) == 12
    assert folders("primary", "--seeds=1", *tiny) == {cells["baseline"], cells["HG+DNP+OR+IWD"]}


def test_other_data_or_settings_are_other_cells(tiny, tmp_path):
    here = folders("primary", *tiny)
    assert here == folders("primary", *tiny, "--sample_tokens=9") and not here & folders("primary", *tiny, "--beta2=.9")
    shutil.copytree("corpus", "moved")
    assert here == folders("primary", *tiny[:-1], f"--dataset={tmp_path}/moved")
    write_bin("corpus/val.bin", [np.ones(600, np.uint16)])
    assert not here & folders("primary", *tiny)


def test_another_dtype_is_another_cell_whether_a_flag_or_the_machine_chose_it(tiny, monkeypatch):
    here, flag = folders("primary", *tiny), folders("primary", *tiny, "--dtype=bfloat16")
    monkeypatch.setattr(ablate, "pick_device", lambda s: SimpleNamespace(dtype="bfloat16"))
    assert folders("primary", *tiny) == flag and not flag & here


def test_initial_weights_count_by_content_and_with_their_shape(tiny, monkeypatch):
    monkeypatch.setattr(ablate, "adopt", lambda s: setattr(s, "n_layer", 2))  # what hf.py does with the folder's shape
    for name in ("a", "b"):
        Path(name).mkdir()
        Path(name, "model.safetensors").write_text("weights")
    args = [ONE, "--seeds=1", *tiny[1:]]
    same = folders(*args, "--init_from=a")
    assert "/2x16-" in str(*same) and folders(*args, "--init_from=b") == same
    Path("b/model.safetensors").write_text("others")
    assert folders(*args, "--init_from=b") != same


def test_other_code_makes_other_cells_and_other_comments_do_not(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    for name in runs.CODE:
        (tmp_path / name).write_text('"""Words."""\n\nx = "not # a remark"\n')
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    hashes = [ablate.code_hash()]
    for name in runs.CODE:
        (tmp_path / name).write_text('"""Other\nwords."""\n# a remark\nx = "not # a remark"  # another\n')
        assert ablate.code_hash() == hashes[-1]
        (tmp_path / name).write_text('x = "not # another"\n')
        hashes.append(ablate.code_hash())
    for text in ("x = (\n", "def f():\nx = 1\n", 'x = """\n'):  # half edited
        (tmp_path / "train.py").write_text(text)
        hashes.append(ablate.code_hash())
    assert len(set(hashes)) == len(runs.CODE) + 4


def test_every_file_that_a_run_imports_is_hashed_or_cannot_change_a_loss():
    # settings are in a cell's name themselves; hf.py counts with init_from; the others decide where and what is written
    no_loss = {"configurator.py", "settings.py", "devices.py", "runs.py", "runlog.py", "hf.py"}
    todo, found = ["train.py"], set()
    while todo:
        found.add(name := todo.pop())
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [
                a.name for a in node.names] if isinstance(node, ast.Import) else []
            files = {module.replace(".", "/") + ".py" for module in modules}
            todo += [f for f in files - found if (ROOT / f).exists() and not f.endswith("prepare.py")]
    assert found - no_loss == set(runs.CODE)


def test_sizes_count_tokens_by_the_baselines_active_parameters(tiny):
    flags = ["--tokens_per_param=3", "--seeds=1", *(f for f in tiny if "n_" not in f), "--warmup_steps=200"]
    for suite in ("figure6", "figure7"):
        arms = ablate.Suite([suite, "--sizes=1,2,1@5", *flags]).arms
        assert list(arms)[-2:] == [f"{name} at 1x32, 5 tokens per parameter" for name in ("baseline", "unified")]
        for arm, cell in arms.items():
            counts = ablate.meta_model(arms[f"baseline at {arm.split(' at ')[1]}"].settings).counts()
            steps = (5 if "," in arm else 3) * counts["active_params"] // 64
            assert (cell.settings.max_steps, cell.settings.warmup_steps) == (steps, min(200, steps // 10))
    assert (cell.settings.n_experts, cell.settings.expert_dim, cell.settings.shared_dim) == (32, 21, 85)
    data = next(f for f in tiny if f.startswith("--dataset"))  # in place of the lab's
    Path("lab.py").write_text((ROOT / "config/size/lab.py").read_text().replace('dataset = "pysrc"', ""))
    assert folders("figure6", "lab.py", data, "--sizes=lab.py") == folders("primary", "lab.py", data)  # run only once


def test_longer_runs_take_the_rate_of_the_arm_they_name(tiny):
    suite = ablate.Suite(["figure1", "--tune=reference", "--max_steps=10", *tiny])
    assert {name: (cell.settings.max_steps, cell.tuned_as) for name, cell in suite.arms.items()} == {
        "baseline": (10, "baseline"), "no scale, baseline's rate": (10, "baseline"),
        "no scale, own rate": (10, "no scale, own rate"), "no scale, baseline's rate, 1.4x steps": (14, "baseline"),
        "no scale, own rate, 1.2x steps": (12, "no scale, own rate")}


@pytest.mark.parametrize("args, message", [
    ([], "name a suite first"), (["primry"], "there is no suite 'primry'"), (["primary", "--seeds=a"], "--seeds takes"),
    (["primary", "--lrs=-1"], "at least 0"), (["primary", "--seed=2"], "it takes --seeds, --lrs and --out"),
    (["primary", "--jobs=0"], "jobs must be at least 1"), (["primary", "--n_head=3"], "not divisible by n_head"),
    (["primary", "--batch_tokens=33"], "not divisible by block_size"), (["a/x.py,b/x.py"], "of different names"),
    (["primary", "--lrs=1,2,3", "--seeds=1,101"], "share a seed"), (["figure6", "--sizes=1@²"], "as in 2@100"),
    (["figure6", "--sizes=²"], "there is no such file"), (["figure6", "--sizes=1@0"], "as in 2@100"),
    (["figure6", "--sizes=1,1"], "each size once"),
    (["primary", "--sizes=1"], "are for figure6 and figure7"),
    (["primary", "--tokens_per_param=100"], "are for figure6 and figure7"),
    (["primary", "--lrs=1e-3,2e-3"], "takes one rate, or three and more"),
    (["primary", "--device=cuda:99"], "cannot be used here"), (["primary", "--max_step=3"], "Did you mean 'max_steps'"),
    (["primary", "--reparam=or"], "cannot hold for every cell: baseline has reparam 'direct'"),
    ([ONE, "--reparam=direct"], "Leave it out, or compare strategy files without it"),
    (["figure6", "--sizes=1"], "--n_embd=16 cannot hold for every cell: baseline at 1x32 has n_embd 32"),
    (["primary", "--init_from=nowhere"], "nowhere")])
def test_mistakes_are_refused_before_anything_runs(args, message, tiny):
    with pytest.raises(ConfigError, match=message):
        ablate.main([*args[:1], *tiny, *args[1:]] if args else [])
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------------------------------
# the rate of each arm


def tuned(tiny, losses):
    """plan() of figure1 once these losses are known: (reported rates by arm, nan where not known yet; bad)."""
    suite = ablate.Suite(["figure1", "--lrs=1e-3,4e-3,2e-3", "--tune_seeds=7,8,9", "--seeds=1", *tiny])
    suite.loss = lambda cell: losses(cell.settings)
    cells, bad = suite.plan()
    return {cell.arm.name: cell.settings.lr for cell in cells if cell.settings.seed == 1}, bad


def test_the_rate_is_the_best_of_the_whole_grid_by_the_mean_of_all_tuning_seeds(tiny):
    # by seed 7 the best is 4e-3
    by_rate = lambda s: {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.2}[s.lr] - (s.seed == 7 and s.lr == 4e-3) * 0.5
    rates, bad = tuned(tiny, by_rate)
    assert set(rates.values()) == {2e-3} and len(rates) == 5 and not bad
    unfinished = lambda s: None if (s.seed, s.lr, s.scale_vectors) == (9, 1e-3, False) else by_rate(s)
    rates, bad = tuned(tiny, unfinished)
    assert [name for name, lr in rates.items() if not math.isnan(lr)] == [
        "baseline", "no scale, baseline's rate", "no scale, baseline's rate, 1.4x steps"] and len(rates) == 5


@pytest.mark.parametrize("losses, why", [
    ({1e-3: 1, 2e-3: 2, 4e-3: 3}, "the best rate, 0.001, is at the end of the grid: add a lower one to --lrs"),
    ({1e-3: 3, 2e-3: 2, 4e-3: 1}, "the best rate, 0.004, is at the end of the grid: add a higher one to --lrs"),
    ({1e-3: 1, 2e-3: 2, 4e-3: math.inf}, "add a lower one"), ({1e-3: 2, 2e-3: 1, 4e-3: math.inf}, None),
    (dict.fromkeys((1e-3, 2e-3, 4e-3), math.inf), "it diverged at every rate")])
def test_a_best_rate_at_the_end_of_the_grid_is_not_reported(losses, why, tiny):
    rates, bad = tuned(tiny, lambda s: losses[s.lr])
    assert len(rates) == (0 if why else 5)
    assert [why in text for text in bad.values()] == ([True, True] if why else [])


def test_tune_reference_tunes_each_reference_once_and_uses_its_rate_for_all_its_arms(tiny):
    flags = ["--lrs=1,2,3", "--tune=reference", "--max_steps=9", *tiny]
    for suite, references in (("figure5", {"baseline"}), ("start", {"baseline, N(0, 0.02)", "baseline, 1/√fan_in"})):
        suite = ablate.Suite([suite, *flags])
        cells = [cell for cell in suite.plan()[0] if not math.isnan(cell.settings.lr)]
        assert {cell.arm.name for cell in cells} == references and len(cells) == 9 * len(references)
        assert all(cell.tuned_as == ("baseline, " + name.split(", ", 1)[1] if "," in name else "baseline")
                   for name, cell in suite.arms.items())


# ---------------------------------------------------------------------------------------------------------------
# running, with a stand-in for train.py

FAKE = """
import json, signal, sys, time
from pathlib import Path
own = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
out, seed, lr, steps = Path(own["out_dir"]), int(own.get("seed", 1)), float(own.get("lr", 2e-3)), own["max_steps"]
(out / "config.json").write_text(json.dumps({"git_commit": "c", "versions": {"torch": "t"}, "device": "d"}))
if lr > 1:
    sys.exit("train.py: step 3: loss nan, gradient norm nan. Try a lower --lr")
if seed == 66:
    sys.exit("train.py: no disk")
if seed == 99:
    signal.raise_signal(signal.SIGKILL)
if seed == 77 and not (out / "ckpt.pt").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((out / "ckpt.pt").write_text(""), sys.exit(143)))
    (out / "waiting").write_text("")
    time.sleep(60)
rows = [f"{step},{step},{3 + lr + seed / 100 + ('reparam' in own) / 10 if step % 4 == 0 else ''}" for step in range(9)]
(out / "log.csv").write_text("\\n".join(["step,tokens,val_loss,logit_std", *(row + ",1" for row in rows), ""]))
(out / "scales.csv").write_text("step,name,mean,std,norm,cosine\\n8,v,1,1,1,1\\n")
(out / "ckpt.pt").write_text("")
"""


@pytest.fixture
def fake(tiny, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").write_text(FAKE)
    monkeypatch.setattr(ablate, "HERE", tmp_path / "code")
    return ["--max_steps=8", "--lrs=2e-3", *tiny]


def table(folder, name="results"):
    """A CSV of a folder, without the column of seconds."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in ablate.read_csv(f"{folder}/{name}.csv")]


def stamps():
    return {path: path.stat().st_mtime_ns for path in ablate.CELLS.glob("*/train.log")}


def until(condition, process):
    """Wait for a condition. If the process ends before, or 300 s pass, it is stopped and the test fails."""
    deadline = time.monotonic() + 300
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            process.terminate()
            pytest.fail(f"{process.args} did not get there")
        time.sleep(0.01)


def test_seeds_and_arms_are_added_and_finished_cells_stay_as_they_are(fake, capsys):
    assert ablate.main([ONE, "--seeds=1", *fake, "--out=r"]) == 0
    first, logs = table("r"), stamps()
    assert "1/1  unified  lr 0.002  seed 1  val_loss 3.1120" in capsys.readouterr().out
    assert ablate.main([BOTH, "--seeds=1,2", "--jobs=2", *fake, "--out=r"]) == 0
    assert [(r["arm"], r["seed"]) for r in table("r")] == [(a, s) for s in "12" for a in ("baseline", "unified")]
    assert {k: v for k, v in stamps().items() if k in logs} == logs and len(stamps()) == 4
    assert first[0]["val_loss"] == table("r")[1]["val_loss"] and not list(ablate.CELLS.glob("*/ckpt.pt"))
    assert [row["step"] for row in table("r", "curves")] == ["0", "4", "8"] * 4 and len(table("r", "scales")) == 2


def test_rows_of_results_csv_count_as_finished_cells_in_another_clone(fake, capsys, monkeypatch):
    assert ablate.main([ONE, "--seeds=1", *fake, "--out=r"]) == 0
    before = {name: table("r", name) for name in ("results", "curves", "scales")}
    shutil.rmtree("out")
    assert ablate.main([BOTH, "--seeds=1,2", *fake, "--out=r", "--dry_run=True"]) == 0
    assert "1/4 different cells finished" in capsys.readouterr().out and not Path("out").exists()
    assert ablate.main([BOTH, "--seeds=1,2", *fake, "--out=r"]) == 0
    assert len(stamps()) == 3 and table("r", "results")[1]["val_loss"] == before["results"][0]["val_loss"]
    assert all(row in table("r", name) for name in ("curves", "scales") for row in before[name])
    monkeypatch.setattr(ablate, "code_hash", lambda: "other")
    assert ablate.main([ONE, "--seeds=1", *fake, "--out=r"]) == 0
    assert [row["code"] for row in table("r")] == ["other"] and len(stamps()) == 4
    old, = Path("r").glob("results.*.csv")
    assert len(ablate.read_csv(old)) == 4, "the rows of the older code are kept"
    Path("r/results.csv").write_text("arm,cell\nunified,x\n")
    with pytest.raises(ConfigError, match="r/results.csv has other columns"):
        ablate.main([ONE, "--seeds=1", *fake, "--out=r"])


def test_a_cell_that_was_read_while_its_process_ended_has_all_of_its_seconds(fake):
    args = [ONE, "--seeds=1", *fake]
    assert ablate.main(args) == 0
    suite = ablate.Suite(args)
    cell, = suite.plan()[0]
    assert int(suite.outcome(cell)["row"]["seconds"]) < 100
    ablate.Runner(suite).collect(cell, None, time.monotonic() - 3600)
    assert int(ablate.read_csv("out/ablate/unified/results.csv")[0]["seconds"]) >= 3600


def test_divergence_is_a_result_and_failure_is_not(fake, capsys):
    for _ in range(2):
        assert ablate.main([ONE, "--seeds=1", *fake, "--lrs=2", "--out=r"]) == 0
        out = capsys.readouterr().out
        assert "- Diverged: unified at lr 2.0, seed 1." in out and "| unified |" not in out
        assert table("r")[0]["val_loss"] == "inf" and len(stamps()) == 1
    assert ablate.main([ONE, "--seeds=2,66,99", *fake]) == 1
    said = capsys.readouterr()
    assert re.findall(r"failed: \S*: (.*)\n", said.err) == ["exit code 1: train.py: no disk", "exit code -9: "]
    assert "| unified |  | 0.002 | 3.1220 |" in said.out


def test_a_rate_at_the_end_of_the_grid_is_an_error_that_keeps_the_results(fake, capsys):
    args = [BOTH, "--tune_seeds=3", "--seeds=1", *fake]
    assert ablate.main([*args, "--lrs=1e-3,2e-3,4e-3"]) == 1
    said = capsys.readouterr()
    assert "ablate.py: baseline: the best rate, 0.001, is at the end of the grid: add a lower one" in said.err
    assert "- Not tuned: `unified`: the best rate" in said.out and len(table("out/ablate/baseline-unified")) == 6


def test_ctrl_c_stops_the_cells_and_the_same_command_continues(fake, tmp_path, capsys):
    code = f"import sys; from pathlib import Path; sys.path.insert(0, {str(ROOT)!r}); import ablate; " \
           f"ablate.HERE = Path({str(tmp_path / 'code')!r}); sys.exit(ablate.main(sys.argv[1:]))"
    args = [ONE, "--seeds=1,77,78", *fake]
    process = subprocess.Popen([sys.executable, "-c", code, *args], stderr=subprocess.PIPE, text=True)
    until(lambda: list(ablate.CELLS.glob("*/waiting")), process)
    with pytest.raises(ConfigError, match="cells is in use by process .*: wait for it"):
        ablate.main(args)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "the same command continues:\n  python ablate.py" in error
    assert [row["seed"] for row in table("out/ablate/unified")] == ["1"] and list(ablate.CELLS.glob("*/ckpt.pt"))
    assert ablate.main(args) == 0 and [row["seed"] for row in table("out/ablate/unified")] == ["1", "77", "78"]


def test_no_cell_starts_while_the_code_is_not_what_its_name_says_and_older_results_stay(fake, monkeypatch, capsys):
    args, codes = [ONE, "--seeds=1,2", *fake, "--out=r"], iter(range(9))
    assert ablate.main(args) == 0
    before = Path("r/results.csv").read_text(), Path("r/results.md").read_text()
    monkeypatch.setattr(ablate, "code_hash", lambda: f"code {next(codes)}")
    assert ablate.main(args) == 1
    assert "the code has changed since the start" in capsys.readouterr().err and len(stamps()) == 2
    assert (Path("r/results.csv").read_text(), Path("r/results.md").read_text()) == before


def test_names_that_are_not_utf8_and_names_with_marks_of_markdown(fake, capsys):
    files = [os.fsdecode(b"\xff.py"), "a|b*.py"]
    for file in files:
        shutil.copy(ONE, file)
    assert ablate.main([",".join(files), "--seeds=1", *fake, "--out=r"]) == 0
    assert [row["arm"] for row in table("r")] == ["\ufffd", "a|b*"]
    assert "| a\\|b\\* | \ufffd |" in Path("r/results.md").read_text("utf-8")
    assert ablate.readable("é\udcc3\udca9") == "éé"  # what LC_ALL=C makes of it


def test_a_folder_that_cannot_be_written_is_one_line(tiny):
    done = subprocess.run([sys.executable, str(ROOT / "ablate.py"), ONE, *tiny, "--out=corpus/train.bin"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "ablate.py: [Errno 17] File exists: 'corpus/train.bin'\n")


def test_the_real_train_py_is_stopped_and_continued(tiny):
    args = [ONE, "--seeds=1", "--max_steps=200", "--jobs=2", *tiny]  # 2 jobs: a thread each
    process = subprocess.Popen([sys.executable, str(ROOT / "ablate.py"), *args])
    until(lambda: any(len(ablate.read_csv(log)) > 3 for log in ablate.CELLS.glob("*/log.csv")), process)
    process.terminate()
    assert process.wait(300) == 143 and list(ablate.CELLS.glob("*/ckpt.pt"))
    assert ablate.main(args) == 0
    assert len(json.loads(next(ablate.CELLS.glob("*/config.json")).read_text())["resumed"]) == 1
    steps = [{row["step"] for row in table("out/ablate/unified", log)} for log in ("curves", "scales")]
    assert steps == [{"0", "50", "100", "150", "200"}] * 2
