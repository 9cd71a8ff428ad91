"""
Compare strategies, with their noise:

    python ablate.py buildup config/size/lab.py --lrs=2e-3,4e-3,8e-3 --seeds=1,2,3,4,5 --jobs=2
    python ablate.py config/baseline.py,config/unified.py config/size/llama_0.12b.py --nproc=8
    python ablate.py scaling --sizes=1,2,3,4,1@100 --lrs=1e-3,2e-3,4e-3,8e-3,16e-3

The first word is a suite (below), or strategy files joined by commas, the first being the reference. Config files and
settings of train.py after it hold for every cell. A cell is one run of train.py: an arm at one learning rate with one
seed. Of several --lrs each arm gets its best on --tune_seeds, and is reported at that one alone, on --seeds.

Cells live in out/ablate/cells under a name made of their settings, their data and the code that decides their losses.
So arms with equal settings and suites that share arms run them once, finished ones are skipped, the same command goes
on with what was stopped, and after an edit of the code everything runs anew. --out receives results.csv (a row a
cell), results.md (the tables), curves.csv and scales.csv. What they hold of these cells counts as finished too, so
seeds or rates can be added to what another machine has begun; rows of other cells stay there and are compared with
nothing.
"""

import csv
import hashlib
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import get_type_hints

import torch

from configurator import ConfigError, Count, check, configure, help_text, read_json, refuse, streams
from data.tokens import DataError, Tokens, data_folder, vocabulary
from devices import pick_device
from model import GPT
from runs import code_hash, lock, replacing, write_whole
from settings import Settings, batch_plan, gpt_config
from stats import LEVEL, POWER, read_csv, scaling_fits, summarise

HERE = Path(__file__).resolve().parent
CELLS = Path("out/ablate/cells")

# An arm is (name, config files and flags, the arm it is compared with). A word without dashes is config/<word>.py.
STARTS = {"N(0, 0.02)": "--init_std=0.02 --embedding_std=0.02", "1/√fan_in": "--init_std=0 --embedding_std=0.02",
          "1/√fan_in, table 1": "--init_std=0 --embedding_std=0"}  # the defaults
