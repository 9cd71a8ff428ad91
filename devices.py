"""
The machine: processes, device, dtype, the device's name and its peak speed.

Imports configurator.py.
"""

import math
import os
import platform
import re
import sys
import traceback
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from configurator import ConfigError

# Dense bf16 FLOP/s (fp16 on GPUs without bf16) with fp32 sums, from the vendors' data sheets, by part of torch's name
# for the device. The first match counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "GB200": 2500e12,
              "B200": 2250e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12, "V100": 125e12, "T4": 65e12,
              "L40S": 362e12, "L4": 121e12, "5090": 209e12, "4090": 165e12, "3090": 71e12,
              "MI300X": 1307e12, "MI250X": 192e12, "7900 XTX": 123e12}  # torch sees an MI250X as two devices


def processes():
    """
    (rank, number of processes, whether torchrun started them), from torchrun's environment variables. Raises
    ConfigError if only some of them are set.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    there = [name for name in names if os.environ.get(name)]
    if set(there) <= {"MASTER_ADDR", "MASTER_PORT"}:
        return 0, 1, False
    numbers = [os.environ.get(name, "") for name in names[:3]]
    if len(there) < len(names) or not all(n.isdecimal() for n in numbers) or not int(numbers[0]) < int(numbers[2]):
        raise ConfigError(f"{there[0]}={os.environ[there[0]]} is in the environment, without all that torchrun sets: "
                          f"start several processes with torchrun, or unset it")
    return int(numbers[0]), int(numbers[2]), True


@contextmanager
def process_group(distributed, device, minutes):
    """
    The process group of torchrun's processes, unless the caller has made one. Raises ConnectionError if another process
    has ended, or has not answered for this many minutes.
    """
    if not distributed or dist.is_initialized():
        yield
        return
    try:
        timeout = timedelta(minutes=minutes)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun's store outlives a restart, and still holds the addresses of the dead processes. Each machine counts
        # its own restarts, so several machines would not agree on the number
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                timeout=timeout)
        yield
        dist.barrier()  # another process may still be in a collective
    except BaseException as e:
        traceback.clear_frames(e.__traceback__)  # a model in DDP holds the group, whose threads must end first
        if not isinstance(e, RuntimeError) or not isinstance(e, dist.DistError) and "gloo" not in str(e):
            raise
        raise ConnectionError(f"another process has ended, or did not answer for {minutes:g} minutes (--dist_timeout): "
                              f"{str(e).splitlines()[0]}") from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def compare_ranks(mine, rank, world):
    """
    Refuse to train if any process differs from process 0 in `mine`, a dict of what must be equal: they would compute
    parts of different runs, or wait for each other for ever. Every process calls this. Raises ConfigError in process 0
    and SystemExit in the others.
    """
    everyone = [None] * world
    dist.all_gather_object(everyone, mine)
    for other, theirs in enumerate(everyone):
        different = [f"{name} {theirs[name]!r} (process 0: {value!r})" for name, value in everyone[0].items()
                     if theirs[name] != value]
        if different and rank == 0:
            raise ConfigError(f"process {other} has {', '.join(different)}: start all of them with the same command, "
                              f"code and data")
        if different:
            sys.exit(2)  # process 0 prints the message


class Machine(NamedTuple):
    """How a run computes: its device, the dtype of activations and why, torch.compile, and the kernels."""

    device: torch.device
    dtype: str
    why: str
    compile: bool
    kernels: str  # triton or torch


def pick_device(s):
    """The Machine for a run with settings s. Raises ConfigError if its device cannot be used."""
    (_, world, _), local_rank = processes(), int(os.environ.get("LOCAL_RANK") or 0)
    mps = torch.backends.mps.is_available() and world == 1  # gloo does not support it
    name = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:1 and so on, or mps, not {s.device!r}")
    try:
        device = torch.device(name if name != "cuda" else f"cuda:{local_rank}")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        why = str(e).splitlines()[0].partition(". ")[0]  # torch may go on for a page
        raise ConfigError(f"device {s.device!r} cannot be used here: {why}") from None
    if device.type == "mps" and world > 1:
        raise ConfigError("several processes can share CPUs or CUDA devices, not mps: add --device=cpu")
    gpu, dtype, why = device.type == "cuda", s.dtype, ""
    if dtype == "auto":
        # NVIDIA's GPUs since Ampere compute in bfloat16, and all that ROCm supports
        bf16 = gpu and (torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0))
        dtype = "bfloat16" if bf16 else "float32"
        if gpu and not bf16:
            why = f" ({device_name(device)} has no bfloat16 units; --dtype=float16 uses its float16 ones)"
    return Machine(device, dtype, why, gpu if s.compile == "auto" else s.compile,
                   "triton" if gpu and s.kernels == "auto" and find_spec("triton") else "torch")


def device_name(device):
    """The device's name, for results: 'NVIDIA H100 80GB HBM3', or 'AMD EPYC, 2 cores'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    try:
        name = re.search("model name.*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))[1]
    except (OSError, TypeError):
        name = platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def peak_flops(device):
    """The vendor's FLOP/s for the device, or None if PEAK_FLOPS does not list it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for words, flops in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


def peak_memory_mb(device):
    """The most GPU memory that tensors took; on a CPU, the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def step_memory(model, s, dtype, compiled, micro, persistent=False):
    """
    The peak memory of a training step on one process, estimated from shapes: {part: bytes}. The peak comes as the
    backward pass begins, when all activations are there.

    model: may be on the meta device. s: the Settings. dtype: of activations. micro: sequences in a micro-batch.
    persistent: gradients outlive a micro-batch, as they do with several of them or several processes.
    Within 15% of what was measured at small sizes (tests/test_bench.py). Not counted: what libraries and the CUDA
    context take.
    """
    c, b, tokens = model.config, torch.finfo(getattr(torch, dtype)).bits // 8, micro * s.block_size
    params = sum(p.numel() for p in model.parameters())
    muon = sum(p.numel() for _, p, role, _ in model.named_roles() if role == "matrix") if s.optimizer == "muon" else 0
    n, q, kv, K = c.n_embd, c.n_head * c.d_head, c.n_kv_head * c.d_head, c.experts_per_token if c.n_experts else 0
    hidden, attn = K * c.expert_dim + c.shared_dim if K else c.ffn_dim, model.blocks[0].attn
    gate_up = (model.blocks[0].ffn.experts if K else model.blocks[0].ffn).gate_up
    # per token and block: the residual stream and its norm before each sublayer; q, k and v; attention's output; gate,
    # up and their product; the rows that experts get and give
    width = (4 - attn.qkv.idle_norm - gate_up.idle_norm) * n + 2 * q + 2 * kv + 3 * hidden + 2 * K * n
    if attn.qk_norm or attn.qkv.normed or not compiled:
        width += q + 2 * kv  # the same before norms or RoPE
    if not compiled:  # attention's output again, in another order; silu(gate), if no kernel of ours makes it
        width += q + (0 if gate_up.normed else hidden)
    # logits and their gradient; without torch.compile three such in fp32, and twice that if they are normed themselves
    head = 2 * b if compiled else 24 if model.lm_head.normed and not model.lm_head.gram_pays else 12
    # the folded weights; a u on a fold keeps W ⊙ v for its gradient, and the head's Gram matrix another copy of it
    folded = params
    if not compiled:
        folded += params if gate_up.u and not gate_up.normed else 2 * c.vocab_size * n if model.lm_head.normed else 0
    return {"weights": 4 * params, "gradients": 4 * params if persistent else 0, "optimizer": 8 * params - 4 * muon,
            "activations": tokens * (c.n_layer * width * b + c.vocab_size * head) + b * folded}
