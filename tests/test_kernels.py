"""
kernels.py's rms_norm and swiglu as Triton kernels: on a GPU as they run, elsewhere in Triton's interpreter (conftest.py
sets it). There bf16 is wrong, so the low precision that is tested is fp16.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_model import shake
from test_norms import naive_rms_norm

import kernels
from kernels import backend, rms_norm, swiglu

pytestmark = [pytest.mark.skipif(kernels.triton is None, reason="Triton is not installed"),
              pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]  # numpy's, about NaN
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
EPS = 1e-5


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran."""
    names, launch = [], kernels._launch

    def record(kernel, *args, **kw):
        names.append(kernel.__name__)
        launch(kernel, *args, **kw)
    monkeypatch.setattr(kernels, "_launch", record)
    return names


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def gamma(n):
    return torch.rand(n, device=DEVICE) + 0.5


def outputs_and_grads(f, inputs, douts, way):
    """f's outputs and the gradients of its inputs, where douts arrive. An input that is None stays."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in inputs]
    with backend(way):
        out = f(*inputs)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [t for t in inputs if t is not None]
        pairs = [(o, d) for o, d in zip(out, douts) if d is not None]
        grads = torch.autograd.grad([o for o, _ in pairs], wanted, [d for _, d in pairs])
    return [t.detach() for t in (*out, *grads)]


def assert_as_good(ours, plain, exact, dtype):
    """At most twice as far from float64 as the formula done in the low precision throughout, and a few roundings."""
    assert len(ours) == len(plain) == len(exact)
    for i, (o, p, e) in enumerate(zip(ours, plain, exact)):
        assert o.shape == e.shape and not o.isnan().any(), i
        if e.numel():
            allowed = 2 * (p.double() - e).abs().max() + 4 * torch.finfo(dtype).eps * max(1, e.abs().max())
            assert (o.double() - e).abs().max() <= allowed, i


def against_float64(f, naive, inputs, douts, dtype):
    def cast(tensors, dtype):
        return [t if t is None else t.to(dtype) for t in tensors]
    exact = outputs_and_grads(naive, cast(inputs, torch.float64), cast(douts, torch.float64), "torch")
    plain = outputs_and_grads(naive, cast(inputs, dtype), cast(douts, dtype), "torch")
    ours = outputs_and_grads(f, inputs, douts, "triton")
    assert_as_good(ours, plain, exact, dtype)
    return ours


def naive_norm(x, residual, gamma):
    x = x if residual is None else x + residual
    y = naive_rms_norm(x, EPS, gamma)
    return y if residual is None else (y, x)


def norm(x, residual, gamma):
    return rms_norm(x, EPS, gamma, residual)


def naive_swiglu(n, normed):
    def f(y, gamma):
        m = y.size(-1) // 2
        a, b = y[..., :n], y[..., m:m + n]
        if normed:
            a, b = naive_rms_norm(a, EPS, gamma), naive_rms_norm(b, EPS)
        return F.pad(a * torch.sigmoid(a) * b, (0, m - n))
    return f


def our_swiglu(n, normed):
    return lambda y, gamma: swiglu(y, n, EPS, normed, gamma)


# rows: none, one, many enough that each program takes several tiles. Widths: 1, and no power of two
@pytest.mark.parametrize("shape", [(0, 16), (1, 1), (3, 5, 64), (1, 257), (300, 40)])
@pytest.mark.parametrize("with_gamma,with_residual", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_against_float64(shape, with_gamma, with_residual, dtype, launched):
    inputs = [randn(*shape, dtype=dtype), randn(*shape, dtype=dtype) if with_residual else None,
              gamma(shape[-1]) if with_gamma else None]
    douts = [randn(*shape, dtype=dtype) for _ in range(1 + with_residual)]
    ours = against_float64(norm, naive_norm, inputs, douts, dtype)
    assert ours[0].dtype == dtype and launched == ["_rms_norm_kernel", "_rms_norm_backward_kernel"]


@pytest.mark.parametrize("shape,n", [((0, 16), 8), ((1, 2), 1), ((2, 3, 144), 70), ((300, 80), 40), ((2, 2100), 1045)])
@pytest.mark.parametrize("normed,with_gamma", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_against_float64(shape, n, normed, with_gamma, dtype, launched):
    inputs = [randn(*shape, dtype=dtype), gamma(n) if with_gamma else None]
    m = shape[-1] // 2
    ours = against_float64(our_swiglu(n, normed), naive_swiglu(n, normed), inputs, [randn(*shape[:-1], m, dtype=dtype)],
                           dtype)
    assert ours[0].dtype == dtype and launched == ["_swiglu_kernel", "_swiglu_backward_kernel"]
    assert (ours[0][..., n:] == 0).all() and (ours[1][..., n:m] == 0).all() and (ours[1][..., m + n:] == 0).all()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("of_gamma", [None, (10,), (600, 10)])
def test_the_written_out_swiglu_block_by_block_and_compiled(of_gamma, compiled):
    y = F.pad(randn(600, 2, 10), (0, 2)).flatten(1)  # the third block of 256 rows is not whole
    inputs, f = [y, None if of_gamma is None else torch.rand(of_gamma, device=DEVICE) + 0.5], our_swiglu(10, True)
    ours = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    d = randn(600, 12)
    got = outputs_and_grads(ours, inputs, [d], "torch")
    plain = outputs_and_grads(naive_swiglu(10, True), inputs, [d], "torch")
    exact = outputs_and_grads(naive_swiglu(10, True), [t if t is None else t.double() for t in inputs], [d.double()],
                              "torch")
    assert_as_good(got, plain, exact, torch.float32)


def test_the_gradient_of_a_sum_or_norm_that_is_not_used():
    x, residual, g, d = randn(5, 24), randn(5, 24), gamma(24), randn(5, 24)
    for douts in ([d, None], [None, d]):
        inputs = [x, residual, g if douts[0] is not None else None]
        for ours, theirs in zip(*(outputs_and_grads(norm, inputs, douts, way) for way in ("triton", "torch"))):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_norm_of_a_sum_is_that_of_the_rounded_sum():
    """Which is what the backward pass and the next layer read. A norm of the unrounded one differs in many places."""
    x, residual = randn(50, 40, dtype=torch.float16), randn(50, 40, dtype=torch.float16)
    with backend("triton"):
        y, total = rms_norm(x, EPS, residual=residual)
        assert torch.equal(total, x + residual) and (y != rms_norm(total, EPS)).float().mean() < 0.01


def strided(t):
    """The same numbers in a wider buffer, one number in, so that no row begins at a multiple of 16 bytes."""
    wide = torch.full((*t.shape[:-1], t.size(-1) + 3), math.nan, dtype=t.dtype, device=t.device)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(t):
    return torch.stack((t, torch.full_like(t, math.nan)), dim=1)[:, 0]


@pytest.mark.parametrize("layout", [strided, transposed, every_second])
def test_any_layout_gives_the_same(layout):
    x, residual, dy, dtotal, g = randn(6, 40), randn(6, 40), randn(6, 40), randn(6, 40), gamma(40)
    plain = outputs_and_grads(norm, [x, residual, g], [dy, dtotal], "triton")
    # one at a time, so that no two strides can be mistaken for each other
    for i in range(4):
        x_, residual_, dy_, dtotal_ = (layout(t) if i == j else t for j, t in enumerate((x, residual, dy, dtotal)))
        other = outputs_and_grads(norm, [x_, residual_, g], [dy_, dtotal_], "triton")
        torch.testing.assert_close(other, plain)  # on a GPU a row's sum may be taken in another order
    y, dh, g, f = randn(6, 64), randn(6, 32), gamma(30), our_swiglu(30, True)
    plain = outputs_and_grads(f, [y, g], [dh], "triton")
    other = outputs_and_grads(f, [layout(y), layout(torch.stack((g, g)))[0]], [layout(dh)], "triton")
    torch.testing.assert_close(other, plain)


def test_a_gradient_that_is_one_number_in_every_place():
    """As sum().backward() gives: all strides are 0."""
    x = randn(4, 24).requires_grad_()
    with backend("triton"):
        ours, = torch.autograd.grad(rms_norm(x, EPS).sum(), x)
    theirs, = torch.autograd.grad(rms_norm(x, EPS).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("width", [None, 4, 12])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_of_groups(width, with_residual, launched):
    inputs = [randn(2, 3, 12), randn(2, 3, 12) if with_residual else None, None if width is None else gamma(width)]
    douts = [randn(2, 3, 12) for _ in range(1 + with_residual)]

    def f(x, residual, gamma):
        return rms_norm(x, EPS, gamma, residual, group=4)
    for ours, theirs in zip(*(outputs_and_grads(f, inputs, douts, way) for way in ("triton", "torch"))):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert bool(launched) == (width != 12)  # a γ that differs between the groups is the twin's


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_row_and_zeros_survive(dtype):
    x, dy, g = randn(5, 40, dtype=dtype), randn(5, 40, dtype=dtype), gamma(40)
    x[1, 3], x[2, 0], x[3] = math.nan, math.inf, 0
    y, dx, _ = outputs_and_grads(norm, [x, None, g], [dy], "triton")
    for t in (y, dx):
        assert t[[0, 3, 4]].isfinite().all() and not t[1].isfinite().any() and not t[2].isfinite().all()
    assert (y[3] == 0).all() and (dx[3] != 0).any()

    y, dh = randn(5, 96, dtype=dtype), randn(5, 48, dtype=dtype)
    y[1, 3], y[2, 50], y[3] = math.nan, math.inf, 0
    y[:, 40:48], y[:, 88:], dh[:, 40:] = math.nan, math.nan, math.nan  # after n: not part of the function
    h, dy, *_ = outputs_and_grads(our_swiglu(40, True), [y, g], [dh], "triton")
    for t in (h, dy):
        assert t[[0, 3, 4]].isfinite().all() and not t[1].isfinite().all() and not t[2].isfinite().all()
    assert (h[3] == 0).all() and (h[:, 40:] == 0).all() and (dy[:, 40:48] == 0).all() and (dy[:, 88:] == 0).all()
    h, dy = outputs_and_grads(our_swiglu(40, False), [y, None], [dh], "triton")
    assert h.isfinite().sum() == h.numel() - 2 and dy.isfinite().sum() >= dy.numel() - 4


def test_without_eps_the_lanes_after_the_last_row_leave_dgamma_alone():
    x, y, g = randn(3, 40), randn(3, 80), gamma(40)
    *_, dgamma = outputs_and_grads(lambda x, g: rms_norm(x, 0.0, g), [x, g], [x], "triton")
    assert dgamma.isfinite().all()
    *_, dgamma = outputs_and_grads(lambda y, g: swiglu(y, 40, 0.0, True, g), [y, g], [x], "triton")
    assert dgamma.isfinite().all()


def assert_repeats_and_writes_over_nothing(f, inputs, douts):
    before = [t.clone() for t in (*inputs, *douts)]
    first = outputs_and_grads(f, inputs, douts, "triton")
    assert all(map(torch.equal, before, (*inputs, *douts)))
    assert all(map(torch.equal, first, outputs_and_grads(f, inputs, douts, "triton")))
    addresses = {t.data_ptr() for t in (*inputs, *douts)}
    assert not any(t.data_ptr() in addresses for t in first)


def test_inputs_and_arriving_gradients_are_left_as_they_were_and_runs_repeat_bit_for_bit():
    assert_repeats_and_writes_over_nothing(norm, [randn(200, 40), randn(200, 40), gamma(40)],
                                           [randn(200, 40), randn(200, 40)])
    assert_repeats_and_writes_over_nothing(our_swiglu(30, True), [randn(200, 64), gamma(30)], [randn(200, 32)])


def test_what_goes_to_the_twin(launched):
    x, per_row = randn(3, 8), torch.rand(3, 8, device=DEVICE)
    for way in ("torch", "triton"):
        with backend(way):
            rms_norm(x.double(), EPS)
            rms_norm(x, EPS, per_row)
            rms_norm(x, EPS, gamma(1))
            rms_norm(x, EPS, residual=x.half())
            rms_norm(randn(1, kernels.WIDEST + 1), EPS)
            swiglu(x, 4, EPS, True, per_row[:, :4])
            swiglu(x.double(), 4)
    with backend("torch"):
        rms_norm(x, EPS)
        swiglu(x, 4)
    assert launched == []
    rms_norm(x, EPS)
    assert launched == ["_rms_norm_kernel"] * GPU


def test_backend_refuses_what_it_cannot_do(monkeypatch):
    with pytest.raises(ValueError, match="there are: auto, torch, triton"), backend("cuda"):
        pass
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), backend("triton"):
        rms_norm(torch.randn(2, 4), EPS)
    rms_norm(torch.randn(2, 4), EPS)
    monkeypatch.setattr(kernels, "triton", None)
    with pytest.raises(RuntimeError, match="not installed"), backend("triton"):
        pass


@pytest.mark.parametrize("with_gamma", [False, True])
def test_opcheck(with_gamma):
    x, residual, g = randn(3, 10).requires_grad_(), randn(3, 10).requires_grad_(), None
    if with_gamma:
        g = gamma(10).requires_grad_()
    torch.library.opcheck(kernels._rms_norm, (x, residual, g, EPS))
    torch.library.opcheck(kernels._rms_norm, (x, None, g, EPS))
    d = randn(3, 10)
    g = g if g is None else g.detach()
    torch.library.opcheck(kernels._rms_norm_backward, (d, x.detach(), g, d, EPS))
    y, h = randn(3, 24).requires_grad_(), randn(3, 12)
    g = gamma(10).requires_grad_() if with_gamma else None
    torch.library.opcheck(kernels._swiglu, (y, 10, EPS, with_gamma, g))
    g = g if g is None else g.detach()
    torch.library.opcheck(kernels._swiglu_backward, (h, y.detach(), 10, EPS, with_gamma, g))


def everything(x, residual, g, y):
    a, total = rms_norm(x, EPS, g, residual)
    b, _ = rms_norm(a, EPS, residual=total)  # a sum that goes nowhere, as after the last block
    return a.square().sum() + b.pow(3).sum() + swiglu(y, 10, EPS, True, g[:10]).square().sum()


@pytest.mark.parametrize("way", ["triton", "torch"])
def test_compiled_without_graph_breaks_is_eager(way):
    inputs = [t.requires_grad_() for t in (randn(3, 12), randn(3, 12), gamma(12), randn(3, 24))]
    with backend(way):
        eager = everything(*inputs)
        compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(*inputs)
        assert torch.equal(eager, compiled)
        assert all(map(torch.equal, torch.autograd.grad(eager, inputs), torch.autograd.grad(compiled, inputs)))


@pytest.mark.parametrize("name,flags", [("baseline", []), ("unified", []), ("gemma_unified", []), ("norm", []),
                                        ("unified", ["--n_experts=4", "--expert_dim=12"])])
def test_a_model_with_kernels_is_the_model_without(name, flags, launched):
    from configurator import configure
    from model import GPT
    from settings import Settings, gpt_config
    small = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--vocab_size=31"]
    config = gpt_config(configure(Settings, [str(ROOT / "config" / f"{name}.py"), *small, *flags])[0])
    model = shake(GPT(config)).to(DEVICE)
    idx, targets = torch.randint(0, 31, (2, 2, 8), device=DEVICE)
    results = {}
    for way in ("torch", "triton"):
        with backend(way):
            _, loss = model(idx, targets)
            results[way] = [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]
    assert {"_rms_norm_kernel", "_rms_norm_backward_kernel"} <= {*launched}  # before the LM head, at least
    assert flags or {"_swiglu_kernel", "_swiglu_backward_kernel"} <= {*launched}  # experts have a γ for each row
    for ours, theirs in zip(results["triton"], results["torch"]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_torch_compile_gets_the_plain_norm_unless_triton_is_asked_for(monkeypatch):
    x = SimpleNamespace(dtype=torch.float32, is_cuda=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels._use_triton(x) and not kernels._use_triton(x, left_to_compile=True)
    with kernels.backend("triton"):
        assert kernels._use_triton(x, left_to_compile=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    assert kernels._use_triton(x, left_to_compile=True)
