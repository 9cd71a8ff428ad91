"""
Measurements, each a table on stdout, and a CSV and a markdown table in results/bench/:

    python bench.py kernels      each op of kernels.py alone: eager, compiled, Triton, and other people's
    python bench.py overhead     step time and memory of strategies, over the baseline's
    python bench.py peers        tokens per second beside Hugging Face's Llama, of the same shape and the same loss
    python bench.py profile      where the time of one training step goes
    python bench.py train        whole runs of train.py: tokens per second, MFU, peak memory
    python bench.py checkpoint   seconds to save and to load a checkpoint
    python bench.py all          every one, the most telling first, in --minutes

On a GPU: llama_0.12b and llama_1b, in bf16 and compiled. On a CPU: the quickstart, in fp32; its absolute times say
little about any other machine.

What is compared runs in one process, the arms in turns and in an order drawn anew for each round, so that whatever
else slows the machine slows them alike. A ratio is the geometric mean over rounds of one arm's time over the other's in
the same round, with Student's 95% interval of that mean.
"""

import argparse
import csv
import itertools
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch._functorch.config
import torch._inductor.config
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import kernels
from stats import mean_and_half_width
from configurator import ConfigError, configure, refuse
from devices import PEAK_FLOPS, device_name, pick_device
from hf import fold, hf_config, hf_tensors, hf_type
from model import ALIGN, GPT, rope_tables
from norms import Branches, ScaleVector
from optim import make_optimizers, param_groups
from runs import git_commit, load_checkpoint, save_checkpoint, versions
from settings import Settings, gpt_config

HERE = Path(__file__).resolve().parent
# of each verb, where none are named
STRATEGIES = {"train": ["no_scale", "baseline", "unified"],
              "overhead": ["baseline", "hg", "dp", "or", "unified", "baseline:unfolded", "hg:unfolded", "dp:unfolded",
                           "unified:unfolded"],
              "profile": ["unified"]}
MIN_ROUNDS = 3  # below, an interval says nothing


class NotTheSame(RuntimeError):
    """Two models that were to be compared compute different things."""


# ---------------------------------------------------------------------------------------------------------------
# statistics


def quartiles(values):
    """(25%, 50%, 75%) of values, interpolated between neighbours, the extremes being 0% and 100%."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def paired_ratio(times, base):
    """(ratio, low, high) of times over base, paired by round: the geometric mean and its 95% interval."""
    mean, half = mean_and_half_width([math.log(t / b) for t, b in zip(times, base, strict=True)])
    half = math.nan if half is None else half
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def faster_or_slower(ratio, low, high, noise=0.01):
    """What (ratio, low, high) says of the arm above the line; a per cent is what an arm differs from itself by."""
    return "faster" if high < 1 - noise else "slower" if low > 1 + noise else "even"


def clock(device):
    """
    The clock to time with. On a CPU and one thread, that thread's own: it stands still while others have the core. More
    threads, or a GPU, are only seen by the one on the wall.
    """
    return time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def alternate(arms, rounds, deadline=math.inf, seed=0):
    """
    arms: name -> a function that does the work once and returns its seconds. Every round calls each once, in an order
    drawn anew. No round begins that would probably end behind `deadline`, of time.monotonic, but for MIN_ROUNDS.
    Returns name -> [seconds], a number for each round.
    """
    order, times = random.Random(seed), {name: [] for name in arms}
    with tqdm(total=rounds * len(arms), unit="timing", leave=False, disable=None) as bar:
        for i in range(rounds):
            began = time.monotonic()
            for name in order.sample(list(arms), len(arms)):
                times[name].append(arms[name]())
                bar.update()
            now = time.monotonic()
            if i + 1 >= MIN_ROUNDS and now + (now - began) > deadline:
                break
    return times


# ---------------------------------------------------------------------------------------------------------------
# tables


def machine(device):
    """What a row must say of where it was measured."""
    others = {}
    for package in ("triton", "transformers"):
        if package in sys.modules:  # imported by whoever used it
            others[package] = sys.modules[package].__version__
    return {"device": device_name(device), "threads": torch.get_num_threads(), **versions(), **others,
            "commit": git_commit()}


def report(name, rows, a, notes=()):
    """Print rows as a table, and write them with the machine to NAME.csv and NAME.md in a.out."""
    columns, where = list(rows[0]), machine(a.device)
    command = " ".join(arg for arg in a.command if not arg.startswith(("--out", "--minutes")))
    lines = [dict(zip(columns, columns)), *rows]
    widths = [max(len(str(line[c])) for line in lines) for c in columns]
    print(f"\n{name}")
    for line in lines:
        print("  ".join(str(line[c]).rjust(w) for c, w in zip(columns, widths)))
    print(*notes, sep="\n", end="\n" if notes else "")
    a.out.mkdir(parents=True, exist_ok=True)
    with open(a.out / f"{name}.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, [*columns, *where], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **where} for row in rows)
    table = ["| " + " | ".join(str(line[c]) for c in columns) + " |" for line in lines]
    table.insert(1, "|" + "---|" * len(columns))
    said = [f"{key} {value}" for key, value in where.items()]
    (a.out / f"{name}.md").write_text("\n".join([
        *table, "", *notes, *([""] if notes else []),
        f"`python bench.py {command}`: {', '.join(said)}"]) + "\n", encoding="utf-8")


def each_size(sizes, measure):
    """measure(size) for each. One that does not fit in memory does not take the others' results with it."""
    failed = False
    for size in sizes:
        try:
            measure(size)
        except (torch.OutOfMemoryError, NotTheSame) as e:
            print(f"bench.py: {size}: {str(e).splitlines()[0]}", file=sys.stderr)
            failed = True
        torch._dynamo.reset()  # compiled code may hold on to a model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if failed:
        sys.exit(1)


