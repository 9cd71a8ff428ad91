"""ablate.py: which cells there are, what is called real, and that nothing is lost."""

import csv
import fcntl
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import ablate
from configurator import ConfigError, configure
from data.tokens import BinWriter, load_tokenizer, write_meta
from optim import param_groups
from settings import Settings

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


def cells_of(suite, *flags):
    suite, opt, base = ablate.parse([suite, *flags])
    return ablate.make_cells(ablate.suite_arms(suite, opt, base), opt)


# ---------------------------------------------------------------------------------------------------------------
# cells


@pytest.mark.parametrize("suite", ablate.SUITES)
def test_suites_name_their_references(suite, tiny):
    suite, opt, base = ablate.parse([suite, "--sizes=1,2", *tiny])
    arms = ablate.suite_arms(suite, opt, base)
    names = [name for name, _, _ in arms]
    assert len(set(names)) == len(names)
    assert {ref for _, _, ref in arms} - {None} <= set(names)
    assert len(ablate.make_cells(arms, opt)) == 3 * len(arms)


def test_equal_settings_are_one_cell(tiny):
    cells = {arm: c.folder for (arm, _, seed), c in cells_of("norm_or_vector", *tiny).items() if seed == 1}
    assert cells["norm alone, no vectors"] == cells["DNP, no vectors"] == cells["unified, no vectors"]
    assert len(set(cells.values())) == 7
    decay = {arm: c.folder for (arm, _, seed), c in cells_of("decay", *tiny).items() if seed == 1}
    assert decay["llama, all"] == decay["llama, input"] and decay["llama, none"] == decay["llama, output"]
    assert len(set(decay.values())) == 6  # gemma has both roles, so its four differ


@pytest.mark.parametrize("file", sorted((ROOT / "config").glob("*.py")), ids=lambda f: f.stem)
@pytest.mark.parametrize("bare", [False, True])
def test_canonical_settings_train_to_the_same_numbers(file, bare):
    flags = [f for f in TINY if "steps" not in f] + ["--scale_lr_mult=2", *(["--scale_vectors=False"] if bare else [])]
    given = configure(Settings, [str(file), *flags])[0]
    results = []
    for s in (given, ablate.canonical(given)):
        torch.manual_seed(0)
        model = ablate.GPT(ablate.gpt_config(s))
        groups = param_groups(model.named_roles(), s.weight_decay, s.scale_decay, s.scale_lr_mult)
        names = {p: name for name, p in model.named_parameters()}
        treated = {names[p]: (g["weight_decay"], g["lr_mult"]) for g in groups for p in g["params"]}
        results.append((treated, model(torch.arange(32).view(1, 32), torch.arange(32).view(1, 32))[1].item()))
    assert results[0] == results[1]


def test_other_data_or_settings_are_other_cells(tiny):
    folders = lambda *flags: {c.folder for c in cells_of("removal", *tiny, *flags).values()}
    here = folders()
    assert here == folders("--sample_tokens=9") and not here & folders("--beta2=0.9")
    with BinWriter(Path(tiny[-1].partition("=")[2]) / "val.bin") as f:
        f.write(np.ones(600, np.uint16))
    assert not here & folders()


def test_scaling_counts_tokens_by_the_baselines_parameters(tiny):
    cells = cells_of("scaling", "--sizes=1,2", "--tokens_per_param=3", "--seeds=1", *(f for f in tiny if "n_" not in f))
    for (arm, _, _), cell in cells.items():
        baseline = cells[arm.replace("unified", "baseline"), cell.settings.lr, 1]
        assert cell.settings.max_steps == round(3 * baseline.counts["params"] / 64)


@pytest.mark.parametrize("args, message", [
    ([], "name a suite first"), (["remval"], "there is no suite 'remval'"), (["removal", "--seeds=a"], "--seeds takes"),
    (["removal", "--lrs=-1"], "at least 0"), (["removal", "--seed=2"], "there are --seeds and --out"),
    (["removal", "--jobs=0"], "jobs must be at least 1"), (["removal", "--n_head=3"], "not divisible by n_head"),
    (["removal", "--batch_tokens=33"], "not divisible by block_size"), (["a/x.py,b/x.py"], "of different names"),
    (["removal", "--max_step=3"], "Did you mean 'max_steps'")])
def test_mistakes_are_refused_before_anything_runs(args, message, tiny):
    with pytest.raises(ConfigError, match=message):
        ablate.main([*args[:1], *tiny, *args[1:]] if args else [])
    assert not Path("out").exists()


# ---------------------------------------------------------------------------------------------------------------
# what is called real


