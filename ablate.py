"""
Compare strategies, with their noise:

    python ablate.py buildup --lrs=2e-3,4e-3,8e-3 --seeds=1,2,3 --jobs=2 --max_steps=300
    python ablate.py config/baseline.py,config/unified.py config/size/llama_0.12b.py --nproc=8
    python ablate.py scaling --sizes=2,3,4,5 --tokens_per_param=20

The first word is a suite (below), or strategy files joined by commas, the first being the reference. Config files and
settings of train.py behind it hold for every cell. A cell is one run of train.py: an arm at one learning rate with
one seed. Cells live in out/ablate/cells under a name made of their settings and data, so arms with equal settings
and suites that share arms run them once, finished ones are skipped, and the same command goes on with what was
stopped. --out receives results.csv (a row a cell), results.md (the table), curves.csv and scales.csv. What they hold
counts as finished too, so seeds or learning rates can be added to what another machine has begun. A cell's name does
not cover the code: when you have changed that, remove out/ablate.
"""

import fcntl
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
from pathlib import Path
from typing import get_type_hints

import torch
from tqdm import tqdm

from configurator import (
    ConfigError,
    Count,
    check,
    configure,
    help_text,
    read_flag,
    refuse,
)
from data.tokens import DataError, Tokens, data_folder
from model import GPT
from runs import write_whole
from settings import Settings, batch_plan, gpt_config
from stats import read_csv, summarise, write_csv

HERE = Path(__file__).resolve().parent
CELLS = Path("out/ablate/cells")

# An arm is (name, config files and flags, the arm it is compared with). A word without dashes is config/<word>.py.
LEAVE_OUT = ("hg", "dnp", "or")
SUITES = {
    "removal": [("baseline", "baseline", None), ("no scale", "no_scale", "baseline")],
    "decay": [(f"{arch}, {decay}", f"--arch={arch} --scale_decay={decay}", f"{arch}, all" if decay != "all" else None)
              for arch in ("gemma", "llama") for decay in ("all", "input", "none", "output")],
    "design": [("baseline", "baseline", None),
               *((name, name, "baseline") for name in ("hg", "dp", "dnp", "or", "er", "product", "zero_centred"))],
    "buildup": [("baseline", "baseline", None), ("+HG", "hg", "baseline"), ("+DNP", "hg_dnp", "baseline"),
                ("+OR", "hg_dnp_or", "baseline"), ("+IWD (unified)", "unified", "baseline")],
    "leave_one_out": [("unified", "unified", None), *((f"without {x.upper()}", f"unified_no_{x}", "unified")
                                                      for x in LEAVE_OUT),
                      ("without IWD", "hg_dnp_or", "unified"), ("baseline", "baseline", "unified")],
    # each [R] of the design against its rivals
    "readings": [("unified", "unified", None),
                 ("final norm: output role", "unified_final_output", "unified"),
                 ("norms over the full width", "unified_full_norm", "unified"),
                 ("DP in attention", "unified_dp_attn", "unified"),
                 ("DNP in the FFN alone", "unified --attn_placement=input", "unified"),
                 ("DNP in attention alone", "unified --ffn_placement=input", "unified"),
                 ("DNP on o and down too", "gemma_unified", "unified"),  # Gemma's post-norms are just that
                 ("ER for OR", "unified --reparam=er", "unified"),
                 ("product for OR", "unified --reparam=product", "unified"),
                 ("baseline", "baseline", "unified"),
                 ("baseline, no decay on γ", "wd_none", "unified")],
    # how much is QK-norm and its like in the FFN, and how much the vectors?
    "norm_or_vector": [("baseline", "baseline", None),
                       *((name, file, "baseline") for name, file in (
                           ("norm alone", "norm"), ("DNP", "dnp"), ("unified", "unified"),
                           ("unified, norm alone", "unified_norm"))),
                       *((f"{name}, no vectors", f"{file} --scale_vectors=False", "baseline") for name, file in (
                           ("baseline", "baseline"), ("norm alone", "norm"), ("DNP", "dnp"), ("unified", "unified"),
                           ("unified, norm alone", "unified_norm"))),
                       # the same runs again, beside those with the same norms
                       ("DNP's vectors", "dnp", "norm alone"),
                       ("unified's output vectors", "unified", "unified, norm alone"),
                       ("all of unified's vectors", "unified", "unified, no vectors")],
    "optimizers": [(f"{name}, {optimizer} {schedule}", f"{name} --optimizer={optimizer} --schedule={schedule}",
                    f"baseline, {optimizer} {schedule}" if name != "baseline" else None)
                   for optimizer in ("adamw", "muon") for schedule in ("cosine", "wsd")
                   for name in ("baseline", "unified")],
    "scaling": [("baseline", "baseline", None), ("unified", "unified", "baseline")],  # at each of --sizes
}