SUITES = {
    "removal": [("baseline", "baseline", None), ("no scale", "no_scale", "baseline")],
    "decay": [(f"{arch}, {decay}", f"--arch={arch} --scale_decay={decay}", f"{arch}, all" if decay != "all" else None)
              for arch, decays in (("gemma", ("all", "input", "none", "output")), ("llama", ("all", "none")))
              for decay in decays],  # the baseline of llama's layout has no γ of the output role
    "design": [("baseline", "baseline", None),
               *((name, name, "baseline") for name in ("hg", "dp", "dnp", "or", "er", "product", "zero_centred"))],
    "buildup": [("baseline", "baseline", None), ("+HG", "hg", "baseline"), ("+DNP", "hg_dnp", "baseline"),
                ("+OR", "hg_dnp_or", "baseline"), ("+IWD (unified)", "unified", "baseline")],
    "leave_one_out": [("unified", "unified", None),
                      *((f"without {x.upper()}", f"unified_no_{x}", "unified") for x in ("hg", "dnp", "or")),
                      ("without IWD", "hg_dnp_or", "unified"), ("baseline", "baseline", "unified")],
    "free": [("baseline", "baseline", None), ("free", "unified_free", "baseline"),
             ("light", "unified_light", "baseline"), ("unified", "unified", "baseline")],
    # how much of the gain is a better start?
    "init": [(f"{name}, {start}", f"{file} {flags}", f"baseline, {start}" if name != "baseline" else None)
             for start, flags in STARTS.items()
             for name, file in (("baseline", "baseline"), ("unified", "unified"), ("light", "unified_light"),
                                ("free", "unified_free"), ("QK-norm", "qk_norm"))],
    # each [R] of the design against its rivals
    "readings": [("unified", "unified", None),
                 ("final norm: output role", "unified_final_output", "unified"),
                 ("norms over the full width", "unified_full_norm", "unified"),
                 ("DP in attention", "unified_dp_attn", "unified"),
                 ("none of it on v", "unified_no_v", "unified"),
                 ("DNP in the FFN alone", "unified --attn_placement=input", "unified"),
                 ("DNP in attention alone", "unified --ffn_placement=input", "unified"),
                 ("DNP on o and down too", "gemma_unified", "unified"),  # Gemma's post-norms are just that
                 ("decay on α too", "unified_decay_direction", "unified"),
                 ("ER for OR", "unified --reparam=er", "unified"),
                 ("product for OR", "unified --reparam=product", "unified"),
                 ("baseline", "baseline", "unified"),
                 ("baseline, no decay on γ", "wd_none", "unified")],
    # how much is QK-norm and its like in the FFN, and how much the vectors?
    "norm_or_vector": [("baseline", "baseline", None),
                       *((name, file, "baseline") for name, file in (
                           ("QK-norm", "qk_norm"), ("QK-norm without its γ", "qk_norm_bare"), ("norm alone", "norm"),
                           ("DNP", "dnp"), ("unified", "unified"), ("unified, norm alone", "unified_norm"))),
                       ("no vectors", "no_scale", "baseline"),
                       ("norm alone, no vectors", "norm --scale_vectors=False", "baseline"),
                       # the same runs again, beside those with the same norms
                       ("unified and QK-norm", "unified", "QK-norm"),
                       ("DNP's vectors", "dnp", "norm alone"),
                       ("unified's output vectors", "unified", "unified, norm alone"),
                       ("all of unified's vectors", "unified", "norm alone, no vectors")],
    "optimizers": [(f"{name}, {optimizer} {schedule}", f"{name} --optimizer={optimizer} --schedule={schedule}",
                    f"baseline, {optimizer} {schedule}" if name != "baseline" else None)
                   for optimizer in ("adamw", "muon") for schedule in ("cosine", "wsd")
                   for name in ("baseline", "unified")],
}
# of size/moe_quickstart, and at each of --sizes
SUITES["mixtures"] = SUITES["scaling"] = [("baseline", "baseline", None), ("unified", "unified", "baseline"),
                                          ("free", "unified_free", "baseline")]


@dataclass
class Options:
    lrs: str = ""  # peak learning rates, with commas; empty is train.py's one, and one is not tuned
    seeds: str = "1,2,3"  # with commas; the arms share them, and with them the initial weights and the data's order
    tune_seeds: str = "101,102"  # on which each arm's learning rate is chosen
    jobs: Count = 1  # cells that run side by side, each with its share of the threads, or GPUs
    nproc: Count = 1  # processes of each cell; more than 1 is torchrun
    out: str = ""  # folder of the results; empty is out/ablate/ and the suite's name
    sizes: str = "1,2,3,4,1@100,2@100"  # scaling's: config files, or k for k layers, k heads and a width of 32 k; then
    tokens_per_param: Count = 20  # tokens for each parameter of the baseline, where no @ gives a size its own
    dry_run: bool = False  # list the cells and what is left to run, run nothing


@dataclass
class Cell:
    """One run of train.py, finished or not."""

    settings: Settings
    identity: list  # what else decides its losses: its data's fingerprints, and the code
    flops: float

    @cached_property
    def folder(self):
        s = self.settings
        # gpt_config: what settings.py makes of a 0 or a 'same' is no part of the code's hash
        identity = json.dumps([asdict(s), asdict(gpt_config(s)), self.identity], sort_keys=True)
        digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
        return CELLS / f"{s.n_layer}x{s.n_embd}-{s.max_steps}steps-lr{s.lr:g}-seed{s.seed}-{digest}"

    def at(self, lr, seed):
        return replace(self, settings=replace(self.settings, lr=lr, seed=seed))


# ---------------------------------------------------------------------------------------------------------------
# from words to arms, from arms to cells


def numbers(text, kind, name):
    """'1,2,3' as [1, 2, 3] of `kind`, each once, in order. Raises ConfigError."""
    try:
        values = sorted({kind(word) for word in text.split(",")})
    except ValueError:
        raise ConfigError(f"--{name} takes numbers with commas between them, not {text!r}") from None
    hints = get_type_hints(Settings, include_extras=True)
    return [check(name, value, hints["lr" if kind is float else "seed"]) for value in values]


