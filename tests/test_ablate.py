"""ablate.py: which cells there are, which rate is chosen, and that nothing is lost, mixed up or run twice."""

import ast
import math
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
from data.tokens import BinWriter, load_tokenizer, write_meta

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_tokens=64", "--eval_tokens=256",
        "--warmup_steps=2", "--eval_interval=50", "--log_interval=10", "--save_interval=20"]


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Flags of a tiny cell, in a folder where out/ may be written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "corpus"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, n in (("train", 4000), ("val", 600)):
        with BinWriter(folder / f"{split}.bin") as f:
            f.write(rng.integers(1, 60, n).astype(np.uint16))
    write_meta(folder, load_tokenizer("bytes"))
    return [*TINY, f"--dataset={folder}"]


def arms_of(suite, *flags):
    suite, opt, base = ablate.parse([suite, *flags])
    return ablate.make_arms(ablate.suite_arms(suite, opt, base), opt, ablate.code_hash()), opt


def cells_of(suite, *flags, loss_of=lambda cell: None):
    return ablate.plan(*arms_of(suite, *flags), loss_of)[0]


# ---------------------------------------------------------------------------------------------------------------
# cells


@pytest.mark.parametrize("suite", ablate.SUITES)
def test_suites_name_their_references(suite, tiny):
    flags = tiny[:1] + tiny[3:] if suite == "mixtures" else tiny  # its size is its own
    suite, opt, base = ablate.parse([suite, "--sizes=1,2,1@100", *flags])
    named = ablate.suite_arms(suite, opt, base)
    names = [name for name, _, _ in named]
    assert len(set(names)) == len(names)
    assert {ref for _, _, ref in named} - {None} <= set(names)
    assert len(ablate.plan(ablate.make_arms(named, opt, ""), opt, lambda cell: None)[0]) == 3 * len(named)


def test_equal_settings_are_one_cell(tiny):
    cells = {arm: c.folder for (arm, _, _), c in cells_of("norm_or_vector", "--seeds=1", *tiny).items()}
    assert cells["DNP's vectors"] == cells["DNP"] and cells["unified and QK-norm"] == cells["unified"]
    assert (len(cells), len(set(cells.values()))) == (13, 9)
    elsewhere = cells_of("removal", "--seeds=1", *tiny)
    assert {c.folder for c in elsewhere.values()} == {cells["baseline"], cells["no vectors"]}


def test_other_data_or_settings_are_other_cells(tiny):
    folders = lambda *flags: {c.folder for c in cells_of("removal", *tiny, *flags).values()}
    here = folders()
    assert here == folders("--sample_tokens=9") and not here & folders("--beta2=0.9")
    with BinWriter(Path(tiny[-1].partition("=")[2]) / "val.bin") as f:
        f.write(np.ones(600, np.uint16))
    assert not here & folders()


def test_another_dtype_is_another_cell_whether_a_flag_or_the_machine_chose_it(tiny, monkeypatch):
    here, flag = cells_of("removal", *tiny), cells_of("removal", *tiny, "--dtype=bfloat16")
    assert {c.settings.dtype for c in here.values()} == {"float32"}
    monkeypatch.setattr(ablate, "pick_device", lambda s: SimpleNamespace(dtype="bfloat16"))
    gpu = cells_of("removal", *tiny)
    assert {c.folder for c in gpu.values()} == {c.folder for c in flag.values()}
    assert not {c.folder for c in gpu.values()} & {c.folder for c in here.values()}


@pytest.mark.parametrize("file", runs.CODE)
def test_other_code_makes_other_cells_and_other_words_do_not(file, tmp_path, monkeypatch):
    for name in runs.CODE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    source, before = (tmp_path / file).read_text(), ablate.code_hash()
    (tmp_path / file).write_text("# a remark\n\n" + source.replace('"""', '"""About this: ', 1) + "\n# another\n")
    assert ablate.code_hash() == before
    (tmp_path / file).write_text(source + '\nTEXT = "not # a remark"\n')
    changed = ablate.code_hash()
    (tmp_path / file).write_text(source + '\nTEXT = "not # another"\n')
    assert len({before, changed, ablate.code_hash()}) == 3


