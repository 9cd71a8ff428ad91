"""norms.py and the plain twins of kernels.py, against float64 and against each other."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kernels import rms_norm, scaled_cast, swiglu
from norms import Branches, ScaleVector
from settings import FORMS, PLACEMENTS


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def naive_rms_norm(x, eps, gamma=None):
    y = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return y if gamma is None else y * gamma


def against_float64(ours, naive, inputs, dy, dtype, roundings):
    """
    ours is naive, in its output and in every gradient: at most twice as far from float64 as naive done in the low
    precision throughout, and a few roundings.
    """
    def results(f, inputs):
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        y = f(*inputs)
        return [y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))]
    exact = results(naive, [t.double() for t in inputs])
    plain = results(naive, [t.to(dtype) for t in inputs])
    for o, p, e in zip(results(ours, inputs), plain, exact, strict=True):
        assert o.shape == e.shape
        if e.numel():
            allowed = 2 * (p.double() - e).abs().max() + roundings * torch.finfo(dtype).eps * max(1, e.abs().max())
            assert (o.double() - e).abs().max() <= allowed
    assert ours(*inputs).dtype == dtype


@pytest.mark.parametrize("shape", [(4, 7, 64), (3, 1), (1, 257), (0, 8)])
@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_against_float64(shape, with_gamma, dtype):
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    gamma = torch.rand(shape[-1], dtype=torch.promote_types(dtype, torch.float32)) + 0.5
    inputs = (x, gamma) if with_gamma else (x,)
    against_float64(lambda x, g=None: rms_norm(x, 1e-6, g), lambda x, g=None: naive_rms_norm(x, 1e-6, g), inputs, dy,
                    dtype, roundings=4)


def test_rms_norm_second_derivative():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: rms_norm(x, 1e-3), x)


def test_rms_norm_keeps_nan_and_inf_in_their_row_and_survives_a_row_of_zeros():
    x = torch.randn(4, 8)
    x[1, 3], x[2, 0], x[3] = math.nan, math.inf, 0
    y = rms_norm(x, 1e-6)
    assert y[0].isfinite().all() and y[1].isnan().all() and y[2, 0].isnan() and (y[3] == 0).all()


# rows: none, one, more than a block of them; the padding, and what lies in it, is no part of the function
@pytest.mark.parametrize("rows", [0, 1, 600])
@pytest.mark.parametrize("n,m", [(13, 16), (16, 16)])
@pytest.mark.parametrize("with_gamma", [None, "shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_normed_swiglu_against_float64(rows, n, m, with_gamma, dtype):
    y, dh = torch.randn(rows, 2 * m).to(dtype), torch.randn(rows, m).to(dtype)
    shape = {"shared": (n,), "own": (rows, n)}.get(with_gamma)
    inputs = [y, *([] if shape is None else [torch.rand(shape, dtype=torch.promote_types(dtype, torch.float32)) + 0.5])]

    def naive(y, gamma=None):
        gate, up = naive_rms_norm(y[:, :n], 1e-6, gamma), naive_rms_norm(y[:, m:m + n], 1e-6)
        return F.pad(gate * gate.sigmoid() * up, (0, m - n))

    against_float64(lambda y, gamma=None: swiglu(y, n, 1e-6, True, gamma), naive, inputs, dh, dtype, roundings=16)


def test_scaled_cast_rounds_once():
    w, u, v = torch.randn(33, 17), torch.rand(33) + 0.5, torch.rand(17) + 0.5
    exact = (u.double()[:, None] * w.double() * v.double()).to(torch.bfloat16)
    twice = (w * v).to(torch.bfloat16) * u.to(torch.bfloat16)[:, None]
    ours = scaled_cast([w], [u], [v], torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert (ours != exact).float().mean() < 0.01 < (twice != exact).float().mean()


FORMULAS = {
    "direct": lambda p: p["gamma"],
    "zero_centred": lambda p: 1 + p["w"],
    "product": lambda p: p["beta"] * p["alpha"],
    "or": lambda p: p["beta"] * 7 ** 0.5 * p["alpha"] / p["alpha"].square().sum().sqrt(),
    "er": lambda p: math.exp(p["beta"]) * (p["alpha"] - p["alpha"].sum() / 7).exp(),
}


@pytest.mark.parametrize("form", FORMULAS)
def test_scale_vector_formulas(form):
    s = ScaleVector(7, "input", form).double()
    with torch.no_grad():
        for p in s.parameters():
            p.copy_(torch.rand_like(p) + 0.3)
    assert torch.allclose(s(), FORMULAS[form]({name: p.detach() for name, p in s.named_parameters()}), atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_decays_says_which_parameters_move_gamma_when_they_shrink(form):
    s = ScaleVector(5, "output", form).double()
    with torch.no_grad():
        for p in s.parameters():
            p.copy_(torch.rand_like(p) + 0.3)
    before = s().detach().clone()
    for name, p in s.named_parameters():
        old = p.detach().clone()
        with torch.no_grad():
            p.mul_(0.5)
        moved = not torch.allclose(s(), before, atol=1e-12)
        assert moved == s.decays(name), name
        with torch.no_grad():
            p.copy_(old)


@pytest.mark.parametrize("kw, free", [
    (dict(placement="dual_norm"), []), (dict(placement="norm"), []), (dict(placement="dual"), ["shared"]),
    (dict(placement=dict(q="dual_norm", k="dual")), ["shared"]),
    (dict(placement=dict(q="dual_norm", k="dual"), heterogeneous=True), ["k"])])
@pytest.mark.parametrize("form", FORMS)
def test_only_a_vector_whose_length_matters_has_a_magnitude(form, kw, free):
    b = Branches(5, {"q": 4, "k": 6}, form=form, **kw)
    beta = [name.split(".")[1] for name, _ in b.named_parameters() if name.startswith("v.") and name.endswith(".beta")]
    assert beta == (free if form in ("or", "er", "product") else [])
    gamma = torch.arange(1.0, 6.0)
    for c, v in b.v.items():
        v.set(gamma)
        length = 1.0 if form not in ("or", "er") or c in free else (gamma / v())[0]
        torch.testing.assert_close(length * v(), gamma)


def test_unknown_form_role_and_placement_are_refused():
    with pytest.raises(ValueError, match="form"):
        ScaleVector(4, "input", "exotic")
    with pytest.raises(ValueError, match="role"):
        ScaleVector(4, "inside")
    with pytest.raises(ValueError, match="placement"):
        Branches(4, {"q": 4}, placement="triple")


def randomised(branches):
    with torch.no_grad():
        for p in branches.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + (1.0 if p.ndim < 2 else 0.0))
    return branches


@pytest.mark.parametrize("form,placement,heterogeneous", list(itertools.product(FORMS, PLACEMENTS, (False, True))))
def test_branches_are_the_formulas_of_the_paper(form, placement, heterogeneous):
    """Written a second time, one branch after the other and on activations, as the table in norms.py reads."""
    n_in, n_out, group = 6, {"q": 8, "k": 4}, 4
    b = randomised(Branches(n_in, n_out, placement, heterogeneous, form, group=group).double())
    h = torch.randn(3, 5, n_in, dtype=torch.float64)
    for y, c in zip(b(h), n_out):
        v = 1.0 if placement == "after" else b.v[c if heterogeneous else "shared"]()
        expected = (h * v) @ b.weight[c].T
        if placement in ("dual_norm", "norm"):
            heads = expected.unflatten(-1, (-1, group))
            expected = naive_rms_norm(heads, 1e-16).flatten(-2)
        if placement in ("after", "dual", "dual_norm"):
            expected = expected * b.u[c]()
        assert torch.allclose(y, expected, atol=1e-12)
    assert len(b.v) == (0 if placement == "after" else 2 if heterogeneous else 1)
    assert len(b.u) == (2 if placement in ("after", "dual", "dual_norm") else 0)


def test_the_fold_rounds_no_worse_than_scaling_activations_in_bf16():
    b = randomised(Branches(256, {"q": 256, "k": 128}, "dual", heterogeneous=True))
    h = torch.randn(64, 256).to(torch.bfloat16)
    exact = torch.cat(b.double()(h.double()), dim=-1)
    b.float()
    folded, written = F.linear(h, b.folded_weight(torch.bfloat16)), torch.cat(b(h), dim=-1)
    assert (folded.double() - exact).norm() < 1.1 * (written.double() - exact).norm()