# ---------------------------------------------------------------------------------------------------------------
# kernels


class Case(NamedTuple):
    """An op to time. What it must move: each input read once, each output written once; scale vectors left out."""

    op: str
    inputs: tuple  # tensors
    call: object  # takes them, returns a tensor or several
    forward_bytes: int
    both_bytes: int  # of forward and backward
    peers: dict = {}  # name -> a function like call


def other_peoples():
    """Name -> what Liger and quack offer, of what is installed."""
    found = {}
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction
        # in_place: Liger writes dX over dY, which is as wrong in a benchmark that reuses dY as in a model that does
        found["liger norm"] = lambda x, g, eps: LigerRMSNormFunction.apply(x, g, eps, 0.0, "llama", False)
        found["liger add"] = lambda x, r, g, eps: LigerFusedAddRMSNormFunction.apply(x, r, g, eps, 0.0, "llama", False)
        found["liger swiglu"] = lambda y: LigerFusedGateUpSiLUMulFunction.apply(y)
    except ImportError:
        pass
    try:
        from quack import rmsnorm
        found["quack norm"] = lambda x, g, eps: rmsnorm(x, g, eps=eps)
        found["quack add"] = lambda x, r, g, eps: rmsnorm(x, g, residual=r, eps=eps, prenorm=True)
    except ImportError:
        pass
    return found


