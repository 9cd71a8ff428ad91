"""bench.py, results/tune.py, results/step.py and bench.sh: the statistics, and that all of them run."""

import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import bench
import kernels
from configurator import ConfigError
from devices import step_memory

sys.path.insert(0, str(ROOT / "results"))
import step
import tune

SCRIPTS = {"bench.py": bench, "results/step.py": step, "results/tune.py": tune}
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------
# timing, tables


def test_paired_ratio_by_hand():
    # ratios 2, 4, 8: logs 1, 2, 3 times ln 2, their mean 2 and deviation 1; t(2) = 4.303, so ± 4.303/√3
    ratio, low, high = bench.paired_ratio([6.0, 4.0, 16.0], [3.0, 1.0, 2.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert math.isclose(ratio, 4) and math.isclose(low, 2 ** (2 - half)) and math.isclose(high, 2 ** (2 + half))


def test_paired_ratio_needs_pairs():
    assert all(map(math.isnan, bench.paired_ratio([2.0], [1.0])[1:]))  # one round has no interval
    with pytest.raises(ValueError):
        bench.paired_ratio([1.0, 2.0], [1.0])


def test_share_is_of_the_ceiling_in_the_same_round():
    # 10 in 2 s are 5 per second, of a ceiling of 100 in 5 s, 20 per second: 25%, and the same where both are slower
    assert bench.share(10, [2.0, 20.0, 2.0], 100, [5.0, 50.0, 5.0]) == "25"
    assert bench.share(10, [2.0, 1.0, 1.0], 100, [5.0, 5.0, 5.0]) == "50"  # the median


def test_alternate_runs_each_arm_once_per_round_in_changing_order():
    calls = []
    times = bench.alternate({name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}, 8)
    rounds = [calls[i:i + 3] for i in range(0, 24, 3)]
    assert len(calls) == 24 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(map(tuple, rounds))) > 2
    assert times == {name: [3.0 * i + r.index(name) + 1 for i, r in enumerate(rounds)] for name in "abc"}


def test_alternate_stops_in_time_but_not_before_three_rounds():
    assert len(bench.alternate({"a": lambda: 1.0}, 8, until=time.monotonic() - 1)["a"]) == 3


def test_a_cpus_clock_stands_still_while_others_have_the_core():
    now = bench.clock(CPU)
    began = now()
    time.sleep(0.2)
    assert now() - began < 0.1 and bench.clock(torch.device("cuda")) is time.perf_counter


@pytest.fixture(scope="module")
def ceilings():
    return bench.Ceilings(CPU, "float32")


def test_ceilings(ceilings):
    assert ceilings.bytes == 2 * 64 * 2**20 and ceilings.flops == 2 * 1024**3
    ceilings.target.zero_()
    assert ceilings.copy() > 0 and torch.equal(ceilings.target, ceilings.source)
    assert "GB/s" in ceilings.said and "1024 × 1024 matrices in float32" in ceilings.said


# ---------------------------------------------------------------------------------------------------------------
# verbs, at a size of a few thousand parameters


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text("n_layer, n_head, n_embd = 1, 2, 16\nvocab_size, block_size = 32, 8\nmicro_batch = 2\n")
    return str(path)


def on_a_cpu(size):
    """As much of bench.py's arguments as make_arm needs."""
    return SimpleNamespace(size=size, device=CPU, dtype="float32")


@pytest.fixture
def run(toy, tmp_path, monkeypatch, ceilings):
    """A function that runs a verb on the toy. torch.compile only traces, so that no C++ is compiled."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options=None, **kw: compile(f, backend="eager", **kw))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "Ceilings", lambda device, dtype: ceilings)
    monkeypatch.setattr(kernels, "TUNED", {})
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(*words):
        script = SCRIPTS.get(words[0], bench)
        words = [*words[script is not bench:], f"--out={tmp_path / 'out'}", "--rounds=3"]
        words += [] if script is tune else [f"--size={toy}"]
        script.main(script.arguments(words), words)
        return tmp_path / "out"
    yield run
    torch._dynamo.reset()


def table(folder, name):
    """The rows of a Markdown table, and what is written below it."""
    lines, below = (folder / f"{name}.md").read_text(encoding="utf-8").split("\n\n", 1)
    columns, _, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines.splitlines())
    assert rows and all(len(row) == len(columns) for row in rows)
    return [dict(zip(columns, row)) for row in rows], below


def test_kernels(run, capsys, tmp_path):
    (tmp_path / "tune.json").write_text('{"rms_norm forward 16": {"rows": 2}}')
    rows, below = table(run("kernels", "--tokens=16", f"--tuned={tmp_path / 'tune.json'}"), "kernels_toy")
    out = capsys.readouterr().out
    assert "Ceilings: " in out and out.count(f"| {rows[0]['op']} |") == 2 and "16 tokens, float32" in below
    assert "Ceilings: " in below and "`python bench.py kernels --tokens=16 " in below and "--out" not in below
    assert "{'rms_norm forward 16': {'rows': 2}}" in below and kernels.TUNED == {"rms_norm forward 16": {"rows": 2}}
    assert [row["arm"] for row in rows] == ["eager", "compile"] * 7
    assert all(float(row[f"{part}_us"]) > 0 and float(row[f"{part}_copy_%"]) >= 0
               for row in rows for part in ("forward", "both"))
    assert all(row["both_vs_compile"] == "1.000 (1.000–1.000)" for row in rows if row["arm"] == "compile")


@pytest.mark.skipif(not kernels.INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")
def test_the_arms_of_each_op_compute_the_same(toy):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for op, (call, inputs, *moved) in bench.cases(bench.settings_of(toy), 16, device, "float32").items():
        results = []
        for name in ("torch", "triton"):
            with kernels.backend(name):
                outs = [*bench.tree_leaves(call())]
                results.append([*outs, *torch.autograd.grad(outs, inputs, [torch.ones_like(y) for y in outs])])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), op
        made, given = (sum(t.nbytes for t in ts if t.dim() > 1) for ts in (results[0][:len(outs)], inputs))
        # forward reads inputs and writes outputs; backward the other way round, and may read the inputs again
        assert moved[0] == made + given and moved[1] - moved[0] in (made + given, made + 2 * given), op


def test_each_arm_runs_its_own_way(monkeypatch):
    asked, x = [], torch.randn(4, 8, requires_grad=True)
    monkeypatch.setattr(kernels, "_use_triton", lambda x, *_, **kw: asked.append(kernels._backend) and False)
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    monkeypatch.setattr(kernels, "triton", kernels.triton or True)
    arms = bench.arms_of(lambda: kernels.rms_norm(x, 1e-6), (x,), SimpleNamespace(type="cuda"))
    assert list(arms) == [(arm, part) for arm in ("eager", "compile", "triton") for part in ("forward", "both")]
    asked.clear()
    assert all(f()[0].shape == x.shape for f in arms.values()) and asked == ["torch"] * 4 + ["triton"] * 2


@pytest.mark.skipif(not kernels.INTERPRETED, reason="needs the interpreter")
def test_tune_takes_the_fastest_constants(run, ceilings, monkeypatch):
    used = {}

    def constants(part, n, warps, **rule):
        use = before(part, n, warps, **rule)
        used.update({"rows": 1, **vars(use)})
        return use
    before = kernels._constants
    monkeypatch.setattr(kernels, "_constants", constants)
    monkeypatch.setattr(ceilings, "seconds", lambda f: (f(), 2.0 - (used["rows"] == 4) - used["stages"] / 10)[1])
    folder = run("results/tune.py", "--widths=128", "--elements=512", "--seconds=900")
    rows, below = table(folder, "tune")
    found = json.loads((folder / "tune.json").read_text(encoding="utf-8"))
    parts = {"rms_norm": 128, "swiglu": 344, "qk_norm_rope": 64}
    assert {row["part"] for row in rows} == {
        f"{op} {part} {n}" for op, n in parts.items() for part in ("forward", "backward", "backward γ")
    } - {"swiglu forward 344", "swiglu backward 344"}
    assert all(found[f"rms_norm {part} 128"]["rows"] == 4 for part in ("forward", "backward", "backward γ"))
    for part in ("rms_norm backward γ 128", "swiglu backward γ 344", "qk_norm_rope backward γ 64"):
        assert found[part]["stages"] == 3 and "evict" not in found[part] and "programs" not in found[part]


def test_step_compares_the_ways_to_make_a_step(run):
    rows, below = table(run("results/step.py", "--block=2"), "step_toy_baseline")
    assert [row["what"] for row in rows] == ["as train.py has it", "waiting", "linear and cross-entropy, compiled",
                                          "the same, softmax in two passes"]
    assert rows[0]["time"] == rows[2]["time"] == "1.000 (1.000–1.000)" and all(float(row["ms"]) >= 0 for row in rows)
    assert "3 rounds" in below and "python results/step.py --block=2" in below


def test_a_profile_adds_up_the_gaps_between_kernels():
    assert bench.idle([(5, 6), (0, 4), (1, 2), (8, 9)]) == 1 + 2 and bench.idle([(0, 1)]) == bench.idle([]) == 0


def test_overhead(run, toy):
    Path(toy).write_text(Path(toy).read_text().replace("micro_batch = 2", "micro_batch = 32"))
    folder = run("overhead", "--strategies=baseline,hg,dp,baseline --n_layer=2")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    for way in ("eager", "compiled"):
        rows, below = table(folder, f"overhead_toy_{way}")
        assert [row["model"] for row in rows] == ["baseline", "hg", "dp", "baseline --n_layer=2"]
        assert {row["way"] for row in rows} == {way} and "256 tokens per step" in below
        assert rows[0]["time"] == "1.000 (1.000–1.000)" and rows[0]["memory"] == "1.000"
        memory = [float(row["memory"]) for row in rows]
        assert 0.9 < memory[1] < 1.1 and 0.9 < memory[2] < 1.1 and memory[3] > 1.2  # vectors are small, a block is not


def test_overhead_leaves_arms_out_to_end_in_time(run):
    folder = run("overhead", "--ways=eager", "--seconds=1e-9", "--strategies=baseline,hg")
    rows, below = table(folder, "overhead_toy_eager")
    assert [row["model"] for row in rows] == ["baseline"] and "Left out for want of time: hg (eager)." in below


def test_arms_of_a_size_get_the_same_matrices_and_batches_and_steps_do_not_change_them(toy):
    base, dual = (bench.make_arm(strategy, "eager", on_a_cpu(toy)) for strategy in ("baseline", "unified"))
    assert torch.equal(base.model.blocks[0].attn.o, dual.model.blocks[0].attn.o)
    assert all(map(torch.equal, next(base.batches), next(dual.batches)))
    before = [w.clone() for w in dual.model.parameters()]
    losses = {loss for _ in range(9) for loss, *_ in [dual.step() or [None]]} - {None}  # four batches, twice
    assert len(losses) == 4 and all(torch.equal(a, b) for a, b in zip(before, dual.model.parameters()))


def test_memory_counts_parameters_and_what_a_step_allocates():
    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1 << 18))  # 1 MiB

        def forward(self, x, y):
            return None, (self.w * self.w.detach().repeat(3)[:1 << 18]).sum()  # the copy has 3 MiB
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    arm = bench.Arm(model, "eager", [optimizer], itertools.repeat((None, None)))
    arm.step()
    memory = arm.memory_mb()
    assert 3 + 3 < memory < 3 + 3 + 4  # three copies of w are held; then 3 for the copy, and a few of 1
    assert arm.memory_mb() == memory


@pytest.mark.parametrize("shape, strategy", [
    ("2, 2, 64, 256, 128", "baseline"), ("2, 2, 64, 256, 128", "unified"), ("2, 3, 96, 2048, 64", "unified"),
    ("2, 3, 96, 2048, 64", "unified_free"), ("2, 2, 64, 512, 64", "unified --n_experts=8 --expert_dim=40")])
def test_the_estimate_of_a_steps_memory(shape, strategy, tmp_path):
    (tmp_path / "x.py").write_text(f"n_layer, n_head, n_embd, vocab_size, block_size = {shape}\nmicro_batch = 16\n")
    arm = bench.make_arm(strategy, "eager", on_a_cpu(str(tmp_path / "x.py")))
    parts = step_memory(arm.model, bench.settings_of(str(tmp_path / "x.py"), strategy), "float32", False, 16)
    assert sum(parts.values()) / 2**20 == pytest.approx(arm.memory_mb(), rel=0.15)


def test_the_estimate_of_a_steps_memory_on_a_gpu():
    s = bench.settings_of("llama_0.12b")
    with torch.device("meta"):
        model = bench.GPT(bench.gpt_config(s, "bfloat16"))
    parts = step_memory(model, s, "bfloat16", True, 32)
    # an H200 took 15,672 MB, compiled, when the logits still had a gradient of zeros, 3,144 MB
    assert sum(parts.values()) / 2**20 == pytest.approx(15672 - 3144, rel=0.05)
    sharded = step_memory(model, s, "bfloat16", True, 32, persistent=True)
    assert sharded["gradients"] == parts["weights"] == parts["optimizer"] / 2 == 4 * model.counts()["params"]


def test_a_step_is_timed_as_the_mean_of_a_block(monkeypatch):
    arm, steps, ticks = bench.Arm(torch.nn.Linear(1, 1), "eager", [], None), [], iter([1.0, 7.0])
    monkeypatch.setattr(arm, "step", lambda: steps.append(1))
    monkeypatch.setattr(bench, "clock", lambda device: lambda: next(ticks))
    assert arm.seconds(3) == 2.0 and len(steps) == 3


NANOGPT = """
from types import SimpleNamespace
import torch
GPTConfig = lambda *args: SimpleNamespace(args=args)
class GPT(torch.nn.Linear):
    def __init__(self, config):
        assert config.args == (8, 32, 1, 2, 16, 0.0, False)
        super().__init__(1, 32)
    def forward(self, idx, targets):
        logits = super().forward(idx[..., None].float())
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


def test_peers(run, tmp_path):
    pytest.importorskip("transformers", reason="compares with transformers' Llama")
    (tmp_path / "model.py").write_text(NANOGPT)
    rows, _ = table(run("peers", f"--nanogpt={tmp_path}"), "peers_toy")
    assert [(row["model"], row["way"]) for row in rows] == [
        (model, way) for model in ("nanoScale", "Hugging Face's Llama", "nanoGPT") for way in ("eager", "compiled")]
    assert all(row["time"] == "1.000 (1.000–1.000)" for row in rows[:2])
    assert {row["params"] for row in rows[:4]} == {rows[0]["params"]} != {row["params"] for row in rows[4:]}


def test_bad_requests_are_refused(run, monkeypatch, tmp_path):
    for words, said in ((["overhead", "--strategies=nothing"], "no such file"),
                        (["overhead", "--strategies=baseline --lrr=1"], "lrr"),
                        (["peers", f"--nanogpt={tmp_path}/nowhere"], "not a clone of nanoGPT")):
        with pytest.raises(ConfigError, match=said):
            run(*words)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        run("peers")


@pytest.mark.parametrize("script, flag, code, said", [
    ("bench.py", "--ways=compile", 2, "invalid choice: 'compile'"),
    ("bench.py", "--tuned=nope.json", 2, "nope.json: there is no such file"),
    ("bench.py", "--rounds=-1", 2, "cannot be negative"),
    ("bench.py", "--out=toy.py/out", 1, "Not a directory"),
    ("results/step.py", "--size=nope", 2, "nope.py: there is no such file")])
@pytest.mark.usefixtures("run")
def test_mistakes_are_one_line_and_an_exit_code(script, flag, code, said, tmp_path, monkeypatch, capsys):
    for name in ("stdout", "stderr", "excepthook"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # undoes what the script replaces
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [script, *["overhead"] * (script == "bench.py"), f"--out={tmp_path}", flag])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == code and len(lines) == 1 and said in lines[0]


# ---------------------------------------------------------------------------------------------------------------
# the plan


@pytest.fixture
def plan(tmp_path):
    """A function that runs bench.sh with a `python` that only writes its arguments down: (code, output, arguments)."""
    if os.name == "nt":
        pytest.skip("a shell script")

    def plan(*flags, fails="nothing"):
        python, notes = tmp_path / "python", tmp_path / "notes"
        python.write_text(f'#!/bin/sh\nfor w; do printf "%s\\n" "$w"; done | paste -sd"\\t" >> {notes}\n'
                          f'case "$*" in {fails}) exit 3;; esac\n')
        python.chmod(0o755)
        notes.write_text("")
        done = subprocess.run(["bash", str(ROOT / "bench.sh"), f"--out={tmp_path / 'out'}", *flags], text=True,
                              capture_output=True, env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
        return done.returncode, done.stdout + done.stderr, [x.split("\t") for x in notes.read_text().splitlines()]
    return plan


def test_the_plan_goes_on_after_a_failure_and_resumes(plan):
    code, said, all_steps = plan(fails="*overhead*")
    assert code == 1 and "not done: overhead overhead_large overhead_moe" in said
    assert [words[0] for words in all_steps] == ["-m", "results/tune.py", *["bench.py"] * 5, *["results/step.py"] * 2,
                                                 *["bench.py"] * 3]
    assert ["--seconds=176" in words for words in all_steps] == [i == 2 for i in range(12)]
    code, said, rest = plan()
    assert code == 0 and rest == [words for words in all_steps if "overhead" in words] and "tune: done before" in said
    assert plan("--minutes=0.5")[0] == plan("--minute=5")[0] == 2


def test_the_plan_stops_in_time(plan):
    code, said, steps = plan("--minutes=0")
    assert code == 0 and not steps and said.count("no time left") == 12


def test_every_step_of_the_plan_runs(plan, run, monkeypatch, tmp_path):
    """With tiny sizes, in this process, since a dozen imports of torch would take half a minute."""
    if not kernels.INTERPRETED:
        pytest.skip("needs the interpreter")
    pytest.importorskip("transformers", reason="compares with transformers' Llama")
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tune.json").write_text("{}")
    _, said, ((*_, tests), *steps) = plan("--tiny")
    assert (ROOT / tests).exists() and len(steps) == 11, said
    for script, *words in steps:
        SCRIPTS[script].main(SCRIPTS[script].arguments(words), words)
    tables = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.md")}
    assert tables.keys() == {"kernels_tiny.md", "overhead_tiny_compiled.md", "peers_tiny.md", "tune.md",
                             *(f"step_tiny_{name}.md" for name in ("baseline", "unified")),
                             *(f"profile_tiny_{name}_compiled.md" for name in ("baseline", "unified"))}
    profile = tables["profile_tiny_unified_compiled.md"]
    assert "| aten::mm |" in profile and "Without the profiler a step takes" in profile