def test_all_that_a_run_imports_is_part_of_its_name_or_decides_no_loss():
    # values of settings are in the name; where a run is and what it leaves is not its loss; init_from's folder is data
    # that no suite of ours has
    no_loss = {"configurator.py", "settings.py", "devices.py", "runs.py", "folding.py", "hf.py"}
    todo, found = ["train.py"], set()
    while todo:
        found.add(name := todo.pop())
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [
                a.name for a in node.names] if isinstance(node, ast.Import) else []
            files = {module.replace(".", "/") + ".py" for module in modules}
            todo += [f for f in files - found if (ROOT / f).exists() and not f.endswith("prepare.py")]
    assert found - no_loss == set(runs.CODE)


def test_scaling_counts_tokens_by_the_baselines_parameters(tiny):
    flags = ["--tokens_per_param=3", "--seeds=1", *(f for f in tiny if "n_" not in f)]
    arms, _ = arms_of("scaling", "--sizes=1,2,1@5", *flags)
    assert list(arms)[-3:] == [f"{name} at 1x32, 5 tokens a parameter" for name in ("baseline", "unified", "free")]
    for arm, cell in arms.items():
        params = ablate.meta_model(arms[f"baseline at {arm.split(' at ')[1]}"].settings).counts()["params"]
        steps = round((5 if "," in arm else 3) * params / 64)
        assert (cell.settings.max_steps, cell.settings.warmup_steps) == (steps, min(2, steps // 10))


@pytest.mark.parametrize("args, message", [
    ([], "name a suite first"), (["remval"], "there is no suite 'remval'"), (["removal", "--seeds=a"], "--seeds takes"),
    (["removal", "--lrs=-1"], "at least 0"), (["removal", "--seed=2"], "there are --seeds and --out"),
    (["removal", "--jobs=0"], "jobs must be at least 1"), (["removal", "--n_head=3"], "not divisible by n_head"),
    (["removal", "--batch_tokens=33"], "not divisible by block_size"), (["a/x.py,b/x.py"], "of different names"),
    (["removal", "--lrs=1e-3,2e-3", "--seeds=1,101"], "share a seed"), (["scaling", "--sizes=1@x"], "as in 2@100"),
    (["removal", "--device=cuda:99"], "cannot be used here"), (["removal", "--max_step=3"], "Did you mean 'max_steps'"),
    (["free", "--reparam=or"], "cannot hold for every cell: baseline has reparam 'direct'"),
    (["scaling", "--sizes=1", "--max_steps=9"], "cannot hold for every cell: baseline at 1x32 has max_steps")])
def test_mistakes_are_refused_before_anything_runs(args, message, tiny):
    with pytest.raises(ConfigError, match=message):
        ablate.main([*args[:1], *tiny, *args[1:]] if args else [])
    assert not Path("out").exists()


def test_without_fcntl_as_on_windows(tmp_path):
    code = "import sys; sys.modules['fcntl'] = None; import ablate; print(ablate.in_use(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


# ---------------------------------------------------------------------------------------------------------------
# the rate of each arm


def walk(grid, losses):
    """best_rate() over and over, each time with what it asked for: (its choice, the rates that it asked for)."""
    known = {}
    while True:
        asked = set()
        best = ablate.best_rate(grid, lambda lr: asked.add(lr) or known.get(lr))
        if not asked - known.keys():
            return best, sorted(known)
        known.update({lr: losses[grid.index(lr)] for lr in asked})


@pytest.mark.parametrize("losses, best, asked", [
    ([9, 9, 1, 2, 3, 4], 2, [1, 2, 3, 4]), ([1, 2, 3, 4, 5, 6], 0, [0, 1, 2, 3, 4]),
    ([9, 9, 3, 2, 1, 4], 4, [2, 3, 4, 5]),
    ([9, 9, 3, 2, 1, math.inf], 4, [2, 3, 4, 5]), ([3, 1, 2], 1, [0, 1, 2]), ([2, 1], 1, [0, 1]), ([5], 0, []),
    ([math.inf] * 3, None, [0, 1, 2])])
def test_the_walk_ends_where_both_neighbours_are_worse(losses, best, asked):
    grid = [1e-3 * 2**i for i in range(len(losses))]
    assert walk(grid, losses) == (None if best is None else grid[best], [grid[i] for i in asked])


def test_rates_are_chosen_on_seeds_that_are_not_reported(tiny):
    known = {}
    flags = ["removal", "--lrs=1e-3,4e-3,2e-3", "--tune_seeds=7,8", "--seeds=1,2", *tiny]
    first = cells_of(*flags, loss_of=lambda cell: known.get(cell.folder))
    assert [key[1:] for key in first if key[0] == "baseline"] == [(lr, s) for lr in (1e-3, 2e-3, 4e-3) for s in (7, 8)]
    # baseline's best is 2e-3 by seed 7 alone, and 4e-3 by the mean; no scale is not tuned to the end
    known.update({cell.folder: {1e-3: 3.0, 2e-3: 2.0 + (seed == 8), 4e-3: 2.2}[lr]
                  for (arm, lr, seed), cell in first.items() if (arm, seed) != ("no scale", 8)})
    arms, opt = arms_of(*flags)
    cells, later = ablate.plan(arms, opt, lambda cell: known.get(cell.folder))
    assert [key for key in cells if key not in first] == [("baseline", 4e-3, 1), ("baseline", 4e-3, 2)]
    assert later == 2 * arms["no scale"].flops


# ---------------------------------------------------------------------------------------------------------------
# results.md


def report(*groups):
    """The text of results.md for (use, lr, {arm: losses by seed})."""
    made = dict.fromkeys(ablate.COLUMNS, "") | {"params": 1, "tokens": 5, "flops": 1, "code": "abc"}
    rows = [{**made, "use": use, "arm": arm, "reference": "base" * (arm != "base"), "lr": lr, "seed": seed,
             "val_loss": loss, "cell": f"{use}{arm}{lr}{seed}", "code": "old" if use == "kept" else "abc"}
            for use, lr, losses in groups for arm, by_seed in losses.items() for seed, loss in enumerate(by_seed)]
    return ablate.report_text(rows, "")


def line_of(text, start):
    return [word.strip() for word in next(line for line in text.splitlines() if line.startswith(start)).split("|")]


def test_the_table_names_difference_interval_p_and_what_could_be_seen():
    text = report(("report", 1e-3, {"base": [2.0, 2.1, 2.2], "arm": [1.9, 2.02, 2.08], "other": [2.0, 2.3, 2.1]}))
    _, name, lr, loss, difference, interval, p, verdict, sees, seeds, *_ = line_of(text, "| arm | 0")
    assert (name, lr, loss, difference, interval) == ("arm", "0.001", "2.0000", "-0.1000", "-0.1497 … -0.0503")
    assert (p, verdict, seeds) == ("0.026", "better", "3") and sees.startswith("±0.0")
    assert line_of(text, "| other")[7] == "open"
    assert "corrected by Holm for the 2 distinct comparisons" in text and "probability 0.8 at 0.05 / 2" in text
    assert "none tuned" in text and "Tuning" not in text
    assert line_of(report(("report", 1e-3, {"base": [2.0], "arm": [1.0]})), "| arm | 0")[5:8] == ["", "", "one pair"]


def test_the_grid_with_the_chosen_rate_and_a_star_at_its_end():
    text = report(("report", 2e-3, {"base": [2.0, 2.1], "arm": [1.9, 2.0]}),
                  ("tuning", 1e-3, {"base": [2.2, 2.2], "arm": [2.2, 2.2]}),
                  ("tuning", 2e-3, {"base": [2.1, 2.1], "arm": [2.1, 2.1]}),
                  ("tuning", 4e-3, {"base": [2.4, 2.3], "arm": [2.0, 2.0]}))
    assert line_of(text, "| base | 2")[2:5] == ["2.2000", "**2.1000**", "2.3500"]
    assert line_of(text, "| arm | 2")[2:5] == ["2.2000", "2.1000", "**2.0000**\\*"]


def test_rows_of_other_code_are_named_and_compared_with_nothing():
    new = ("report", 1e-3, {"base": [2.0, 2.1], "arm": [1.9, 2.0]})
    text = report(new, ("kept", 1e-3, {"base": [9.0, 9.0], "arm": [1.0, 1.0]}))
    assert text.splitlines()[:8] == report(new).splitlines()[:8]
    assert "4 rows of other settings, data, rates, seeds or code (old)" in text and "- code: abc\n" in text


TABLES = [path for path in sorted((ROOT / "results").glob("*/results.md"))
          if "`python ablate.py" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.parent.name)
def test_committed_tables_are_their_rows(path):
    text = path.read_text("utf-8")
    command = re.search("- Command: `(.*)`", text)[1]
    assert text == ablate.report_text(ablate.read_csv(path.with_suffix(".csv")), command)


# ---------------------------------------------------------------------------------------------------------------
# running; a cell costs the seconds that torch takes to load


ONE = str(ROOT / "config/unified.py")


def start(*args):
    return subprocess.Popen([sys.executable, str(ROOT / "ablate.py"), *args], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def steps():
    """How many steps all cells here have made."""
    last = [(0, *(int(row["step"]) for row in ablate.read_csv(log)))[-1] for log in ablate.CELLS.glob("*/log.csv")]
    return sum(last)


def tables(folder):
    """The CSVs of a folder, without what no two commands share."""
    own = ("suite", "tokens_per_second")
    return {name: [{k: v for k, v in row.items() if k not in own} for row in ablate.read_csv(f"{folder}/{name}.csv")]
            for name in ("results", "curves", "scales")}


def test_killed_twice_and_resumed_gives_the_same_table(tiny, capsys):
    args = [ONE, "--seeds=1", "--max_steps=600", "--jobs=2", *tiny]  # 2 jobs: one thread each, quick on a busy machine
    for kill in (signal.SIGTERM, signal.SIGKILL):
        before = steps()
        process = start(*args)
        wait_for(lambda: steps() > before + 20)
        process.send_signal(kill)
        output = process.communicate(timeout=60)[0]
        folders = list(ablate.CELLS.iterdir())
        assert len(folders) == 1 and steps() < 600, "it was over before it was killed"
        if kill == signal.SIGTERM:
            assert process.returncode == 128 + kill and "the same command goes on:\n  python ablate.py" in output
            assert any((folder / "ckpt.pt").exists() for folder in folders)
    assert any(map(ablate.in_use, folders))  # the orphans go on and hold their cells
    assert ablate.main(args) == 0
    assert not list(ablate.CELLS.glob("*/ckpt.pt")) and len(list(ablate.CELLS.iterdir())) == 1
    resumed = tables("out/ablate/unified")
    assert resumed["curves"][-1]["step"] == "600"
    Path("out").rename("out_resumed")
    assert ablate.main(args) == 0
    assert resumed == tables("out/ablate/unified")
    stamps = [path.stat().st_mtime_ns for path in ablate.CELLS.glob("*/train.log")]
    assert ablate.main(args) == 0 and stamps == [path.stat().st_mtime_ns for path in ablate.CELLS.glob("*/train.log")]
    assert "1/1 different cells finished" in capsys.readouterr().out


def test_divergence_is_a_result_and_failure_is_not(tiny, capsys):
    args = [ONE, "--seeds=1", "--max_steps=8", "--weight_decay=1e30", "--grad_clip=0", *tiny]
    for _ in range(2):
        assert ablate.main(args) == 0
        out = capsys.readouterr().out
        assert "Diverged: unified at lr 0.002, seed 1." in out and "unified does not count" in out
        assert ablate.read_csv("out/ablate/unified/results.csv")[0]["val_loss"] == "inf"
    assert ablate.main([ONE, "--seeds=1", "--init_from=nowhere", "--out=elsewhere", *tiny]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("ablate.py: failed: ") == 1 and "nowhere" in captured.err
    assert "No cell is finished yet" in captured.out


def runner_of(cell, *flags):
    runner = ablate.Runner(ablate.parse(["removal", *flags])[1])
    cell.folder.mkdir(parents=True)
    return runner


def test_a_cell_that_was_killed_by_a_signal_is_reported_as_that(tiny):
    cell = next(iter(cells_of("removal", *tiny).values()))
    runner = runner_of(cell)
    (cell.folder / "train.log").write_text("step 55  train_loss 2.58\n")
    entry = cell, SimpleNamespace(returncode=-signal.SIGKILL), 0, ablate.lock(cell.folder, "ablate.lock")
    runner.running.append(entry)
    assert runner.collect(*entry) is None
    assert list(runner.failed.values()) == ["killed by SIGKILL"]


def test_no_cell_starts_with_other_code_than_its_name_says(tiny, monkeypatch, capsys):
    said = iter(["before", "after"])
    monkeypatch.setattr(ablate, "code_hash", lambda: next(said))
    assert ablate.main([ONE, "--seeds=1,2", *tiny]) == 1
    assert "the code has changed since the start" in capsys.readouterr().err
    assert not list(ablate.CELLS.glob("*/train.log"))


def test_two_at_once_share_a_cell(tiny):
    args = [ONE, "--seeds=1", "--max_steps=8", "--jobs=2", *tiny]
    both = [start(*args, f"--out=out/{i}") for i in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert tables("out/0") == tables("out/1")
    assert sum(line.startswith("1/1  unified") for output in outputs for line in output.splitlines()) == 1


def test_results_go_on_without_their_cells(tiny, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    flags = ["--max_steps=8", *tiny, "--jobs=2", "--out=~/results"]
    both = f"{ROOT / 'config/baseline.py'},{ONE}"
    assert ablate.main([ONE, "--seeds=1", *flags]) == 0
    before = tables("results")
    assert len(before["curves"]) == 2 and before["scales"] and not Path("~").exists()  # steps 0 and 8
    shutil.rmtree("out")  # results that came from another machine
    assert ablate.main([ONE, "--seeds=1", *flags]) == 0
    assert not Path("out").exists() and before == tables("results")
    capsys.readouterr()
    assert ablate.main([both, "--seeds=1,2", *flags, "--dry_run=True"]) == 0
    assert "1/4 different cells finished" in capsys.readouterr().out
    assert ablate.main([both, "--seeds=1,2", *flags]) == 0
    assert len(list(ablate.CELLS.iterdir())) == 3
    more = tables("results")
    assert all(row in more[log] for log in ("curves", "scales") for row in before[log])
    assert [(row["arm"], row["seed"], row["use"]) for row in more["results"]] == [
        (arm, seed, "report") for seed in "12" for arm in ("baseline", "unified")]

    # a full disk: one line names the file, and what was there stays
    full = ["bash", "-c", "ulimit -f 0; exec \"$@\"", "", sys.executable, str(ROOT / "ablate.py"), ONE, "--seeds=1"]
    done = subprocess.run(full + flags, capture_output=True, text=True)
    assert (done.returncode, tables("results")) == (1, more), done.stderr
    assert done.stderr == f"ablate.py: {Path.cwd()}/results/results.csv cannot be written: File too large\n"

    # another code: everything runs anew, and what was there stays, apart
    code = ablate.code_hash
    monkeypatch.setattr(ablate, "code_hash", lambda: "another")
    shutil.rmtree("out")
    assert ablate.main([ONE, "--seeds=1", *flags]) == 0
    assert "4 rows of other settings, data, rates, seeds or code" in capsys.readouterr().out
    edited = tables("results")
    assert edited["results"][0]["code"] == "another" and len(edited["curves"]) == len(more["curves"]) + 2
    assert [dict(row, use="report") for row in edited["results"][1:]] == more["results"]
    # the same code again, on a machine that has none of the cells
    monkeypatch.setattr(ablate, "code_hash", code)
    shutil.rmtree("out")
    assert ablate.main([both, "--seeds=1,2", *flags]) == 0
    assert not Path("out").exists()
    again = tables("results")
    assert again["results"][:4] == more["results"] and again["results"][4]["use"] == "kept"
    Path("results/results.csv").write_text("arm,cell\nunified,x\n")
    with pytest.raises(ConfigError, match="results/results.csv has other columns"):
        ablate.main([ONE, "--seeds=1", *flags])


def test_dry_run_runs_nothing(tiny, capsys):
    assert ablate.main(["norm_or_vector", "--seeds=1,2", "--dry_run=True", "--max_steps=4", *tiny]) == 0
    assert "0/18 different cells finished" in capsys.readouterr().out
    assert ablate.main(["removal", "--lrs=1e-3,2e-3", "--dry_run=True", "--max_steps=4", *tiny]) == 0
    assert "0/8+ different cells finished" in capsys.readouterr().out
    assert not Path("out").exists()
