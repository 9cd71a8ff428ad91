"""
Train a GPT with any scale-vector strategy:

    python train.py config/unified.py                                    a small model, on any machine, in minutes
    python train.py config/size/llama_0.12b.py config/unified.py --seed=2
    torchrun --standalone --nproc_per_node=8 train.py config/size/llama_1b.py config/unified.py

Config files and --key=value flags apply from left to right. --resume=auto starts a run, or continues it if it was
stopped. --overwrite=True starts over. The loop is in train(), between its setup and its report.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import ConfigError, from_command_line, refuse, unheard
from settings import Settings, batch_plan, gpt_config

if __name__ == "__main__":
    # before torch is loaded, so that --help and a typo are answered at once
    settings, config_files = from_command_line(Settings, __doc__)

import contextlib
import math
import os
import shlex
import signal
import time
import warnings
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import kernels
from data.tokens import Tokens, data_folder, load_tokenizer, vocabulary
from devices import compare_ranks, peak_flops, peak_memory_mb, pick_device, process_group, processes, step_memory
from hf import adopt, load, read_tensors
from model import GPT
from moe import balance_routers, take_router_statistics
from optim import expected_state, gather_state, load_state, lr_at, make_optimizers, param_groups, set_lr, update
from runlog import RunLog, tokens_per_second
from runs import (
    check_tensors,
    claim_out_dir,
    code_hash,
    differing,
    load_checkpoint,
    run_folder,
    save_checkpoint,
    versions,
)


class Diverged(RuntimeError):
    """The loss or a gradient is no longer finite."""


# ---------------------------------------------------------------------------------------------------------------
# setting up


def default_out_dir(config_files):
    return str(Path("out") / ("-".join(Path(f).stem for f in config_files) or "default"))


def prepare_data(s, here=True):
    """The folder of the data. The embedded corpus is prepared first if it is missing and `here` is True."""
    folder = data_folder(s.dataset)
    if s.dataset == "pysrc" and not (folder / "meta.json").exists() and here:
        from data.pysrc.prepare import prepare
        prepare()
    return folder


def open_data(s, rank, distributed):
    """Return (training Tokens, validation Tokens, fingerprints), and set a vocab_size of 0. Raises ConfigError."""
    folder = prepare_data(s, here=rank == 0)
    if distributed:
        dist.barrier()
    s.vocab_size = s.vocab_size or vocabulary(folder)
    train_data = Tokens(folder, "train", s.block_size, s.vocab_size, s.seed)
    val_data = Tokens(folder, "val", s.block_size, s.vocab_size)
    return train_data, val_data, {"train": train_data.fingerprint(), "val": val_data.fingerprint()}


def make_model(s, config, device, distributed):
    """Return (GPT on the device, its optimizers), with initial weights or --init_from's. Raises ConfigError."""
    try:
        tensors = read_tensors(s.init_from) if s.init_from and not s.resume else {}
        torch.manual_seed(s.seed)
        model = GPT(config)  # drawn on the CPU, so that every device starts from the same weights
        if tensors:
            load(model, tensors)
    except ConfigError as e:
        raise ConfigError(f"init_from {s.init_from}: {e}") from None
    model.to(device)
    groups = param_groups(model.named_roles(), s.weight_decay, s.scale_decay, s.scale_lr_mult, s.decay_direction)
    return model, make_optimizers(groups, s.optimizer, (s.beta1, s.beta2), shard=s.shard_optimizer and distributed)


def own_checkpoint(s, path, fingerprint):
    """Load the checkpoint in `path`. Raises ConfigError if its settings or data are not the run's."""
    ckpt = load_checkpoint(path)
    if changed := differing(ckpt["settings"], s):
        raise ConfigError(f"{path} has other settings: {changed}. Resume with the same ones")
    if ckpt["data"] != fingerprint:
        raise ConfigError(f"{s.dataset} is not the data that {path} was trained on: its content differs")
    return ckpt


def restore(ckpt, path, model, optimizers, scaler):
    """Load a checkpoint into model, optimizers, scaler and RNG. Returns (step, skipped steps). Raises ConfigError."""
    def tensors(weights, rng, states):
        moments = {f"{name} of optimizer {k}'s parameter {i}": t for k, state in enumerate(states)
                   for i, each in state.items() for name, t in each.items()}
        return {**weights, "rng": rng, **moments}
    states, skipped = [optimizer["state"] for optimizer in ckpt["optimizers"]], ckpt["scaler"].pop("skipped", 0)
    stepped = ckpt["step"] > skipped  # until its first step an optimizer has no state
    check_tensors(tensors(ckpt["model"], ckpt["rng"], states),
                  tensors(model.state_dict(), torch.get_rng_state(),
                          [expected_state(optimizer) if stepped else {} for optimizer in optimizers]), path)
    model.load_state_dict(ckpt["model"])
    for optimizer, state in zip(optimizers, states):
        if stepped:
            load_state(optimizer, state)
    torch.set_rng_state(ckpt["rng"])
    if scaler.is_enabled():
        scaler.load_state_dict({**scaler.state_dict(), **ckpt["scaler"]})
    return ckpt["step"], skipped


