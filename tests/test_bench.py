"""bench.py: its statistics, and that every verb runs here and leaves its tables. What it measures is not tested."""

import contextlib
import math
import os
import subprocess
import sys
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT

import bench
import kernels
from configurator import ConfigError

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------
# timing, tables


def test_paired_ratio_by_hand():
    # ratios 2, 4, 8: logs 1, 2, 3 times ln 2, their mean 2 and deviation 1; t(2) = 4.303, so ± 4.303/√3
    ratio, low, high = bench.paired_ratio([2.0, 8.0, 24.0], [1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert math.isclose(ratio, 4) and math.isclose(low, 2 ** (2 - half)) and math.isclose(high, 2 ** (2 + half))


def test_paired_ratio_does_not_see_what_slows_both():
    noise = [1.0, 50.0, 3.0, 7.0]
    ratio, low, high = bench.paired_ratio([1.1 * n for n in noise], noise)
    assert all(math.isclose(x, 1.1) for x in (ratio, low, high))


def test_paired_ratio_wants_pairs():
    assert all(map(math.isnan, bench.paired_ratio([2.0], [1.0])[1:]))  # one round has no interval
    with pytest.raises(ValueError):
        bench.paired_ratio([1.0, 2.0], [1.0])


def test_an_interval_holds_the_ratio_as_often_as_it_says():
    generator, held = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        a, b = (0.2 * torch.randn(2, 6, generator=generator, dtype=torch.float64)).exp().tolist()
        _, low, high = bench.paired_ratio([1.3 * t for t in a], b)
        held += low < 1.3 < high
    assert 0.92 < held / 400 < 0.98


def test_share_is_of_the_ceiling_of_the_same_round():
    # 10 in 2 s are 5 a second, of a ceiling of 100 in 5 s, 20 a second: 25%; one in which both are slower is no other
    assert bench.share(10, [2.0, 20.0, 2.0], 100, [5.0, 50.0, 5.0]) == "25"
    assert bench.share(10, [2.0, 1.0, 1.0], 100, [5.0, 5.0, 5.0]) == "50"  # the median


def test_alternate_runs_each_arm_once_a_round_in_changing_order():
    calls = []
    times = bench.alternate({name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}, 8)
    rounds = [calls[i:i + 3] for i in range(0, 24, 3)]
    assert len(calls) == 24 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(map(tuple, rounds))) > 2
    assert times == {name: [3.0 * i + r.index(name) + 1 for i, r in enumerate(rounds)] for name in "abc"}


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


@pytest.fixture
def run(toy, tmp_path, monkeypatch, ceilings):
    """A function that runs a verb on the toy. torch.compile traces and leaves the tracing as it is: no C++ is built."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, backend="eager", **kw))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "Ceilings", lambda device, dtype: ceilings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(verb, *flags):
        bench.main([verb, f"--sizes={toy}", f"--out={tmp_path / 'out'}", "--rounds=3", *flags])
        return tmp_path / "out"
    yield run
    torch._dynamo.reset()


def table(folder, name):
    """The rows of a markdown table, and what is written below it."""
    lines, below = (folder / f"{name}.md").read_text(encoding="utf-8").split("\n\n", 1)
    columns, rule, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines.splitlines())
    assert set("".join(rule)) == {"-"} and rows and all(len(row) == len(columns) for row in rows)
    return [dict(zip(columns, row)) for row in rows], below


def test_kernels(run, capsys):
    rows, below = table(run("kernels", "--tokens=16", "--strategies=baseline,unified"), "kernels_toy")
    out = capsys.readouterr().out
    assert out.startswith("Ceilings: ") and rows[0]["op"] in out and "16 tokens, float32, 3 rounds" in below
    assert "Ceilings: " in below and "`python bench.py kernels " in below and "--out" not in below
    assert {row["op"].split()[0] for row in rows} == {"rms_norm", "scaled_cast", "qk_norm_rope", "swiglu"}
    assert [row["arm"] for row in rows[:2]] == ["eager", "compile"]
    assert all(float(row[f"{part}_us"]) > 0 and float(row[f"{part}_copy_%"]) >= 0
               for row in rows for part in ("forward", "both"))
    assert all(row["both_vs_compile"] == "1.000 (1.000–1.000)" for row in rows if row["arm"] == "compile")


def ops(size, *strategies, tokens=32):
    return {case.op: case for case in bench.cases(size, strategies, tokens, CPU, "float32")}


def test_cases_are_what_a_model_calls(toy):
    plain, both = ops(toy, "baseline"), ops(toy, "baseline", "unified")
    # 4 × 8 tokens of 16 channels; q, k and v share one γ; the FFN's 42 hidden channels are padded to 48
    assert list(plain) == ["rms_norm 4×8×16", "scaled_cast 16×16, 16×16, 16×16, 16", "qk_norm_rope 4×8×48",
                           "rms_norm 4×8×16, 4×8×16", "scaled_cast 16×42", "scaled_cast 42×16, 42×16, 16",
                           "swiglu 4×8×96", "scaled_cast 32×16, 16"]
    added = set(both) - set(plain)
    assert set(plain) < set(both) and all(both[op].strategy == "unified" for op in added)
    assert "scaled_cast 42×16, 42×16, 16, 16" in added and "swiglu normed=True 4×8×96, 42" in added


def test_bytes_that_an_op_must_move(tmp_path):
    path = tmp_path / "size.py"  # no padding, which is of a layout and not of an op
    path.write_text("n_layer, n_head, n_embd, ffn_dim = 1, 4, 16, 48\nvocab_size, block_size = 32, 8\n")
    found = ops(str(path), "baseline", "unified")
    X, Y, H = 4 * 32 * 16, 4 * 32 * 48, 4 * 32 * 48  # bytes of the stream, of q, k and v, of the hidden channels
    W, C, V = 4 * 3 * 16 * 16, 4 * 2 * 48 * 16, 4 * 16  # of the matrices, of a γ
    expected = {
        "rms_norm 4×8×16": (2 * X, 5 * X),  # backward: dy and x in, dx out
        "rms_norm 4×8×16, 4×8×16": (4 * X, 8 * X),  # dy, dtotal and the sum in; one gradient serves both
        "scaled_cast 16×16, 16×16, 16×16, 16": (2 * W + V, 5 * W + 3 * V),  # dout, W and γ in, dW and dγ out
        "qk_norm_rope 4×8×48": (Y + 2 * Y // 3, 3 * Y + 2 * Y // 3),  # v may stay; a rotation's gradient needs no input
        "swiglu 4×8×96": (3 * H, 8 * H),  # dh and y in, dy out
        "scaled_cast 48×16, 48×16, 16": (2 * C + V, 5 * C + 3 * V)}
    for op, (forward, both) in expected.items():
        assert bench.bytes_moved(found[op]) == {"forward": forward, "both": both}, op


@pytest.mark.skipif(not kernels.INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")
def test_the_arms_of_a_case_compute_the_same(toy):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in bench.cases(toy, ["baseline", "dp", "unified", "gemma_wd_all"], 16, device, "float32"):
        results = []
        for name in ("torch", "triton"):
            with kernels.backend(name):
                outs = [*bench.tree_leaves(case.call())]
                results.append([*outs, *torch.autograd.grad(outs, case.inputs, [torch.ones_like(y) for y in outs])])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), case.op


def test_arms_ask_for_their_twin(monkeypatch):
    """On a GPU: the op as it is, as torch.compile has it, as Triton, and what Liger offers."""
    asked = []

    @contextlib.contextmanager
    def backend(name):
        asked.append(name)
        yield
    monkeypatch.setattr(kernels, "backend", backend)
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    x = torch.randn(4, 8, requires_grad=True)
    case = bench.Case("baseline", "op", (x,), lambda: kernels.rms_norm(x, 1e-6), lambda: x * 2)
    arms = bench.arms_of(case, SimpleNamespace(type="cuda"))
    assert list(arms) == [(arm, part) for arm in ("eager", "compile", "triton", "liger") for part in ("forward", "both")]
    asked.clear()
    for f in arms.values():
        (y,) = f()
        assert y.shape == x.shape
    assert asked == ["torch"] * 4 + ["triton"] * 2 + ["torch"] * 2


def test_what_liger_offers(monkeypatch):
    called = []

    def function(name):
        return SimpleNamespace(apply=lambda *args: called.append((name, *args)))
    parts = {"rms_norm": "LigerRMSNormFunction", "fused_add_rms_norm": "LigerFusedAddRMSNormFunction",
             "swiglu": "LigerFusedGateUpSiLUMulFunction"}
    package = ModuleType("liger_kernel.ops")
    for name, of in parts.items():
        setattr(package, name, SimpleNamespace(**{of: function(name)}))
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, package)
    x, r, y = torch.ones(3, 4), torch.zeros(3, 4), torch.ones(3, 8)
    bench.ligers("rms_norm", x=x, eps=1e-6)()
    bench.ligers("rms_norm", x=x, eps=1e-6, residual=r)()
    bench.ligers("swiglu", y=y, n=4)()
    assert [(name, rest[0] is (y if name == "swiglu" else x)) for name, *rest in called] == [
        ("rms_norm", True), ("fused_add_rms_norm", True), ("swiglu", True)]
    assert called[1][2] is r and torch.equal(called[0][2], torch.ones(4)) and called[0][-1] is False  # not in place
    assert bench.ligers("swiglu", y=y, n=4, normed=True) is None and bench.ligers("scaled_cast", weights=[x]) is None
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    assert bench.ligers("rms_norm", x=x, eps=1e-6) is None


def test_overhead(run):
    folder = run("overhead", "--micro_batch=32", "--strategies=baseline,hg,dp,baseline --n_layer=2")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    for way in ("eager", "compiled"):
        rows, below = table(folder, f"overhead_toy_{way}")
        assert [row["strategy"] for row in rows] == ["baseline", "hg", "dp", "baseline --n_layer=2"]
        assert rows[0]["time"] == rows[0]["memory"] == "1.0000" and "256 tokens a step" in below
        assert all(float(row["low"]) <= float(row["time"]) <= float(row["high"]) for row in rows)
        memory = [float(row["memory"]) for row in rows]
        assert 0.9 < memory[1] < 1.1 and 0.9 < memory[2] < 1.1 and memory[3] > 1.2  # vectors are small, a block is not


@pytest.mark.parametrize("flag, way", [("--eager", "eager"), ("--compile", "compiled")])
def test_overhead_one_way(flag, way, run):
    folder = run("overhead", flag, "--strategies=baseline")
    assert [path.name for path in folder.iterdir()] == [f"overhead_toy_{way}.md"]


def test_overhead_names_every_strategy_that_has_a_target():
    for name in bench.STRATEGIES["overhead"].split(","):
        bench.settings_of("quickstart", name)
    assert {"baseline", "hg", "dp", "or", "norm", "unified", "unified_light", "unified_free"} <= {
        *bench.STRATEGIES["overhead"].split(",")}


def test_arms_share_their_matrices_and_moments_and_stand_still(toy):
    a, shared = SimpleNamespace(device=CPU, dtype="float32", micro_batch=0), {}
    base, dual = (bench.make_arm(toy, strategy, a, "eager", shared) for strategy in ("baseline", "unified"))
    p, q = base.model.blocks[0].attn.o, dual.model.blocks[0].attn.o
    assert p is not q and p.data_ptr() == q.data_ptr()
    moments = [arm.optimizers[0].state[w]["exp_avg"] for arm, w in ((base, p), (dual, q))]
    assert moments[0] is moments[1] and moments[0].abs().sum() > 0
    before = [w.clone() for w in dual.model.parameters()]
    losses = {dual.step() for _ in range(8)}  # four batches, twice
    assert len(losses) == 4 and all(torch.equal(a, b) for a, b in zip(before, dual.model.parameters()))


def test_memory_counts_parameters_and_what_a_step_allocates():
    class Toy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(1 << 18))  # 1 MiB

        def loss(self, x, y):
            return (self.w * self.w.detach().repeat(3)[:1 << 18]).sum()  # the copy has 3 MiB
    model = Toy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    arm = bench.Arm(model, model.loss, [optimizer], [torch.zeros(2, 1)])
    arm.step()
    memory = arm.memory_mb()
    assert 3 + 3 < memory < 3 + 3 + 4  # three copies of w are held; then 3 for the copy, and a few of 1
    assert arm.memory_mb() == memory


def test_a_step_is_timed_as_the_median_of_a_block(monkeypatch):
    arm = bench.Arm(None, None, [], [torch.zeros(2, 1)])
    steps, ticks = [], iter([0.0, 1.0, 11.0, 13.0])  # steps of 1, 10 and 2 s
    monkeypatch.setattr(arm, "step", lambda: steps.append(1))
    monkeypatch.setattr(bench, "clock", lambda device: lambda: next(ticks))
    assert arm.seconds(3) == 2.0 and len(steps) == 3


def test_peers(run):
    pytest.importorskip("transformers", reason="compares with transformers' Llama")
    rows, below = table(run("peers"), "peers_toy")
    assert "In fp32 the same weights give the loss 3." in below
    assert [(row["whose"], row["way"]) for row in rows] == [(whose, way) for way in ("eager", "compiled")
                                                            for whose in ("Hugging Face", "nanoScale")]
    assert all(row["times_theirs"] == "1.000" for row in rows[::2]) and all(float(row["low"]) > 0 for row in rows)


@pytest.mark.parametrize("wrong", ["weight", "eps", "nan"])
def test_peers_refuses_to_time_what_is_not_the_same(wrong, run, monkeypatch):
    pytest.importorskip("transformers", reason="compares with transformers' Llama")
    hf_tensors, hf_config = bench.hf_tensors, bench.hf_config

    def tensors(*args):
        there = hf_tensors(*args)
        if wrong != "eps":
            there["model.layers.0.mlp.down_proj.weight"].mul_(-30 if wrong == "weight" else math.nan)
        return there

    monkeypatch.setattr(bench, "hf_tensors", tensors)
    monkeypatch.setattr(bench, "hf_config", lambda *args: {
        **hf_config(*args), **({"rms_norm_eps": 1e-2} if wrong == "eps" else {})})
    monkeypatch.setattr(bench, "alternate", lambda *args: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match="nothing to compare the speed of"):
        run("peers", "--eager")


def test_profile(run):
    folder = run("profile", "--strategies=baseline,baseline --reparam=or")
    text = (folder / "profile_toy_baseline_eager.md").read_text(encoding="utf-8")
    assert text.count("```") == 2 and "aten::mm" in text and "Self CPU time total" in text
    assert "5 steps. Without the profiler one takes" in text and "of the matrix product's speed" in text
    assert len(list(folder.iterdir())) == 4 and (folder / "profile_toy_baseline_reparam=or_compiled.md").exists()


def test_names_of_sizes():
    assert [bench.size_name(size) for size in ("llama_0.12b", "/a/b/toy.py")] == ["llama_0.12b", "toy"]


def test_bad_requests_are_refused(run, monkeypatch):
    for flags, said in ((["--sizes=nowhere"], "no such config file"), (["--strategies=nothing"], "no such config file"),
                        (["--strategies=baseline --lrr=1"], "lrr")):
        with pytest.raises(ConfigError, match=said):
            run("overhead", *flags)
    with pytest.raises(ConfigError, match="peers compares with a Llama"):
        run("peers", "--strategies=dnp")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        run("peers")


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_script_runs_the_gpus_tests_and_then_every_verb(tmp_path):
    def calls(failing):
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\ncase "$*" in {failing}) exit 3;; esac\n')
        python.chmod(0o755)
        (tmp_path / "calls").write_text("")
        done = subprocess.run(["bash", str(ROOT / "bench.sh"), "--sizes=x"], capture_output=True,
                              env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
        return done.returncode, (tmp_path / "calls").read_text().splitlines()
    verbs = [f"bench.py {verb} --sizes=x" for verb in bench.VERBS]
    code, (first, *rest) = calls("nothing")
    assert code == 0 and "tests/test_gpu.py" in first and rest == verbs
    code, (_, *rest) = calls("*overhead*")
    assert code == 1 and rest == verbs  # what fails loses no other's table
    assert calls("*pytest*")[0] == 3 and len(calls("*pytest*")[1]) == 1  # a wrong kernel needs no timing
