"""
Train a GPT with any scale-vector strategy:

    python train.py config/unified.py                                    a small model, on any machine, in minutes
    python train.py config/size/llama_0.12b.py config/unified.py --seed=2
    torchrun --standalone --nproc_per_node=8 train.py config/size/llama_1b.py config/unified.py

Config files and --key=value flags apply from left to right. --resume=True goes on with a run that was stopped.
"""

from configurator import ConfigError, from_command_line, refuse
from settings import FREE_ON_RESUME, Settings, batch_plan, gpt_config

if __name__ == "__main__":
    # before torch is loaded, so that --help and a typo are answered at once
    settings, config_files = from_command_line(Settings, __doc__)

import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.tokens import DataError, Tokens, data_folder, load_tokenizer
from devices import device_name, peak_flops, peak_memory_mb, pick_device
from hf import adopt, load, read_tensors
from model import GPT
from moe import balance_routers, take_router_statistics
from norms import ScaleVector
from optim import gather_state, lr_at, make_optimizers, param_groups, set_lr
from runs import (
    CSVLog,
    claim_out_dir,
    differing,
    git_commit,
    load_checkpoint,
    save_checkpoint,
    versions,
    write_whole,
)


class Diverged(RuntimeError):
    """The loss or a gradient is not a number any more."""


# ---------------------------------------------------------------------------------------------------------------
# setting up


def default_out_dir(config_files):
    return str(Path("out") / ("-".join(Path(f).stem for f in config_files) or "default"))


# ---------------------------------------------------------------------------------------------------------------
# the log