@contextlib.contextmanager
def noted_signals():
    """
    Yield a list to which Ctrl-C, SIGTERM and SIGHUP are appended, so that the current step can finish. A second Ctrl-C
    stops at once.
    """
    signals = []

    def note(signum, frame):
        signals.append(signum)
        if signals.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    heard = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    old = {signum: signal.signal(signum, note) for signum in heard
           if signal.getsignal(signum) != signal.SIG_IGN}  # nohup's
    try:
        yield signals
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


# ---------------------------------------------------------------------------------------------------------------
# one step


def to_device(arrays, device):
    """The arrays of a batch as tensors. Pinned memory lets the copy to a GPU run while the CPU goes on."""
    tensors = (torch.from_numpy(a) for a in arrays)
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in tensors)
    return tuple(t.to(device) for t in tensors)


@torch.no_grad()
def evaluate(model, data, s, device, rank, world):
    """
    Return (mean loss over eval_tokens spread over all of the validation split: the same at every step, on any world;
    standard deviation of a token's logits over the vocabulary, mean over the first sequence, nan except on rank 0).
    """
    windows = data.spread(s.eval_tokens)
    total, logit_std = 0.0, math.nan
    for first in range(rank * s.micro_batch, len(windows), world * s.micro_batch):
        batch = windows[first:first + s.micro_batch]
        x, y = to_device(data.window(batch), device)
        logits, loss = model(x, y)
        total += loss.item() * len(batch)
        if first == 0:
            logit_std = logits[0].float().std(-1).mean().item()
    if world > 1:
        total = torch.tensor(total, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        total = total.item()
    return total / len(windows), logit_std


def finish(step, lr, read, overflow, s):
    """Wait for a step. Returns (its row of log.csv, whether any process wants to stop). Raises Diverged."""
    loss, norm, stop = read()
    if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):  # never saved
        raise Diverged(f"step {step}: loss {loss}, gradient norm {norm}. Try a lower --lr, a longer --warmup_steps "
                       f"or another --seed; {s.out_dir} keeps what was saved before")
    return {"train_loss": f"{loss:.6f}", "lr": f"{lr:.6g}", "grad_norm": f"{norm:.6g}"}, bool(stop)


def settle_routers(model, n_micro, world):
    """After a step of n_micro batches, balance a mixture's routers. Returns (load, mean entropy) of all processes."""
    load, entropy = take_router_statistics(model)
    if world > 1:
        dist.all_reduce(load)
        dist.all_reduce(entropy)
    balance_routers(model, load)
    return load, entropy / (n_micro * world)


# ---------------------------------------------------------------------------------------------------------------
# the run