def parse(args):
    """Return (suite, options, base): base is the files and flags that hold for every cell. Raises ConfigError."""
    if not args or args[0].startswith("-"):
        raise ConfigError(f"name a suite first ({', '.join(SUITES)}), or strategy files with commas between them")
    own, base = [], []
    for arg in args[1:]:
        name = arg[2:].partition("=")[0] if arg.startswith("--") else ""
        if name in ("seed", "out_dir", "resume", "overwrite"):
            raise ConfigError(f"{arg}: ablate.py sets {name} for each cell; there are --seeds and --out")
        (own if name in get_type_hints(Options) else base).append(arg)
    opt, _ = configure(Options, own)
    opt.lrs = numbers(opt.lrs, float, "lrs") if opt.lrs else []
    opt.seeds, opt.tune_seeds = numbers(opt.seeds, int, "seeds"), numbers(opt.tune_seeds, int, "tune_seeds")
    if opt.lrs[1:] and set(opt.seeds) & set(opt.tune_seeds):
        raise ConfigError("--seeds and --tune_seeds share a seed: the rate chosen on it looks better there than it is")
    return args[0], opt, base


def suite_arms(suite, opt, base):
    """[(name, arguments of train.py, reference or None)] of a suite. Raises ConfigError for an unknown one."""
    file = lambda word: word if word.startswith("--") else str(HERE / "config" / f"{word}.py")
    if suite.endswith(".py"):
        files = suite.split(",")
        names = [Path(f).stem for f in files]
        if len(set(names)) < len(names):
            raise ConfigError(f"{suite}: each strategy file once, and of different names")
        return [(n, base + [f], names[0] if n != names[0] else None) for n, f in zip(names, files)]
    if suite not in SUITES:
        raise ConfigError(f"there is no suite {suite!r}; there are {', '.join(SUITES)}, or name strategy files (.py)")
    if suite == "mixtures":
        base = [file("size/moe_quickstart"), *base]
    arms = [(name, base + [file(word) for word in words.split()], ref) for name, words, ref in SUITES[suite]]
    return [arm for size in opt.sizes.split(",") for arm in at_size(size, arms, opt)] if suite == "scaling" else arms


def check_flags(arms, base):
    """Refuse a flag of `base` that the words of an arm, which come after it, set otherwise. Raises ConfigError."""
    told, _ = configure(Settings, base)
    flags = {arg[2:].partition("=")[0] for arg in base if arg.startswith("--")} - {"warmup_steps"}  # scaling cuts it
    for arm, words, _ in arms:
        own, _ = configure(Settings, words)
        for name in sorted(flags):
            if getattr(own, name) != getattr(told, name):
                raise ConfigError(f"--{name}={getattr(told, name)} cannot hold for every cell: {arm} has {name} "
                                  f"{getattr(own, name)!r}. Compare strategy files of your own")


def at_size(size, arms, opt):
    """The arms at one of --sizes, as long as its tokens for each parameter of the first make it. Raises ConfigError."""
    shape, own, budget = size.partition("@")
    shape, label = [shape], Path(shape).stem
    if label.isdigit():
        width = 32 * int(label)
        shape, label = [f"--n_layer={label}", f"--n_head={label}", f"--n_embd={width}"], f"{label}x{width}"
    if own and not budget.isdigit():
        raise ConfigError(f"--sizes: {size}: after the @ comes a number of tokens, as in 2@100")
    s = settings_of(shape + arms[0][1])
    tokens = int(budget or opt.tokens_per_param) * meta_model(s).counts()["params"]
    steps = max(1, round(tokens / s.batch_tokens))
    length = [f"--max_steps={steps}", f"--warmup_steps={min(s.warmup_steps, steps // 10)}"]
    at = f"at {label}" + (f", {budget} tokens a parameter" if own else "")  # the comma keeps it out of stats.py's fit
    return [(f"{name} {at}", shape + words + length, ref and f"{ref} {at}") for name, words, ref in arms]