LOG_COLUMNS = ["step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "tokens_per_second"]
EXPERT_COLUMNS = ["step", "layer", "load_max", "idle", "entropy"]
SCALE_COLUMNS = ["step", "name", "role", "mean", "std", "min", "max", "norm", "cosine"]


@torch.no_grad()
def scale_statistics(model, step):
    """A row for every effective γ; cosine is the one to γ's initial value, all ones."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, ScaleVector):
            gamma = module().cpu().double()
            for e, g in enumerate(gamma.view(-1, module.n)):  # each expert's, where they are stacked
                norm = torch.linalg.vector_norm(g)
                cosine = g.sum() / (norm * math.sqrt(g.numel()))
                values = torch.stack((g.mean(), g.std(correction=0), g.min(), g.max(), norm, cosine)).tolist()
                row = [step, f"{name}.{e}" if module.stack else name, module.role, *(f"{v:.9g}" for v in values)]
                rows.append(dict(zip(SCALE_COLUMNS, row)))
    return rows


def expert_statistics(load, entropy, step):
    """
    A row for each layer's router at a step: largest over mean load, experts without a token, entropy in nats.

    load: (n_layer, E) int64. entropy: (n_layer,). Both of the whole step.
    """
    load = load.cpu().double()
    values = zip((load.amax(1) / load.mean(1)).tolist(), (load == 0).sum(1).tolist(), entropy.tolist())
    return [dict(zip(EXPERT_COLUMNS, [step, layer, f"{most:.6g}", idle, f"{h:.6g}"]))
            for layer, (most, idle, h) in enumerate(values)]


# ---------------------------------------------------------------------------------------------------------------
# one step


def to_device(arrays, device):
    """(x, y) of a batch as tensors; pinned, so that the copy to a GPU runs while the CPU goes on."""
    tensors = (torch.from_numpy(a) for a in arrays)
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)


def eval_windows(data, s):
    """How many windows of the validation split hold its first eval_tokens; one at least."""
    return min(data.n_windows, max(1, s.eval_tokens // s.block_size))


@torch.no_grad()
def evaluate(model, data, s, device, rank, world):
    """Mean loss over the first eval_tokens of the validation split: the same tokens at every step, on any world."""
    n = eval_windows(data, s)
    total = 0.0
    for first in range(rank * s.micro_batch, n, world * s.micro_batch):
        count = min(s.micro_batch, n - first)
        x, y = to_device(data.window(first, count), device)
        total += model(x, y)[1].item() * count
    if world > 1:
        total = torch.tensor(total, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        total = total.item()
    return total / n


def main(s, config_files=()):
    if not s.out_dir:
        s.out_dir = default_out_dir(config_files)
    init_tokenizer, init_note = adopt(s) if s.init_from else (None, "")
    if s.dry_run:
        return dry_run(s)
    device, dtype = pick_device(s)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share, micro, n_micro = batch_plan(s, world)
    config = gpt_config(s, dtype)
    claim_out_dir(s)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed = "RANK" in os.environ  # torchrun's doing
    owns_group = distributed and not dist.is_initialized()  # a caller that trains several models keeps its own
    if owns_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    master = rank == 0  # prints and writes; the others only compute

    # data: the embedded corpus prepares itself, by one process while the others wait
    folder = data_folder(s.dataset)
    if s.dataset == "pysrc" and not (folder / "meta.json").exists() and master:
        from data.pysrc.prepare import prepare
        prepare()
    if distributed:
        dist.barrier()
    train_data = Tokens(folder, "train", s.block_size, s.vocab_size, s.seed)
    val_data = Tokens(folder, "val", s.block_size, s.vocab_size)
    tokenizer = train_data.tokenizer
    if init_tokenizer and init_tokenizer != tokenizer:
        raise ConfigError(f"{s.init_from} knows tokens of {init_tokenizer!r}, and {folder} has {tokenizer!r}")
    fingerprint = {"train": train_data.fingerprint(), "val": val_data.fingerprint()}

    # model and optimizer; drawn on the CPU, so that every device starts from the same weights
    torch.manual_seed(s.seed)
    raw_model = GPT(config)
    if s.init_from and not s.resume:
        try:
            load(raw_model, read_tensors(s.init_from))
        except ConfigError as e:
            raise ConfigError(f"init_from {s.init_from}: {e}") from None
    raw_model.to(device)
    groups = param_groups(raw_model.named_roles(), s.weight_decay, s.scale_decay, s.scale_lr_mult, s.decay_direction)
    optimizers = make_optimizers(groups, s.optimizer, (s.beta1, s.beta2), shard=s.shard_optimizer and distributed)

    out = Path(s.out_dir)
    step = 0
    if s.resume:
        ckpt = load_checkpoint(out / "ckpt.pt")
        if changed := differing(ckpt["settings"], s, FREE_ON_RESUME):
            raise ConfigError(f"{out}/ckpt.pt has other settings: {changed}. Resume with the same ones")
        if ckpt["data"] != fingerprint:
            raise ConfigError(f"{folder} is not the data that {out}/ckpt.pt was trained on: its content differs")
        step = ckpt["step"]
        if step >= s.max_steps:
            if master:
                print(f"{out} is finished: step {step} of {s.max_steps}. A larger --max_steps continues it.")
            return
        raw_model.load_state_dict(ckpt["model"])
        for optimizer, state in zip(optimizers, ckpt["optimizers"]):
            optimizer.load_state_dict(state)
        torch.set_rng_state(ckpt["rng"])
        del ckpt
    first_step = step

    model = torch.compile(raw_model) if (s.compile if s.compile != "auto" else device.type == "cuda") else raw_model
    ddp_model = model
    if distributed:
        ddp_model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                            broadcast_buffers=False)  # they are the same everywhere, or a process's own

    counts = raw_model.counts()
    if master:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "config.json", json.dumps({
            "settings": asdict(s), "versions": versions(), "git_commit": git_commit(),
            "device": device_name(device),
            "processes": world, **counts}, indent=1))
        log = CSVLog(out / "log.csv", LOG_COLUMNS, first_step)
        scales = CSVLog(out / "scales.csv", SCALE_COLUMNS, first_step)
        experts = CSVLog(out / "experts.csv", EXPERT_COLUMNS, first_step) if s.n_experts else None
        print(f"{counts['params']:,} parameters, {counts['scale_params']:,} of them in scale vectors; "
              f"{train_data.n_tokens:,} tokens in {folder.name}; {s.max_steps} steps of {s.batch_tokens} tokens "
              f"on {device.type} in {dtype}, to {out}")
        if init_note:
            print(init_note)
    bar = tqdm(total=s.max_steps, initial=step, disable=not (master and sys.stderr.isatty()), unit="step",
               dynamic_ncols=True)

    # SIGTERM and Ctrl-C let the step finish, save, and stop; a second one stops at once
    stop_signal, stopping = 0, False

    def on_signal(signum, frame):
        nonlocal stop_signal
        if stop_signal:
            raise KeyboardInterrupt
        stop_signal = signum

    old_handlers = {sig: signal.signal(sig, on_signal) for sig in (signal.SIGINT, signal.SIGTERM)}

    val_loss = None
    timed_steps, timed_seconds = 0, 0.0  # for tokens_per_second: steps alone, without the first, which compiles
    since_log, seconds_since_log = 0, 0.0
    row, routed = {}, None
    try:
        while True:
            # Everything about step n happens before step n + 1 and in this order: evaluate, log, save. A resumed
            # run begins right behind that point, so nothing is done twice.
            last = step == s.max_steps
            if step > first_step or step == 0:
                if step % s.eval_interval == 0 or last:
                    val_loss = evaluate(model, val_data, s, device, rank, world)
                    row["val_loss"] = f"{val_loss:.6f}"
                    if master:
                        scales.write(*scale_statistics(raw_model, step))
                if master and (step % s.log_interval == 0 or "val_loss" in row or stopping):
                    rate = since_log * s.batch_tokens / seconds_since_log if since_log else 0
                    row.update(step=step, tokens=step * s.batch_tokens, tokens_per_second=f"{rate:.0f}")
                    since_log, seconds_since_log = 0, 0.0
                    log.write({name: row.get(name, "") for name in LOG_COLUMNS})
                    shown = {k: float(row[k]) for k in ("train_loss", "val_loss") if k in row}
                    if s.n_experts and step > first_step:
                        loads = expert_statistics(*routed, step)
                        experts.write(*loads)
                        shown["load_max"] = max(float(layer["load_max"]) for layer in loads)
                        shown["idle"] = sum(layer["idle"] for layer in loads)
                    bar.set_postfix({k: f"{v:.3f}" for k, v in shown.items()}, refresh=False)
                    if bar.disable or "val_loss" in row:
                        bar.write(f"step {step:6d}  " + "".join(f"{k} {v:.4f}  " for k, v in shown.items())
                                  + (f"{rate:,.0f} tokens/s" if rate else ""))
                if step > 0 and (step % s.save_interval == 0 or last or stopping):
                    gather_state(optimizers)
                    if master:
                        save_checkpoint(out / "ckpt.pt", raw_model, optimizers, step, s, tokenizer, fingerprint)
            if last or stopping:
                break

            started = time.perf_counter()
            lr = lr_at(step, s.lr, s.schedule, s.warmup_steps, s.max_steps, s.min_lr_frac, s.decay_frac)
            set_lr(optimizers, lr)
            loss_sum = torch.zeros((), device=device)
            for i in range(n_micro):
                first = step * (share * world) + rank * share + i * micro
                x, y = to_device(train_data.batch(first, micro), device)
                # gradients are averaged over processes once, behind the last micro-batch
                with ddp_model.no_sync() if distributed and i < n_micro - 1 else contextlib.nullcontext():
                    loss = ddp_model(x, y)[1] / n_micro
                    loss.backward()
                loss_sum += loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), s.grad_clip or math.inf)
            # The one place where the CPU waits for the device. It costs the launch of the next step's first kernels
            # and buys that no optimizer step ever runs on a NaN.
            status = torch.stack((loss_sum / world, norm / world, norm.new_tensor(float(stop_signal))))
            if distributed:
                dist.all_reduce(status)
            train_loss, norm, stopping = status.tolist()  # all processes agree on stopping, and at which step
            if not (math.isfinite(train_loss) and math.isfinite(norm)):
                raise Diverged(f"step {step}: loss {train_loss}, gradient norm {norm}. Try a lower --lr, a longer "
                               f"--warmup_steps or another --seed; {out} keeps what was saved before")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if s.n_experts:
                choices, entropy = take_router_statistics(raw_model)
                if distributed:
                    dist.all_reduce(choices)
                    dist.all_reduce(entropy)
                balance_routers(raw_model, choices)
                routed = choices, entropy / (n_micro * world)
            step += 1
            bar.update()
            seconds = time.perf_counter() - started
            since_log, seconds_since_log = since_log + 1, seconds_since_log + seconds
            if step > first_step + 1:
                timed_steps, timed_seconds = timed_steps + 1, timed_seconds + seconds
            row = {"train_loss": f"{train_loss:.6f}", "lr": f"{lr:.6g}", "grad_norm": f"{norm:.6g}"}
        if owns_group:
            dist.barrier()  # nobody leaves while another may still be in a collective
    finally:
        bar.close()
        ddp_model = None  # its reducer holds on to the process group, whose threads must end before the process does
        for sig, handler in old_handlers.items():
            signal.signal(sig, handler)
        if owns_group:
            dist.destroy_process_group()

    if stopping and step < s.max_steps:
        if master:
            print(f"stopped by a signal at step {step}; {out}/ckpt.pt holds it, --resume=True goes on")
        sys.exit(128 + (stop_signal or signal.SIGTERM))
    if master:
        if s.sample_tokens:
            show_sample(raw_model, tokenizer, s, device)
        summary = {"val_loss": f"{val_loss:.4f}"}
        if bytes_per_token := val_data.bytes_per_token(eval_windows(val_data, s)):
            summary["val_bpb"] = f"{val_loss / math.log(2) / bytes_per_token:.4f}"
        rate = timed_steps * s.batch_tokens / timed_seconds if timed_steps else 0.0
        summary.update(steps=step, tokens=step * s.batch_tokens, tokens_per_second=f"{rate:.0f}")
        if peak := peak_flops(device):
            summary["mfu"] = f"{raw_model.flops_per_token() * rate / (peak * world):.4f}"
        summary.update(peak_memory_mb=f"{peak_memory_mb(device):.0f}", **counts, out_dir=out)
        print("\n".join(f"{key}: {value}" for key, value in summary.items()))


def show_sample(model, tokenizer, s, device):
    """Print what the model writes behind a document's start."""
    try:
        tokenizer = load_tokenizer(tokenizer)
    except DataError:  # text is a courtesy: a machine without the BPE files trains all the same
        return
    start = torch.full((1, 1), tokenizer.separator, device=device)
    generator = torch.Generator(device).manual_seed(s.seed)
    tokens = model.generate(start, s.sample_tokens, temperature=0.8, top_k=50, generator=generator)
    text = b"".join(tokenizer.token_bytes(t.item()) for t in tokens).decode("utf-8", errors="replace")
    print("\na sample:\n" + text + "\n")


def dry_run(s):
    """Build the model on the meta device, where tensors have shapes but no memory, and print what it would be."""
    batch_plan(s, int(os.environ.get("WORLD_SIZE", 1)))
    with torch.device("meta"):
        model = GPT(gpt_config(s))
    for key, value in {**model.counts(), "flops_per_token": model.flops_per_token()}.items():
        print(f"{key}: {value}")
    for g in param_groups(model.named_roles(), s.weight_decay, s.scale_decay, s.scale_lr_mult, s.decay_direction):
        print(f"group {g['name']}: {len(g['params'])} tensors, {sum(p.numel() for p in g['params'])} parameters, "
              f"weight_decay {g['weight_decay']}, lr {s.lr * g['lr_mult']}")


def run(s, config_files=()):
    """main, with exit codes for the shell: 2 for what was asked wrongly, 1 for what went wrong on the way."""
    try:
        main(s, config_files)
    except (ConfigError, DataError) as e:
        refuse(e)
    except torch.OutOfMemoryError as e:
        sys.exit(f"train.py: {str(e).splitlines()[0]} A smaller --micro_batch needs less.")
    except (Diverged, OSError) as e:
        sys.exit(f"train.py: {e}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # whoever reads through a pipe sees each line as it comes
    run(settings, config_files)
