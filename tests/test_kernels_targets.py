"""kernels.py on GPUs that are not here, with a kernel that fails, and without Triton."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_kernels import EPS, launched, pytestmark, randn

import kernels
from kernels import backend, rms_norm, swiglu

targets = pytest.importorskip("targets")  # which imports Triton

KERNELS = {f"_{name}{way}_kernel" for name in ("rms_norm", "swiglu", "qk_norm_rope") for way in ("", "_backward")}


@pytest.fixture(scope="module")
def compiled():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, targets.__file__], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr[-2000:]
    return json.loads(out.stdout)


@pytest.mark.parametrize("name", targets.SHARED)
def test_every_launch_of_a_training_step_compiles_and_fits(name, compiled):
    rows = compiled[name]
    assert {row[0] for row in rows} == KERNELS and len(rows) >= 30
    assert not [row[:2] for row in rows if row[1]]
    for kernel, _, shared, threads, _ in rows:
        assert shared <= targets.SHARED[name] * 1024 and threads <= 1024, kernel


def test_ptx_has_no_fp64_and_its_accesses_are_16_bytes_wide(compiled):
    ptxs = [(kernel, ptx) for kernel, *_, ptx in compiled["90"] if ptx]
    assert {kernel for kernel, _ in ptxs} == KERNELS
    for kernel, ptx in ptxs:
        assert ".f64" not in ptx, kernel
        accesses = set(re.findall(r"(?:ld|st)\.global\S*", ptx))
        assert accesses and all(".v4.b32" in access for access in accesses), (kernel, accesses)


class Broken:
    """A kernel whose launch raises this error."""

    def __init__(self, error):
        self.error, self.__name__ = error, "_broken_kernel"

    def __getitem__(self, grid):
        def fail(*args, **kw):
            raise self.error
        return fail


def compilation_error():
    """As Triton makes it, of many lines, the last of which says why."""
    from triton.compiler.errors import CompilationError
    node = compile("x =\\\n  1", "", "exec", 1024).body[0]  # 1024: only parse
    return CompilationError("def kernel():\n    a line\n", node, "Unsupported conversion\nand more")


@pytest.mark.parametrize("error,why", [
    (lambda: RuntimeError("PassManager::run failed\nand more"), "RuntimeError: PassManager::run failed"),
    (compilation_error, "CompilationError: Unsupported conversion"),
    (lambda: OSError(), "OSError: no message"), (lambda: ValueError("x" * 9999), "ValueError: " + "x" * 200)])
def test_a_failing_kernel_raises_one_line_that_says_how_to_run_without_it(error, why, monkeypatch):
    x = randn(3, 8).requires_grad_()
    line = f"_broken_kernel failed, {why}; --kernels=torch goes on without Triton's kernels"
    with monkeypatch.context() as m, backend("triton"):
        m.setattr(kernels, "_rms_norm_kernel", Broken(error()))
        for f in (rms_norm, torch.compile(rms_norm, backend="aot_eager")):
            with pytest.raises(kernels.KernelError) as e:
                f(x, EPS)
            assert str(e.value) == line and isinstance(e.value.__cause__, type(error()))
        with backend("torch"):
            assert torch.equal(rms_norm(x, EPS), kernels._RMSNorm.apply(x, None, EPS))
    with monkeypatch.context() as m, backend("triton"):  # from autograd's thread, too
        m.setattr(kernels, "_rms_norm_backward_kernel", Broken(error()))
        with pytest.raises(kernels.KernelError, match="_broken_kernel failed"):
            rms_norm(x, EPS).sum().backward()


def test_a_backward_pass_uses_the_backend_of_its_forward_pass(launched):
    x, y = randn(3, 8).requires_grad_(), randn(3, 16).requires_grad_()
    with backend("triton"):
        first = rms_norm(x, EPS)
        with backend("torch"):
            second = swiglu(y, 8)
            first.sum().backward()
        second.sum().backward()
        assert launched == ["_rms_norm_kernel", "_rms_norm_backward_kernel"]
        swiglu(y, 8)
        assert launched[2:] == ["_swiglu_kernel"]


@pytest.mark.parametrize("normed", [False, True])
def test_another_activation_than_silu_is_used_by_every_backend(normed, monkeypatch, launched):
    y, gamma = randn(5, 16), randn(8)
    monkeypatch.setattr(kernels, "activation", torch.nn.functional.gelu)
    gate, up = y.chunk(2, dim=-1)
    if normed:
        gate, up = gamma * rms_norm(gate, EPS), rms_norm(up, EPS)
    for name in ("torch", "auto", "triton"):
        with backend(name):
            h = swiglu(y, 8, EPS, normed, gamma if normed else None)
        assert torch.allclose(h, torch.nn.functional.gelu(gate) * up, atol=1e-6)
    assert "_swiglu_kernel" not in launched


def test_without_triton_the_twins_do_the_work():
    code = """
import sys
sys.modules["triton"] = None  # import raises ImportError
import torch, kernels
from model import GPT
from settings import GPTConfig
model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=4, placement="dual_norm", dtype="float32"))
x = torch.zeros(1, 4, dtype=torch.int64)
model(x, x)[1].backward()
with kernels.backend("torch"):
    model(x, x)[1].backward()
assert kernels.triton is None and all(p.grad.isfinite().all() for p in model.parameters())
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