def main(s, config_files=()):
    """Train, evaluate, save and report as the settings s say. Raises ConfigError, Diverged, OSError."""
    s.out_dir = os.path.expanduser(s.out_dir or default_out_dir(config_files))
    rank, world, distributed = processes()
    machine = pick_device(s)
    device = machine.device
    if not s.dry_run:  # it writes nothing
        claim_out_dir(s)
    init_tokenizer, init_note = adopt(s) if s.init_from else (None, "")
    batch_plan(s, world)
    if s.dry_run:
        return dry_run(s, machine, world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(distributed, device, s.dist_timeout):
        train_data, val_data, fingerprint = open_data(s, rank, distributed)
        gpt_config(s)
        if init_tokenizer not in (None, train_data.tokenizer):
            raise ConfigError(f"{s.init_from} knows tokens of {init_tokenizer!r}, and {s.dataset} has "
                              f"{train_data.tokenizer!r}")
        if distributed:
            compare_ranks({**asdict(s), "device": device.type, **versions(), "code": code_hash(), "data": fingerprint},
                          rank, world)
        with run_folder(s, master=rank == 0) as out:  # nothing was written until now, when all is checked
            with kernels.backend(s.kernels):
                train(s, out, train_data, val_data, fingerprint, machine, rank, world, distributed, init_note)


def data_parallel(model, device):
    """The model, its gradients averaged over processes by each backward pass outside no_sync()."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of an argument's new name, which torch 2.11 does not have
        # Buffers are equal everywhere, or each process has its own. A compiled model is cut where DDP's buckets end, so
        # that they are sent while the backward pass goes on.
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                       broadcast_buffers=False)


def train(s, out, train_data, val_data, fingerprint, machine, rank=0, world=1, distributed=False, note=""):
    """The run itself, in the folder out, with the settings that main completed: model, loop and report."""
    master = rank == 0  # prints and writes; the others only compute
    device, dtype = machine.device, machine.dtype
    share, micro, n_micro = batch_plan(s, world)
    end = min(s.max_steps, s.stop_at or s.max_steps)
    step = first_step = skipped = 0
    ckpt = own_checkpoint(s, out / "ckpt.pt", fingerprint) if s.resume else None  # refused before memory is taken
    if ckpt and ckpt["step"] >= end:
        if master and end == s.max_steps:
            print(f"{s.out_dir} is finished: step {ckpt['step']} of {end}. A larger --max_steps continues it.")
        elif master:
            print(f"{s.out_dir} is at step {ckpt['step']} already, and --stop_at is {end}. A larger one continues it.")
        return
    raw_model, optimizers = make_model(s, gpt_config(s, dtype), device, distributed)
    # fp16 would lose small gradients, so the loss is scaled up; other dtypes leave it as it is
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "float16")
    if ckpt:
        step, skipped = restore(ckpt, out / "ckpt.pt", raw_model, optimizers, scaler)
        first_step, ckpt = step, None  # lets go of the file
    # not dynamic, or the last batch of an evaluation, which may be smaller, would give training a graph for any size
    ddp_model = model = torch.compile(raw_model, dynamic=False) if machine.compile else raw_model
    if distributed:
        ddp_model = data_parallel(model, device)
    counts, log = raw_model.counts(), None
    if master:
        log = RunLog(s, out, step, counts, device, world)
        print(f"{counts['params']:,} parameters, {counts['scale_params']:,} of them in scale vectors; "
              f"{train_data.n_tokens:,} tokens in {train_data.folder.name}; {s.max_steps} steps of {s.batch_tokens} "
              f"tokens on {device.type} in {dtype}{machine.why}{', compiled' * machine.compile}, with "
              f"{'Triton' if machine.kernels == 'triton' else 'PyTorch'}'s kernels, to {s.out_dir}")
        if note:
            print(note)
        if s.n_experts > 1 and s.experts_per_token == 1 and s.router != "softmax_all":
            print(f"With one expert per token, router={s.router} always gives it the weight 1, so only router_aux and "
                  f"router_z train the router. With router=softmax_all the loss trains it too.")

    val_loss, stopping, row, routed, seconds, unread = None, False, {}, None, [], []
    with noted_signals() as signals, contextlib.closing(log) if master else contextlib.nullcontext():
        while True:
            # Everything about step n happens before step n + 1 and in this order: evaluate, log, save. A resumed run
            # begins right after that point, so nothing is done twice.
            last = step == end or stopping
            if step > first_step or step == 0:
                if step % s.eval_interval == 0 or step == s.max_steps:
                    val_loss, logit_std = evaluate(model, val_data, s, device, rank, world)
                    if not math.isfinite(val_loss):  # an update may diverge after a finite loss and gradient
                        raise Diverged(f"step {step}: loss {val_loss} on the validation split. Try a lower --lr")
                    row.update(val_loss=f"{val_loss:.6f}", logit_std=f"{logit_std:.6g}")
                if master and (step % s.log_interval == 0 or "val_loss" in row or last):
                    log.write(step, row, skipped, routed, seconds, raw_model)
                if step > 0 and (step % s.save_interval == 0 or last):
                    gather_state(optimizers)
                    if master:
                        save_checkpoint(out / "ckpt.pt", raw_model, optimizers, step, s, train_data.tokenizer,
                                        fingerprint, {**scaler.state_dict(), "skipped": skipped})
            if last:
                break

            started, row = time.perf_counter(), {}
            lr = lr_at(step, s.lr, s.schedule, s.warmup_steps, s.max_steps, s.min_lr_frac, s.decay_frac)
            set_lr(optimizers, lr)
            loss_sum = torch.zeros((), device=device)
            for i in range(n_micro):
                first = step * (share * world) + rank * share + i * micro
                x, y = to_device(train_data.batch(first, micro), device)
                # gradients are averaged over processes once, after the last micro-batch
                with ddp_model.no_sync() if distributed and i < n_micro - 1 else contextlib.nullcontext():
                    loss = ddp_model(x, y)[1] / n_micro
                    scaler.scale(loss).backward()
                loss_sum += loss.detach()
            read, overflow = update(raw_model, optimizers, scaler, loss_sum, signals or unheard(), s.grad_clip, world)
            routed = settle_routers(raw_model, n_micro, world) if s.n_experts else None
            unread.append((step, lr, read, overflow))
            skipped, step = skipped + overflow, step + 1
            # The CPU waits for the step before, while a GPU has this one to do; for this one only if it is needed.
            needed = step == end or not all(step % n for n in (s.eval_interval, s.log_interval, s.save_interval))
            while unread and (len(unread) > 1 or needed or stopping):
                row, stopping = finish(*unread.pop(0), s)
            seconds.append(time.perf_counter() - started)
            if master:
                log.bar.update()

    if step < s.max_steps:
        if master:
            print(f"stopped by {'a signal' if stopping else '--stop_at'} at step {step}; {s.out_dir}/ckpt.pt holds it, "
                  f"--resume=True goes on")
        if stopping:
            sys.exit(128 + (signals[0] if signals else 13 if unheard() else signal.SIGTERM))
    elif master:
        # the first step compiles
        report(s, raw_model, val_data, val_loss, tokens_per_second(seconds[1:], s), device, world)


# ---------------------------------------------------------------------------------------------------------------
# the report


def report(s, model, val_data, val_loss, rate, device, world):
    """Print the closing `key: value` lines, a sample, and the command that draws the run. rate: tokens per second."""
    summary = {"val_loss": f"{val_loss:.4f}"}
    if bytes_per_token := val_data.bytes_per_token(val_data.spread(s.eval_tokens)):
        summary["val_bpb"] = f"{val_loss / math.log(2) / bytes_per_token:.4f}"
    summary.update(steps=s.max_steps, tokens=s.max_steps * s.batch_tokens, tokens_per_second=f"{rate:.0f}")
    if peak := peak_flops(device):
        summary["mfu"] = f"{model.flops_per_token() * rate / (peak * world):.4f}"
    summary.update(peak_memory_mb=f"{peak_memory_mb(device):.0f}", **model.counts(), out_dir=s.out_dir)
    print("\n".join(f"{key}: {value}" for key, value in summary.items()))
    if s.sample_tokens:
        try:
            show_sample(model, val_data.tokenizer, s, device)
        except (RuntimeError, ValueError) as e:  # ConfigError is a ValueError: the BPE files may be missing
            print(f"no sample: {' '.join(str(e).splitlines())}")
    print(f"pictures: {shlex.join(['python', 'plot.py', s.out_dir])}")


def show_sample(model, tokenizer, s, device):
    """Print what the model generates from the start of a document."""
    tokenizer = load_tokenizer(tokenizer)
    start = torch.full((1, 1), tokenizer.separator, device=device)
    generator = torch.Generator(device).manual_seed(s.seed)
    tokens = model.generate(start, s.sample_tokens, temperature=0.8, top_k=50, generator=generator)
    text = b"".join(tokenizer.token_bytes(t.item()) for t in tokens).decode("utf-8", errors="replace")
    print("\na sample:\n" + text + "\n")


def dry_run(s, machine, world):
    """Build the model on the meta device, where tensors have shapes but no memory, and print its counts and groups."""
    s.vocab_size = s.vocab_size or vocabulary(prepare_data(s))
    with torch.device("meta"):
        model = GPT(gpt_config(s))
    for key, value in {**model.counts(), "flops_per_token": model.flops_per_token()}.items():
        print(f"{key}: {value}")
    for g in param_groups(model.named_roles(), s.weight_decay, s.scale_decay, s.scale_lr_mult, s.decay_direction):
        print(f"group {g['name']}: {len(g['params'])} tensors, {sum(p.numel() for p in g['params'])} parameters, "
              f"weight_decay {g['weight_decay']}, lr {s.lr * g['lr_mult']}")
    _, micro, n_micro = batch_plan(s, world)
    print(f"memory_of_a_step: estimated MB per process, for {micro} sequences in {machine.dtype}, "
          f"{'compiled' if machine.compile else 'eager'}; --shard_optimizer divides the optimizer's by the processes")
    parts = step_memory(model, s, machine.dtype, machine.compile, micro, persistent=n_micro > 1 or world > 1)
    for part, size in {**parts, "total": sum(parts.values())}.items():
        print(f"memory_{part}: {size / 2**20:.0f}")


def run(s, config_files=()):
    """Run main, with exit codes for the shell: 2 for a mistake in the settings or data, 1 for a failure later."""
    try:
        main(s, config_files)
    except ConfigError as e:
        refuse(e)
    except (Diverged, kernels.KernelError) as e:
        refuse(e, 1)
    except OSError as e:
        ckpt = Path(s.out_dir, "ckpt.pt")
        refuse(f"{e}; " + (f"{ckpt} is kept: fix that, then use --resume=True" if ckpt.exists() else
                           "fix that, then start again"), 1)
    except (MemoryError, RuntimeError) as e:
        if not (isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(e)
                or "calculation overflowed" in str(e)):  # of a tensor's size
            raise
        refuse(f"out of memory. A smaller --micro_batch needs less; {(str(e).splitlines() or ['that is all'])[0]}", 1)


if __name__ == "__main__":
    run(settings, config_files)
