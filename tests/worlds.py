"""
Losses of every strategy file on as many processes as torchrun starts, for test_ddp.py and by hand:

    torchrun --standalone --nproc_per_node=2 tests/worlds.py OUT DATASET STEPS [config names]
"""

import os
import sys

import torch
import torch.distributed as dist
from conftest import ROOT  # puts the project on sys.path

from configurator import configure
from settings import Settings
from train import main


def settings(name, out, dataset, steps, *flags):
    small = [f"--out_dir={out}/{name}", f"--dataset={dataset}", f"--max_steps={steps}", "--n_layer=2", "--n_head=2",
             "--n_embd=16", "--block_size=16", "--batch_tokens=128", "--micro_batch=8", "--warmup_steps=2",
             "--eval_interval=25", "--eval_tokens=512", "--log_interval=1", "--save_interval=1000",
             "--sample_tokens=0", "--device=cpu"]
    return configure(Settings, [str(ROOT / "config" / f"{name}.py"), *small, *flags])[0]


if __name__ == "__main__":
    out, dataset, steps, *names = sys.argv[1:]
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name in names or sorted(path.stem for path in (ROOT / "config").glob("*.py")):
        main(settings(name, out, dataset, steps))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