@dataclass
class Options:
    lrs: str = ""  # peak learning rates, with commas; empty is train.py's one
    seeds: str = "1,2,3"  # with commas; the arms share them, and with them the initial weights and the data's order
    jobs: Count = 1  # cells that run side by side, each with its share of the threads, or GPUs
    nproc: Count = 1  # processes of each cell; more than 1 is torchrun
    out: str = ""  # folder of the results; empty is out/ablate/ and the suite's name
    sizes: str = "2,3,4,5,6"  # scaling's: config files, or k for k layers, k heads and a width of 32 k
    tokens_per_param: Count = 20  # scaling's: tokens for each parameter of the baseline
    dry_run: bool = False  # list the cells and what is left to run, run nothing


@dataclass
class Cell:
    """One run: its settings with all that has no effect taken out, and what it counts."""

    settings: Settings
    folder: Path
    counts: dict  # params, active_params, scale_params
    flops: float  # of the whole run


# ---------------------------------------------------------------------------------------------------------------
# from words to cells


def numbers(text, kind, name):
    """'1,2,3' as [1, 2, 3] of `kind`, each once. Raises ConfigError."""
    try:
        values = list(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        raise ConfigError(f"--{name} takes numbers with commas between them, not {text!r}") from None
    return [check(name, value, get_type_hints(Settings, include_extras=True)[name[:-1]]) for value in values]


def parse(args):
    """Return (suite, options, base): base is the files and flags that hold for every cell. Raises ConfigError."""
    if not args or args[0].startswith("-"):
        raise ConfigError(f"name a suite first ({', '.join(SUITES)}), or strategy files with commas between them")
    hints = get_type_hints(Options, include_extras=True)
    own, base = {}, []
    for arg in args[1:]:
        name = arg[2:].partition("=")[0] if arg.startswith("--") else ""
        if name in hints:
            own[name] = read_flag(arg, hints)[1]
        elif name in ("seed", "out_dir", "resume"):
            raise ConfigError(f"{arg}: ablate.py sets {name} for each cell; there are --seeds and --out")
        else:
            base.append(arg)
    return args[0], Options(**own), base


def suite_arms(suite, opt, base):
    """[(name, arguments of train.py, reference or None)] of a suite. Raises ConfigError for an unknown one."""
    if suite in SUITES:
        arms = [(name, [w if w.startswith("--") else str(HERE / "config" / f"{w}.py") for w in words.split()], ref)
                for name, words, ref in SUITES[suite]]
    elif suite.endswith(".py"):
        files = suite.split(",")
        names = [Path(f).stem for f in files]
        if len(set(names)) < len(names):
            raise ConfigError(f"{suite}: each strategy file once, and of different names")
        arms = [(n, [f], names[0] if n != names[0] else None) for n, f in zip(names, files)]
    else:
        raise ConfigError(f"there is no suite {suite!r}; there are {', '.join(SUITES)}, or name strategy files (.py)")
    if suite != "scaling":
        return [(name, base + words, ref) for name, words, ref in arms]
    sized = []
    for size in opt.sizes.split(","):
        shape = [f"--n_layer={size}", f"--n_head={size}", f"--n_embd={32 * int(size)}"] if size.isdigit() else [size]
        words = shape + base
        s = configure(Settings, words + arms[0][1])[0]
        steps = max(1, round(opt.tokens_per_param * meta_model(s).counts()["params"] / s.batch_tokens))
        label = Path(size).stem if not size.isdigit() else f"{size}x{32 * int(size)}"
        sized += [(f"{name} at {label}", words + [f"--max_steps={steps}"] + own, ref and f"{ref} at {label}")
                  for name, own, ref in arms]
    return sized


def meta_model(s):
    """The model of these settings without memory. Raises ConfigError where they do not fit together."""
    with torch.device("meta"):
        return GPT(gpt_config(s))


def canonical(s):
    """
    Settings that train to the same numbers as s, the same ones for all such s.

    So no cell is run twice under two names: without output-role γ, decay on all is decay on the input role; without
    scale vectors DNP is its norm, and what parameterises γ is nothing.
    """
    config = gpt_config(s)
    attn, ffn = config.attn_placement, config.ffn_placement
    if not s.scale_vectors:
        bare = {"dual": "input", "dual_norm": "norm"}
        attn, ffn = bare.get(attn, attn), bare.get(ffn, ffn)
        s = replace(s, heterogeneous=False, reparam="direct", scale_decay="all", scale_lr_mult=1.0,
                    final_norm_role="input")
    alike = attn == ffn
    s = replace(s, placement=attn if alike else "input", attn_placement="same" if alike else attn,
                ffn_placement="same" if alike else ffn)
    if "output" not in {role for _, _, role, _ in meta_model(s).named_roles()}:
        s = replace(s, scale_decay={"input": "all", "output": "none"}.get(s.scale_decay, s.scale_decay))
    return replace(s, sample_tokens=0, out_dir="", resume=False, dry_run=False)


def data_identity(s, dry_run):
    """The fingerprint of a cell's data, 'absent' where a dry run finds none. Raises DataError."""
    folder = data_folder(s.dataset)
    if s.dataset == "pysrc" and not (folder / "meta.json").exists() and not dry_run:
        from data.pysrc.prepare import prepare
        prepare()
    try:
        return [Tokens(folder, split, s.block_size, s.vocab_size).fingerprint() for split in ("train", "val")]
    except DataError:
        if dry_run:
            return "absent"
        raise


def make_cells(arms, opt, nproc=1):
    """
    {(arm, lr, seed): Cell}, one seed after the other, so that a stopped suite has whole ones. Equal cells are one
    object. Raises ConfigError, DataError.
    """
    seeds = numbers(opt.seeds, int, "seeds")
    cells, by_folder, data = {}, {}, {}
    for name, words, _ in arms:
        given, _ = configure(Settings, words)
        batch_plan(given, nproc)
        base = canonical(given)
        data_key = (base.dataset, base.block_size, base.vocab_size)
        if data_key not in data:
            data[data_key] = data_identity(base, opt.dry_run)
        model = meta_model(base)
        flops = model.flops_per_token() * base.batch_tokens * base.max_steps
        for lr in numbers(opt.lrs, float, "lrs") if opt.lrs else [base.lr]:
            for seed in seeds:
                s = replace(base, lr=lr, seed=seed)
                digest = hashlib.sha256(json.dumps([asdict(s), data[data_key]], sort_keys=True).encode()).hexdigest()
                folder = CELLS / f"{s.n_layer}x{s.n_embd}-{s.max_steps}steps-lr{lr:g}-seed{seed}-{digest[:10]}"
                cells[name, lr, seed] = by_folder.setdefault(folder, Cell(s, folder, model.counts(), flops))
    return dict(sorted(cells.items(), key=lambda item: seeds.index(item[0][2])))


# ---------------------------------------------------------------------------------------------------------------
# what a cell left on disk


def step_of(cell):
    """The last step that the cell's log has reached; 0 before there is one."""
    try:
        with open(cell.folder / "log.csv", "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - 400))
            last = f.read().splitlines()[-1].split(b",")[0]
    except (FileNotFoundError, IndexError):
        return 0
    return min(int(last), cell.settings.max_steps) if last.isdigit() else 0


def val_loss(cell):
    """The final validation loss in nats, inf where the run diverged, None where it is not finished."""
    if (cell.folder / "diverged.txt").exists():
        return math.inf
    rows = read_csv(cell.folder / "log.csv")
    if rows and rows[-1]["step"] == str(cell.settings.max_steps) and rows[-1]["val_loss"]:
        return float(rows[-1]["val_loss"])
    return None


RESULT_COLUMNS = ["suite", "arm", "reference", "lr", "seed", "val_loss", "params", "scale_params", "steps", "tokens",
                  "flops", "tokens_per_second", "commit", "python", "torch", "device", "cell"]


def result_row(suite, arm, reference, cell):
    """A row of results.csv, or None where the cell is not finished."""
    loss = val_loss(cell)
    if loss is None:
        return None
    s, made = cell.settings, json.loads((cell.folder / "config.json").read_text(encoding="utf-8"))
    rates = [float(r) for row in read_csv(cell.folder / "log.csv") if (r := row["tokens_per_second"]) != "0"]
    values = (suite, arm, reference or "", s.lr, s.seed, loss, made["params"], made["scale_params"], s.max_steps,
              s.max_steps * s.batch_tokens, f"{cell.flops:.6g}", f"{statistics.median(rates):.0f}" if rates else "",
              made["git_commit"], made["versions"]["python"], made["versions"]["torch"], made["device"],
              cell.folder.name)
    return dict(zip(RESULT_COLUMNS, values, strict=True))


def thin(values, n):
    """At most n of a list, evenly, with its first and its last."""
    return values if len(values) <= n else [values[round(i * (len(values) - 1) / (n - 1))] for i in range(n)]


def curve_rows(arm, cell):
    """A row for an evaluation: the losses, train_loss the mean of what was logged since the one before."""
    rows, since = [], []
    for row in read_csv(cell.folder / "log.csv"):
        # a stopped run logs its last step too, which an uninterrupted one has not
        if row["train_loss"] and (int(row["step"]) % cell.settings.log_interval == 0 or row["val_loss"]):
            since.append(float(row["train_loss"]))
        if row["val_loss"]:
            rows.append({"arm": arm, "lr": cell.settings.lr, "seed": cell.settings.seed, "step": row["step"],
                         "tokens": row["tokens"], "train_loss": f"{statistics.mean(since):.5f}" if since else "",
                         "val_loss": f"{float(row['val_loss']):.5f}"})
            since = []
    return thin(rows, 60)


def scale_rows(arm, cell):
    """The statistics of every γ at 12 evaluations at most."""
    rows = read_csv(cell.folder / "scales.csv")
    steps = set(thin(list(dict.fromkeys(row["step"] for row in rows)), 12))
    kept = ("step", "name", "role", "cosine")  # an angle of a degree is a cosine of 0.99985
    return [{"arm": arm, "lr": cell.settings.lr, **{k: v if k in kept else f"{float(v):.5g}" for k, v in row.items()}}
            for row in rows if row["step"] in steps]


# ---------------------------------------------------------------------------------------------------------------
# running


class Runner:
    """
    Runs cells, `jobs` at a time, each a process of train.py; keeps one bar for all.

    A cell's lock file is held by ablate.py and by the cell's own process: if ablate.py alone is killed, the cell
    goes on and a second ablate.py waits for it instead of writing into the same folder.
    """

    def __init__(self, cells, opt):
        self.cells, self.opt = cells, opt
        self.signal, self.failed = 0, []
        self.free, self.running = list(range(opt.jobs)), {}
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = names.split(",") if names else [str(i) for i in range(torch.cuda.device_count())]
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.threads = max(1, cpus // (opt.jobs * opt.nproc))

    def command(self, cell):
        s = cell.settings
        flags = [f"--{f.name}={getattr(s, f.name)}" for f in fields(s) if getattr(s, f.name) != f.default]
        flags.append(f"--out_dir={cell.folder}")
        if (cell.folder / "ckpt.pt").exists():
            flags.append("--resume=True")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.opt.nproc}"]
        return [sys.executable, *(launcher if self.opt.nproc > 1 else []), str(HERE / "train.py"), *flags]

    def start(self, cell):
        """Start a cell, or tidy up behind a finished one; False where another process has it."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(cell.folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        if val_loss(cell) is not None:
            self.drop_checkpoint(cell)
            os.close(lock)
            return True
        slot = self.free.pop(0)
        env = dict(os.environ, OMP_NUM_THREADS=str(self.threads))
        if self.gpus:
            mine = [self.gpus[(slot * self.opt.nproc + i) % len(self.gpus)] for i in range(self.opt.nproc)]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))
        with open(cell.folder / "train.log", "w", encoding="utf-8") as log:
            # a session of its own: Ctrl-C comes to ablate.py alone, which passes it on
            process = subprocess.Popen(self.command(cell), stdin=subprocess.DEVNULL, stdout=log,
                                       stderr=subprocess.STDOUT, env=env, pass_fds=(lock,), start_new_session=True)
        self.running[cell.folder] = (cell, process, slot, lock)
        return True

    def drop_checkpoint(self, cell):
        """The logs are what is kept of a finished cell: checkpoints of hundreds would fill the disk."""
        for name in ("ckpt.pt", "ckpt.pt.tmp"):
            (cell.folder / name).unlink(missing_ok=True)

    def collect(self, cell, process, slot, lock):
        """Put down how a cell ended: its loss, its divergence, or that it failed and why."""
        loss = val_loss(cell)
        output = (cell.folder / "train.log").read_text(encoding="utf-8", errors="replace")
        diverged = re.search(r"^train\.py: (step \d+: loss .*)$", output, re.M)
        if loss is None and process.returncode and diverged:
            write_whole(cell.folder / "diverged.txt", diverged[1] + "\n")
            loss = math.inf
        if loss is not None:
            self.drop_checkpoint(cell)
        elif not self.signal:
            lines = output.strip().splitlines() or [f"exit code {process.returncode}"]
            self.failed.append(f"{cell.folder}: {lines[-1]}")
        del self.running[cell.folder]
        self.free.append(slot)
        os.close(lock)
        return loss

    def done(self, unfinished):
        """FLOPs behind us, given the cells that are not finished."""
        left = sum(cell.flops * (1 - step_of(cell) / cell.settings.max_steps) for cell in unfinished)
        return sum(cell.flops for cell in self.cells) - left

    def run(self, report):
        """Run what is not finished; report(write, cell, loss, seconds left) is called behind each cell that ends."""
        signals = []
        old = {sig: signal.signal(sig, lambda signum, frame: signals.append(signum))
               for sig in (signal.SIGINT, signal.SIGTERM)}
        # one that is finished but has a checkpoint is still being saved, by a process whose ablate.py was killed,
        # or was when all were killed: the lock tells which
        waiting = [c for c in self.cells if val_loss(c) is None or (c.folder / "ckpt.pt").exists()]
        total, before = sum(cell.flops for cell in self.cells), self.done(waiting)
        started, told = time.monotonic(), 0
        bar = tqdm(total=total, initial=before, disable=not sys.stderr.isatty(), dynamic_ncols=True, smoothing=0,
                   bar_format="{desc}{percentage:3.0f}%|{bar}| {elapsed} gone, {remaining} left")
        try:
            while self.running or (waiting and not self.signal):
                for cell in list(waiting):
                    if not self.free or self.signal:
                        break
                    if self.start(cell):
                        waiting.remove(cell)
                time.sleep(0.2)
                for self.signal in signals[told:]:
                    told += 1
                    for _, process, _, _ in self.running.values():
                        # the first lets train.py save; torchrun passes it on, so it must not go to the whole group
                        process.terminate() if told == 1 else os.killpg(process.pid, signal.SIGKILL)
                done = self.done(waiting + [cell for cell, *_ in self.running.values()])
                bar.set_description(f"{len(self.cells) - len(waiting) - len(self.running)}/{len(self.cells)} cells ",
                                    refresh=False)
                bar.update(max(0, done - bar.n))
                for entry in list(self.running.values()):
                    if entry[1].poll() is not None:
                        loss = self.collect(*entry)
                        if loss is not None:
                            seconds = time.monotonic() - started
                            left = seconds * (total - done) / (done - before) if done > before else None
                            report(bar.write, entry[0], loss, left)
        finally:
            bar.close()
            for _, process, _, _ in self.running.values():  # only where ablate.py itself failed
                process.terminate()
            for sig, handler in old.items():
                signal.signal(sig, handler)


# ---------------------------------------------------------------------------------------------------------------
# the table


def markdown_table(arms):
    """The lines of a Markdown table of summarise()'s arms."""
    lines = ["| arm | lr | val loss | difference | 95% interval | beyond noise | seeds | parameters added | tokens |",
             "|---|---:|---:|---:|---:|:---:|---:|---:|---:|"]
    for name, a in arms.items():
        difference, interval, beyond, added = "", "", "", ""
        if "delta" in a:
            difference, added = f"{a['delta']:+.4f}", f"{a['added']:+,.0f}"
            interval = "?" if a["half"] is None else f"{a['delta'] - a['half']:+.4f} … {a['delta'] + a['half']:+.4f}"
            beyond = "same runs" if a["same"] else "?" if a["half"] is None else "yes" if a["beyond"] else "no"
        lines.append(f"| {name} | {a['lr']:g}{'*' if a['edge'] else ''} | {a['mean']:.4f} | {difference} | {interval} "
                     f"| {beyond} | {len(a['losses'])} | {added} | {a['tokens']:,.0f} |")
    return lines


def report_text(rows, arm_names, command):
    """results.md: the tables, what does not count and why, and what was run on what."""
    if not rows:
        return "No cell is finished yet.\n"
    arms = summarise(rows)
    lines = ["# " + rows[0]["suite"], ""]
    lines += markdown_table(arms)
    if any(a["edge"] for a in arms.values()):
        lines += ["", "\\* the best learning rate is the last of its grid: a better one may lie beyond."]
    lrs = sorted({float(row["lr"]) for row in rows})
    for lr in lrs if lrs[1:] else []:
        lines += ["", f"All at {lr:g}:", "", *markdown_table(summarise(rows, dict.fromkeys(arm_names, lr)))]
    lines += ["", "A difference is the arm's validation loss (nats) minus that of its reference, in pairs of equal "
              "seed and data order; its interval is Student's t over seeds. It is beyond noise when 0 lies outside the "
              "interval and it exceeds what two sets of reference runs differ by when nothing but seeds differs. One "
              "comparison in twenty passes the first by chance alone.", ""]
    for name in dict.fromkeys(a["reference"] for a in arms.values() if "delta" in a):
        ref = arms[name]
        losses = list(ref["losses"].values())
        others = [arm for arm, a in arms.items() if a["reference"] == name]
        if losses[1:]:
            lines.append(f"- {name} against itself: standard deviation {statistics.stdev(losses):.4f} over "
                         f"{len(losses)} seeds, so sets of {len(losses)} differ by up to "
                         f"±{arms[others[0]]['noise']:.4f}. Compared with it: {'; '.join(others)}.")
        else:
            lines.append(f"- {name} has one seed, so nothing is known of the noise and no difference is called real.")
    if len(lrs) == 1:
        lines.append("- One learning rate: nothing was tuned.")
    for name in arm_names:
        if name not in arms:
            lines.append(f"- {name} does not count: no learning rate at which all seeds are finished and finite.")
    if diverged := [f"{r['arm']} at lr {r['lr']}, seed {r['seed']}" for r in rows if math.isinf(float(r["val_loss"]))]:
        lines.append(f"- Diverged: {'; '.join(diverged)}.")
    made_by = {name: dict.fromkeys(str(row[name]) for row in rows) for name in ("commit", "python", "torch", "device")}
    lines += [f"- Command: `{command}`", *(f"- {name}: {'; '.join(values)}" for name, values in made_by.items()), ""]
    return "\n".join(lines)


def duration(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


# ---------------------------------------------------------------------------------------------------------------


def recorded(out, cells, dry_run=False):
    """
    {cell's name: row} of the results.csv that out holds already. Raises ConfigError where that is of another kind, and
    where a new one, with the rows of `cells` alone, would lose some that are nowhere else.
    """
    rows = read_csv(out / "results.csv")
    if rows and list(rows[0]) != RESULT_COLUMNS:
        raise ConfigError(f"{out}/results.csv has other columns than this ablate.py writes; name another --out")
    planned = {cell.folder.name for cell in cells.values()}
    lost = [row for row in rows if row["cell"] not in planned and not (CELLS / row["cell"]).exists()]
    if lost and not dry_run:
        raise ConfigError(f"{out}/results.csv has {len(lost)} rows that are not among these cells, such as "
                          f"{lost[0]['arm']} at lr {lost[0]['lr']}, seed {lost[0]['seed']}: another arm, rate, seed "
                          "or setting, or other data. Ask for them as well, or name another --out")
    return {row["cell"]: row for row in rows}


def write_report(out, suite, arms, cells, command):
    """Gather the cells' logs, and what out holds of cells without logs here, into out. Returns results.md's text."""
    references, known = {name: ref for name, _, ref in arms}, recorded(out, cells)
    rows = []
    for (arm, _, _), cell in cells.items():
        row = result_row(suite, arm, references[arm], cell) or known.get(cell.folder.name)
        if row:
            rows.append({**row, "suite": suite, "arm": arm, "reference": references[arm] or ""})
    old_curves, old_scales = (defaultdict(list) for _ in range(2))
    for row in read_csv(out / "curves.csv"):
        old_curves[row["arm"], float(row["lr"]), int(row["seed"])].append(row)
    for row in read_csv(out / "scales.csv"):
        old_scales[row["arm"], float(row["lr"])].append(row)
    curves, scales, first_seed = [], [], next(iter(cells))[2]
    for (arm, lr, seed), cell in cells.items():
        here = val_loss(cell) is not None
        curves += curve_rows(arm, cell) if here else old_curves[arm, lr, seed]
        if seed == first_seed:
            scales += scale_rows(arm, cell) if here else old_scales[arm, lr]
    out.mkdir(parents=True, exist_ok=True)
    for name, found in (("results", rows), ("curves", curves), ("scales", scales)):
        write_csv(out / f"{name}.csv", found)
    text = report_text(rows, list(references), command)
    write_whole(out / "results.md", text)
    return text


def to_run(cells, known):
    """The distinct cells that are not finished elsewhere; of those that are finished here, a checkpoint may be left."""
    distinct = {cell.folder: cell for cell in cells.values()}
    return [cell for folder, cell in distinct.items() if folder.name not in known or folder.exists()]


def list_cells(cells, known, opt):
    """What --dry_run prints: every cell with its state, then the sum and the time it would take."""
    distinct = {cell.folder: cell for cell in cells.values()}
    left = [cell for cell in to_run(cells, known) if val_loss(cell) is None]
    seen = set()
    for (arm, lr, seed), cell in cells.items():
        state = f"{step_of(cell)} of {cell.settings.max_steps} steps" if cell in left else "finished"
        print(f"{arm:<28} lr {lr:<8g} seed {seed:<4} {'same as above' if cell.folder in seen else state}")
        seen.add(cell.folder)
    tokens = sum(cell.settings.max_steps * cell.settings.batch_tokens for cell in left)
    flops = sum(cell.flops * (1 - step_of(cell) / cell.settings.max_steps) for cell in left)
    print(f"{len(cells)} cells, {len(distinct)} of them different, {len(left)} left: {tokens:,} tokens, "
          f"{flops:.3g} FLOPs")
    # tokens per second of the finished cells, in FLOPs: what one of them reached on this machine under its load
    rates = [float(row["tokens_per_second"]) * cell.flops / float(row["tokens"])
             for cell in distinct.values() if (row := result_row("", "", "", cell)) and row["tokens_per_second"]]
    if rates:
        print(f"about {duration(flops / statistics.median(rates) / opt.jobs)} with --jobs={opt.jobs}, from the "
              f"speed of the finished ones, without start and evaluation")
    else:
        print("how long that takes is not known before a cell is finished")


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
    arms = suite_arms(suite, opt, base)
    cells = make_cells(arms, opt, opt.nproc)
    out = Path(opt.out or Path("out/ablate") / (suite if suite in SUITES else "-".join(n for n, _, _ in arms)))
    known = recorded(out, cells, opt.dry_run)
    if opt.dry_run:
        list_cells(cells, known, opt)
        return 0
    command = shlex.join(["python", "ablate.py", *args])
    todo, n = to_run(cells, known), len({cell.folder for cell in cells.values()})
    finished = lambda: n - sum(val_loss(cell) is None for cell in todo)
    print(f"{len(cells)} cells, {n} of them different, {finished()} finished already")

    def report(write, cell, loss, seconds_left):
        arm, lr, seed = next(key for key, c in cells.items() if c is cell)
        left = f"{duration(seconds_left)} left" if seconds_left is not None else ""
        write(f"{finished()}/{n}  {arm}  lr {lr:g}  seed {seed}  val_loss {loss:.4f}  {left}")
        write_report(out, suite, arms, cells, command)

    runner = Runner(todo, opt)
    runner.run(report)
    print("\n" + write_report(out, suite, arms, cells, command))
    for failure in runner.failed:
        print(f"ablate.py: failed: {failure}", file=sys.stderr)
    if runner.signal:
        print(f"stopped by a signal; the same command goes on:\n  {command}", file=sys.stderr)
        return 128 + runner.signal
    print(f"in {out}: results.csv, results.md, curves.csv, scales.csv")
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, DataError) as e:
        refuse(e)
