"""What only a GPU can show: bf16, torch.compile and NCCL in the real loop."""

import signal
import subprocess
import sys
from pathlib import Path

import faults
import pytest
import test_model
import torch
from conftest import ROOT
from test_kernels import gamma, norm, our_swiglu, outputs_and_grads
from test_kernels_gemm import our_heads, tables
from test_train import UNIFIED, equal, log, stop_at, weights

from kernels import backend
from train import main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = dict(device="cuda", dtype="bfloat16", compile=True)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-4), ("bfloat16", 0.05)])
@pytest.mark.parametrize("kw", [dict(), test_model.UNIFIED], ids=["baseline", "unified"])
def test_compiled_gradients_are_those_of_plain_pytorch_in_fp64(kw, dtype, tolerance):
    exact, ours = (test_model.shake(test_model.tiny(n_layer=1, vocab_size=128, init_std=0.0, embedding_std=0.0,
                                                    dtype=name, **kw)).cuda() for name in ("float64", dtype))
    with backend("torch"):
        loss, gradients = test_model.loss_and_gradients(exact.double())
    our_loss, our_gradients = test_model.loss_and_gradients(ours, torch.compile(ours))
    assert abs(our_loss - loss) < tolerance * loss
    floor = 0.1 * torch.stack([g.norm() for g in gradients.values()]).norm()  # that of v's β is 0
    for name, g in gradients.items():
        assert (our_gradients[name] - g).norm() < tolerance * (g.norm() + floor), name


def test_bf16_compiled_follows_fp32(settings, tmp_path):
    exact = settings(device="cuda", dtype="float32", compile=False, max_steps=30, **UNIFIED)
    fast = settings(max_steps=30, out_dir=str(tmp_path / "fast"), **GPU, **UNIFIED)
    main(exact)
    main(fast)
    a, b = ([float(v) for v in log(s).values()] for s in (exact, fast))
    assert max(abs(x - y) for x, y in zip(a, b)) < 0.02


def test_resuming_in_bf16_with_compile_is_bit_for_bit(settings, tmp_path, monkeypatch):
    whole = settings(**GPU, **UNIFIED)
    main(whole)
    parts = settings(out_dir=str(tmp_path / "parts"), **GPU, **UNIFIED)
    with monkeypatch.context() as m:
        stop_at(m, 4, signal.SIGTERM)
        with pytest.raises(SystemExit):
            main(parts)
    parts.resume = True
    main(parts)
    assert log(parts) == log(whole) and equal(weights(parts), weights(whole))


def test_nccl_on_one_gpu(settings, tmp_path):
    alone = settings(**GPU)
    main(alone)
    s = settings(out_dir=str(tmp_path / "nccl"), shard_optimizer=True, **GPU)
    flags = [f"--{name}={value}" for name, value in vars(s).items()]
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                    str(ROOT / "train.py"), *flags], check=True)
    assert faults.outcome(Path(s.out_dir))[1] == faults.outcome(Path(alone.out_dir))[1]


def bf16(*shape):
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def test_kernels_beyond_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 * 2 ** 30:
        pytest.skip("needs 40 GB")
    rows, n, last = 2 ** 31 // 1024 + 5, 1024, slice(-7, None)
    x, dy = bf16(rows, n), bf16(rows, n)
    for f, inputs, dout in ((norm, [x, dy, None], [dy, x]), (our_swiglu(500, True), [x, None], [dy[:, :512]])):
        whole = outputs_and_grads(f, inputs, dout, "triton")
        part = outputs_and_grads(f, [t if t is None else t[last] for t in inputs], [d[last] for d in dout], "triton")
        torch.testing.assert_close([t[last] for t in whole], part)
        del whole


def test_kernels_compiled_are_kernels():
    """In inductor's graph they do what they do in eager mode, bit for bit."""
    for f, inputs, dout in ((norm, [bf16(64, 768), bf16(64, 768), gamma(768)], [bf16(64, 768), bf16(64, 768)]),
                            (our_swiglu(341, True), [bf16(64, 688), gamma(341)], [bf16(64, 344)]),
                            (our_heads(*tables(32, 64), 12, 4, "qkv"), [bf16(2, 32, 20 * 64), gamma(768), gamma(256)],
                             [bf16(2, 32, n, 64) for n in (12, 4, 4)])):
        eager = outputs_and_grads(f, inputs, dout, "triton")
        compiled = outputs_and_grads(torch.compile(f, fullgraph=True), inputs, dout, "triton")
        assert all(map(torch.equal, eager, compiled))


def test_heads_beyond_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 40 * 2 ** 30:
        pytest.skip("needs 40 GB")
    B, T, heads = 513, 1024, 22
    y, douts = bf16(B, T, 3 * heads * 64), [bf16(B, T, heads, 64) for _ in "qkv"]
    assert y[:-1].numel() > 2 ** 31
    f = our_heads(*tables(T, 64), heads, heads, "qkv")
    whole, part = (outputs_and_grads(f, [y[a:]], [t[a:] for t in douts], "triton") for a in (0, B - 1))
    torch.testing.assert_close([t[-1:] for t in whole], part)