def rows(losses, lr=1e-3, reference="base"):
    """Rows of results.csv from {arm: losses by seed}."""
    return [{"arm": arm, "reference": reference if arm != reference else "", "lr": lr, "seed": seed, "val_loss": loss,
             "params": 100 + (arm != reference), "tokens": 5, "flops": 1, "cell": f"{arm}{lr}{seed}"}
            for arm, by_seed in losses.items() for seed, loss in enumerate(by_seed) if loss is not None]


def report(rows):
    """The text of results.md."""
    made = dict(suite="s", commit="", python="", torch="", device="")
    return ablate.report_text([{**row, **made} for row in rows], ["base", "arm"], "")


def test_paired_difference_and_its_interval():
    arms = ablate.summarise(rows({"base": [2.0, 2.1, 2.2], "arm": [1.9, 2.02, 2.08]}))
    # differences −0.10, −0.08, −0.12: mean −0.1, sd 0.02, half width 4.303 · 0.02 / √3
    assert arms["arm"]["delta"] == pytest.approx(-0.1)
    assert arms["arm"]["half"] == pytest.approx(4.302653 * 0.02 / math.sqrt(3))
    assert arms["arm"]["added"] == 1


def test_a_difference_inside_the_baselines_spread_is_not_real():
    # all pairs agree on −0.01 to a hair, but seeds move the baseline by ±0.1
    arms = ablate.summarise(rows({"base": [2.0, 2.1, 2.2], "arm": [1.99, 2.0901, 2.1899]}))
    assert abs(arms["arm"]["delta"]) > arms["arm"]["half"] and not arms["arm"]["beyond"]
    arms = ablate.summarise(rows({"base": [2.0, 2.001, 2.002], "arm": [1.99, 1.9911, 1.9919]}))
    assert arms["arm"]["beyond"]


def test_the_baseline_against_itself_is_hardly_ever_real():
    rng, called = np.random.default_rng(0), 0
    for _ in range(400):
        losses = rng.normal(2.0, 0.01, (2, 4)).tolist()
        called += ablate.summarise(rows({"base": losses[0], "arm": losses[1]}))["arm"]["beyond"]
    assert called <= 0.05 * 400


def test_one_seed_says_nothing():
    arm = ablate.summarise(rows({"base": [2.0], "arm": [1.0]}))["arm"]
    assert arm["half"] is None and not arm["beyond"]
    assert "nothing is known of the noise" in report(rows({"base": [2.0], "arm": [1.0]}))


def test_each_arm_at_its_best_rate_with_all_seeds():
    low, mid, high = (rows(losses, lr) for losses, lr in (
        ({"base": [2.2, 2.2], "arm": [2.3, 2.3]}, 1e-3),
        ({"base": [2.1, 2.1], "arm": [2.2, 2.2]}, 2e-3),
        ({"base": [2.4, 2.4], "arm": [1.0, None]}, 4e-3)))  # a seed is missing: the best mean does not count
    arms = ablate.summarise(low + mid + high)
    assert (arms["base"]["lr"], arms["arm"]["lr"]) == (2e-3, 2e-3)
    assert not arms["base"]["edge"]
    high = rows({"base": [2.4, 2.4], "arm": [1.0, math.inf]}, 4e-3)  # a seed diverged: nor does it
    assert ablate.summarise(low + mid + high)["arm"]["lr"] == 2e-3
    high = rows({"base": [2.4, 2.4], "arm": [2.1, 2.1]}, 4e-3)
    arms = ablate.summarise(low + mid + high)
    assert arms["arm"]["lr"] == 4e-3 and arms["arm"]["edge"]
    assert "arm" not in ablate.summarise(rows({"base": [2.0, 2.0], "arm": [1.0, None]}))


def test_a_table_for_each_rate_of_a_grid():
    both = (rows({"base": [2.0, 2.1], "arm": [2.2, 2.3]}, 1e-3)
            + rows({"base": [1.9, 1.9], "arm": [1.8, 1.8]}, 2e-3))
    texts = report(both), report(both[:4])
    differences = [line.split("|")[4].strip() for line in texts[0].splitlines() if line.startswith("| arm | 0")]
    assert differences == ["-0.1000", "+0.2000", "-0.1000"]  # the best of each, then at 1e-3, then at 2e-3
    assert "All at 0.001:" in texts[0] and "nothing was tuned" not in texts[0]
    assert "All at" not in texts[1] and "nothing was tuned" in texts[1]


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


def tables(folder):
    """The CSVs of a folder, without what no two commands share."""
    found, own = {}, ("suite", "tokens_per_second")
    for name in ("results", "curves", "scales"):
        with open(f"{folder}/{name}.csv", newline="") as f:
            found[name] = [{k: v for k, v in row.items() if k not in own} for row in csv.DictReader(f)]
    return found


