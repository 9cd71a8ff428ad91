"""
Measurements, each a table on stdout and in results/bench/:

    python bench.py kernels      each op of kernels.py that a model calls: eager, compiled, Triton, and Liger's
    python bench.py overhead     step time and memory of strategies over the baseline's; --eager or --compile alone
    python bench.py peers        tokens per second beside Hugging Face's Llama, of the same shape and the same loss
    python bench.py profile      where the time of one training step goes
    bash bench.sh                all of them, after the tests that need a GPU

On a GPU llama_0.12b and llama_1b, in bf16; on a CPU the quickstart, in fp32 and on one core.

First come the machine's two ceilings, a copy's bytes per second and a matrix product's FLOP/s. What moves bytes is
given as a share of the first, a step as a share of the second, each against the ceiling measured in the same round.

What is compared runs in one process, the arms in turns and in an order drawn anew for each round, so that whatever
else slows the machine slows them alike. A ratio is the geometric mean over rounds of one arm's time over the other's in
the same round, with Student's 95% interval of that mean. Memory is counted and has no interval: see Arm.memory_mb.
"""

import inspect
import itertools
import math
import random
import re
import statistics
import sys
import time
from collections import namedtuple
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._inductor.config
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

import kernels
import model as model_module
import moe
import norms
from configurator import ConfigError, Parser, configure, refuse, streams
from devices import device_name, pick_device
from hf import fold, hf_config, hf_tensors, hf_type
from optim import make_optimizers, param_groups
from runs import git_commit, versions
from settings import Settings, gpt_config
from stats import mean_and_half_width

HERE = Path(__file__).resolve().parent
# of each verb, where none are named
STRATEGIES = {"kernels": "baseline,hg,dp,unified,gemma_wd_all",  # every placement, both layouts
              "overhead": "baseline,hg,dp,or,norm,unified,unified_light,unified_free",
              "peers": "baseline", "profile": "baseline,unified"}


def paired_ratio(times, base):
    """(ratio, low, high) of times over base, paired by round: the geometric mean and its 95% interval."""
    mean, half = mean_and_half_width([math.log(t / b) for t, b in zip(times, base, strict=True)])
    half = math.nan if half is None else half
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def clock(device):
    """The clock to time with. A CPU's one thread has its own, which stands still while others have the core."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def alternate(arms, rounds):
    """
    arms: name -> a function that does the work once and returns its seconds. Every round calls each once, in an order
    drawn anew. Returns name -> [seconds], a number for each round.
    """
    order, times = random.Random(0), {name: [] for name in arms}
    for _ in tqdm(range(rounds), unit="round", leave=False, disable=None):
        for name in order.sample(list(arms), len(arms)):
            times[name].append(arms[name]())
    return times


def share(work, times, ceiling, ceiling_times):
    """Per cent of a ceiling: work a second over the ceiling's work a second, the median over rounds."""
    return f"{statistics.median(100 * (work / t) / (ceiling / c) for t, c in zip(times, ceiling_times)):.0f}"