def cases(s, tokens, device, dtype):
    """Yield a Case for each op, with the shapes that it has in a model of settings s and a batch of `tokens`."""
    config = gpt_config(s)
    n, d, eps, h, kv = config.n_embd, config.d_head, config.norm_eps, config.n_head, config.n_kv_head
    T = min(config.block_size, tokens)
    B = tokens // T
    m = config.ffn_dim + -config.ffn_dim % ALIGN
    width = (h + 2 * kv) * d
    e = dtype.itemsize
    others = other_peoples()

    def rand(*shape, of=dtype):
        return torch.randn(shape, device=device).to(of).requires_grad_()

    def gamma(n):
        return (1 + 0.1 * torch.randn(n, device=device)).requires_grad_()

    def peers(kind, call):
        return {name.split()[0]: call(f) for name, f in others.items() if name.endswith(kind)}

    X = B * T * n * e  # bytes of the residual stream
    yield Case("rms_norm", (rand(B, T, n),), lambda x: kernels.rms_norm(x, eps), 2 * X, 5 * X)
    yield Case("rms_norm γ", (rand(B, T, n), gamma(n)), lambda x, g: kernels.rms_norm(x, eps, g), 2 * X, 5 * X,
               peers("norm", lambda f: lambda x, g: f(x, g, eps)))
    ones = torch.ones(n, device=device)  # theirs want a γ
    yield Case("rms_norm + residual", (rand(B, T, n), rand(B, T, n)),
               lambda x, r: kernels.rms_norm(x, eps, residual=r), 4 * X, 8 * X,  # one gradient serves x and residual
               peers("add", lambda f: lambda x, r: f(x, r, ones, eps)))
    if device.type == "cuda":  # as long as the published figures' inputs
        rows = 2**25 // n
        large = rows * n * e
        yield Case("rms_norm, 2^25", (rand(rows, n),), lambda x: kernels.rms_norm(x, eps), 2 * large, 5 * large)

    for name, outs in (("qkv", (h * d, kv * d, kv * d)), ("gate_up", (config.ffn_dim,) * 2)):
        k, weights = len(outs), [rand(n_c, n, of=torch.float32) for n_c in outs]
        NK = sum(outs) * n
        yield Case(f"scaled_cast {name} v", (*weights, gamma(n)), lambda *i, k=k: kernels.scaled_cast(
            i[:k], [None] * k, [i[k]] * k, dtype, ALIGN), NK * (4 + e), NK * (12 + 2 * e))
        yield Case(f"scaled_cast {name} uv", (*weights, *(gamma(n_c) for n_c in outs), *(gamma(n) for _ in outs)),
                   lambda *i, k=k: kernels.scaled_cast(i[:k], i[k:2 * k], i[2 * k:], dtype, ALIGN),
                   NK * (4 + e), NK * (12 + 2 * e))
    yield Case("scaled_cast down", (rand(n, config.ffn_dim, of=torch.float32),), lambda w: kernels.scaled_cast(
        [w], [None], [None], dtype, align_columns=ALIGN), NK // 2 * (4 + e), NK // 2 * (8 + 2 * e))

    cos, sin = (t.to(device) for t in rope_tables(d, T, config.rope_theta))
    Y, QK = B * T * width * e, B * T * (h + kv) * d * e
    # v need not move where it has no norm; its gradient does, into its place beside q's and k's
    yield Case("rope", (rand(B, T, width),), lambda y: kernels.qk_norm_rope(y, cos, sin, h, kv), 2 * QK, 2 * QK + 2 * Y)
    yield Case("qk_norm_rope qk", (rand(B, T, width), gamma(d), gamma(d)), lambda y, q, k: kernels.qk_norm_rope(
        y, cos, sin, h, kv, eps, "qk", (q, k, None), d), 2 * QK, 3 * QK + 2 * Y)
    yield Case("qk_norm_rope qkv", (rand(B, T, width), gamma(h * d), gamma(kv * d), gamma(kv * d)),
               lambda y, *g: kernels.qk_norm_rope(y, cos, sin, h, kv, eps, "qkv", g, d), 2 * Y, 5 * Y)

    def gate_up():
        y = torch.randn((B, T, 2, m), device=device).to(dtype)
        y[..., config.ffn_dim:] = 0  # as the GEMM leaves them
        return y.flatten(-2).requires_grad_()

    H = B * T * m * e
    yield Case("swiglu", (gate_up(),), lambda y: kernels.swiglu(y, config.ffn_dim), 3 * H, 8 * H,
               peers("swiglu", lambda f: f))
    yield Case("swiglu dual_norm", (gate_up(), gamma(config.ffn_dim), gamma(config.ffn_dim)),
               lambda y, *g: kernels.swiglu(y, config.ffn_dim, eps, True, g), 3 * H, 8 * H)


def arms_of(case, device):
    """name -> a function without arguments that runs the case's forward."""
    def within(name, call):
        def run():
            with kernels.backend(name):
                return call(*case.inputs)
        return run

    torch._dynamo.reset()  # each case gets a fresh cache of compiled code, of which there may be eight for one lambda
    arms = {"eager": within("torch", case.call), "compile": within("torch", torch.compile(case.call, dynamic=False))}
    if device.type == "cuda":  # the interpreter has no speed to speak of
        arms["triton"] = within("triton", case.call)
    for name, call in case.peers.items():
        arms[name] = within("torch", call)
    return arms


def both(forward, inputs):
    """A function that runs forward and backward, with gradients that are drawn once."""
    outs = forward()
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = tuple(torch.randn_like(y) for y in outs)

    def run():
        outs = forward()
        return torch.autograd.grad(outs if isinstance(outs, tuple) else (outs,), inputs, grads)
    return run


def stopwatch(device, flush_mb):
    """A function that takes a function and returns the seconds of one call, its inputs in no cache."""
    flush, now = torch.empty(flush_mb << 18, dtype=torch.float32, device=device), clock(device)

    def seconds(f):
        if device.type != "cuda":
            flush.zero_()
            began = now()
            f()
            return now() - began
        # The device sleeps for about 2 ms, in which the CPU launches all that follows: the events then enclose the
        # kernels and no gap between them. A training step is fed in the same way.
        torch.cuda._sleep(4_000_000)
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    return seconds


def bench_kernels(a):
    """Every Case at every size. Times are medians with quartiles, beside a copy measured in the same rounds."""
    seconds = stopwatch(a.device, 256 if a.device.type == "cuda" else a.flush_mb)
    a_copy = torch.randn((256 if a.device.type == "cuda" else a.flush_mb) << 18, device=a.device)
    target = torch.empty_like(a_copy)
    copied = 2 * a_copy.numel() * 4
    rows = []
    for size in a.sizes:
        torch.manual_seed(0)
        for case in tqdm(list(cases(settings_of(size), a.tokens, a.device, a.dtype)), desc=size, leave=False,
                         disable=None):
            if time.monotonic() > a.deadline:
                print(f"bench.py: {size}: no time for {case.op}", file=sys.stderr)
                continue
            timings = {("copy", ""): lambda: seconds(lambda: target.copy_(a_copy))}
            for name, forward in arms_of(case, a.device).items():
                try:
                    backward = both(forward, case.inputs)
                    backward()
                except Exception as e:  # a peer's own trouble; ours is in the tests
                    if name in ("eager", "compile", "triton"):
                        raise
                    print(f"bench.py: {case.op}: {name}: {str(e).splitlines()[0]}", file=sys.stderr)
                    continue
                timings[name, "forward"] = lambda f=forward: seconds(f)
                timings[name, "both"] = lambda f=backward: seconds(f)
            if not a.rounds:  # prebuild
                continue
            times = alternate(timings, a.rounds, a.deadline)
            rows += kernel_rows(size_name(size), case, times, copied)
    if rows:
        verdicts = kept(rows)
        for row in rows:
            row["verdict"] = verdicts.get(row["op"], "") if row["arm"] == "triton" else ""
        report("kernels", rows, a, [f"{a.tokens} tokens, {str(a.dtype).removeprefix('torch.')}. MB: what the op must "
                                    "move, forward and backward; %: of the speed of a copy in the same round."])


def kernel_rows(size, case, times, copied):
    """A row for each arm. times: (arm, 'forward' or 'both') -> [seconds], and ('copy', '')."""
    rows = []
    for arm in dict.fromkeys(name for name, part in times if part):
        row = {"size": size, "op": case.op, "arm": arm}
        for part, moved in (("forward", case.forward_bytes), ("both", case.both_bytes)):
            low, middle, high = (1e6 * t for t in quartiles(times[arm, part]))
            percent = statistics.median(
                100 * moved / t / (copied / c) for t, c in zip(times[arm, part], times["copy", ""]))
            row.update({f"{part}_mb": f"{moved / 1e6:.2f}", f"{part}_us": f"{middle:.1f}",
                        f"{part}_quartiles": f"{low:.1f}–{high:.1f}", f"{part}_%": f"{percent:.0f}"})
            ratio = paired_ratio(times[arm, part], times["compile", part])
            row[f"{part}_vs_compile"] = "" if arm == "compile" else "{:.3f} ({:.3f}–{:.3f})".format(*ratio)
            row[f"{part}_is"] = "" if arm == "compile" else faster_or_slower(*ratio)
        rows.append(row)
    return rows


def kept(rows):
    """
    op -> 'kept' or 'delete', of each that has a Triton arm. A kernel stays where it beats what torch.compile makes of
    its twin at some size, forward and backward together, and is slower at none.
    """
    verdicts = {}
    for op in dict.fromkeys(row["op"] for row in rows if row["arm"] == "triton"):
        mine = [row for row in rows if row["op"] == op and row["arm"] == "triton"]
        won = any(row["both_is"] == "faster" for row in mine)
        lost = any("slower" in (row["both_is"], row["forward_is"]) for row in mine)
        verdicts[op] = "kept" if won and not lost else "delete"
    return verdicts


# ---------------------------------------------------------------------------------------------------------------
# training steps


def settings_of(size, strategy="baseline"):
    """train.py's settings of a size, a name in config/size or a file, and a strategy, a name in config."""
    path = size if size.endswith(".py") else f"{HERE}/config/size/{size}.py"
    return configure(Settings, [path, f"{HERE}/config/{strategy}.py"])[0]


def size_name(size):
    return Path(size).name.removesuffix(".py")  # not its stem, which of llama_0.12b is llama_0


def tensor_bytes(tensors):
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


class Arm:
    """
    A model and its training step, that of train.py's loop on one micro-batch: forward, backward, clipping, a look at
    the loss, AdamW. The learning rate is 0: the same work, and every step starts from the same weights.
    """

    def __init__(self, model, loss, optimizers, batches, around=nullcontext):
        """loss: takes (x, y), what runs in `around()`. batches: a list of (x, y) on the device."""
        self.model, self.loss, self.optimizers, self.around = model, loss, optimizers, around
        self.batches = itertools.cycle(batches)

    def step(self):
        x, y = next(self.batches)
        with self.around():
            loss = self.loss(x, y)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        loss, norm = torch.stack((loss.detach(), norm)).tolist()  # waits for the device, as train.py does
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    def seconds(self, steps):
        """
        Median seconds of a step, over `steps` of them behind one that is not timed. On a GPU a step's time runs from
        one wait to the next, so that AdamW, launched behind the wait, counts in the step that follows.
        """
        now = clock(next(self.model.parameters()).device)
        self.step()
        times = [now()]
        for _ in range(steps):
            self.step()
            times.append(now())
        return statistics.median(after - before for before, after in zip(times, times[1:]))

    def memory_mb(self):
        """Peak of one step: parameters, AdamW's moments, and all that the step allocates on top."""
        state = [t for o in self.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
        held = tensor_bytes([*self.model.parameters(), *self.model.buffers(), *state])
        if next(self.model.parameters()).is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return (held + torch.cuda.max_memory_allocated() - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            self.step()
        sizes = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
        return (held + max(itertools.accumulate(sizes, initial=0))) / 2**20


def random_batches(s, a):
    """Four micro-batches of random tokens, on the device."""
    torch.manual_seed(0)
    shape = 4, 2, a.micro_batch or s.micro_batch, s.block_size
    return list(torch.randint(0, s.vocab_size, shape, device=a.device).unbind())


def build(s, a):
    torch.manual_seed(s.seed)
    with torch.device(a.device):
        return GPT(gpt_config(s, str(a.dtype).removeprefix("torch.")))


def adamw(model, s):
    return make_optimizers(param_groups(model.named_roles(), s.weight_decay, s.scale_decay, s.scale_lr_mult),
                           s.optimizer, (s.beta1, s.beta2))


def make_arm(size, spec, a, shared):
    """
    The Arm of a strategy. spec: a name in config, and behind a colon 'unfolded' (vectors scale activations, as the
    paper writes it), 'torch' (no Triton) or 'triton'. shared: a dict in which the arms keep one set of matrices and
    AdamW's moments among them; one model's memory then holds all of them, and the caches see the same numbers.
    """
    strategy, _, way = spec.partition(":")
    if way not in ("", "unfolded", "torch", "triton"):
        raise ConfigError(f"{spec}: behind the colon stands unfolded, torch or triton")
    s = settings_of(size, strategy)
    model = build(s, a)
    for module in model.modules():
        if isinstance(module, Branches):
            module.folded = way != "unfolded"
    matrices = {name: p for name, p, role, _ in model.named_roles() if role not in ("input", "output")}
    for name, p in matrices.items():
        p.data = shared.setdefault(name, p.data)
    optimizers = adamw(model, s)
    run = torch.compile(model) if a.compile else model
    batches = shared.setdefault("batches", random_batches(s, a))
    arm = Arm(model, lambda x, y: run(x, y)[1], optimizers, batches,
              (lambda: kernels.backend(way)) if way in ("torch", "triton") else nullcontext)
    arm.step()  # compiles, and makes AdamW's moments
    for optimizer in optimizers:
        for name, p in matrices.items():
            if p in optimizer.state:
                optimizer.state[p] = shared.setdefault(("moments", name), optimizer.state[p])
    return arm


def peak_flops(a):
    name = torch.cuda.get_device_name() if a.device.type == "cuda" else ""
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def speed(step, model, tokens, a):
    """Columns of a step's time: milliseconds, tokens per second, MFU where the chip's peak is known."""
    peak = peak_flops(a)
    return {"step_ms": f"{1e3 * step:.2f}", "tokens_per_second": f"{tokens / step:.0f}",
            "mfu": f"{model.flops_per_token() * tokens / step / peak:.4f}" if peak else ""}


def bench_overhead(a):
    torch._dynamo.config.recompile_limit = 64  # a strategy each, where a model usually has one

    def measure(size):
        arms, shared = {}, {}
        specs = a.strategies if a.strategies != ["all"] else [p.stem for p in sorted((HERE / "config").glob("*.py"))]
        for spec in tqdm(specs, desc=f"{size}: building", unit="model", leave=False, disable=None):
            if arms and time.monotonic() > a.deadline - 0.5 * (a.deadline - a.began):  # leave half for the timing
                print(f"bench.py: {size}: no time for {spec}", file=sys.stderr)
                continue
            arms[spec] = make_arm(size, spec, a, shared)
        if not a.rounds:
            return
        memory = {spec: arm.memory_mb() for spec, arm in arms.items()}
        times = alternate({spec: lambda arm=arm: arm.seconds(a.block) for spec, arm in arms.items()}, a.rounds,
                          a.deadline)
        tokens = shared["batches"][0][0].numel()
        rows = []
        for spec, arm in arms.items():
            # Gemma's layout has norms that Llama's has not, and a baseline of its own
            base = "gemma_wd_all" if spec.startswith("gemma") and "gemma_wd_all" in arms else next(iter(arms))
            ratio, low, high = paired_ratio(times[spec], times[base])
            rows.append({"strategy": spec, **speed(statistics.median(times[spec]), arm.model, tokens, a),
                         "over": base, "ratio": f"{ratio:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}",
                         "memory_mb": f"{memory[spec]:.1f}", "memory_ratio": f"{memory[spec] / memory[base]:.4f}"})
        # a pair for each strategy that is there both ways
        for spec in arms:
            if f"{spec}:unfolded" in arms:
                ratio, low, high = paired_ratio(times[spec], times[f"{spec}:unfolded"])
                rows.append({**dict.fromkeys(rows[0], ""), "strategy": spec, "over": f"{spec}:unfolded",
                             "ratio": f"{ratio:.4f}", "low": f"{low:.4f}", "high": f"{high:.4f}",
                             "memory_ratio": f"{memory[spec] / memory[f'{spec}:unfolded']:.4f}"})
        n = len(next(iter(times.values())))
        report(f"overhead_{size_name(size)}", rows, a, [
            f"{tokens} tokens a step, {str(a.dtype).removeprefix('torch.')}, "
            f"{'compiled' if a.compile else 'eager'}, {n} rounds of {a.block} steps for each. ratio: of step times, "
            f"with its 95% interval."])
    each_size(a.sizes, measure)


# ---------------------------------------------------------------------------------------------------------------
# peers


def hf_llama(model, device):
    """Hugging Face's Llama that computes what model does, from its folded weights, on the device in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config, tensors = fold(model)
    if (kind := hf_type(config, tensors)) != "llama":
        raise NotTheSame(f"this model is no Llama to Hugging Face, but of type {kind}")
    told = hf_config(kind, config, SimpleNamespace(separator=0, name="bytes"))
    with torch.device(device):
        llama = LlamaForCausalLM(LlamaConfig(**told, attn_implementation="sdpa"))
    llama.load_state_dict(hf_tensors(kind, config, tensors))
    return llama.train()


def llama_loss(llama):
    """Its own loss on our batches: shift_labels are labels that are shifted already."""
    return lambda x, y: llama(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss


def check_same(ours, theirs, x, y, dtype, around):
    """
    (our loss, theirs) in the precision that will be timed, after they agreed in it and in fp32. Raises NotTheSame.
    In fp32 on one sequence only: at a large size, that is all that fits beside two models.
    """
    def losses():
        with torch.no_grad():
            ours_is = ours(x_, y_)[1].item()
            with around_():
                return ours_is, llama_loss(theirs)(x_, y_).item()

    x_, y_, around_, ours.config.dtype = x[:1], y[:1], nullcontext, "float32"
    exact = losses()
    x_, y_, around_, ours.config.dtype = x, y, around, str(dtype).removeprefix("torch.")
    timed = losses()
    for (mine, their), tolerance in ((exact, 1e-4), (timed, 1e-4 if dtype == torch.float32 else 1e-2)):
        if not abs(mine - their) <= tolerance:
            raise NotTheSame(f"our loss is {mine:.6f} and Hugging Face's {their:.6f}: nothing to compare the speed of")
    return timed


def peer_arms(size, a, ways):
    """
    (name -> Arm, a line on their losses), of Hugging Face's Llama and the same baseline model here, after check_same.
    ways: of False and True, eager and compiled; the two share their model.
    """
    s = settings_of(size)
    batches = random_batches(s, a)
    model = build(s, a)
    torch.manual_seed(1)
    for module in model.modules():  # no γ at 1, or a wrong one would go unnoticed
        if isinstance(module, ScaleVector):
            module.set(1 + 0.1 * torch.randn(module.n))
    llama = hf_llama(model, a.device)
    # Mixed precision as everyone has it there: fp32 weights under autocast. Ours keeps the same fp32 weights.
    around = nullcontext if a.dtype == torch.float32 else lambda: torch.autocast(a.device.type, a.dtype)
    mine, their = check_same(model, llama, *batches[0], a.dtype, around)
    same = f"The same weights give the loss {mine:.6f} here and {their:.6f} there."
    print(f"{size}: {same}", flush=True)
    ours = adamw(model, s)
    theirs = [torch.optim.AdamW(llama.parameters(), lr=0.0, betas=(s.beta1, s.beta2), eps=1e-8,
                                weight_decay=s.weight_decay, fused=True)]
    arms = {}
    for compiled in ways:
        run_llama, run_model = (torch.compile(m) if compiled else m for m in (llama, model))
        label = ", compiled" if compiled else ""
        arms["Hugging Face" + label] = Arm(llama, llama_loss(run_llama), theirs, batches, around)
        arms["nanoScale" + label] = Arm(model, lambda x, y, run=run_model: run(x, y)[1], ours, batches)
    for arm in tqdm(arms.values(), desc=f"{size}: warming up", leave=False, disable=None):
        arm.step()
    return arms, same


def has_transformers():
    try:
        import transformers
    except ImportError:
        print("bench.py: transformers is not installed: no Hugging Face model to compare with")
        return False
    transformers.utils.logging.set_verbosity_error()
    return True


def bench_peers(a):
    if not has_transformers():
        return

    def measure(size):
        ways = (False,) if a.compile is False else (False, True) if a.rounds else (True,)
        arms, same = peer_arms(size, a, ways)
        if not a.rounds:
            return
        ours = arms["nanoScale"]
        tokens = next(ours.batches)[0].numel()
        memory = {name: arm.memory_mb() for name, arm in arms.items()}
        times = alternate({name: lambda arm=arm: arm.seconds(a.block) for name, arm in arms.items()}, a.rounds,
                          a.deadline)
        rows = []
        for name in arms:
            row = {"arm": name, **speed(statistics.median(times[name]), ours.model, tokens, a),
                   "times_theirs": "", "low": "", "high": "", "memory_mb": f"{memory[name]:.1f}"}
            if name.startswith("nanoScale"):
                ratio = paired_ratio(times[name.replace("nanoScale", "Hugging Face")], times[name])
                row.update(zip(("times_theirs", "low", "high"), (f"{r:.3f}" for r in ratio)))
            rows.append(row)
        n = len(times["nanoScale"])
        report(f"peers_{size_name(size)}", rows, a, [
            same, f"{tokens} tokens a step, {str(a.dtype).removeprefix('torch.')}, {n} rounds of {a.block} steps for "
                  f"each; sdpa attention, AdamW and clipping the same. times_theirs: tokens per second over Hugging "
                  f"Face's, eager over eager and compiled over compiled, with its 95% interval."])
    each_size(a.sizes, measure)


# ---------------------------------------------------------------------------------------------------------------
# profile


# by the names that the profiler has for dtypes
ITEM_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long int": 8, "long": 8, "int": 4,
              "bool": 1}


def argument_bytes(event):
    """Bytes of the tensors that an op was called with; what it allocates and returns is not among them."""
    kinds = getattr(event, "input_dtypes", None) or []
    return sum(math.prod(shape) * ITEM_BYTES.get(kind, 0) for shape, kind in zip(event.input_shapes or [], kinds)
               if shape)


def by_kernel(events, cuda):
    """
    name -> [seconds, calls, bytes], from a profile's events: the device's kernels on a GPU, ops on a CPU, without the
    time of ops that they call. bytes are the arguments' of the op that launched a kernel.
    """
    rows = {}
    for event in events:
        on_cpu = event.device_type == torch.autograd.DeviceType.CPU
        if cuda and on_cpu:
            for k in event.kernels:
                rows.setdefault(k.name, [0.0, 0, 0])[2] += argument_bytes(event) / len(event.kernels)
        elif cuda and not getattr(event, "is_user_annotation", False):
            row = rows.setdefault(event.name, [0.0, 0, 0])
            row[0] += event.time_range.elapsed_us() / 1e6
            row[1] += 1
        elif not cuda and event.name != "[memory]":
            row = rows.setdefault(event.name, [0.0, 0, 0])
            row[0] += event.self_cpu_time_total / 1e6
            row[1] += 1
            row[2] += argument_bytes(event)
    return rows


def bench_profile(a, top=20, steps=5):
    cuda = a.device.type == "cuda"
    torch._inductor.config.cpp.enable_kernel_profile = True  # a CPU's compiled loops, by name

    def measure(size):
        for spec in a.strategies:
            if spec != "hugging_face":
                arm = make_arm(size, spec, a, {})
            elif has_transformers():
                arm = peer_arms(size, a, [a.compile])[0]["Hugging Face" + ", compiled" * a.compile]
            else:
                continue
            wall = arm.seconds(steps)
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
            with profile(activities=activities, record_shapes=True) as p:
                for _ in range(steps):
                    arm.step()
                if cuda:
                    torch.cuda.synchronize()
            found = {name: [x / steps for x in numbers] for name, numbers in by_kernel(p.events(), cuda).items()}
            found = sorted(found.items(), key=lambda item: -item[1][0])
            total = sum(seconds for _, (seconds, _, _) in found)
            rest = [sum(column) for column in zip(*(numbers for _, numbers in found[top:]))]
            shown = found[:top] + ([(f"{len(found) - top} others", rest)] if rest else [])
            rows = [{"ms": f"{1e3 * seconds:.3f}", "calls": f"{calls:g}", "share_%": f"{100 * seconds / total:.1f}",
                     "argument_mb": f"{moved / 1e6:.2f}" if moved else "",
                     "gb_per_second": f"{moved / seconds / 1e9:.0f}" if moved and seconds else "",
                     "kernel": name.replace("|", "/")[:100]} for name, (seconds, calls, moved) in shown]
            report(f"profile_{size_name(size)}_{spec.replace(':', '_')}", rows, a, [
                f"{'Kernels' if cuda else 'Ops'} of a step, the mean of {steps}: {1e3 * total:.2f} ms, "
                f"{sum(n for _, (_, n, _) in found):g} calls; the step takes {1e3 * wall:.2f} ms without the profiler. "
                f"argument_mb: the tensors that the call was given, not those that it made."])
    each_size(a.sizes, measure)


# ---------------------------------------------------------------------------------------------------------------
# whole runs


def bench_train(a):
    """Run train.py for each size and strategy; on the embedded corpus, since speed does not depend on the text."""
    rows = []
    for size, strategy in tqdm(list(itertools.product(a.sizes, a.strategies)), unit="run", disable=None):
        path = size if size.endswith(".py") else f"{HERE}/config/size/{size}.py"
        with tempfile.TemporaryDirectory() as out:
            run = subprocess.run(
                [sys.executable, str(HERE / "train.py"), path,
                 f"{HERE}/config/{strategy}.py", "--dataset=pysrc", f"--max_steps={a.steps}", "--eval_tokens=65536",
                 f"--eval_interval={a.steps}", "--save_interval=1000000", "--sample_tokens=0", "--warmup_steps=10",
                 f"--device={a.device.type}", f"--out_dir={out}/run"], capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(f"bench.py: {size} {strategy}: {run.stderr.strip().splitlines()[-1]}")
        said = dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)
        rows.append({"size": size_name(size), "strategy": strategy, **{key: said.get(key, "") for key in (
            "params", "scale_params", "val_loss", "tokens", "tokens_per_second", "mfu", "peak_memory_mb")}})
    report("train", rows, a)


def bench_checkpoint(a):
    """Save and load the model and the AdamW state of each size, as train.py does."""
    rows = []
    for size in tqdm(a.sizes, unit="checkpoint", disable=None):
        s = settings_of(size)
        model = build(s, a)
        optimizers = adamw(model, s)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizers[0].step()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ckpt.pt"
            started = time.perf_counter()
            save_checkpoint(path, model, optimizers, 1, s, "bytes", {})
            saved = time.perf_counter()
            load_checkpoint(path)
            loaded = time.perf_counter()
            rows.append({"size": size_name(size), "gigabytes": f"{path.stat().st_size / 1e9:.2f}",
                         "save_seconds": f"{saved - started:.1f}", "load_seconds": f"{loaded - saved:.1f}"})
        del model, optimizers
    report("checkpoint", rows, a)


# ---------------------------------------------------------------------------------------------------------------
# all

# (minutes at most, command line), the most telling first
PLAN = {
    "cuda": [
        (1.5, "kernels --sizes=llama_0.12b,llama_1b"),
        (2.0, "overhead --sizes=llama_0.12b --strategies=baseline,hg,dp,or,unified,baseline:unfolded,unified:unfolded"),
        (1.0, "peers --sizes=llama_0.12b --block=20"),
        (1.5, "overhead --sizes=llama_1b --strategies=baseline,unified"),
        (1.5, "peers --sizes=llama_1b --block=5"),
        (0.8, "profile --sizes=llama_0.12b,llama_1b"),
        (1.0, "train --sizes=llama_0.12b --strategies=unified --steps=20"),
        (0.5, "checkpoint --sizes=llama_0.12b"),
    ],
    "cpu": [
        (1.0, "kernels --sizes=quickstart"),
        (2.0, "overhead --sizes=quickstart --strategies=baseline,unified,baseline:unfolded,unified:unfolded --block=5"),
        (2.0, "peers --sizes=quickstart --block=5"),
        (0.5, "profile --sizes=quickstart"),
        (1.5, "train --sizes=quickstart --steps=30"),
        (0.5, "checkpoint --sizes=quickstart"),
    ],
}


def commands_to_prebuild(plan):
    """The plan's commands with --rounds=0, one for each model: they compile, and end."""
    for _, command in plan:
        verb, *flags = command.split()
        told = dict(flag.removeprefix("--").split("=") for flag in flags)
        if verb in ("overhead", "peers", "kernels"):
            for size, strategy in itertools.product(told["sizes"].split(","), told.get("strategies", "").split(",")):
                yield [verb, f"--sizes={size}", "--rounds=0", *([f"--strategies={strategy}"] if strategy else [])]


def prebuild(plan, seconds):
    """
    Compile side by side what the plan will compile one after the other, on every core, into torch.compile's cache on
    disk. One that runs out of the GPU's memory has been compiled by then: see main.
    """
    environment = {"TORCHINDUCTOR_COMPILE_THREADS": "1", **os.environ}
    waiting, running = list(commands_to_prebuild(plan)), []
    end = time.monotonic() + seconds
    while (waiting or running) and time.monotonic() < end:
        running = [p for p in running if p.poll() is None]
        while waiting and len(running) < (os.cpu_count() or 1):
            running.append(subprocess.Popen([sys.executable, __file__, *waiting.pop(0)], env=environment,
                                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        time.sleep(0.2)
    for p in running:
        p.kill()
        p.wait()


def bench_all(a):
    """
    Every verb of the plan, each in a process of its own: what kills one, or leaves the GPU in a bad state, loses no
    other's table, and memory begins empty. What fails, and what there is no time for, is said at the end.
    """
    plan, lost = PLAN[a.device.type], []
    end = a.began + 60 * a.minutes
    if a.device.type == "cuda":
        print("compiling", flush=True)
        prebuild(plan, 0.25 * 60 * a.minutes)
    for minutes, command in plan:
        left = (end - time.monotonic()) / 60
        flags = [*command.split(), f"--device={a.device.type}", f"--out={a.out}"]
        if left < 0.5 * minutes:
            lost.append(f"no time for: python bench.py {command}")
            continue
        print(f"\nbench.py {command}", flush=True)
        try:
            # a verb looks at the clock before a round, and is ended where that is not enough
            run = subprocess.run([sys.executable, __file__, *flags, f"--minutes={min(minutes, left):.2f}"],
                                 timeout=60 * min(1.5 * minutes + 0.2, left))
            if run.returncode:
                lost.append(f"exit code {run.returncode}: python bench.py {command}")
        except subprocess.TimeoutExpired:
            lost.append(f"too slow: python bench.py {command}")
    print(*(f"bench.py: {line}" for line in lost), sep="\n", file=sys.stderr)
    if lost:
        sys.exit(1)


VERBS = {"kernels": bench_kernels, "overhead": bench_overhead, "peers": bench_peers, "profile": bench_profile,
         "train": bench_train, "checkpoint": bench_checkpoint, "all": bench_all}


def arguments(args=None):
    """The command line, with what it leaves open decided by the verb and the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=VERBS)
    parser.add_argument("--sizes", help="names in config/size, or files, with commas; default: by the device")
    parser.add_argument("--strategies", help="names in config, with commas; overhead and profile take "
                        "unified:unfolded, :torch and :triton too, and overhead all")
    parser.add_argument("--rounds", type=int, help="of alternating arms; default: 10, of kernels 30; 0 only compiles")
    parser.add_argument("--block", type=int, default=50, help="steps of an arm in a round; default: 50")
    parser.add_argument("--minutes", type=float, help="when to stop beginning rounds; default: 5, of all 8")
    parser.add_argument("--micro_batch", type=int, help="sequences in a step; default: the size's")
    parser.add_argument("--tokens", type=int, help="of kernels; default: 16384, on a CPU 2048")
    parser.add_argument("--steps", type=int, default=100, help="of each run of train; default: 100")
    parser.add_argument("--compile", choices=("True", "False"), help="overhead and profile: default: on a GPU; "
                        "peers: False leaves the compiled arms out")
    parser.add_argument("--flush_mb", type=int, default=64, help="of a CPU's caches, written before each timing")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "bench", help="default: results/bench")
    a = parser.parse_args(args)
    a.command = sys.argv[1:] if args is None else [str(arg) for arg in args]
    a.device, dtype = pick_device(Settings(device=a.device))
    a.dtype, cuda = getattr(torch, dtype), a.device.type == "cuda"
    sizes = ["llama_0.12b", "llama_1b"] if cuda else ["llama_0.12b" if a.what == "checkpoint" else "quickstart"]
    a.sizes = a.sizes.split(",") if a.sizes else sizes
    a.strategies = a.strategies.split(",") if a.strategies else STRATEGIES.get(a.what)
    a.rounds = a.rounds if a.rounds is not None else 30 if a.what == "kernels" else 10
    a.tokens = a.tokens or (16384 if cuda else 2048)
    a.compile = None if a.compile is None else a.compile == "True"
    if a.what != "peers" and a.compile is None:
        a.compile = cuda  # as train.py
    a.minutes = a.minutes or (8.0 if a.what == "all" else 5.0)
    a.began = time.monotonic()
    a.deadline = a.began + 60 * a.minutes
    return a


def main(args=None):
    a = arguments(args)
    # Compile the backward pass with the forward, not when it is first needed. The same in all processes, since
    # torch.compile's cache goes by its settings too.
    torch._functorch.config.force_non_lazy_backward_lowering = True
    VERBS[a.what](a)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as e:
        refuse(e)
