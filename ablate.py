"""
Compare strategies over several seeds:

    python ablate.py figure5 config/size/lab.py --lrs=2e-3,4e-3,8e-3,16e-3,32e-3 --seeds=1,2,3,4,5 --jobs=2
    python ablate.py config/baseline.py,config/unified.py config/size/llama_0.12b.py --nproc=8
    python ablate.py figure6 --sizes=1,2,3,4,1@100 --lrs=1e-3,2e-3,4e-3,8e-3,16e-3

The first word is a suite (listed below), or strategy files joined by commas, of which the first is the reference. The
config files and train.py settings after it hold for every cell. A cell is one run of train.py: one arm, one learning
rate, one seed.

With several --lrs the whole grid runs on --tune_seeds, and the rate with the lowest mean loss is then run on --seeds,
which are reported. --tune=each tunes every arm. --tune=reference is the paper's protocol: the rate is tuned for the
reference and used for all arms that are compared with it. If the best rate is at the end of the grid, the suite says
so, does not report that arm and exits with 1: add a rate and run it again.

A cell lives in out/ablate/cells, in a folder named after everything that decides its loss: settings, data, initial
weights and code. So suites share cells, finished cells are skipped, an interrupted command can be repeated, and cells
whose code has changed run again. --out receives results.csv (one row per cell), results.md, curves.csv and scales.csv.
A row of a results.csv that is already there also counts as a finished cell, so that seeds and rates can be added in
another clone of the same code. Rows of cells that this command does not have are dropped.
"""

import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import ConfigError, configure, help_text, read_json, refuse, streams
from settings import Settings, batch_plan, gpt_config
from suites import SIZES, SUITES, Arm, Options, check_base, named_arms, parse, readable

HERE = Path(__file__).resolve().parent
CELLS = Path("out/ablate/cells")

if __name__ == "__main__":  # before torch is loaded
    streams()
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(f"{(__doc__ or '').strip()}\n\nsuites:")
        print("\n".join(f"  {suite:<10} {'; '.join(arm.name for arm in arms)}" for suite, arms in SUITES.items()))
        print("\noptions, with their defaults:\n" + help_text(Options))
        sys.exit(0)

import torch

from data.tokens import Tokens, data_folder, vocabulary
from devices import pick_device
from hf import adopt
from model import GPT
from runs import code_hash, lock, replacing, write_whole
from stats import read_csv, report_text

# ---------------------------------------------------------------------------------------------------------------
# from words to arms, from arms to cells