class Ceilings:
    """The most that the machine does: `copy` moves bytes and computes nothing, `matmul` computes and hardly moves."""

    def __init__(self, device, dtype):
        self.device, self.clock = device, clock(device)
        mb, n = (256, 8192) if device.type == "cuda" else (64, 1024)
        self.source, self.target = torch.randn(2, mb << 18, device=device)
        self.a, self.b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
        self.bytes, self.flops = 2 * self.source.nbytes, 2 * n**3
        copy, matmul = (statistics.median(f() for _ in range(11)) for f in (self.copy, self.matmul))
        self.said = (f"Ceilings: a copy of {mb} MB {self.bytes / copy / 1e9:.1f} GB/s; a product of {n} × {n} matrices "
                     f"in {dtype} {self.flops / matmul / 1e12:.3g} TFLOP/s.")

    def copy(self):
        return self.seconds(lambda: self.target.copy_(self.source))

    def matmul(self):
        return self.seconds(lambda: self.a @ self.b)

    def seconds(self, f):
        """Of one call of f, its inputs in no cache."""
        if self.device.type != "cuda":
            self.target.zero_()
            began = self.clock()
            f()
            return self.clock() - began
        # The device sleeps for about 2 ms, in which the CPU launches all that follows: the events then enclose the
        # kernels and no gap between them. A training step is fed in the same way.
        torch.cuda._sleep(4_000_000)
        self.target.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def report(name, rows, a, notes):
    """Print rows, a list of dicts or text, and write them with notes and the machine to NAME.md in a.out."""
    if isinstance(rows, list):
        lines = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * w for w in widths])
        rows = "\n".join("| " + " | ".join(cell.rjust(w) for cell, w in zip(line, widths)) + " |" for line in lines)
    print(f"\n{name}", rows, *notes, sep="\n", flush=True)
    packages = {p: sys.modules[p].__version__ for p in ("triton", "transformers") if p in sys.modules}
    where = {"device": device_name(a.device), "threads": torch.get_num_threads(), **versions(), **packages,
             "commit": git_commit()}
    command = re.sub(r" --out[= ]\S+", "", " ".join(a.command))
    where = f"`python bench.py {command}`: " + ", ".join(f"{key} {value}" for key, value in where.items())
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / f"{name}.md").write_text("\n".join([rows, "", *notes, a.ceilings.said, "", where, ""]), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# kernels


# An op to time: the strategy that calls it, its name, the inputs that get a gradient, a function without arguments that
# runs it, and one that runs what Liger offers in its place, or None.
Case = namedtuple("Case", "strategy op inputs call liger")


def recorded(s, tokens, device, dtype):
    """
    (name, function, arguments by name) of each call that a forward pass of s's model makes into kernels.py, with one
    block, since all are alike. Recorded, so that what is timed is what the model does, whatever that comes to be.
    """
    calls = []

    def recording(name, f):
        def call(*args, **kw):
            calls.append((name, f, inspect.signature(f).bind(*args, **kw).arguments))
            return f(*args, **kw)
        return call

    model, T = build(replace(s, n_layer=1), device, dtype), min(s.block_size, tokens)
    with ExitStack() as patches:
        for module in (model_module, norms, moe):
            for name, f in list(vars(module).items()):
                if inspect.isfunction(f) and f.__module__ == "kernels":
                    patches.enter_context(patch.object(module, name, recording(name, f)))
        model(torch.randint(0, s.vocab_size, (tokens // T, T), device=device))
    return calls


def cases(size, strategies, tokens, device, dtype):
    """A Case for each call that the strategies' models make; of those with the same shapes and settings, the first."""
    found = {}
    for strategy in strategies:
        for name, f, given in recorded(settings_of(size, strategy), tokens, device, dtype):
            copies = {}
            own = lambda x: copies.setdefault(id(x), x.detach().clone().requires_grad_(x.requires_grad))
            kw = tree_map_only(torch.Tensor, own, given)  # and what branches share stays one tensor
            inputs = tuple(x for x in copies.values() if x.requires_grad)
            if any(f(**kw) is x for x in inputs):
                continue  # nothing to do, as to cast to fp32
            op = f"{name} normed={given['normed']}" if given.get("normed") else name
            op = f"{op} {', '.join('×'.join(map(str, x.shape)) for x in inputs)}"
            found.setdefault(op, Case(strategy, op, inputs, lambda f=f, kw=kw: f(**kw), ligers(name, **kw)))
    return list(found.values())


def ligers(name, x=None, y=None, gamma=None, residual=None, eps=None, normed=None, **_):
    """A call of what Liger offers for the op that was called with these arguments, or None."""
    try:
        from liger_kernel.ops import fused_add_rms_norm, rms_norm, swiglu
    except ImportError:
        return None
    if name == "swiglu" and not normed:
        return lambda: swiglu.LigerFusedGateUpSiLUMulFunction.apply(y)
    if name == "rms_norm":
        gamma = torch.ones(x.size(-1), device=x.device) if gamma is None else gamma  # theirs want one
        rest = gamma, eps, 0.0, "llama", False  # in_place: it would write dX over dY, which may be used again
        if residual is None:
            return lambda: rms_norm.LigerRMSNormFunction.apply(x, *rest)
        return lambda: fused_add_rms_norm.LigerFusedAddRMSNormFunction.apply(x, residual, *rest)


def bytes_moved(case):
    """
    What the op must move, in bytes, {"forward": , "both": forward and backward}. Forward reads each input and writes
    each output once. Backward reads the outputs' gradients, writes the inputs', and reads those inputs and outputs
    again that the plain twin keeps for it; what else it keeps, another implementation may compute anew.
    """
    kept = []

    def storages(tensors):
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

    with kernels.backend("torch"), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        outs = tree_leaves(case.call())
    grads = torch.autograd.grad(outs, case.inputs, [torch.ones_like(y) for y in outs])
    known = storages([*case.inputs, *outs])
    again = [size for at, size in storages(kept).items() if at in known]
    backward = [*(y.nbytes for y in outs), *again, *storages(grads).values()]
    return {"forward": sum(known.values()), "both": sum([*known.values(), *backward])}


def arms_of(case, device):
    """(arm, 'forward' or 'both') -> a function that runs the case's forward pass, or that and its backward pass."""
    torch._dynamo.reset()  # each case gets a fresh cache of compiled code, of which there may be eight for one lambda
    ways = {"eager": ("torch", case.call), "compile": ("torch", torch.compile(case.call, dynamic=False))}
    if device.type == "cuda" and not case.op.startswith("scaled_cast"):  # the interpreter has no speed to speak of
        ways["triton"] = "triton", case.call
    if case.liger:
        ways["liger"] = "torch", case.liger
    arms = {}
    for name, (backend, call) in ways.items():
        def forward(backend=backend, call=call):
            with kernels.backend(backend):
                return tree_leaves(call())
        grads = [torch.randn_like(y) for y in forward()]
        arms[name, "forward"] = forward
        arms[name, "both"] = lambda forward=forward, grads=grads: torch.autograd.grad(forward(), case.inputs, grads)
        arms[name, "both"]()  # compiles
    return arms


def bench_kernels(size, a):
    """Every Case, an arm a row, beside a copy measured in the same rounds."""
    rows = []
    for case in tqdm(cases(size, a.strategies, a.tokens, a.device, a.dtype), desc=size, leave=False, disable=None):
        arms = arms_of(case, a.device)
        timings = {arm: lambda f=f: a.ceilings.seconds(f) for arm, f in arms.items()}
        times, moved = alternate({**timings, "copy": a.ceilings.copy}, a.rounds), bytes_moved(case)
        for arm in dict.fromkeys(name for name, _ in arms):
            row = {"strategy": case.strategy, "op": case.op, "arm": arm}
            for part in ("forward", "both"):
                mine, ratio = times[arm, part], paired_ratio(times[arm, part], times["compile", part])
                row.update({f"{part}_us": f"{1e6 * statistics.median(mine):.1f}",
                            f"{part}_copy_%": share(moved[part], mine, a.ceilings.bytes, times["copy"]),
                            f"{part}_vs_compile": "{:.3f} ({:.3f}–{:.3f})".format(*ratio)})
            rows.append(row)
    report(f"kernels_{size_name(size)}", rows, a, [
        f"{a.tokens} tokens, {a.dtype}, {a.rounds} rounds. both: forward and backward. copy_%: bytes that the op must "
        f"move, a second, over a copy's in the same round. vs_compile: time over the compiled twin's, with its 95% "
        f"interval. A kernel that is below 1 nowhere, or above it somewhere, goes."])


# ---------------------------------------------------------------------------------------------------------------
# training steps


def settings_of(size, strategy="baseline"):
    """
    train.py's settings of a size, a name in config/size or a file, and a strategy, a name in config and flags after it:
    "unified --ffn_placement=dual".
    """
    path = size if size.endswith(".py") else f"{HERE}/config/size/{size}.py"
    name, *flags = strategy.split()
    return configure(Settings, [path, f"{HERE}/config/{name}.py", *flags])[0]


def size_name(size):
    return Path(size).name.removesuffix(".py")  # not its stem, which of llama_0.12b is llama_0


def build(s, device, dtype):
    torch.manual_seed(s.seed)
    with torch.device(device):
        return model_module.GPT(gpt_config(s, dtype))


class Arm:
    """
    A model and its training step, that of train.py's loop on one micro-batch: forward, backward, clipping, a look at
    the loss, AdamW. The learning rate is 0: the same work, and every step starts from the same weights.
    """

    def __init__(self, model, loss, optimizers, batches):
        """loss: takes (x, y). batches: a list of (x, y) on the device."""
        self.model, self.loss, self.optimizers, self.device = model, loss, optimizers, batches[0][0].device
        self.batches = itertools.cycle(batches)

    def step(self):
        loss = self.loss(*next(self.batches))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        status = torch.stack((loss.detach(), norm))
        for optimizer in self.optimizers:
            optimizer.step()
        loss, norm = status.tolist()  # waits for the device, as train.py does
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return loss

    def seconds(self, steps):
        """Median of some steps, one after the other."""
        now = clock(self.device)
        times = [now()]
        for _ in range(steps):
            self.step()
            times.append(now())
        return statistics.median(after - before for before, after in itertools.pairwise(times))

    def memory_mb(self):
        """
        Peak of one step: parameters, AdamW's moments, and all that the step allocates on top. On a GPU as its allocator
        says. On a CPU the largest running sum of what the profiler says that tensors take and give back: exact, the
        same every time, and of this arm alone, which the process's resident size is not. Neither sees the scratch
        memory that a library takes for itself.
        """
        state = [t for o in self.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state]
        held = sum({t.data_ptr(): t.nbytes for t in tensors}.values())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return (held + torch.cuda.max_memory_allocated() - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            self.step()
        sizes = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
        return (held + max(itertools.accumulate(sizes, initial=0))) / 2**20


def make_arm(size, strategy, a, way, shared):
    """
    The Arm of a strategy. shared: a dict in which the arms keep one set of matrices and AdamW's moments among them; one
    model's memory then holds all of them, and the caches see the same numbers.
    """
    s = settings_of(size, strategy)
    model = build(s, a.device, a.dtype)
    roles = list(model.named_roles())
    matrices = {name: p for name, p, role, _ in roles if role not in ("input", "output")}
    for name, p in matrices.items():
        p.data = shared.setdefault(name, p.data)
    if "batches" not in shared:  # four, of random tokens
        shape = 4, 2, a.micro_batch or s.micro_batch, s.block_size
        shared["batches"] = list(torch.randint(0, s.vocab_size, shape, device=a.device).unbind())
    optimizers = make_optimizers(param_groups(roles, s.weight_decay, s.scale_decay, s.scale_lr_mult), s.optimizer,
                                 (s.beta1, s.beta2))
    run = torch.compile(model) if way == "compiled" else model
    arm = Arm(model, lambda x, y: run(x, y)[1], optimizers, shared["batches"])
    arm.step()  # compiles, and makes AdamW's moments
    for optimizer in optimizers:
        for name, p in matrices.items():
            if p in optimizer.state:
                optimizer.state[p] = shared.setdefault(("moments", name), optimizer.state[p])
    return arm


def compare(arms, flops, a):
    """(name -> times, name -> MB, name -> columns of its row, a note) of arms. flops: of a token."""
    memory = {name: arm.memory_mb() for name, arm in arms.items()}
    timed = {name: lambda arm=arm: arm.seconds(a.block) for name, arm in arms.items()}
    times = alternate({**timed, "matmul": a.ceilings.matmul}, a.rounds)
    columns = {}
    for name, arm in arms.items():
        step, tokens = statistics.median(times[name]), next(arm.batches)[0].numel()
        columns[name] = {"step_ms": f"{1e3 * step:.2f}", "tokens_per_second": f"{tokens / step:.0f}",
                         "matmul_%": share(flops * tokens, times[name], a.ceilings.flops, times["matmul"]),
                         "memory_mb": f"{memory[name]:.1f}"}
    return times, memory, columns, (
        f"{tokens} tokens a step, {a.dtype}, {a.rounds} rounds of {a.block} steps each. matmul_%: of the matrix "
        f"product's speed in the same round. memory_mb: peak of a step.")


def bench_overhead(size, a):
    torch._dynamo.config.recompile_limit = 64  # a strategy each, where a model usually has one
    arms, shared, todo = {}, {}, list(itertools.product(a.ways, a.strategies))
    for way, name in tqdm(todo, desc=f"{size}: building", unit="model", leave=False, disable=None):
        arms[way, name] = make_arm(size, name, a, way, shared)
    times, memory, columns, note = compare(arms, arms[todo[0]].model.flops_per_token(), a)
    for way in a.ways:
        rows, base = [], (way, a.strategies[0])
        for name in a.strategies:
            ratio, low, high = (f"{r:.4f}" for r in paired_ratio(times[way, name], times[base]))
            rows.append({"strategy": name, "time": ratio, "low": low, "high": high,
                         "memory": f"{memory[way, name] / memory[base]:.4f}", **columns[way, name]})
        report(f"overhead_{size_name(size)}_{way}", rows, a, [
            f"time, with its 95% interval, and memory: over those of {a.strategies[0]}.", note])


# ---------------------------------------------------------------------------------------------------------------
# peers, profile


def hf_llama(model, x, y):
    """
    (Hugging Face's Llama that computes what model does, in fp32, a line on their losses). Raises ConfigError where no
    Llama does, and SystemExit where they differ on x and y: few tokens, since two large models leave little room.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config, tensors = fold(model)
    if (kind := hf_type(config, tensors)) != "llama":
        raise ConfigError(f"peers compares with a Llama, and to Hugging Face this model is of type {kind}")
    told = hf_config(kind, config, SimpleNamespace(separator=0, name="bytes"))
    with torch.device(x.device):
        llama = LlamaForCausalLM(LlamaConfig(**told, attn_implementation="sdpa"))
    llama.load_state_dict(hf_tensors(kind, config, tensors))
    dtype, model.config.dtype = model.config.dtype, "float32"
    with torch.no_grad():
        ours, theirs = model(x, y)[1].item(), llama_loss(llama, x, y).item()
    model.config.dtype = dtype
    if not abs(ours - theirs) <= 1e-4:
        sys.exit(f"bench.py: our loss is {ours:.6f} and Hugging Face's {theirs:.6f}: nothing to compare the speed of")
    return llama.train(), f"In fp32 the same weights give the loss {ours:.6f} here and {theirs:.6f} there."


def llama_loss(llama, x, y):
    """Its own loss on our batches: shift_labels are labels that are shifted already."""
    return llama(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss


def bench_peers(size, a):
    try:
        import transformers
    except ImportError:
        raise ConfigError("peers compares with Hugging Face's Llama: pip install transformers") from None
    transformers.utils.logging.set_verbosity_error()
    ours = make_arm(size, a.strategies[0], a, "eager", shared := {})
    model, batches = ours.model, shared["batches"]
    for module in model.modules():  # no γ at 1, or a wrong one would go unnoticed
        if isinstance(module, norms.ScaleVector):
            module.set(1 + 0.1 * torch.randn(module.n))
    llama, same = hf_llama(model, *(t[:1] for t in batches[0]))
    optimizers = [torch.optim.AdamW(llama.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    # mixed precision as everyone has it there: fp32 weights under autocast
    autocast = torch.autocast(a.device.type, getattr(torch, a.dtype), enabled=a.dtype != "float32")
    arms = {}
    for way in a.ways:
        run, theirs = (torch.compile(m) if way == "compiled" else m for m in (model, llama))
        arms["Hugging Face", way] = Arm(llama, autocast(lambda x, y, run=theirs: llama_loss(run, x, y)), optimizers,
                                        batches)
        arms["nanoScale", way] = Arm(model, lambda x, y, run=run: run(x, y)[1], ours.optimizers, batches)
    for arm in arms.values():
        arm.step()  # compiles
    times, _, columns, note = compare(arms, model.flops_per_token(), a)
    rows = []
    for (whose, way), cells in columns.items():
        ratio, low, high = (f"{r:.3f}" for r in paired_ratio(times["Hugging Face", way], times[whose, way]))
        rows.append({"whose": whose, "way": way, "times_theirs": ratio, "low": low, "high": high, **cells})
    report(f"peers_{size_name(size)}", rows, a, [
        same, "times_theirs: tokens per second over Hugging Face's, run in the same way, with its 95% interval. sdpa "
              "attention, AdamW and clipping are the same.", note])


def bench_profile(size, a, steps=5):
    cuda = a.device.type == "cuda"
    torch._inductor.config.cpp.enable_kernel_profile = True  # a CPU's compiled loops, by name
    for name, way in itertools.product(a.strategies, a.ways):
        arm = make_arm(size, name, a, way, {})
        flops = arm.model.flops_per_token() * next(arm.batches)[0].numel()
        seconds, matmul = arm.seconds(steps), a.ceilings.matmul()
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as p:
            for _ in range(steps):
                arm.step()
        table = p.key_averages().table(sort_by=f"self_{'cuda' if cuda else 'cpu'}_time_total", row_limit=25,
                                       max_name_column_width=70)
        report(f"profile_{size_name(size)}_{name.replace(' --', '_')}_{way}", f"```\n{table}```", a, [
            f"{steps} steps. Without the profiler one takes {1e3 * seconds:.2f} ms, at "
            f"{share(flops, [seconds], a.ceilings.flops, [matmul])}% of the matrix product's speed."])


VERBS = {"kernels": bench_kernels, "overhead": bench_overhead, "peers": bench_peers, "profile": bench_profile}


def arguments(args=None):
    cuda = torch.cuda.is_available()
    parser = Parser(__doc__)

    def add(flag, default, help, **kw):
        parser.add_argument(flag, default=default, help=f"{help}; default: {default}", **kw)
    parser.add_argument("what", choices=VERBS)
    parser.add_argument("--strategies", help="names in config, with commas, and flags after them: 'baseline,unified "
                        "--reparam=er'; overhead compares with the first")
    parser.add_argument("--eager", action="store_true", help="eager models alone")
    parser.add_argument("--compile", action="store_true", help="compiled models alone; default: both")
    add("--sizes", "llama_0.12b,llama_1b" if cuda else "quickstart", "names in config/size, or files, with commas")
    add("--rounds", 30 if cuda else 60, "in which each arm has its turn", type=int)
    add("--block", 20 if cuda else 1, "steps of an arm in a round", type=int)
    add("--micro_batch", 0, "sequences in a step; 0 is the size's", type=int)
    add("--tokens", 16384 if cuda else 2048, "of kernels", type=int)
    add("--out", HERE / "results" / "bench", "where the tables go", type=Path)
    a = parser.parse_args(args)
    a.command = sys.argv[1:] if args is None else args
    a.device, a.dtype, *_ = pick_device(Settings(device="cuda" if cuda else "cpu"))
    a.sizes, a.strategies = a.sizes.split(","), (a.strategies or STRATEGIES[a.what]).split(",")
    a.ways = ["eager"] * (a.eager or not a.compile) + ["compiled"] * (a.compile or not a.eager)
    return a


def main(args=None):
    a = arguments(args)
    if a.device.type == "cpu":
        torch.set_num_threads(1)  # the fewer cores, the less it matters what else the machine does
    a.ceilings = Ceilings(a.device, a.dtype)
    print(a.ceilings.said, flush=True)
    for size in a.sizes:
        VERBS[a.what](size, a)
        torch._dynamo.reset()  # compiled code may hold on to a model


if __name__ == "__main__":
    streams()
    try:
        main()
    except ConfigError as e:
        refuse(e)
