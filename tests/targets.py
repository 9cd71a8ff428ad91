"""
kernels.py compiled for GPUs that are not there: every launch of a training step, by the path that Triton's JIT takes
before it launches, its check of keywords included.

    python tests/targets.py [75 gfx942 ...]    prints {target: [[kernel, error, shared bytes, threads, PTX], ...]}

The PTX is only Hopper's, of the launches at widths of a model of 1B. TRITON_INTERPRET must not be set, so tests run
this in a process of its own.
"""

import json
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402, after the line above
from configurator import configure  # noqa: E402
from model import GPT  # noqa: E402
from settings import Settings, gpt_config  # noqa: E402

# What a block of threads can have of shared memory, in KiB: compute capabilities in CUDA's guide, and AMD's LDS.
SHARED = {"75": 64, "80": 163, "86": 99, "90": 227, "100": 227, "gfx942": 64, "gfx1100": 64}
DTYPES = ("float32", "bfloat16", "float16")
launches = {}
SMALL = ["--n_layer=1", "--vocab_size=128", "--block_size=64"]  # one block, since all are alike


def target_of(name):
    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)
    return GPUTarget("cuda", int(name), 32)


def recorded(rocm, f, *given):
    """(kernel, arguments, constants) of each launch of f, once where the JIT would see no difference."""
    found = {}

    def launch(kernel, grid, *args, **constants):
        if all(grid):
            seen = [(a.dtype, a.data_ptr() % 16) if isinstance(a, torch.Tensor) else a for a in args]
            found.setdefault(str((kernel.__name__, seen, constants)), (kernel, args, constants))
    kernels._launch, kernels.ROCM = launch, rocm
    f(*given)
    return list(found.values())


def step(dtype, config, *flags):
    """A forward and a backward pass of a model; what the kernels would write is whatever the memory holds."""
    s = configure(Settings, [str(ROOT / "config" / f"{config}.py"), *SMALL, *flags])[0]
    model, tokens = GPT(gpt_config(s, dtype)), torch.zeros(8, s.block_size, dtype=torch.int64)
    model(tokens, tokens)[1].backward()


def every_strategy(dtype):
    for path in sorted((ROOT / "config").glob("*.py")):
        step(dtype, path.stem)
    step(dtype, "baseline", "--attn_placement=norm", "--v_placement=input")  # a norm without a vector on q and k
    step(dtype, "unified", "--placement=norm")
    for name in ("baseline", "unified_free", "unified"):
        step(dtype, name, "--n_experts=4", "--expert_dim=341", "--shared_dim=341", "--expert_scales=own")


def wide():
    """Every kernel once, in bf16, at widths of a model of 1B."""
    def bf16(*shape):
        return torch.randn(shape).to(torch.bfloat16).requires_grad_()
    x, residual, g = bf16(32, 1792), bf16(32, 1792), torch.ones(1792, requires_grad=True)
    sum(t.sum() for t in kernels.rms_norm(x, 1e-6, g, residual)).backward()
    g = torch.ones(4778, requires_grad=True)
    kernels.swiglu(bf16(32, 2 * 4784), 4778, 1e-6, True, g).backward(bf16(32, 4784))
    kernels.swiglu(bf16(32, 2 * 4784), 4778).backward(bf16(32, 4784))
    angles, g = torch.zeros(16, 32), torch.ones(64, requires_grad=True)
    for normed, gammas in (("", (None, None)), ("qkv", (g, g))):
        q, k, v = kernels.qk_norm_rope(bf16(2, 16, 84 * 64), angles, angles, 28, 28, 1e-6, normed, gammas, 64)
        (q + k + v).backward(bf16(2, 16, 28, 64))


def widest(dtype):
    """The largest rows that kernels take: the most shared memory and the most threads that they ask for."""
    n, g = kernels.WIDEST, torch.ones(kernels.WIDEST, requires_grad=True)
    x, y = (torch.zeros(32, m, dtype=getattr(torch, dtype), requires_grad=True) for m in (n, 2 * n))
    sum(t.sum() for t in kernels.rms_norm(x, 1e-6, g, x)).backward()
    kernels.swiglu(y, n, 1e-6, True, g).sum().backward()


def record():
    """Fill `launches`, which forked processes read: on ROCm or not, of which kind."""
    for rocm in (False, True):
        for dtype in DTYPES:
            launches[rocm, dtype] = recorded(rocm, every_strategy, dtype) + recorded(rocm, widest, dtype)
            launches[rocm, dtype, "one"] = recorded(rocm, step, dtype, "gemma_unified")  # which has all kernels
        launches[rocm, "wide"] = recorded(rocm, wide)


def compiled(name):
    """
    [kernel, error, shared bytes, threads, PTX] of each distinct launch on the target of this name: of every strategy in
    the dtype that auto takes, of one strategy in the others. sm_75 has no bf16 units.
    """
    target, rows = target_of(name), {}
    for kernel in {kernel.__name__: kernel for part in launches.values() for kernel, *_ in part}.values():
        kernel.device_caches.clear()  # of this process's last target, which the JIT takes for the same GPU
    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0))
    said = open(Path(os.environ["TRITON_CACHE_DIR"], f"{name}.txt"), "w+")
    os.dup2(said.fileno(), 2)
    old, rocm = name == "75", name.startswith("gfx")
    auto, *others = ("float32", "float16") if old else ("bfloat16", "float32", "float16")
    for part in [(auto,), *((dtype, "one") for dtype in others)] + [("wide",)] * (not old):
        for kernel, args, constants in launches[rocm, *part]:
            print(f"{name} {kernel.__name__}", file=said, flush=True)
            at = said.tell()
            try:
                made = kernel.warmup(*args, grid=(1,), **constants)
                assert made.metadata.target == target
                threads = made.metadata.num_warps * target.warp_size
                ptx = made.asm["ptx"] if (name, part) == ("90", ("wide",)) else None
                said.seek(at)
                error = re.search("error:.*", said.read())  # of AMD's assembler, say: Triton goes on all the same
                if error or id(made) not in rows or ptx:
                    rows[id(made)] = kernel.__name__, error and error[0], made.metadata.shared, threads, ptx
            except Exception as e:  # whatever it is: the next may compile
                rows[len(rows)] = kernel.__name__, f"{type(e).__name__}: {e}"[-300:], 0, 0, None
    return list(rows.values())


if __name__ == "__main__":
    kernels._use_triton = lambda x, left_to_compile=False: x.dtype != torch.float64
    kernels._processors = lambda device: 1  # programs then have several steps each, as in a large batch
    record()
    names = sys.argv[1:] or list(SHARED)
    with TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder  # the usual one holds earlier results without their messages
        try:
            with ProcessPoolExecutor(os.cpu_count(), get_context("fork")) as pool:
                print(json.dumps(dict(zip(names, pool.map(compiled, names)))))
        except BrokenProcessPool:  # LLVM may end the process
            sys.exit("\n".join(path.read_text()[-500:] for path in Path(folder).glob("*.txt")))