def meta_model(s):
    """The model of these settings without memory. Raises ConfigError where they do not fit together."""
    with torch.device("meta"):
        return GPT(gpt_config(s))


def settings_of(words):
    """
    Settings from train.py's arguments, the vocabulary its data's and the embedded data there. Their dtype is that of
    this machine, so that no arm in bf16 is compared with one in fp32 from elsewhere. Raises ConfigError.
    """
    s, _ = configure(Settings, words)
    folder = data_folder(s.dataset)
    if s.dataset == "pysrc" and not (folder / "meta.json").exists():
        from data.pysrc.prepare import prepare
        prepare()
    return replace(s, vocab_size=s.vocab_size or vocabulary(folder), dtype=pick_device(s).dtype, sample_tokens=0)


def make_arms(named, opt, code):
    """{name: its Cell at train.py's rate and seed} of suite_arms()'s triples. Raises ConfigError, DataError."""
    arms, data = {}, {}
    for name, words, _ in named:
        s = settings_of(words)
        batch_plan(s, opt.nproc)
        key = s.dataset, s.block_size, s.vocab_size
        if key not in data:
            data[key] = [Tokens(data_folder(s.dataset), split, *key[1:]).fingerprint() for split in ("train", "val")]
        arms[name] = Cell(s, [data[key], code], meta_model(s).flops_per_token() * s.batch_tokens * s.max_steps)
    return arms


def best_rate(grid, loss_at):
    """
    The rate of a sorted grid with the lowest loss; None where none is finite, or while that is not known.

    loss_at(lr) asks for a loss and returns None where it is still to be found. It is asked for the middle three, then
    for the best one's neighbours until it has both, so that a wide grid costs what a narrow one does.
    """
    if len(grid) == 1:
        return grid[0]
    middle, losses = len(grid) // 2, {}
    more = {middle - 1, middle, middle + 1} & set(range(len(grid)))
    while more:
        losses.update({i: loss_at(grid[i]) for i in sorted(more)})
        if None in losses.values():
            return None
        best = min(losses, key=losses.get)
        more = {best - 1, best + 1} & set(range(len(grid))) - losses.keys()
    return grid[best] if math.isfinite(losses[best]) else None


def plan(arms, opt, loss_of):
    """
    ({(arm, lr, seed): Cell}, FLOPs): the cells that a suite needs by what is known now, and what will come on
    top once the rates are chosen. First tuning's, then one reported seed after the other, so that a stopped suite has
    whole ones. loss_of(cell): its validation loss, inf where it diverged, None where it is not finished.
    """
    cells, rates, later = {}, {}, 0.0
    for arm, cell in arms.items():
        def tuning_loss(lr):
            cells.update({(arm, lr, seed): cell.at(lr, seed) for seed in opt.tune_seeds})
            losses = [loss_of(cells[arm, lr, seed]) for seed in opt.tune_seeds]
            return None if None in losses else statistics.mean(losses)

        rates[arm] = best_rate(opt.lrs or [cell.settings.lr], tuning_loss)
        if any(arm == name and loss_of(c) is None for (name, _, _), c in cells.items()):
            later += cell.flops * len(opt.seeds)
    for seed in opt.seeds:
        cells |= {(arm, lr, seed): arms[arm].at(lr, seed) for arm, lr in rates.items() if lr is not None}
    return cells, later


# ---------------------------------------------------------------------------------------------------------------
# what a cell left on disk


def val_loss(cell):
    """The final validation loss in nats, inf where the run diverged, None where it is not finished."""
    if (cell.folder / "diverged.txt").exists():
        return math.inf
    rows = read_csv(cell.folder / "log.csv")
    if rows and rows[-1]["step"] == str(cell.settings.max_steps) and rows[-1]["val_loss"]:
        return float(rows[-1]["val_loss"])
    return None


