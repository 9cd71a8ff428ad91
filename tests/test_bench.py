"""bench.py: its statistics, and that every verb runs here and leaves its tables. What it measures is not tested."""

import contextlib
import csv
import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
import torch

import bench
import kernels
from configurator import ConfigError

DeviceType = torch.autograd.DeviceType


# ---------------------------------------------------------------------------------------------------------------
# statistics


def test_quartiles_by_hand():
    assert bench.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert bench.quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert bench.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_paired_ratio_by_hand():
    # ratios 2, 4, 8: logs 1, 2, 3 times ln 2, their mean 2 and deviation 1; t(2) = 4.303, so ± 4.303/√3
    ratio, low, high = bench.paired_ratio([2.0, 8.0, 24.0], [1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)
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


def test_faster_or_slower():
    assert bench.faster_or_slower(0.9, 0.8, 0.985) == "faster"
    assert bench.faster_or_slower(0.99, 0.985, 0.995) == "even"  # within a per cent
    assert bench.faster_or_slower(1.3, 0.9, 1.7) == "even"
    assert bench.faster_or_slower(1.1, 1.02, 1.2) == "slower"
    assert bench.faster_or_slower(0.9, math.nan, math.nan) == "even"


def test_a_kernel_stays_where_it_wins_somewhere_and_loses_nowhere():
    def rows(**sizes):
        return [{"op": "op", "arm": arm, "forward_is": f, "both_is": b}
                for f, b in sizes.values() for arm in ("triton", "eager")]
    assert bench.kept(rows(small=("even", "even"), large=("even", "faster"))) == {"op": "kept"}
    assert bench.kept(rows(small=("slower", "even"), large=("faster", "faster"))) == {"op": "delete"}
    assert bench.kept(rows(small=("even", "slower"), large=("faster", "faster"))) == {"op": "delete"}
    assert bench.kept(rows(small=("even", "even"))) == {"op": "delete"}  # no gain is no reason
    assert bench.kept([{"op": "op", "arm": "eager"}]) == {}


def test_alternate_runs_each_arm_once_a_round_in_changing_order():
    calls = []
    arms = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    times = bench.alternate(arms, 8)
    rounds = [calls[i:i + 3] for i in range(0, 24, 3)]
    assert len(calls) == 24 and all(sorted(r) == ["a", "b", "c"] for r in rounds) and len(set(map(tuple, rounds))) > 2
    assert times == {name: [3.0 * i + r.index(name) + 1 for i, r in enumerate(rounds)] for name in "abc"}


def test_alternate_stops_in_time_but_not_before_there_is_an_interval():
    calls = []
    assert len(bench.alternate({"a": lambda: calls.append(1) or 1.0}, 100, deadline=0.0)["a"]) == bench.MIN_ROUNDS


# ---------------------------------------------------------------------------------------------------------------
# verbs, at a size of a few thousand parameters


@pytest.fixture
def toy(tmp_path):
    path = tmp_path / "toy.py"
    path.write_text("n_layer, n_head, n_embd = 1, 2, 16\nvocab_size, block_size = 32, 8\nmicro_batch = 2\n")
    return str(path)


@pytest.fixture
def run(toy, tmp_path, monkeypatch):
    """A function that runs a verb on the toy. torch.compile traces and leaves the tracing as it is: no C++ is built."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, backend="eager", **kw))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def run(verb, *flags):
        bench.main([verb, f"--sizes={toy}", "--device=cpu", f"--out={tmp_path / 'out'}", "--rounds=3", "--block=1",
                    *flags])
        return tmp_path / "out"
    yield run
    torch._dynamo.reset()


def table(folder, name):
    """The rows of a CSV, after its markdown twin showed the same."""
    rows = list(csv.DictReader(open(folder / f"{name}.csv", encoding="utf-8")))
    assert rows and all(None not in row and None not in row.values() for row in rows)
    assert all(row[key] for row in rows for key in ("device", "threads", "python", "torch", "commit"))
    lines = [line for line in (folder / f"{name}.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, rule, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert set(rule) == {"---"} and len(body) == len(rows)
    for cells, row in zip(body, rows):
        assert dict(zip(head, cells, strict=True)) == {key: row[key].strip() for key in head}
    return rows


def test_kernels(run):
    rows = table(run("kernels", "--tokens=32", "--flush_mb=1"), "kernels")
    assert {"rms_norm", "rms_norm + residual", "scaled_cast qkv v", "scaled_cast gate_up uv", "rope",
            "qk_norm_rope qkv", "swiglu", "swiglu dual_norm"} <= {row["op"] for row in rows}
    for row in rows:
        assert row["arm"] in ("eager", "compile", "triton") or row["op"].startswith(("rms_norm", "swiglu"))
        assert float(row["forward_us"]) > 0 and float(row["both_us"]) > 0 and float(row["both_%"]) >= 0
        assert (row["both_is"] in ("faster", "even", "slower")) == (row["arm"] != "compile")
        assert not row["verdict"] or row["arm"] == "triton"


def needed(case):
    """
    The bytes of a case by another way: forward reads the inputs and writes the outputs; backward reads the outputs'
    gradients and what is named here, and writes the inputs' gradients. Vectors left out.
    """
    wide = [t for t in case.inputs if t.dim() > 1]
    outs = case.call(*case.inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    size = bench_bytes
    if case.op == "rms_norm + residual":  # backward reads the sum, which is an output, and writes one gradient
        return size(wide) + size(outs), size(wide) + 2 * size(outs) + 2 * size(wide[:1])
    if case.op in ("rope", "qk_norm_rope qk"):  # v is a part of y, where it may stay
        q, k, v = outs
        normed = size((q, k)) if "norm" in case.op else 0
        return 2 * size((q, k)), 2 * size((q, k)) + normed + size(outs) + size(wide)
    forward = size(wide) + size(outs)
    # what is linear needs no input for its gradient
    saved = 0 if case.op == "scaled_cast down" else size(wide)
    return forward, forward + size(outs) + saved + size(wide)


def test_arms_ask_for_their_twin(monkeypatch, tmp_path):
    """On a GPU: the op as Triton, the twin as it is, and the twin compiled; and what the table says of them."""
    asked, slow = [], {"eager": 3.0, "compile": 2.0, "triton": 1.0}

    @contextlib.contextmanager
    def backend(name):
        asked.append(name)
        yield
    monkeypatch.setattr(kernels, "backend", backend)
    monkeypatch.setattr(torch, "compile", lambda f, **kw: f)
    x = torch.randn(4, 8, requires_grad=True)
    case = bench.Case("op", (x,), lambda x: kernels.rms_norm(x, 1e-6), 100, 200, {"liger": lambda x: x * 2})
    arms = bench.arms_of(case, SimpleNamespace(type="cuda"))
    assert list(arms) == ["eager", "compile", "triton", "liger"]
    for forward in arms.values():
        (dx,) = bench.both(forward, case.inputs)()
        assert dx.shape == x.shape
    assert set(asked[:4]) == {"torch"} and set(asked[4:6]) == {"triton"}

    times = {(arm, part): [t * (1 + 0.001 * i) for i in range(4)] for arm, t in slow.items()
             for part in ("forward", "both")}
    times["copy", ""] = [10.0] * 4
    eager, compiled, triton = rows = bench.kernel_rows("size", case, times, copied=1000)
    assert (eager["both_is"], compiled["both_is"], triton["both_is"]) == ("slower", "", "faster")
    assert triton["forward_%"] == "100" and triton["both_%"] == "200" and eager["forward_%"] == "33"
    assert triton["both_vs_compile"] == "0.500 (0.500–0.500)" and bench.kept(rows) == {"op": "kept"}


def bench_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_bytes_that_an_op_must_move(tmp_path):
    path = tmp_path / "size.py"  # no padding, which is of a layout and not of an op; and fewer heads for k and v
    path.write_text("n_layer, n_head, n_kv_head, n_embd, ffn_dim = 1, 4, 2, 16, 48\nvocab_size, block_size = 32, 8\n")
    for case in bench.cases(bench.settings_of(str(path)), 32, torch.device("cpu"), torch.float32):
        assert (case.forward_bytes, case.both_bytes) == needed(case), case.op


@pytest.mark.skipif(not kernels.INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU or the interpreter")
def test_the_arms_of_a_case_compute_the_same(toy):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in bench.cases(bench.settings_of(toy), 16, device, torch.float32):
        results = []
        for name in ("torch", "triton"):
            with kernels.backend(name):
                torch.manual_seed(0)
                results.append(bench.both(lambda: case.call(*case.inputs), case.inputs)())
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), case.op


def test_cases_are_what_a_model_computes(tmp_path):
    """Their shapes: the ops of a forward pass, recorded, are among the cases with the same inputs."""
    path = tmp_path / "size.py"
    path.write_text("n_layer, n_head, n_embd = 1, 2, 16\nvocab_size, block_size = 32, 8\n")
    s = bench.settings_of(str(path), "unified")
    import model as model_module
    seen = {}

    def record(name, f):
        def recorded(y, *args, **kw):
            seen.setdefault(name, set()).add(tuple(y.shape))
            return f(y, *args, **kw)
        return recorded
    with pytest.MonkeyPatch.context() as m:
        for name in ("rms_norm", "qk_norm_rope", "swiglu"):
            m.setattr(model_module, name, record(name, getattr(kernels, name)))
        x = torch.zeros(4, 8, dtype=torch.long)
        bench.build(s, SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32))(x, x)
    found = {case.op: tuple(case.inputs[0].shape) for case in bench.cases(s, 32, torch.device("cpu"), torch.float32)}
    assert seen == {"rms_norm": {found["rms_norm"]}, "qk_norm_rope": {found["qk_norm_rope qkv"]},
                    "swiglu": {found["swiglu dual_norm"]}}


def test_overhead(run):
    rows = table(run("overhead", "--micro_batch=32"), "overhead_toy")
    specs = bench.STRATEGIES["overhead"]
    assert [row["strategy"] for row in rows] == specs + ["baseline", "hg", "dp", "unified"]
    assert rows[0]["ratio"] == rows[0]["memory_ratio"] == "1.0000"
    for row in rows:
        assert float(row["low"]) <= float(row["ratio"]) <= float(row["high"])
    memory = {row["strategy"]: float(row["memory_ratio"]) for row in rows[:len(specs)]}
    assert memory["dp:unfolded"] > memory["dp"] > 1  # u's, which the optimizer keeps; the activations it scales


def test_overhead_compiled(run):
    rows = table(run("overhead", "--compile=True", "--strategies=baseline,dp:unfolded"), "overhead_toy")
    assert [row["strategy"] for row in rows] == ["baseline", "dp:unfolded"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_arms_share_their_matrices_and_moments_and_stand_still(toy):
    a = bench.arguments(["overhead", f"--sizes={toy}", "--device=cpu", "--block=1"])
    shared = {}
    base, dual = (bench.make_arm(toy, spec, a, shared) for spec in ("baseline", "unified:unfolded"))
    p, q = base.model.blocks[0].attn.o, dual.model.blocks[0].attn.o
    assert p is not q and p.data_ptr() == q.data_ptr()
    moments = [arm.optimizers[0].state[w]["exp_avg"] for arm, w in ((base, p), (dual, q))]
    assert moments[0] is moments[1] and moments[0].abs().sum() > 0
    assert not dual.model.blocks[0].attn.qkv.folded and base.model.blocks[0].attn.qkv.folded
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
    arm = bench.Arm(model, model.loss, [optimizer], [(None, None)])
    arm.step()
    assert 3 + 3 < arm.memory_mb() < 3 + 3 + 4  # three copies of w are held; then 3 for the copy, and a few of 1


def test_peers(run, capsys):
    pytest.importorskip("transformers", reason="compares with transformers' Llama")
    rows = table(run("peers"), "peers_toy")
    assert "The same weights give the loss 3." in capsys.readouterr().out
    assert [row["arm"] for row in rows] == ["Hugging Face", "nanoScale", "Hugging Face, compiled",
                                            "nanoScale, compiled"]
    assert [bool(row["times_theirs"]) for row in rows] == [False, True, False, True]


@pytest.mark.parametrize("wrong", ["weight", "eps", "nan"])
def test_peers_refuses_to_time_what_is_not_the_same(wrong, run, capsys, monkeypatch):
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
    with pytest.raises(SystemExit) as e:
        run("peers")
    assert e.value.code == 1 and "nothing to compare the speed of" in capsys.readouterr().err


def test_peers_without_transformers_says_so_and_goes_on(run, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    folder = run("peers")
    assert "transformers is not installed" in capsys.readouterr().out and not folder.exists()


@pytest.mark.parametrize("compile", [True, False])
def test_profile(compile, run):
    rows = table(run("profile", f"--compile={compile}", "--strategies=baseline"), "profile_toy_baseline")
    assert abs(sum(float(row["share_%"]) for row in rows) - 100) < 2
    mm = next(row for row in rows if row["kernel"] == "aten::mm")
    assert float(mm["argument_mb"]) > 0 and float(mm["calls"]) >= 10
    assert [float(row["ms"]) for row in rows[:-1]] == sorted((float(row["ms"]) for row in rows[:-1]), reverse=True)


def event(name, device=DeviceType.CPU, us=0.0, kernels=(), shapes=(), kinds=(), mine=0.0, user=False):
    return SimpleNamespace(name=name, device_type=device, kernels=[SimpleNamespace(name=k) for k in kernels],
                           time_range=SimpleNamespace(elapsed_us=lambda: us), input_shapes=list(shapes),
                           input_dtypes=list(kinds), self_cpu_time_total=mine, is_user_annotation=user)


def test_by_kernel_adds_up_times_of_kernels_and_arguments_of_who_launched_them():
    events = [event("aten::mm", kernels=["gemm"], shapes=[[4, 8], [8, 2], []], kinds=["c10::BFloat16"] * 2 + ["Scalar"],
                    mine=99.0),
              event("aten::mm", kernels=["gemm"], shapes=[[4, 8], [8, 2], []], kinds=["float"] * 3),
              event("gemm", DeviceType.CUDA, 3.0), event("gemm", DeviceType.CUDA, 4.0),
              event("a range", DeviceType.CUDA, 50.0, user=True), event("Memset", DeviceType.CUDA, 1.0)]
    assert bench.by_kernel(events, True) == {"gemm": [7e-6, 2, 48 * 2 + 48 * 4], "Memset": [1e-6, 1, 0]}
    assert bench.by_kernel(events[:2], False) == {"aten::mm": [99e-6, 2, 48 * 6]}


def test_a_size_that_does_not_fit_loses_no_other(run, toy, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other.py"
    other.write_text(open(toy).read())
    make_arm = bench.make_arm

    def make(size, *args):
        if size == toy:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
        return make_arm(size, *args)
    monkeypatch.setattr(bench, "make_arm", make)
    with pytest.raises(SystemExit):
        run("overhead", f"--sizes={toy},{other}", "--strategies=baseline,hg")
    assert "CUDA out of memory. Tried to allocate" in capsys.readouterr().err
    assert len(table(tmp_path / "out", "overhead_other")) == 2


def test_all_goes_on_where_a_verb_fails_and_says_which(toy, tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(bench.PLAN, "cpu", [
        (0.5, "overhead --sizes=nowhere"),
        (9.0, "train --sizes=quickstart"),
        (0.4, f"profile --sizes={toy} --strategies=baseline"),
    ])
    with pytest.raises(SystemExit) as e:
        bench.main(["all", "--device=cpu", f"--out={tmp_path}", "--minutes=2"])
    assert e.value.code == 1
    assert table(tmp_path, "profile_toy_baseline")
    err = capfd.readouterr().err
    assert "exit code 2: python bench.py overhead --sizes=nowhere" in err
    assert "no time for: python bench.py train --sizes=quickstart" in err


def test_every_command_of_the_plan_is_one(tmp_path):
    for plan in bench.PLAN.values():
        for minutes, command in plan:
            a = bench.arguments([*command.split(), "--device=cpu"])
            for size in a.sizes:
                bench.settings_of(size)
            for spec in a.strategies or []:
                bench.settings_of("quickstart", spec.partition(":")[0])
    names = [verb for verb, *_ in bench.commands_to_prebuild(bench.PLAN["cuda"])]
    assert set(names) == {"kernels", "overhead", "peers"} and len(names) == 13
    assert sum(minutes for minutes, _ in bench.PLAN["cuda"]) < 10.5


def test_kernels_keeps_what_it_has_when_time_is_up(run, monkeypatch, capsys):
    alternate = bench.alternate

    def slow(*args):
        times = alternate(*args)
        monkeypatch.setattr(bench.time, "monotonic", lambda: math.inf)
        return times
    monkeypatch.setattr(bench, "alternate", slow)
    rows = table(run("kernels", "--tokens=16", "--flush_mb=1"), "kernels")
    assert {row["op"] for row in rows} == {"rms_norm"} and "no time for swiglu" in capsys.readouterr().err


def test_prebuilding_runs_the_commands_of_the_plan(toy, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(bench.subprocess, "Popen", lambda command, **kw: told.append(command[2:]) or SimpleNamespace(
        poll=lambda: 0))
    bench.prebuild([(1, "overhead --sizes=a,b --strategies=x,y --block=5"), (1, "train --sizes=a")], 20)
    assert told == [["overhead", f"--sizes={s}", "--rounds=0", f"--strategies={x}"] for s in "ab" for x in "xy"]


def test_prebuilding_compiles_and_times_nothing(run, monkeypatch):
    monkeypatch.setattr(bench, "alternate", lambda *args: pytest.fail("it was timed"))
    cases = bench.cases
    monkeypatch.setattr(bench, "cases", lambda *args: itertools.islice(cases(*args), 2))
    for verb in ("kernels", "overhead", "peers"):
        assert not run(verb, "--rounds=0", "--tokens=16", "--flush_mb=1").exists()


def test_train_and_checkpoint(run, corpus, monkeypatch, toy):
    real = bench.subprocess.run

    def on_the_corpus(command, **kw):  # the embedded one takes a while to prepare
        command = [f"--dataset={corpus}" if arg == "--dataset=pysrc" else arg for arg in command]
        return real([*command, "--vocab_size=256", "--batch_tokens=64", "--eval_tokens=64"], **kw)
    monkeypatch.setattr(bench.subprocess, "run", on_the_corpus)
    rows = table(run("train", "--steps=3", "--strategies=baseline"), "train")
    assert float(rows[0]["tokens_per_second"]) > 0 and rows[0]["params"]
    monkeypatch.undo()
    rows = table(run("checkpoint"), "checkpoint")
    assert float(rows[0]["save_seconds"]) >= 0


def test_names_of_tables():
    assert [bench.size_name(size) for size in ("llama_0.12b", "/a/b/toy.py")] == ["llama_0.12b", "toy"]


def test_bad_requests_are_refused(run, toy):
    with pytest.raises(ConfigError, match="no such config file"):
        bench.main(["overhead", "--sizes=nowhere", "--device=cpu"])
    with pytest.raises(ConfigError, match="behind the colon"):
        run("overhead", "--strategies=baseline:sideways")


def test_wall_or_own_clock(monkeypatch):
    import time
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert bench.clock(torch.device("cpu")) is time.process_time
    assert bench.clock(torch.device("cuda")) is time.perf_counter
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert bench.clock(torch.device("cpu")) is time.perf_counter
    assert statistics.median([bench.stopwatch(torch.device("cpu"), 1)(lambda: None) for _ in range(3)]) < 1
