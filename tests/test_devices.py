"""devices.py, and train.py on devices that this machine does not have: GPUs by name, fp16, MPS without float64."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, UNIFIED, checkpoint, read_log
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import devices
import kernels
import train
from configurator import ConfigError, configure
from settings import Settings
from train import Diverged, main

GRAD_SCALER = torch.amp.GradScaler

# name, compute capability or None for ROCm -> dtype of activations, peak
GPUS = {
    ("Tesla T4", (7, 5)): ("float32", 65e12), ("NVIDIA T400 4GB", (7, 5)): ("float32", None),
    ("NVIDIA A100-SXM4-80GB", (8, 0)): ("bfloat16", 312e12), ("NVIDIA A10", (8, 6)): ("bfloat16", 125e12),
    ("NVIDIA A10G", (8, 6)): ("bfloat16", 70e12), ("NVIDIA GeForce RTX 4090", (8, 9)): ("bfloat16", 165e12),
    ("NVIDIA L4", (8, 9)): ("bfloat16", 121e12), ("NVIDIA L40S", (8, 9)): ("bfloat16", 362e12),
    ("NVIDIA H100 80GB HBM3", (9, 0)): ("bfloat16", 989e12), ("NVIDIA H100 PCIe", (9, 0)): ("bfloat16", 756e12),
    ("NVIDIA B200", (10, 0)): ("bfloat16", 2250e12), ("NVIDIA GB200", (10, 0)): ("bfloat16", 2500e12),
    ("AMD Instinct MI300X", None): ("bfloat16", 1307e12), ("AMD Radeon RX 7900 XTX", None): ("bfloat16", 123e12),
}


@pytest.fixture
def fake(monkeypatch):
    """A function that makes this machine say that it has such a GPU, or MPS, or neither."""
    empty = torch.empty

    def become(gpu=None, capability=None, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: gpu)
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda device=None: SimpleNamespace(major=capability[0], minor=capability[1]))
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.version, "hip", "6.4" if gpu and capability is None else None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch, "empty", lambda *a, device=None, **kw: empty(*a, **kw))
    return become


@pytest.fixture
def choice(monkeypatch, corpus, tmp_path):
    """What `train.py config/unified.py FLAGS` computes with: (device, dtype, kernels, compile), and why that dtype."""
    def choose(*flags):
        seen = []
        monkeypatch.setattr(train, "train", lambda s, out, a, b, c, machine, *rest:
                            seen.extend([machine, kernels._backend]))
        main(configure(Settings, [str(ROOT / "config/unified.py"), f"--dataset={corpus}", "--vocab_size=0",
                                  f"--out_dir={tmp_path / 'run'}", *flags])[0])
        m, backend = seen
        assert backend == ("torch" if "--kernels=torch" in flags else "auto")
        return (str(m.device), m.dtype, m.kernels, m.compile), m.why
    return choose


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu[0])
def test_each_gpu_gets_its_dtype_and_peak(gpu, fake, choice):
    fake(*gpu)
    dtype, peak = GPUS[gpu]
    chosen, why = choice()
    assert chosen == ("cuda:0", dtype, "triton", True)
    assert (gpu[0] in why) == (dtype == "float32")
    assert devices.peak_flops(torch.device("cuda", 0)) == peak


def test_flags_and_machines_without_a_gpu(fake, choice, monkeypatch):
    assert choice()[0] == ("cpu", "float32", "torch", False)
    fake(mps=True)
    assert choice()[0] == ("mps", "float32", "torch", False)
    assert choice("--device=cpu", "--dtype=bfloat16", "--compile=True")[0] == ("cpu", "bfloat16", "torch", True)
    fake("Tesla T4", (7, 5))
    assert choice("--dtype=float16") == (("cuda:0", "float16", "triton", True), "")
    assert choice("--dtype=bfloat16", "--compile=False")[0] == ("cuda:0", "bfloat16", "triton", False)
    assert choice("--kernels=torch")[0] == ("cuda:0", "float32", "torch", True)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)  # Triton is not installed
    assert choice()[0] == ("cuda:0", "float32", "torch", True)


WORLD = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="x", MASTER_PORT="1")


@pytest.mark.parametrize("env", [dict(RANK="0"), dict(WORLD_SIZE="2"), dict(LOCAL_RANK="x"), dict(WORLD, RANK="abc"),
                                 dict(WORLD, RANK="²"), dict(WORLD, RANK="2")], ids=str)
def test_an_incomplete_torchrun_environment_is_refused(env, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for ask in (devices.processes, lambda: devices.pick_device(Settings(device="cpu"))):
        with pytest.raises(ConfigError, match="is in the environment, without all that torchrun sets: .*unset it"):
            ask()


def test_ranks_count_over_all_machines(monkeypatch):
    for name, value in dict(WORLD, RANK="1").items():  # the first process of the second machine
        monkeypatch.setenv(name, value)
    assert devices.processes() == (1, 2, True)


def test_several_processes_do_not_get_mps(fake, monkeypatch):
    fake(mps=True)
    for name, value in WORLD.items():
        monkeypatch.setenv(name, value)
    assert devices.pick_device(Settings()).device.type == "cpu"
    with pytest.raises(ConfigError, match="add --device=cpu"):
        devices.pick_device(Settings(device="mps"))


def test_a_failing_kernel_is_one_line_naming_the_flag_that_avoids_it(settings, monkeypatch, capsys):
    class Broken:
        __name__ = "_rms_norm_kernel"

        def __getitem__(self, grid):
            raise RuntimeError("out of resource: shared memory\nand more")
    monkeypatch.setattr(kernels, "_rms_norm_kernel", Broken())
    monkeypatch.setattr(kernels, "_use_triton", lambda x, **kw: kernels._backend == "auto")  # as on a GPU
    with pytest.raises(SystemExit) as stop:
        train.run(settings())
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1, said
    assert "_rms_norm_kernel failed, RuntimeError: out of resource: shared memory; --kernels=torch goes on" in said
    train.run(settings(kernels="torch"))
    assert log(settings())[-1]["step"] == "8" and kernels._backend == "auto"


# fp16

def log(s):
    return read_log(s.out_dir)


def scaled_by(monkeypatch, scale):
    """Let the loss begin with another factor than 65536; it halves where a gradient overflows."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(GRAD_SCALER, init_scale=scale))