OF_SUITE = ["suite", "arm", "reference", "use"]
COLUMNS = OF_SUITE + ["lr", "seed", "val_loss", "params", "scale_params", "steps", "tokens", "flops",
                      "tokens_per_second", "code", "commit", "python", "torch", "device", "cell"]


def result_row(cell):
    """What results.csv says of a finished cell, beside OF_SUITE."""
    s, made = cell.settings, read_json(cell.folder / "config.json")
    rates = [float(r) for row in read_csv(cell.folder / "log.csv") if (r := row["tokens_per_second"]) != "0"]
    values = (s.lr, s.seed, val_loss(cell), made["params"], made["scale_params"], s.max_steps,
              s.max_steps * s.batch_tokens, f"{cell.flops:.6g}", f"{statistics.median(rates):.0f}" if rates else "",
              cell.identity[-1], made["git_commit"], made["versions"]["python"], made["versions"]["torch"],
              made["device"], cell.folder.name)
    return dict(zip(COLUMNS[len(OF_SUITE):], values, strict=True))


def evaluations(cell, log, n):
    """The rows of a cell's log at n of its evaluations at most, the first and the last among them."""
    rows = [row for row in read_csv(cell.folder / log) if row.get("val_loss") != ""]  # log.csv has others in between
    steps = list(dict.fromkeys(row["step"] for row in rows))
    n = min(n, len(steps))
    chosen = {steps[i * (len(steps) - 1) // max(1, n - 1)] for i in range(n)}
    return [{"cell": cell.folder.name, **row} for row in rows if row["step"] in chosen]


# ---------------------------------------------------------------------------------------------------------------
# running


def in_use(folder):
    """Whether a run holds the folder, such as one whose ablate.py was killed."""
    try:
        lock(folder).close()
    except ConfigError:
        return True
    return False


class Runner:
    """Runs cells, `jobs` at a time, each a process of train.py. Those that others run are waited for."""

    def __init__(self, opt):
        self.opt, self.code, self.edited = opt, code_hash(), False
        self.signals, self.failed = [], {}  # failed: {folder: why}
        self.free, self.running = list(range(opt.jobs)), []
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = names.split(",") if names else [str(i) for i in range(torch.cuda.device_count())]
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = max(1, cpus // (opt.jobs * opt.nproc))

    def start(self, cell):
        """Start a cell, where no other process has it and the code is still what it was."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        try:  # train.py's own lock comes seconds later, when torch is loaded
            held = lock(cell.folder, "ablate.lock")
        except ConfigError:
            return
        finished = val_loss(cell) is not None
        busy = in_use(cell.folder)
        if finished and not busy:
            (cell.folder / "ckpt.pt").unlink(missing_ok=True)  # of hundreds of cells they would fill the disk
        if not finished and not busy:
            self.edited = code_hash() != self.code
        if finished or busy or self.edited:
            held.close()
            return
        slot, n, s = self.free.pop(0), self.opt.nproc, cell.settings
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        command = [sys.executable, *launcher,
                   str(HERE / "train.py"), f"--out_dir={cell.folder}", "--resume=auto",
                   *(f"--{f.name}={getattr(s, f.name)}" for f in fields(s) if getattr(s, f.name) != f.default)]
        env = dict(os.environ, OMP_NUM_THREADS=str(self.threads))
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join({self.gpus[(slot * n + i) % len(self.gpus)]: 0 for i in range(n)})
        with open(cell.folder / "train.log", "w", encoding="utf-8") as log:
            # a session of its own: Ctrl-C comes to ablate.py alone, which passes it on
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env,
                                       start_new_session=True)
        self.running.append((cell, process, slot, held))

    def collect(self, cell, process, slot, held):
        """Put down how a cell ended: that it diverged, or that it failed and why. Returns its loss or None."""
        output = (cell.folder / "train.log").read_text(encoding="utf-8", errors="replace")
        diverged = re.search(r"^train\.py: (step \d+: loss .*)$", output, re.M)
        if val_loss(cell) is None and process.returncode and diverged:
            write_whole(cell.folder / "diverged.txt", diverged[1] + "\n")
        elif val_loss(cell) is None and not self.signals and not in_use(cell.folder):
            lines = output.strip().splitlines() or [f"exit code {process.returncode}"]
            killed = process.returncode < 0 and f"killed by {signal.Signals(-process.returncode).name}"
            self.failed[cell.folder] = killed or lines[-1]
        self.running.remove((cell, process, slot, held))
        self.free.append(slot)
        held.close()
        return val_loss(cell)

    def run(self, wanted, report):
        """
        Run what wanted() lists, which is asked anew after each cell that ends, until nothing of it is left to run.
        report(cell, loss) is called where one has ended with a loss.
        """
        told = 0
        old = {sig: signal.signal(sig, lambda signum, frame: self.signals.append(signum))
               for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            while True:
                taken = {cell.folder for cell, *_ in self.running} | self.failed.keys()
                waiting = [cell for cell in wanted() if cell.folder not in taken]
                if not self.running and (self.signals or self.edited or not waiting):
                    return
                for cell in waiting:
                    if self.free and not self.signals and not self.edited:
                        self.start(cell)
                ended = []
                while not ended:
                    time.sleep(0.2)
                    ended = [entry for entry in self.running if entry[1].poll() is not None]
                    if len(self.signals) > told:
                        told = len(self.signals)
                        # the first lets train.py save; torchrun passes it on, so it must not go to the whole group
                        gentle = told == 1 or os.name == "nt"
                        for _, process, *_ in self.running:
                            process.terminate() if gentle else os.killpg(process.pid, signal.SIGKILL)
                    if not self.running:  # others have what is left
                        break
                for entry in ended:
                    if (loss := self.collect(*entry)) is not None:
                        report(entry[0], loss)
        finally:
            for _, process, *_ in self.running:  # only where ablate.py itself failed
                process.terminate()
            for sig, handler in old.items():
                signal.signal(sig, handler)


# ---------------------------------------------------------------------------------------------------------------
# the tables


def markdown_table(columns, rows):
    """The lines of a Markdown table: its first column is words, the others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def results_table(arms):
    """The table of summarise()'s arms."""
    rows = []
    for name, a in arms.items():
        difference, interval, p, sees, verdict, added = [""] * 6
        if "delta" in a:
            difference, added = f"{a['delta']:+.4f}", f"{a['added']:+,.0f}"
            verdict = "same runs" if a["same"] else "one pair" if a["p"] is None else a["verdict"]
            if a["p"] is not None:
                interval = f"{a['delta'] - a['half']:+.4f} … {a['delta'] + a['half']:+.4f}"
                p, sees = f"{a['p']:.2g}", f"±{a['sees']:.4f}"
        rows.append([name, f"{a['lr']:g}", f"{a['mean']:.4f}", difference, interval, p, verdict, sees,
                     str(len(a["losses"])), added, f"{a['tokens']:,.0f}"])
    return markdown_table(["arm", "lr", "val loss", "difference", "95% interval", "p", "verdict", "could see", "seeds",
                           "parameters added", "tokens"], rows)


def tuning_table(rows):
    """The mean loss of each arm at each rate over tuning seeds, the best in bold, with a star where it is the last."""
    losses = defaultdict(lambda: defaultdict(list))
    for row in rows:
        losses[row["arm"]][float(row["lr"])].append(float(row["val_loss"]))
    grid, lines = sorted({float(row["lr"]) for row in rows}), []
    for arm, by_rate in losses.items():
        means = {lr: statistics.mean(by_rate[lr]) for lr in sorted(by_rate)}
        best, star = min(means, key=means.get), "\\*"
        lines.append([arm, *("" if lr not in means else f"{means[lr]:.4f}" if lr != best else
                             f"**{means[lr]:.4f}**{star if lr in (min(means), max(means)) else ''}" for lr in grid)])
    return markdown_table(["arm", *(f"{lr:g}" for lr in grid)], lines)


def report_text(rows, command):
    """results.md from the rows of results.csv: the tables, how to read them, what does not count and why, what ran."""
    used, tuning = ([row for row in rows if row["use"] in uses] for uses in (("report", "tuning"), ("tuning",)))
    if not used:
        return "No cell is finished yet.\n"
    arms = summarise(rows)
    tests = max((a["tests"] for a in arms.values() if a.get("p") is not None), default=0)
    seeds = ", ".join(sorted({str(row["seed"]) for row in tuning}))
    tuned = f"each at its best learning rate on seeds that are not reported ({seeds})" if tuning else "none tuned"
    lines = [f"# {used[0]['suite']}", "", *results_table(arms), "",
             "A difference is an arm's validation loss (nats) minus its reference's, in pairs of equal seed and data "
             f"order, {tuned}; its interval is Student's t over the pairs. p is the paired t test's, corrected by Holm "
             f"for the {tests} distinct comparisons of the suite, and below {LEVEL} an arm is called better or worse: "
             "where nothing differs, at most one suite in twenty calls any arm so. *Could see* is the true difference "
             f"that would be called so with probability {POWER} at {LEVEL} / {tests}, which is what Holm asks of the "
             "smallest p, given how these pairs scatter. Where the verdict is open, the difference may be as large as "
             "that."]
    if tuning:
        lines += ["", "Tuning, mean loss (\\* the best rate is the last that was tried: a better one may lie beyond):",
                  "", *tuning_table(tuning)]
    lines.append("")
    for name, (_, (a, b, c), ratio) in scaling_fits(arms).items():
        lines.append(f"- {name}: L = {a:.4f} + {b:.4g} C^(−{c:.4f})" + (
            "; at the largest C the same loss for 1/{:.3f} of the compute (95%: {:.3f} … {:.3f})".format(*ratio)
            if ratio else ""))
    for name in dict.fromkeys(row["arm"] for row in used if row["arm"] not in arms):
        lines.append(f"- {name} does not count: it diverged, or is not finished.")
    if diverged := [f"{r['arm']} at lr {r['lr']}, seed {r['seed']}" for r in used if float(r["val_loss"]) == math.inf]:
        lines.append(f"- Diverged: {'; '.join(diverged)}.")
    if kept := [row for row in rows if row["use"] == "kept"]:
        codes = sorted({row["code"] for row in kept} - {row["code"] for row in used})
        lines.append(f"- In results.csv alone, compared with nothing: {len(kept)} rows of other settings, data, rates, "
                     f"seeds{' or code (' + ', '.join(codes) + ')' if codes else ''}.")
    lines.append(f"- Command: `{command}`")
    for name in ("code", "commit", "python", "torch", "device"):
        lines.append(f"- {name}: {'; '.join(dict.fromkeys(str(row[name]) for row in used))}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------------------------


def write_csv(path, rows):
    """Write dicts of equal keys, whole or not at all; without rows, nothing."""
    if rows:
        with replacing(path, encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def recorded(out):
    """The rows of the results.csv that out holds already. Raises ConfigError where that is of another kind."""
    rows = read_csv(out / "results.csv")
    if rows and list(rows[0]) != COLUMNS:
        raise ConfigError(f"{out}/results.csv has other columns than this ablate.py writes; name another --out")
    return rows


def write_report(out, suite, references, opt, cells, command):
    """Gather the cells' logs into out, over what it holds of them and beside what it holds of others: results.md."""
    known = recorded(out)
    by_cell = {row["cell"]: row for row in known}
    logs = {name: defaultdict(list) for name in ("curves", "scales")}
    for name, groups in logs.items():
        for row in read_csv(out / f"{name}.csv"):
            groups[row["cell"]].append(row)
    rows, planned = [], set()
    for (arm, _, seed), cell in cells.items():
        name, finished = cell.folder.name, val_loss(cell) is not None
        planned.add(name)
        if finished or name in by_cell:
            use = "report" if seed in opt.seeds else "tuning"
            names = dict(zip(OF_SUITE, (suite, arm, references[arm] or "", use)))
            rows.append({**names, **(result_row(cell) if finished else by_cell[name]), **names})
        if finished and seed in opt.seeds:
            logs["curves"][name] = evaluations(cell, "log.csv", 40)
            logs["scales"][name] = evaluations(cell, "scales.csv", 12) if seed == opt.seeds[0] else []
    rows += [{**row, "use": "kept"} for row in known if row["cell"] not in planned]
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "results.csv", rows)
    for name, groups in logs.items():
        write_csv(out / f"{name}.csv", [row for group in groups.values() for row in group])
    text = report_text(rows, command)
    write_whole(out / "results.md", text)
    return text


def main(args):
    if {"--help", "-h"} & set(args):
        print(f"{__doc__.strip()}\n\nsuites:")
        for name, arms in SUITES.items():
            print(f"  {name:<16} {'; '.join(arm for arm, _, _ in arms)}")
        print("\noptions, with their defaults:\n" + help_text(Options))
        return 0
    if "RANK" in os.environ:
        raise ConfigError("start ablate.py without torchrun: --nproc=8 gives each cell 8 processes of its own")
    suite, opt, base = parse(args)
    runner = Runner(opt)
    named = suite_arms(suite, opt, base)
    check_flags(named, base)
    arms, references = make_arms(named, opt, runner.code), {name: reference for name, _, reference in named}
    out = opt.out or Path("out/ablate") / (suite if suite in SUITES else "-".join(arms))
    out, command = Path(out).expanduser(), shlex.join(["python", "ablate.py", *args])
    elsewhere = {row["cell"]: float(row["val_loss"]) for row in recorded(out)}

    def loss_of(cell):
        loss = val_loss(cell)
        return elsewhere.get(cell.folder.name) if loss is None else loss

    def progress():
        """(plan()'s cells, how many different ones are finished of how many, FLOPs that are done, FLOPs in all)"""
        cells, later = plan(arms, opt, loss_of)
        distinct = list({cell.folder: cell for cell in cells.values()}.values())
        done = [cell for cell in distinct if loss_of(cell) is not None]
        flops = [sum(cell.flops for cell in some) for some in (done, distinct)]
        return cells, f"{len(done)}/{len(distinct)}{'+' if later else ''}", flops[0], flops[1] + later

    cells, count, done_before, total = progress()
    if opt.dry_run:
        for (arm, lr, seed), cell in cells.items():
            print(f"{arm:<32} lr {lr:<8g} seed {seed:<4} {'to run' if loss_of(cell) is None else 'finished'}")
    print(f"{count} different cells finished, {total - done_before:.3g} of {total:.3g} FLOPs to go")
    if opt.dry_run:
        return 0
    started = time.monotonic()

    def wanted():
        # one that is finished but has a checkpoint is still being saved, by a process whose ablate.py was killed
        return list({cell.folder: cell for cell in plan(arms, opt, loss_of)[0].values()
                     if loss_of(cell) is None or (cell.folder / "ckpt.pt").exists()}.values())

    def report(cell, loss):
        cells, count, done, total = progress()
        arm, lr, seed = next(key for key, c in cells.items() if c.folder == cell.folder)
        seconds = int((time.monotonic() - started) * (total - done) / (done - done_before))
        print(f"{count}  {arm}  lr {lr:g}  seed {seed}  val_loss {loss:.4f}  {timedelta(seconds=seconds)} left")
        write_report(out, suite, references, opt, cells, command)

    runner.run(wanted, report)
    print("\n" + write_report(out, suite, references, opt, progress()[0], command))
    for folder, why in runner.failed.items():
        print(f"ablate.py: failed: {folder}: {why}", file=sys.stderr)
    if runner.edited:
        print("ablate.py: the code has changed since the start; the same command goes on with what it is now",
              file=sys.stderr)
    if runner.signals:
        print(f"stopped by a signal; the same command goes on:\n  {command}", file=sys.stderr)
        return 128 + runner.signals[-1]
    print(f"in {out}: results.csv, results.md, curves.csv, scales.csv")
    return 1 if runner.failed or runner.edited else 0


if __name__ == "__main__":
    streams()
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, DataError) as e:
        refuse(e)
    except OSError as e:
        sys.exit(f"ablate.py: {e}")
