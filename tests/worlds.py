"""
Runs of two processes, all in one launch, for test_ddp.py, which starts it with torchrun:

    torchrun --standalone --nproc_per_node=2 tests/worlds.py OUT DATASET OTHER_DATASET

Each process writes what became of each case to OUT/rank0.json and OUT/rank1.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import UNIFIED, small  # puts the project on sys.path

import train

STEPS = 30


def settings(out_dir, dataset, **kw):
    return small(dataset, **dict(out_dir=str(out_dir), max_steps=STEPS, batch_tokens=128, micro_batch=8,
                                 eval_interval=10, save_interval=1000) | kw)


def with_signal(step, s):
    """Train, with a signal that arrives at this process while step + 1 is computed."""
    real = train.lr_at
    train.lr_at = lambda i, *a: (os.kill(os.getpid(), signal.SIGTERM) if i == step else None, real(i, *a))[1]
    try:
        train.main(s)
    finally:
        train.lr_at = real


def graphs(s, megabytes):
    """How many graphs a compiled model is cut into where DDP sends gradients in buckets of this size."""
    seen, compile_, ddp = [], torch.compile, train.DistributedDataParallel

    def backend(module, inputs):
        seen.extend([module] * torch.is_grad_enabled())
        return module.forward
    torch.compile = lambda model, **kw: compile_(model, backend=backend, **kw)
    train.DistributedDataParallel = lambda *a, **kw: ddp(*a, **kw, bucket_cap_mb=megabytes)
    try:
        train.main(s)
    finally:
        torch.compile, train.DistributedDataParallel = compile_, ddp
        torch._dynamo.reset()
    return len(seen)


def cases(out, dataset, other, second):
    """(name, what to do) of each; second: whether this is the second process."""
    def make(name, **kw):
        return settings(out / name, dataset, **kw)
    wide = dict(n_layer=4, n_embd=192, compile=True, micro_batch=2, max_steps=2, eval_tokens=16, **UNIFIED)
    yield "baseline", lambda: train.main(make("baseline"))
    yield "unified", lambda: train.main(make("unified", **UNIFIED))
    # accumulating, and with a share of the optimizer's state each; one of the two hears the signal
    yield "resumed", lambda: with_signal(16 if second else None, make(
        "resumed", resume=True, micro_batch=2, shard_optimizer=True, **UNIFIED))
    yield "uneven", lambda: train.main(make("uneven", batch_tokens=80))
    yield "lr", lambda: train.main(make("lr", lr=0.1 if second else 0.006))
    yield "max_steps", lambda: train.main(make("max_steps", max_steps=9 if second else STEPS))
    yield "data", lambda: train.main(settings(out / "data", other if second else dataset))
    yield "small buckets", lambda: graphs(make("small", **wide), 1.1)
    yield "large buckets", lambda: graphs(make("large", **wide), 1000)


if __name__ == "__main__":
    out, dataset, other = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    became = {}
    for name, do in cases(out, dataset, other, dist.get_rank() == 1):
        try:
            became[name] = do()
        except SystemExit as e:
            became[name] = f"exit {e.code}"
        except ValueError as e:  # ConfigError
            became[name] = str(e)
    (out / f"rank{dist.get_rank()}.json").write_text(json.dumps(became))
    dist.barrier()
    dist.destroy_process_group()