@pytest.mark.parametrize("kw", [{}, dict(optimizer="muon", n_experts=4, expert_dim=8)], ids=["", "muon and moe"])
def test_fp16_ends_where_fp32_does(settings, tmp_path, kw):
    losses = []
    for dtype in ("float32", "float16"):
        s = settings(**UNIFIED, **kw, max_steps=60, lr=1e-2, dtype=dtype, out_dir=str(tmp_path / dtype))
        main(s)
        losses.append(float(log(s)[-1]["val_loss"]))
    assert losses[0] < 3.7 and abs(losses[0] - losses[1]) < 0.02 and losses[0] != losses[1]


def test_an_overflow_skips_its_step_and_nothing_else(settings, monkeypatch, capsys):
    start = settings(**UNIFIED, max_steps=1, dtype="float16", lr=0.0, weight_decay=0.0)
    main(start)  # at a rate of 0: the initial weights
    first = checkpoint(start)["model"]
    scaled_by(monkeypatch, 2.0**24)
    s = settings(**UNIFIED, max_steps=12, dtype="float16", save_interval=1, overwrite=True)
    saved = {}
    real = train.save_checkpoint
    monkeypatch.setattr(train, "save_checkpoint", lambda path, *a: (real(path, *a), saved.update(
        {a[2]: torch.load(path, weights_only=True)}))[0])
    main(s)
    skipped = [int(row["skipped"]) for row in log(s)]
    n = skipped[-1]
    assert 2 <= n < 10 and skipped == [min(i, n) for i in range(13)]  # the first ones, until the factor is small enough
    assert f"skipped {n} " in capsys.readouterr().out
    for step in range(1, n + 1):
        assert all(torch.equal(saved[step]["model"][name], first[name]) for name in first)
        assert not any(saved[step]["optimizers"][0]["state"].values())
        assert saved[step]["scaler"]["scale"] == 2.0**(24 - step) and saved[step]["scaler"]["skipped"] == step
    after = saved[n + 1]
    assert not torch.equal(after["model"]["wte"], first["wte"])
    assert {int(state["step"]) for state in after["optimizers"][0]["state"].values()} == {1}


def test_fp16_resumes_bit_for_bit(settings, tmp_path, monkeypatch):
    """From between two overflows."""
    stop = 1
    scaled_by(monkeypatch, 2.0**23)
    kw = dict(**UNIFIED, schedule="constant", dtype="float16", save_interval=1)
    whole, parts = settings(**kw, max_steps=12), settings(**kw, max_steps=stop, out_dir=str(tmp_path / "parts"))
    main(whole)
    main(parts)
    main(settings(**kw, max_steps=12, resume=True, out_dir=parts.out_dir))
    assert log(whole)[-1]["skipped"] > "1"
    assert [r for r in log(parts) if r["step"] != str(stop)] == [r for r in log(whole) if r["step"] != str(stop)]
    a, b = checkpoint(whole), checkpoint(parts)
    assert a["scaler"] == b["scaler"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_fp16_that_overflows_at_any_factor_has_diverged(settings, monkeypatch):
    real = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: real(*a) * float("inf"))
    scaled_by(monkeypatch, 0.5)
    with pytest.raises(Diverged, match="step 0: .* gradient norm inf"):
        main(settings(dtype="float16"))


# what other machines lack

class NoFloat64(TorchDispatchMode):
    """MPS has no float64. Tensors that .cpu() returned may have it."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.home = []  # the tensors themselves: an id would be given again
        monkeypatch.setattr(torch.Tensor, "cpu", lambda t: self.bring(t.detach().clone()))

    def bring(self, t):
        self.home.append(t)
        return t

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        out = f(*args, **(kwargs or {}))
        if any(t is h for t in tensors for h in self.home):
            self.home += [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        elif any(x.dtype == torch.float64 for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            raise TypeError(f"{f}: the MPS framework doesn't support float64")
        return out


@pytest.mark.parametrize("kw", [dict(**UNIFIED, n_experts=4, expert_dim=8), dict(optimizer="muon"),
                                dict(arch="gemma", reparam="er")], ids=["unified moe", "muon", "gemma"])
def test_a_device_without_float64(settings, monkeypatch, kw, capsys):
    """The model is made on the CPU; from then on, nothing on the device is in float64."""
    mode, real = NoFloat64(monkeypatch), train.make_model
    monkeypatch.setattr(train, "make_model", lambda *a: (real(*a), mode.__enter__())[0])
    try:
        main(settings(**kw, sample_tokens=8))
    finally:
        mode.__exit__(None, None, None)
    assert mode.home and "a sample:" in capsys.readouterr().out
