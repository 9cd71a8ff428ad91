"""
What a run writes and shows while it trains: config.json, log.csv, scales.csv, experts.csv, lines or a progress bar, and
Weights & Biases. No loss depends on it.

Imports configurator.py, devices.py, norms.py and runs.py.
"""

import json
import math
import sys
from dataclasses import asdict

import torch
from tqdm import tqdm

from configurator import ConfigError, read_json
from devices import device_name
from norms import ScaleVector
from runs import CSVLog, git_commit, set_aside, versions, write_whole

LOG_COLUMNS = ["step", "tokens", "train_loss", "val_loss", "logit_std", "lr", "grad_norm", "skipped",
               "tokens_per_second"]
EXPERT_COLUMNS = ["step", "layer", "load_max", "idle", "entropy"]
SCALE_COLUMNS = ["step", "name", "role", "mean", "std", "min", "max", "norm", "cosine"]


@torch.no_grad()
def scale_statistics(model, step):
    """One row per effective γ. cosine: between γ and its initial value, all ones."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, ScaleVector):
            gamma = module().cpu().double()
            for e, g in enumerate(gamma.view(-1, module.n)):  # one per expert, if they are stacked
                norm = torch.linalg.vector_norm(g)
                cosine = g.sum() / (norm * math.sqrt(g.numel()))
                values = torch.stack((g.mean(), g.std(correction=0), g.min(), g.max(), norm, cosine)).tolist()
                row = [step, f"{name}.{e}" if module.stack else name, module.role, *(f"{v:.9g}" for v in values)]
                rows.append(dict(zip(SCALE_COLUMNS, row)))
    return rows


def expert_statistics(load, entropy, step):
    """
    One row per layer: largest over mean load, number of experts without a token, entropy of the router in nats.

    load: (n_layer, E) int64. entropy: (n_layer,). Both cover the whole step.
    """
    load = load.cpu().double()
    values = zip((load.amax(1) / load.mean(1)).tolist(), (load == 0).sum(1).tolist(), entropy.tolist())
    return [dict(zip(EXPERT_COLUMNS, [step, layer, f"{most:.6g}", idle, f"{h:.6g}"]))
            for layer, (most, idle, h) in enumerate(values)]


class RunLog:
    """What a run writes and shows while it trains: config.json, the CSV files, and lines or a progress bar."""

    def __init__(self, s, out, step, counts, device, world):
        self.wandb = start_wandb(s, out) if s.wandb else None  # first, since it may be refused
        if not s.resume and (out / "config.json").exists():
            set_aside(out)  # only now, when the new run can begin
        describe_run(s, out, step, {"device": device_name(device), "processes": world, **counts})
        self.s, self.logged = s, 0  # how many steps were logged
        self.rows = CSVLog(out / "log.csv", LOG_COLUMNS, step)
        self.scales = CSVLog(out / "scales.csv", SCALE_COLUMNS, step)
        self.experts = CSVLog(out / "experts.csv", EXPERT_COLUMNS, step) if s.n_experts else None
        self.bar = tqdm(total=s.max_steps, initial=step, disable=not sys.stderr.isatty(), unit="step",
                        dynamic_ncols=True)

    def write(self, step, row, skipped, routed, seconds, model):
        """
        A row of log.csv, with scales.csv where row has a val_loss, and a line.

        row: what is known of the step, by column. routed: settle_routers' result. seconds: of each step so far.
        """
        rate = tokens_per_second(seconds[self.logged:], self.s)
        self.logged = len(seconds)
        row = {**row, "step": step, "tokens": step * self.s.batch_tokens, "skipped": skipped,
               "tokens_per_second": f"{rate:.0f}"}
        if "val_loss" in row:
            self.scales.write(*scale_statistics(model, step))
        self.rows.write({name: row.get(name, "") for name in LOG_COLUMNS})
        if self.wandb:
            self.wandb.log({name: float(value) for name, value in row.items()}, step=step)
        shown = {name: float(row[name]) for name in ("train_loss", "val_loss") if name in row}
        if routed:
            layers = expert_statistics(*routed, step)
            self.experts.write(*layers)
            shown["load_max"] = max(float(layer["load_max"]) for layer in layers)
            shown["idle"] = sum(layer["idle"] for layer in layers)
        if skipped:
            shown["skipped"] = skipped
        shown = {name: f"{value:.5g}" for name, value in shown.items()}
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable or "val_loss" in row:
            self.bar.write(f"step {step:6d}  " + "".join(f"{name} {value}  " for name, value in shown.items())
                           + (f"{rate:,.0f} tokens/s" if rate else ""))

    def close(self):
        self.bar.close()
        if self.wandb:
            self.wandb.finish()


def start_wandb(s, out):
    """A run of Weights & Biases, named after out_dir. Raises ConfigError where that cannot be."""
    try:
        import wandb
        return wandb.init(project=s.wandb, name=out.name, dir=out, config=asdict(s))
    except Exception as e:  # not installed, not logged in, not reachable
        raise ConfigError(f"--wandb={s.wandb}: {e}. Leave it out, or set WANDB_MODE=offline") from None


def describe_run(s, out, step, facts):
    """Write config.json: the settings, versions and facts, and the commit of the start and of each resumption."""
    commit, resumed = git_commit(), []
    if step:
        before = read_json(out / "config.json") if (out / "config.json").exists() else {}
        resumed = before.get("resumed", [])
        last = [before, *resumed][-1].get("git_commit", commit)
        if last != commit:
            print(f"the code has changed since step {step}: it was {last}, and is {commit}")
        resumed.append({"step": step, "git_commit": commit})
        commit = before.get("git_commit", "unknown")
    write_whole(out / "config.json", json.dumps({"settings": asdict(s), "versions": versions(), "git_commit": commit,
                                                 "resumed": resumed, **facts}, indent=1))


def tokens_per_second(seconds, s):
    """Tokens per second over steps that took this many seconds each; 0 if there are none."""
    return len(seconds) * s.batch_tokens / sum(seconds) if seconds else 0.0