def at_size(size, arms, opt, suite):
    """
    The arms at one of --sizes. The number of steps gives the first of them --tokens_per_param tokens per active
    parameter, or as many as follow the size's @. figure7 has the paper's mixture: 32 experts of int(2d/3), 4 per token,
    and a shared one of int(8d/3). Raises ConfigError.
    """
    shape, at, budget = size.partition("@")
    if at and not (budget.isdecimal() and int(budget)):
        raise ConfigError(f"--sizes: {size}: after the @ comes a number of tokens, as in 2@100")
    label, words = readable(Path(shape).stem), [shape]
    if shape.isdecimal() and 0 < len(shape) < 4:
        width = 32 * int(shape)
        label, words = f"{shape}x{width}", [f"--n_layer={shape}", f"--n_head={shape}", f"--n_embd={width}"]
        if suite == "figure7":
            words += ["--n_experts=32", "--experts_per_token=4", f"--expert_dim={2 * width // 3}",
                      f"--shared_dim={8 * width // 3}"]
    s = settings_of(arms[0].words + words)
    tokens = int(budget or opt.tokens_per_param) * meta_model(s).counts()["active_params"]
    steps = max(1, tokens // s.batch_tokens)
    words += [f"--max_steps={steps}", f"--warmup_steps={min(s.warmup_steps, steps // 10)}"]
    label += f", {budget} tokens per parameter" if budget else ""  # stats.py fits those without a comma
    return [Arm(f"{a.name} at {label}", a.words + words, a.reference and f"{a.reference} at {label}") for a in arms]


def meta_model(s):
    """The model of these settings without memory. Raises ConfigError where they do not fit together."""
    with torch.device("meta"):
        return GPT(gpt_config(s))


def settings_of(words):
    """
    Settings from train.py's arguments, completed: the data's vocabulary, the shape of --init_from, this machine's
    dtype. Prepares the embedded data. Raises ConfigError.
    """
    s, _ = configure(Settings, words)
    if s.init_from:
        adopt(s)
    folder = data_folder(s.dataset)
    if s.dataset == "pysrc" and not (folder / "meta.json").exists():
        from data.pysrc.prepare import prepare
        prepare()
    return replace(s, vocab_size=s.vocab_size or vocabulary(folder), dtype=pick_device(s).dtype, sample_tokens=0)


# These do not change a loss. Data and initial weights count by their content, whatever their folders are called.
NO_LOSS = {"out_dir", "resume", "overwrite", "dry_run", "dist_timeout", "sample_tokens", "log_interval",
           "save_interval", "stop_at", "wandb", "dataset", "init_from"}


@dataclass
class Cell:
    """One run of train.py, finished or not."""

    arm: Arm
    settings: Settings
    content: list  # what else decides its loss: digests of data, initial weights and code
    params: int
    flops: float  # 6 per token and active parameter, without the token table, as the paper counts
    tuned_as: str  # the arm whose best rate it takes

    @cached_property
    def folder(self):
        s = self.settings
        values = {k: v for k, v in (asdict(s) | asdict(gpt_config(s, s.dtype))).items() if k not in NO_LOSS}
        decides = json.dumps([values, self.content], sort_keys=True)
        digest = hashlib.sha256(decides.encode()).hexdigest()[:10]
        return CELLS / f"{s.n_layer}x{s.n_embd}-{s.max_steps}steps-lr{s.lr:g}-seed{s.seed}-{digest}"

    def at(self, lr, seed):
        return replace(self, settings=replace(self.settings, lr=lr, seed=seed))


def folder_digest(folder):
    """A digest of a folder of weights, and of hf.py, which reads it."""
    digest = hashlib.sha256()
    for path in [HERE / "hf.py", *sorted(p for p in Path(folder).expanduser().iterdir() if p.is_file())]:
        with open(path, "rb") as f:
            digest.update(os.fsencode(path.name) + hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def make_arms(named, opt, code):
    """{name: its Cell at train.py's rate and seed} from a list of Arms. Raises ConfigError."""
    by_name, arms, seen = {arm.name: arm for arm in named}, {}, {}

    def tuned_as(arm):
        if arm.rate == arm.name or not arm.rate and (opt.tune == "each" or not arm.reference):
            return arm.name
        return tuned_as(by_name[arm.rate or arm.reference])

    for arm in named:
        s = settings_of(arm.words)
        s.max_steps = round(s.max_steps * arm.steps)
        batch_plan(s, opt.nproc)
        data = s.dataset, s.block_size, s.vocab_size
        if data not in seen:
            seen[data] = [Tokens(data_folder(s.dataset), split, *data[1:]).fingerprint() for split in ("train", "val")]
        if s.init_from and s.init_from not in seen:
            seen[s.init_from] = folder_digest(s.init_from)
        counts = meta_model(s).counts()
        flops = 6 * (counts["active_params"] - s.n_embd * s.vocab_size) * s.batch_tokens * s.max_steps
        content = [seen[data], seen.get(s.init_from), code]
        arms[arm.name] = Cell(arm, s, content, counts["params"], flops, tuned_as(arm))
    return arms


# ---------------------------------------------------------------------------------------------------------------
# what a cell left on disk


def val_loss(cell):
    """The final validation loss in nats, inf where the run diverged, None where it is not finished."""
    rows = read_csv(cell.folder / "log.csv")
    if rows and rows[-1]["step"] == str(cell.settings.max_steps) and rows[-1]["val_loss"]:
        return float(rows[-1]["val_loss"])
    return math.inf if re.search(r"^train\.py: step \d+: loss ", printed(cell), re.M) else None


def printed(cell):
    """What the last process of a cell printed."""
    path = cell.folder / "train.log"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def seconds(cell):
    """How long the processes of a cell have run, as far as ablate.py saw them end."""
    path = cell.folder / "seconds.txt"
    return float(path.read_text()) if path.exists() else 0.0


COLUMNS = ["suite", "arm", "reference", "use", "lr", "seed", "val_loss", "params", "tokens", "flops", "seconds", "code",
           "commit", "torch", "device", "cell"]


def evaluations(cell, log, columns, n):
    """The rows of a cell's log at n of its evaluations at most, the first and the last among them."""
    rows = [row for row in read_csv(cell.folder / log) if row.get("val_loss") != ""]  # log.csv has others in between
    steps = list(dict.fromkeys(row["step"] for row in rows))
    chosen = {steps[i * (len(steps) - 1) // max(1, n - 1)] for i in range(n)} if len(steps) > n else {*steps}
    return [{"cell": cell.folder.name, **{c: row[c] for c in columns}} for row in rows if row["step"] in chosen]


def outcome(cell):
    """What a finished cell adds to the tables: {"row": of results.csv, "curves": rows, "scales": rows}."""
    s, made = cell.settings, read_json(cell.folder / "config.json")
    row = {"lr": s.lr, "seed": s.seed, "val_loss": val_loss(cell), "params": cell.params,
           "tokens": s.max_steps * s.batch_tokens, "flops": f"{cell.flops:.6g}", "seconds": f"{seconds(cell):.0f}",
           "code": cell.content[-1], "commit": made["git_commit"], "torch": made["versions"]["torch"],
           "device": made["device"], "cell": cell.folder.name}
    return {"row": dict.fromkeys(COLUMNS) | row,
            "curves": evaluations(cell, "log.csv", ["step", "tokens", "val_loss", "logit_std"], 40),
            "scales": evaluations(cell, "scales.csv", ["step", "name", "mean", "std", "norm", "cosine"], 12)}


def write_csv(path, rows):
    """Write dicts of equal keys, whole or not at all; without rows, nothing."""
    if rows:
        with replacing(path, encoding="utf-8", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


# ---------------------------------------------------------------------------------------------------------------
# running


class Suite:
    """A suite's cells: what is known of them, what is left, and the tables."""

    def __init__(self, args):
        suite, self.opt, base = parse(args)
        self.code = code_hash()
        named = named_arms(suite, base)
        if suite in SIZES:
            named = [arm for size in self.opt.sizes for arm in at_size(size, named, self.opt, suite)]
            if len({arm.name for arm in named}) < len(named):
                raise ConfigError("--sizes: each size once, and files of different names")
        check_base(base, named)
        self.arms = make_arms(named, self.opt, self.code)
        self.name = suite if suite in SUITES else "-".join(self.arms)
        self.command = readable(shlex.join(["python", "ablate.py", *args]))
        self.out = Path(self.opt.out or f"out/ablate/{self.name}").expanduser()
        self.outcomes = {}  # of finished cells: by name from out, by folder from the cell itself
        for row in read_csv(self.out / "results.csv"):
            if list(row) != COLUMNS:
                raise ConfigError(f"{self.out}/results.csv has other columns than ablate.py writes; name another --out")
            self.outcomes[row["cell"]] = {"row": row, "curves": [], "scales": []}
        for log in ("curves", "scales"):
            for row in read_csv(self.out / f"{log}.csv"):
                if row["cell"] in self.outcomes:
                    self.outcomes[row["cell"]][log].append(row)

    def outcome(self, cell):
        """The outcome of a cell, None until it is finished. What is in its folder comes before what out says of it."""
        if cell.folder not in self.outcomes and val_loss(cell) is not None:
            self.outcomes[cell.folder] = outcome(cell)
        return self.outcomes.get(cell.folder) or self.outcomes.get(cell.folder.name)

    def loss(self, cell):
        """The validation loss of a cell, inf where it diverged, None until it is finished."""
        known = self.outcome(cell)
        return known and float(known["row"]["val_loss"])

    def plan(self):
        """
        (cells, {arm: why}): the suite's cells, and the arms for which the grid has no best rate. Tuning comes first,
        then one reported seed after the other, whose rate is nan until the tuning is finished.
        """
        opt, cells, rates, bad = self.opt, [], {}, {}
        for name in dict.fromkeys(cell.tuned_as for cell in self.arms.values()):
            arm = self.arms[name]
            rates[name] = opt.lrs[0] if opt.lrs else arm.settings.lr
            if len(opt.lrs) < 2:
                continue
            grid = {lr: [arm.at(lr, seed) for seed in opt.tune_seeds] for lr in opt.lrs}
            cells += [cell for row in grid.values() for cell in row]
            losses = {lr: [self.loss(cell) for cell in row] for lr, row in grid.items()}
            if any(None in row for row in losses.values()):
                rates[name] = math.nan
                continue
            best = rates[name] = min(opt.lrs, key=lambda lr: statistics.mean(losses[lr]))
            if math.inf in losses[best]:
                bad[name] = "it diverged at every rate"
            elif best in (opt.lrs[0], opt.lrs[-1]):
                bad[name] = (f"the best rate, {best:g}, is at the end of the grid: add a "
                             f"{'lower' if best == opt.lrs[0] else 'higher'} one to --lrs")
        for seed in opt.seeds:
            cells += [cell.at(rates[cell.tuned_as], seed) for cell in self.arms.values() if cell.tuned_as not in bad]
        return cells, bad

    def progress(self):
        """(the cells that are left, each once; 'finished/all'; FLOPs to go)."""
        cells = {cell.folder: cell for cell in self.plan()[0]}.values()
        left = [cell for cell in cells if self.loss(cell) is None]
        return left, f"{len(cells) - len(left)}/{len(cells)}", sum(cell.flops for cell in left)

    def write(self):
        """Write results.csv, results.md and the reported cells' logs into out. Returns (the text, the bad arms)."""
        cells, bad = self.plan()
        rows, logs = [], {"curves": {}, "scales": {}}
        for cell in cells:
            if known := self.outcome(cell):
                use = "report" if cell.settings.seed in self.opt.seeds else "tuning"
                rows.append(known["row"] | {"suite": self.name, "arm": cell.arm.name,
                                            "reference": cell.arm.reference or "", "use": use})
                if use == "report":
                    logs["curves"][cell.folder] = known["curves"]
                if cell.settings.seed == self.opt.seeds[0]:
                    logs["scales"][cell.folder] = known["scales"]
        text = report_text(rows, self.command, bad)
        if not rows:
            return text, bad
        write_csv(self.out / "results.csv", rows)
        for log, groups in logs.items():
            write_csv(self.out / f"{log}.csv", [row for group in groups.values() for row in group])
        write_whole(self.out / "results.md", text)
        return text, bad


class Runner:
    """Runs a suite's cells, `jobs` at a time, each a process of train.py."""

    def __init__(self, suite):
        self.suite, self.opt, self.edited = suite, suite.opt, False
        self.signals, self.failed = [], {}  # failed: {folder: why}
        self.running = {}  # {slot: (cell, process, when it started)}, one slot per job
        names = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.gpus = names.split(",") if names else [str(i) for i in range(torch.cuda.device_count())]
        self.threads = max(1, torch.get_num_threads() // (self.opt.jobs * self.opt.nproc))
        self.started, self.done = time.monotonic(), 0.0  # FLOPs since then

    def fill(self):
        """Start a cell in each free slot, unless a signal came or the code has changed."""
        for slot in set(range(self.opt.jobs)) - self.running.keys():
            taken = {cell.folder for cell, *_ in self.running.values()} | self.failed.keys()
            cell = next((cell for cell in self.suite.progress()[0]
                         if cell.folder not in taken and not math.isnan(cell.settings.lr)), None)
            self.edited = self.edited or cell is not None and code_hash() != self.suite.code
            if cell is None or self.edited or self.signals:
                return
            self.running[slot] = cell, self.start(cell, slot), time.monotonic()

    def start(self, cell, slot):
        """Start train.py on a cell. Returns the process."""
        cell.folder.mkdir(parents=True, exist_ok=True)
        n, s = self.opt.nproc, cell.settings
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        command = [sys.executable, *launcher,
                   str(HERE / "train.py"), f"--out_dir={cell.folder}", "--resume=auto",
                   *(f"--{f.name}={getattr(s, f.name)}" for f in fields(s) if getattr(s, f.name) != f.default)]
        env = dict(os.environ, OMP_NUM_THREADS=str(self.threads))
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join({self.gpus[(slot * n + i) % len(self.gpus)]: 0 for i in range(n)})
        with open(cell.folder / "train.log", "w", encoding="utf-8") as log:
            # a session of its own: Ctrl-C comes only to ablate.py, which passes it on
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env,
                                    start_new_session=True)

    def stop(self, signum, frame):
        """The first signal lets the runs save; torchrun passes it on to its processes. The second kills."""
        self.signals.append(signum)
        for _, process, _ in self.running.values():
            process.terminate() if len(self.signals) == 1 or os.name == "nt" else os.killpg(process.pid, signal.SIGKILL)

    def collect(self, cell, process, started):
        """Note how a cell ended: with a loss, because it diverged, or because it failed."""
        write_whole(cell.folder / "seconds.txt", f"{seconds(cell) + time.monotonic() - started:.1f}\n")
        if val_loss(cell) is None:
            if not self.signals:
                last_line = printed(cell).strip().rpartition("\n")[2]
                self.failed[cell.folder] = f"exit code {process.returncode}: {last_line}"
            return
        self.suite.outcomes.pop(cell.folder, None)  # it may have been read before the process ended
        (cell.folder / "ckpt.pt").unlink(missing_ok=True)  # of hundreds of cells they would fill the disk
        self.done += cell.flops
        _, count, to_go = self.suite.progress()
        left = timedelta(seconds=int((time.monotonic() - self.started) * to_go / self.done))
        print(f"{count}  {cell.arm.name}  lr {cell.settings.lr:g}  seed {cell.settings.seed}  "
              f"val_loss {val_loss(cell):.4f}  {left} left")
        self.suite.write()

    def run(self):
        old = {signum: signal.signal(signum, self.stop) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.fill()
            while self.running:
                time.sleep(0.2)
                for slot in [slot for slot, (_, process, _) in self.running.items() if process.poll() is not None]:
                    self.collect(*self.running.pop(slot))
                    self.fill()
        finally:
            for _, process, _ in self.running.values():  # only where ablate.py itself failed
                process.terminate()
            for signum, handler in old.items():
                signal.signal(signum, handler)


def main(args):
    if "RANK" in os.environ:
        raise ConfigError("start ablate.py without torchrun: --nproc=8 gives each cell 8 processes of its own")
    suite = Suite(args)
    if suite.opt.dry_run:
        for cell in suite.plan()[0]:
            lr = "not tuned" if math.isnan(cell.settings.lr) else f"{cell.settings.lr:g}"
            print(f"{cell.arm.name:<32} lr {lr:<10} seed {cell.settings.seed:<4} "
                  f"{'to run' if suite.loss(cell) is None else 'finished'}")
    _, count, to_go = suite.progress()
    print(f"{count} different cells finished, {to_go:.3g} FLOPs to go")
    if suite.opt.dry_run:
        return 0
    for folder in (suite.out, CELLS):
        folder.mkdir(parents=True, exist_ok=True)
    if codes := {row["code"] for row in read_csv(suite.out / "results.csv")} - {suite.code}:
        old = suite.out / f"results.{min(codes)}.csv"
        print(f"{suite.out}/results.csv has rows of other code, which will be dropped; {old} keeps them")
        shutil.copy(suite.out / "results.csv", old)
    runner = Runner(suite)
    with lock(CELLS, "ablate.lock"):
        runner.run()
        text, bad = suite.write()
    print("\n" + text)
    for what, why in [*((f"failed: {folder}", why) for folder, why in runner.failed.items()), *bad.items()]:
        print(f"ablate.py: {what}: {why}", file=sys.stderr)
    if runner.edited:
        print("ablate.py: the code has changed since the start; run the same command again", file=sys.stderr)
    if runner.signals:
        print(f"stopped by a signal; the same command continues:\n  {suite.command}", file=sys.stderr)
        return 128 + runner.signals[-1]
    print(f"in {suite.out}: results.csv, results.md, curves.csv, scales.csv")
    return 1 if runner.failed or runner.edited or bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ConfigError, OSError) as e:
        refuse(e, 1 if isinstance(e, OSError) else 2)
