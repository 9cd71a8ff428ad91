"""
Measurements, each printed as a table and written to results/bench/:

    python bench.py kernels      each op of kernels.py: eager, compiled, and as a Triton kernel
    python bench.py overhead     step time and memory of the strategies over the baseline's
    python bench.py peers        tokens per second against Hugging Face's Llama and, with --nanogpt=PATH, nanoGPT's GPT
    python bench.py profile      where the time of a training step goes
    bash bench.sh --minutes=12   all of them in order of worth, within the time given

On a GPU in bf16; on a CPU in fp32, on one core.

The arms of a comparison run in one process and take turns, in an order drawn anew for each round, so that whatever else
slows the machine slows them alike. A ratio is the geometric mean over rounds of one arm's time over the other's in the
same round, with Student's 95% interval. The columns in % are shares of the machine's two ceilings, a copy's bytes per
second and a matrix product's FLOP/s, which are measured in every round, too.
"""

import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(HERE))

from configurator import ConfigError, Parser, configure, read_json, refuse, streams

STRATEGIES = {"overhead": "baseline,unified,unified --head_placement=input,unified_light,unified_free,hg,dp,"
              "baseline --placement=after,or", "profile": "baseline,unified"}  # where none are named


def arguments(args=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("what", choices=("kernels", "overhead", "peers", "profile"))
    add("--strategies", default="", help="for overhead, which compares with the first, and profile: names in config, "
        "separated by commas, each with flags if you like: 'baseline,unified --reparam=er'")
    add("--ways", default="eager,compiled", choices=("eager", "compiled", "eager,compiled"), metavar="WAYS",
        help="eager, compiled, or (the default) both")
    add("--size", default="", help="in config/size, or a file; default: llama_0.12b on a GPU, quickstart on a CPU")
    add("--rounds", default=0, type=int, help="in each, every arm has a turn; default: 30 on a GPU, 60 on a CPU")
    add("--block", default=0, type=int, help="steps of an arm per turn; default: 10 on a GPU, 1 on a CPU")
    add("--seconds", default=math.inf, type=float, help="leave out arms and rounds to end in time; default: no limit")
    add("--tokens", default=0, type=int, help="for kernels; default: 65536 on a GPU, 2048 on a CPU")
    add("--tuned", type=Path, help="a file of results/tune.py, whose constants are used")
    add("--nanogpt", type=Path, help="for peers: a clone of github.com/karpathy/nanoGPT")
    add("--out", default=HERE / "results" / "bench", type=Path, help="where the tables go; default: results/bench")
    return parser.parse_args(args)


if __name__ == "__main__":
    asked = arguments()  # before torch is loaded, so that --help and a typo are answered at once

import importlib.util
import itertools
import random
import re
import statistics
import time
from types import SimpleNamespace

import torch
import torch._inductor.config
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import kernels
from devices import device_name, pick_device
from hf import hf_config
from model import ALIGN, GPT, rope_tables
from optim import make_optimizers, param_groups, update
from runs import git_commit, versions
from settings import Settings, gpt_config
from stats import markdown_table, mean_and_half_width


def paired_ratio(times, base):
    """(ratio, low, high) of times over base, paired by round: the geometric mean and its 95% interval."""
    mean, half = mean_and_half_width([math.log(t / b) for t, b in zip(times, base, strict=True)])
    half = math.nan if half is None else half
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def over(times, base):
    """paired_ratio as a table's cell."""
    return "{:.3f} ({:.3f}–{:.3f})".format(*paired_ratio(times, base))


def idle(spans):
    """The time between the first start and the last end of spans, (start, end) each, in which there is none."""
    ends = itertools.accumulate((end for _, end in sorted(spans)), max)
    return sum(max(0, start - end) for end, (start, _) in zip(ends, sorted(spans)[1:]))


def clock(device):
    """The clock to time with. A CPU's is that of our one thread, which stands still while others have the core."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def alternate(arms, rounds, until=math.inf):
    """
    arms: name -> a function that does the work once and returns its seconds. Every round calls each once, in an order
    drawn anew. until: a time.monotonic() after which no round begins, except the three that an interval needs.
    Returns name -> [seconds], one number per round.
    """
    order, times = random.Random(0), {name: [] for name in arms}
    for i in tqdm(range(rounds), unit="round", leave=False, disable=None):
        if i >= 3 and time.monotonic() > until:
            break
        for name in order.sample(list(arms), len(arms)):
            times[name].append(arms[name]())
    return times


def share(work, times, ceiling, ceiling_times):
    """Per cent of a ceiling: work per second over the ceiling's in the same round, the median over rounds."""
    return f"{statistics.median(100 * (work / t) / (ceiling / c) for t, c in zip(times, ceiling_times)):.0f}"


def in_time(things, a):
    """Each of things, and the time.monotonic() until which it may take its equal share of the time that is left."""
    for left, thing in zip(range(len(things), 0, -1), things):
        yield thing, time.monotonic() + (a.until - time.monotonic()) / left


class Ceilings:
    """The most that the machine does: `copy` moves bytes and computes nothing, `matmul` computes and hardly moves."""

    def __init__(self, device, dtype):
        self.device, self.clock = device, clock(device)
        mb, n = (256, 8192) if device.type == "cuda" else (64, 1024)
        self.source, self.target = torch.randn(2, mb << 18, device=device)
        a, b = torch.randn(2, n, n, device=device, dtype=getattr(torch, dtype))
        self.bytes, self.flops = 2 * self.source.nbytes, 2 * n**3
        self.copy = lambda: self.seconds(lambda: self.target.copy_(self.source))
        self.matmul = lambda: self.seconds(lambda: a @ b)
        copy, matmul = (statistics.median(f() for _ in range(11)) for f in (self.copy, self.matmul))
        self.said = (f"Ceilings: a copy of {mb} MB {self.bytes / copy / 1e9:.1f} GB/s; a product of {n} × {n} matrices "
                     f"in {dtype} {self.flops / matmul / 1e12:.3g} TFLOP/s.")

    def seconds(self, f):
        """The time of one call of f, with none of its inputs in a cache."""
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


def report(name, rows, a, notes, say=True):
    """Write rows, a list of dicts or text, with notes and the machine to NAME.md in a.out; `say` prints them too."""
    if isinstance(rows, list):
        rows = "\n".join(markdown_table(list(rows[0]), [[str(cell) for cell in row.values()] for row in rows]))
    if say:
        print(f"\n{name}", rows, *notes, sep="\n", flush=True)
    packages = {p: sys.modules[p].__version__ for p in ("triton", "transformers") if p in sys.modules}
    where = {"device": device_name(a.device), "threads": torch.get_num_threads(), **versions(), **packages,
             "commit": git_commit()}
    where = f"`python {a.command}`: " + ", ".join(f"{key} {value}" for key, value in where.items())
    if getattr(a, "tuned", None):
        where += f", constants {kernels.TUNED}"
    (a.out / f"{name}.md").write_text("\n".join([rows, "", *notes, a.ceilings.said, "", where, ""]), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# kernels

def cases(s, tokens, device, dtype):
    """
    The ops at the shapes that a model of settings s gives them: name -> (a function that runs the op, the inputs that
    get a gradient, the bytes that it must move forward, and forward and backward together). Forward must read its
    inputs and write its outputs. Backward must read the outputs' gradients and the inputs that they depend on, and
    write the inputs' gradients.
    """
    config, dtype = gpt_config(s, dtype), getattr(torch, dtype)
    T, d, eps, n, hidden = min(tokens, s.block_size), config.d_head, config.norm_eps, s.n_embd, config.ffn_dim
    q, kv, padded = config.n_head * d, config.n_kv_head * d, hidden + -hidden % ALIGN
    x, r, qkv, gate_up = (torch.randn(tokens // T, T, width, device=device, dtype=dtype).requires_grad_()
                          for width in (n, n, q + 2 * kv, 2 * padded))
    with torch.no_grad():
        gate_up.unflatten(-1, (2, padded))[..., hidden:] = 0  # as the padded weights leave it
    gamma, gamma_q, gamma_k, gamma_gate = (torch.ones(w, device=device).requires_grad_() for w in (n, q, kv, hidden))
    cos, sin = (t.to(device) for t in rope_tables(d, T, s.rope_theta))
    heads = cos, sin, config.n_head, config.n_kv_head
    X, Y, H = x.nbytes, qkv.nbytes, gate_up.nbytes // 2
    return {
        "rms_norm": (lambda: kernels.rms_norm(x, eps), (x,), 2 * X, 5 * X),
        "rms_norm, γ": (lambda: kernels.rms_norm(x, eps, gamma), (x, gamma), 2 * X, 5 * X),
        "rms_norm, residual": (lambda: kernels.rms_norm(x, eps, residual=r), (x, r), 4 * X, 8 * X),
        "RoPE": (lambda: kernels.qk_norm_rope(qkv, *heads), (qkv,), 2 * Y, 4 * Y),
        "norms of q, k, v, RoPE": (lambda: kernels.qk_norm_rope(qkv, *heads, eps, "qkv", (gamma_q, gamma_k), d),
                                   (qkv, gamma_q, gamma_k), 2 * Y, 5 * Y),
        "SwiGLU": (lambda: kernels.swiglu(gate_up, hidden), (gate_up,), 3 * H, 8 * H),
        "norms, SwiGLU": (lambda: kernels.swiglu(gate_up, hidden, eps, True, gamma_gate), (gate_up, gamma_gate), 3 * H,
                          8 * H)}


def arms_of(call, inputs, device):
    """(arm, 'forward' or 'both') -> a function that runs an op's forward pass, or forward and backward."""
    torch._dynamo.reset()  # each op gets a fresh cache of compiled code, of which there may be eight for one lambda
    ways = {"eager": ("torch", call), "compile": ("torch", torch.compile(call, dynamic=False))}
    if device.type == "cuda":  # the interpreter's speed says nothing
        ways["triton"] = "triton", call
    arms = {}
    for name, (backend, run) in ways.items():
        def forward(backend=backend, run=run):
            with kernels.backend(backend):
                return tree_leaves(run())
        grads = [torch.randn_like(y) for y in forward()]
        arms[name, "forward"] = forward
        arms[name, "both"] = lambda forward=forward, grads=grads: torch.autograd.grad(forward(), inputs, grads)
        arms[name, "both"]()  # compiles
    return arms


def bench_kernels(a):
    rows, todo = [], cases(settings_of(a.size), a.tokens, a.device, a.dtype)
    for name, until in in_time(todo, a):
        call, inputs, *moved = todo[name]
        timed = {arm: lambda f=f: a.ceilings.seconds(f) for arm, f in arms_of(call, inputs, a.device).items()}
        times = alternate({**timed, "copy": a.ceilings.copy}, a.rounds, until)
        for arm in dict.fromkeys(name for name, _ in timed):
            row = {"op": name, "arm": arm}
            for part, size in zip(("forward", "both"), moved):
                mine = times[arm, part]
                row.update({f"{part}_us": f"{1e6 * statistics.median(mine):.1f}",
                            f"{part}_copy_%": share(size, mine, a.ceilings.bytes, times["copy"]),
                            f"{part}_vs_compile": over(mine, times["compile", part])})
            rows.append(row)
        report(f"kernels_{a.name}", rows, a, [
            f"{a.tokens} tokens, {a.dtype}, up to {a.rounds} rounds. both: forward and backward. copy_%: bytes that "
            f"the op must move per second, over a copy's. vs_compile: time over the compiled twin's, with its 95% "
            f"interval."], say=len(rows) >= 2 * len(todo))


# ---------------------------------------------------------------------------------------------------------------
# training steps


def settings_of(size, strategy="baseline"):
    """train.py's settings of a size, a name in config/size or a file, and a strategy, as --strategies has them."""
    path = size if size.endswith(".py") else f"{HERE}/config/size/{size}.py"
    name, *flags = strategy.split()
    return configure(Settings, [path, f"{HERE}/config/{name}.py", *flags])[0]


def size_name(size):
    return Path(size).name.removesuffix(".py")  # not its stem, which of llama_0.12b is llama_0


def own_loss(run, x, y):
    return run(x, y)[1]


def hf_loss(run, x, y):
    return run(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss


class Arm:
    """
    A model and its training step, that of train.py's loop on one micro-batch: forward, backward, clipping, AdamW,
    waiting for the step before. The learning rate is 0: the same work, and every step starts from the same weights.
    """

    def __init__(self, model, way, optimizers, batches, loss=own_loss):
        """batches: an iterator without end over (x, y) on the device. loss: takes the model to run, x and y."""
        self.model, self.optimizers, self.batches, self.loss = model, optimizers, batches, loss
        self.run = torch.compile(model, dynamic=False) if way == "compiled" else model
        self.device, self.read = next(model.parameters()).device, lambda: None

    def step(self):
        """Returns the last step's loss, gradient norm and 0, for which it waits as train.py does; None at first."""
        loss = self.loss(self.run, *next(self.batches))
        loss.backward()
        before = self.read
        self.read, _ = update(self.model, self.optimizers, torch.amp.GradScaler(enabled=False), loss.detach())
        return before()

    def seconds(self, steps):
        """Seconds per step of some steps, one after the other."""
        now = clock(self.device)
        began = now()
        for _ in range(steps):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return (now() - began) / steps

    def memory_mb(self):
        """
        Peak of one step: parameters, AdamW's moments, and all that the step allocates on top, by the GPU's allocator.
        On a CPU it is the largest running sum of what the profiler says that tensors take and give back: exact, the
        same every time, and this arm's only. Neither sees the scratch memory that a library takes for itself.
        """
        state = [t for o in self.optimizers for s in o.state.values() for t in s.values() if torch.is_tensor(t)]
        held = sum({t.data_ptr(): t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *state)}.values())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return (held + torch.cuda.max_memory_allocated() - before) / 2**20
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
            self.step()
        sizes = [e.nbytes() for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
        return (held + max(itertools.accumulate(sizes, initial=0))) / 2**20


def make_arm(strategy, way, a):
    """The Arm of a strategy. All arms get the same four batches of random tokens, and the same matrices."""
    s = settings_of(a.size, strategy)
    torch.manual_seed(s.seed)
    batches = torch.randint(0, s.vocab_size, (4, 2, s.micro_batch, s.block_size), device=a.device).unbind()
    with torch.device(a.device):
        model = GPT(gpt_config(s, a.dtype))
    groups = param_groups(model.named_roles(), s.weight_decay, s.scale_decay, s.scale_lr_mult)
    arm = Arm(model, way, make_optimizers(groups, s.optimizer, (s.beta1, s.beta2)), itertools.cycle(batches))
    arm.step()  # compiles, and makes AdamW's moments
    return arm


def compare(arms, flops, a):
    """(One row per arm of arms, (name, way) -> Arm, and a note on the columns.) flops: per token."""
    memory = {key: arm.memory_mb() for key, arm in arms.items()}
    timed = {key: lambda arm=arm: arm.seconds(a.block) for key, arm in arms.items()}
    times, rows = alternate({**timed, "matmul": a.ceilings.matmul}, a.rounds, a.until), []
    tokens = next(next(iter(arms.values())).batches)[0].numel()
    for name, way in arms:
        mine, mb, first = times[name, way], memory[name, way], next(key for key in arms if key[1] == way)
        step = statistics.median(mine)
        rows.append({"model": name, "way": way, "time": over(mine, times[first]), "memory": f"{mb / memory[first]:.3f}",
                     "step_ms": f"{1e3 * step:.2f}", "tokens_per_second": f"{tokens / step:.0f}",
                     "matmul_%": share(flops * tokens, mine, a.ceilings.flops, times["matmul"]),
                     "memory_mb": f"{mb:.1f}"})
    return rows, (
        f"time, with its 95% interval, and memory (of a step's peak): over those of the first row run in the same way. "
        f"matmul_%: of the matrix product's speed in the same round. {tokens} tokens per step, {a.dtype}, "
        f"{len(times['matmul'])} rounds of {a.block} steps each.")


def bench_overhead(a):
    torch._dynamo.config.recompile_limit = 64  # one per strategy, where a model usually has one
    began, arms, late = time.monotonic(), {}, []
    todo = list(itertools.product(a.strategies, a.ways))
    for name, way in tqdm(todo, desc="building", leave=False, disable=None):
        if name != a.strategies[0] and time.monotonic() > began + 0.7 * (a.until - began):
            late.append(f"{name} ({way})")
        else:
            arms[name, way] = make_arm(name, way, a)
    rows, note = compare(arms, next(iter(arms.values())).model.flops_per_token(), a)
    late = [f"Left out for want of time: {', '.join(late)}."] if late else []
    for way in a.ways:
        report(f"overhead_{a.name}_{way}", [row for row in rows if row["way"] == way], a, [note, *late])


# ---------------------------------------------------------------------------------------------------------------
# peers, profile


def hf_llama(config, device):
    """Hugging Face's Llama of the shape of a GPTConfig. Raises ConfigError without transformers."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("peers compares with Hugging Face's Llama: pip install transformers") from None
    told = hf_config("llama", config, SimpleNamespace(separator=0, name="bytes"))
    with torch.device(device):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**told, attn_implementation="sdpa")).train()


def nanogpt(path, s, device):
    """nanoGPT's GPT of the same depth, width, heads, block and vocabulary. path: a clone, else raises ConfigError."""
    try:
        spec = importlib.util.spec_from_file_location("nanogpt_model", path / "model.py")
        sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except OSError as e:
        raise ConfigError(f"--nanogpt={path} is not a clone of nanoGPT: {e}") from None
    with torch.device(device):
        return module.GPT(module.GPTConfig(s.block_size, s.vocab_size, s.n_layer, s.n_head, s.n_embd, 0.0, False))


def bench_peers(a):
    ours = make_arm("baseline", "eager", a)
    peers = {"Hugging Face's Llama": (hf_llama(ours.model.config, a.device), hf_loss)}
    if a.nanogpt:
        peers["nanoGPT"] = nanogpt(a.nanogpt, settings_of(a.size), a.device), own_loss
    # the usual mixed precision: fp32 weights under autocast
    autocast = torch.autocast(a.device.type, getattr(torch, a.dtype), enabled=a.dtype != "float32")
    arms = {("nanoScale", way): Arm(ours.model, way, ours.optimizers, ours.batches) for way in a.ways}
    for name, (peer, loss) in peers.items():
        adamw = torch.optim.AdamW(peer.parameters(), 0.0, (0.9, 0.95), weight_decay=0.1, fused=True)
        arms.update({(name, way): Arm(peer, way, [adamw], ours.batches, autocast(loss)) for way in a.ways})
    for arm in arms.values():
        arm.step()  # compiles
    rows, note = compare(arms, ours.model.flops_per_token(), a)
    for row in rows:
        row["params"] = sum(p.numel() for p in arms[row["model"], row["way"]].model.parameters())
    report(f"peers_{a.name}", rows, a, [
        note, "Attention (sdpa), AdamW and clipping are the same. matmul_% counts our model's FLOPs."])


def bench_profile(a, steps=5):
    cuda = a.device.type == "cuda"
    torch._inductor.config.cpp.enable_kernel_profile = True  # a CPU's compiled loops, by name
    for name, way in itertools.product(a.strategies, a.ways):
        arm = make_arm(name, way, a)
        flops = arm.model.flops_per_token() * next(arm.batches)[0].numel()
        seconds, matmul = arm.seconds(steps), a.ceilings.matmul()
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as p:
            for _ in range(steps):
                arm.step()
        used = [(e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key) for e in p.key_averages()
                if not e.is_user_annotation and (not cuda or e.device_type == DeviceType.CUDA)]
        total = sum(us for us, *_ in used)
        gaps = idle([(e.time_range.start, e.time_range.end) for e in p.events()
                     if e.device_type == DeviceType.CUDA and not e.is_user_annotation])
        rows = [{"ms": f"{us / steps / 1e3:.3f}", "%": f"{100 * us / total:.1f}", "calls": f"{calls / steps:.0f}",
                 "kernel" if cuda else "operation": key[:100]} for us, calls, key in sorted(used, reverse=True)[:40]]
        report(f"profile_{a.name}_{name.replace(' --', '_')}_{way}", rows, a, [
            f"Per step, of {steps}: {total / steps / 1e3:.2f} ms in {sum(c for _, c, _ in used) / steps:.0f} calls"
            + f", between which the GPU was idle for {gaps / steps / 1e3:.2f} ms" * cuda +
            f". Without the profiler a step takes {1e3 * seconds:.2f} ms, at "
            f"{share(flops, [seconds], a.ceilings.flops, [matmul])}% of the matrix product's speed."])


VERBS = {"kernels": bench_kernels, "overhead": bench_overhead, "peers": bench_peers, "profile": bench_profile}


def prepare(a, command):
    """Complete what arguments() returned for this machine. command: how it was called. Raises ConfigError."""
    if min(a.rounds, getattr(a, "block", 0)) < 0:
        raise ConfigError("--rounds and --block cannot be negative")
    a.out.mkdir(parents=True, exist_ok=True)  # before anything is measured
    cuda = torch.cuda.is_available()
    a.until = time.monotonic() + a.seconds
    a.device, a.dtype, *_ = pick_device(Settings(device="cuda" if cuda else "cpu"))
    a.command = re.sub(r" --(out|tuned|nanogpt)[= ]\S+", "", " ".join(command))  # paths are of one machine
    if not cuda:
        torch.set_num_threads(1)  # the fewer cores, the less it matters what else the machine does
    a.ceilings = Ceilings(a.device, a.dtype)
    print(a.ceilings.said, flush=True)
    return cuda


def main(a, command):
    cuda = prepare(a, ["bench.py", *command])
    a.rounds, a.block = a.rounds or (30 if cuda else 60), a.block or (10 if cuda else 1)
    a.tokens, a.size = a.tokens or (65536 if cuda else 2048), a.size or ("llama_0.12b" if cuda else "quickstart")
    a.name = size_name(a.size)
    a.strategies, a.ways = (a.strategies or STRATEGIES.get(a.what, "")).split(","), a.ways.split(",")
    if a.tuned:
        kernels.TUNED = read_json(a.tuned)
    VERBS[a.what](a)


def run(main, asked):
    """main(asked, command) of a script, whose mistakes are one line on stderr and an exit code."""
    streams()
    try:
        main(asked, sys.argv[1:])
    except (ConfigError, OSError) as e:
        refuse(e, 1 if isinstance(e, OSError) else 2)


if __name__ == "__main__":
    run(main, asked)