def test_killed_twice_and_resumed_gives_the_same_table(tiny, capsys):
    args = [ONE, "--seeds=1", "--max_steps=400", "--jobs=2", *tiny]  # 2 jobs: one thread each, quick on a busy machine
    suite, opt, base = ablate.parse(args)
    cell, = ablate.make_cells(ablate.suite_arms(suite, opt, base), opt).values()
    for kill in (signal.SIGTERM, signal.SIGKILL):
        before = ablate.step_of(cell)
        process = start(*args)
        wait_for(lambda: ablate.step_of(cell) > before + 10)
        process.send_signal(kill)
        output = process.communicate(timeout=60)[0]
        assert ablate.val_loss(cell) is None, "it was over before it was killed"
        if kill == signal.SIGTERM:
            assert process.returncode == 128 + kill and "the same command goes on:\n  python ablate.py" in output
            assert (cell.folder / "ckpt.pt").exists()
    with open(cell.folder / "lock") as lock, pytest.raises(BlockingIOError):  # the orphan goes on and holds it
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert ablate.main(args) == 0
    assert not (cell.folder / "ckpt.pt").exists()
    resumed = tables("out/ablate/unified")
    assert resumed["curves"][-1]["step"] == "400"
    Path("out").rename("out_resumed")
    assert ablate.main(args) == 0
    assert resumed == tables("out/ablate/unified")
    stamp = (cell.folder / "train.log").stat().st_mtime_ns
    assert ablate.main(args) == 0 and (cell.folder / "train.log").stat().st_mtime_ns == stamp
    assert "1 of them different, 1 finished already" in capsys.readouterr().out


def test_divergence_is_a_result_and_failure_is_not(tiny, capsys):
    args = [ONE, "--seeds=1", "--max_steps=8", "--weight_decay=1e30", "--grad_clip=0", *tiny]
    for _ in range(2):
        assert ablate.main(args) == 0
        assert "Diverged: unified at lr 0.002, seed 1." in capsys.readouterr().out
        assert ablate.read_csv("out/ablate/unified/results.csv")[0]["val_loss"] == "inf"
    assert ablate.main([ONE, "--seeds=1", "--device=cuda:99", *tiny]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("ablate.py: failed: ") == 1 and "cannot be used here" in captured.err
    assert "No cell is finished yet" in captured.out


def test_two_at_once_share_a_cell(tiny):
    args = [ONE, "--seeds=1", "--max_steps=8", "--jobs=2", *tiny]
    both = [start(*args, f"--out=out/{i}") for i in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert tables("out/0") == tables("out/1")
    assert sum("1/1" in line for output in outputs for line in output.splitlines()) == 1


def test_results_go_on_without_their_cells(tiny, capsys):
    flags = ["--max_steps=8", *tiny, "--jobs=2", "--out=results"]
    both = f"{ROOT / 'config/baseline.py'},{ONE}"
    assert ablate.main([ONE, "--seeds=1", *flags]) == 0
    before = tables("results")
    assert len(before["curves"]) == 2 and before["scales"]  # steps 0 and 8
    shutil.rmtree("out")  # results that came from another machine
    with pytest.raises(ConfigError, match="has 1 rows that are not among .* such as unified at lr 0.002, seed 1"):
        ablate.main([both, "--seeds=2", *flags])
    assert ablate.main([both, "--seeds=2", *flags, "--dry_run=True"]) == 0
    assert ablate.main([ONE, "--seeds=1", *flags]) == 0
    assert not Path("out").exists() and before == tables("results")
    capsys.readouterr()
    assert ablate.main([both, "--seeds=1,2", *flags, "--dry_run=True"]) == 0
    assert "4 cells, 4 of them different, 3 left" in capsys.readouterr().out
    # baseline is ready first, so that unified has one of two seeds while the first reports are written
    assert ablate.main([both, "--seeds=1,2", *flags]) == 0
    assert len(list(Path("out/ablate/cells").iterdir())) == 3
    more = tables("results")
    for name, rows in before.items():
        kept = [row for row in more[name] if row["arm"] == "unified" and row.get("seed", "1") == "1"]
        assert [dict(row, reference="") for row in kept] == [dict(row, reference="") for row in rows]
    shutil.rmtree("out"), shutil.rmtree("results")
    assert ablate.main([both, "--seeds=1,2", *flags]) == 0
    assert more == tables("results")
    Path("results/results.csv").write_text("arm,cell\nunified,x\n")
    with pytest.raises(ConfigError, match="results/results.csv has other columns"):
        ablate.main([ONE, "--seeds=1", *flags])


def test_dry_run_runs_nothing(tiny, capsys):
    assert ablate.main(["norm_or_vector", "--seeds=1,2", "--dry_run=True", "--max_steps=4", *tiny]) == 0
    out = capsys.readouterr().out
    assert "26 cells, 14 of them different, 14 left: 3,584 tokens" in out
    assert not Path("out").exists()
