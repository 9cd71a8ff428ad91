"""
kernels.py's scaled_cast and qk_norm_rope, before and after a GEMM. qk_norm_rope is tested as a Triton kernel; what
test_kernels.py says of the interpreter holds here, too.
"""

import math

import pytest
import torch
from test_kernels import (
    DEVICE,
    DTYPES,
    EPS,
    GPU,
    against_float64,
    assert_repeats_and_writes_over_nothing,
    gamma,
    launched,
    outputs_and_grads,
    pytestmark,
    randn,
    seed,
    strided,
)
from test_model import UNIFIED, loss_and_gradients, shake, tiny
from test_norms import naive_rms_norm

import kernels
from kernels import backend, qk_norm_rope, scaled_cast
from model import rope_tables

ROPE = ["_qk_norm_rope_kernel", "_qk_norm_rope_backward_kernel"]


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is NaN, so that nothing a kernel leaves out can be a zero by luck."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def vector(*shape):
    return torch.rand(shape, device=DEVICE) + 0.5


# -- scaled_cast ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("lead,ns,k", [((), (37, 70), 45), ((), (1, 33), 130), ((), (8, 16), 16), ((3,), (9, 40), 10),
                                       ((2, 2), (3, 5), 4), ((), (0, 3), 5), ((), (2, 3), 0)])
@pytest.mark.parametrize("pattern", [("", ""), ("v", "v"), ("uv", "uv"), ("u", "v")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_cast_branch_by_branch(lead, ns, k, pattern, dtype):
    """Its gradients are autograd's own. pattern: which branch has a u and a v."""
    weights = [randn(*lead, n, k) for n in ns]
    us, vs = ([vector(*lead, size) if name in word else None for word, size in zip(pattern, sizes)]
              for name, sizes in (("u", ns), ("v", (k, k))))
    out, first = scaled_cast(weights, us, vs, dtype, 8, 4), 0
    assert out.dtype == dtype
    for w, u, v in zip(weights, us, vs):
        w = w if v is None else torch.einsum("...nk,...k->...nk", w, v)
        w = w if u is None else torch.einsum("...nk,...n->...nk", w, u)
        rows = out[..., first:first + w.size(-2) + -w.size(-2) % 8, :]
        torch.testing.assert_close(rows[..., :w.size(-2), :k], w.to(dtype))
        assert rows.count_nonzero() == rows[..., :w.size(-2), :k].count_nonzero()  # the rest is padding
        first += rows.size(-2)
    assert out.shape == (*lead, first, k + -k % 4)


def test_a_weight_with_nothing_to_do_is_itself():
    w = randn(8, 16)
    assert scaled_cast([w], [None], [None], torch.float32, 8, 8) is w


# -- qk_norm_rope -----------------------------------------------------------------------------------------------------

def naive_heads(cos, sin, n_head, n_kv_head, normed):
    d = 2 * cos.size(-1)

    def f(y, *gammas):
        out = []
        sizes = [n_head, n_kv_head, n_kv_head]
        for c, x, g in zip("qkv", y.split([n * d for n in sizes], -1), (*gammas, None, None, None)[:2] + (None,)):
            x = x.unflatten(-1, (-1, d))
            if c in normed:
                x = naive_rms_norm(x, EPS, None if g is None else g.view(-1, d))
            if c != "v":
                angles = [torch.cat((t, t), -1).unsqueeze(1).to(x.dtype) for t in (cos, sin)]
                x = x * angles[0] + torch.cat((-x[..., d // 2:], x[..., :d // 2]), -1) * angles[1]
            out.append(x)
        return tuple(out)
    return f


def our_heads(cos, sin, n_head, n_kv_head, normed):
    return lambda y, *gammas: qk_norm_rope(y, cos, sin, n_head, n_kv_head, EPS, normed, (*gammas, None, None)[:2],
                                           2 * cos.size(-1))


def tables(T, d, start=3):
    cos, sin = rope_tables(d, start + T, 10000.0)
    return cos[start:].to(DEVICE), sin[start:].to(DEVICE)


def heads(B, T, d, n_head, n_kv_head, normed="", gammas="--", dtype=torch.float32):
    """(ours, naive), their inputs and gradients that arrive. gammas: of q and k: none (-), shared (1) or own (n)."""
    args = *tables(T, d), n_head, n_kv_head, normed
    sizes = n_head, n_kv_head, n_kv_head
    given = [None if c == "-" else gamma(d if c == "1" else n * d) for c, n in zip(gammas, sizes[:2])]
    return (our_heads(*args), naive_heads(*args)), [randn(B, T, sum(sizes) * d, dtype=dtype), *given], [
        randn(B, T, n, d, dtype=dtype) for n in sizes]


# the norms of llama, gemma, DNP and its control, with the γ of each, and combinations that no model has
NORMS = [("", "--"), ("qk", "--"), ("qk", "11"), ("qk", "nn"), ("qkv", "--"), ("qkv", "nn"), ("qkv", "-n")]


@pytest.mark.parametrize("normed,gammas", NORMS)
@pytest.mark.parametrize("n_head,n_kv_head,d", [(3, 3, 8), (4, 2, 6), (1, 1, 2), (6, 3, 66)])  # of 66, 8 in a tile
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_against_float64(normed, gammas, n_head, n_kv_head, d, dtype, launched):
    B, T = (2, 3) if d < 66 else (1, 2)
    (f, naive), inputs, douts = heads(B, T, d, n_head, n_kv_head, normed, gammas, dtype)
    ours = against_float64(f, naive, inputs, douts, dtype)
    assert all(t.dtype == dtype for t in ours[:4]) and all(t.dtype == torch.float32 for t in ours[4:])
    assert launched == ROPE


@pytest.mark.parametrize("B,T", [(0, 3), (2, 0), (1, 1)])
def test_no_token_and_one(B, T):
    (f, naive), inputs, douts = heads(B, T, 4, 2, 1, "qkv", "nn")
    *_, dgamma = against_float64(f, naive, inputs, douts, torch.float32)
    assert (dgamma == 0).all() == (B * T == 0)


@pytest.mark.parametrize("stages", [1, 2])
def test_more_tokens_than_programs(monkeypatch, stages):
    monkeypatch.setattr(kernels, "_processors", lambda device: 1)
    monkeypatch.setitem(kernels.TUNED, "qk_norm_rope backward γ 4", {"programs": 4, "stages": stages})
    (f, naive), inputs, douts = heads(3, 7, 4, 2, 1, "qkv", "nn")
    against_float64(f, naive, inputs, douts, torch.float32)


@pytest.mark.parametrize("layout", [strided, lambda t: t.mT.contiguous().mT, lambda t: torch.stack((t, -t), 1)[:, 0],
                                    lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)])
@pytest.mark.parametrize("normed,gammas", [("", "--"), ("qkv", "n1")])
def test_qk_norm_rope_takes_any_layout(layout, normed, gammas):
    (f, _), (y, *gammas), douts = heads(2, 3, 8, 4, 2, normed, gammas)
    plain = outputs_and_grads(f, [y, *gammas], douts, "triton")
    f = our_heads(*map(strided, tables(3, 8)), 4, 2, normed)
    layouts = [g if g is None else strided(g) for g in gammas]
    other = outputs_and_grads(f, [layout(y), *layouts], [layout(d) for d in douts], "triton")
    torch.testing.assert_close(other, plain)  # on a GPU sums may be taken in another order


@pytest.mark.parametrize("normed,gammas", [("", "--"), ("qk", "nn"), ("qkv", "nn")])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_stay_in_their_head_and_zeros_survive(normed, gammas, bad):
    (f, naive), (y, *gammas), douts = heads(2, 3, 8, 3, 2, normed, gammas)
    row = y.view(2, 3, 7, 8)
    row[0, 1, 2, 5] = row[1, 2, 4, 0] = row[1, 0, 6, 3] = row[1, 1, 5, 6] = bad  # in heads of q, k, v and v
    row[0, 0] = 0
    *out, dy = outputs_and_grads(f, [y, *gammas], douts, "triton")[:4]
    out, row = torch.cat(out, 2), dy.view(2, 3, 7, 8)
    hit = torch.zeros(2, 3, 7, dtype=torch.bool, device=DEVICE)
    hit[0, 1, 2] = hit[1, 2, 4] = hit[1, 0, 6] = hit[1, 1, 5] = True
    assert (out.isfinite().all(-1) == ~hit).all() and (out[0, 0] == 0).all()
    for head in (out[1, 0, 6], out[1, 1, 5]):  # of v, which nothing turns: without a norm only one channel
        assert (~head.isfinite()).sum() == (8 if "v" in normed and math.isnan(bad) else 1)
    # a gradient depends on y only through a norm
    through = hit.clone()
    through[:, :, {"": 0, "qk": 5, "qkv": 7}[normed]:] = False
    assert (row.isfinite().all(-1) == ~through).all()


def test_an_infinite_gradient_of_v_stays_in_its_channel():
    (f, _), inputs, douts = heads(1, 2, 8, 1, 1)
    douts[2][0, 0, 0, 7] = douts[2][0, 1, 0, 2] = math.inf
    dy = outputs_and_grads(f, inputs, douts, "triton")[3]
    assert (~dy.isfinite()).sum() == 2 and dy[0, 0, 23] == dy[0, 1, 18] == math.inf


def test_a_rotation_alone_keeps_no_activations():
    (f, _), (y, *_), _ = heads(2, 3, 8, 2, 1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t), backend("triton"):
        f(y.requires_grad_())
    assert y.shape not in saved


def test_what_qk_norm_rope_leaves_to_the_twin(launched):
    (f, _), (y, *_), _ = heads(1, 2, 4, 2, 1)
    cos, sin = tables(2, 4)
    with backend("triton"):
        qk_norm_rope(y, cos, sin, 2, 1, EPS, "qkv")  # over the whole width of q, k and v
        f(y.double())
        assert ROPE[0] not in launched
        qk_norm_rope(y, cos, sin, 2, 1)
        assert ROPE[0] in launched
    launched.clear()
    f(y)
    assert launched == ROPE[:1] * GPU


def test_inputs_and_arriving_gradients_are_left_as_they_were_and_runs_repeat_bit_for_bit():
    (f, _), inputs, douts = heads(2, 9, 6, 4, 2, "qkv", "n1", torch.float16)
    assert_repeats_and_writes_over_nothing(f, inputs, douts)


def test_opcheck():
    cos, sin = tables(3, 4)
    y, g = randn(2, 3, 16).requires_grad_(), vector(3, 4).requires_grad_()
    douts = [randn(2, 3, n, 4) for n in (2, 1, 1)]
    for normed, g in ((0, None), (4, g)):
        torch.library.opcheck(kernels._qk_norm_rope, (y, cos, sin, g, 2, 1, normed, EPS))
        g = g if g is None else g.detach()
        torch.library.opcheck(kernels._qk_norm_rope_backward,
                              (*douts, y.detach() if normed else None, cos, sin, g, normed, EPS))


def test_compiled_without_graph_breaks_is_eager():
    (f, _), inputs, douts = heads(2, 9, 6, 4, 2, "qkv", "n1", torch.float16)
    eager = outputs_and_grads(f, inputs, douts, "triton")
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, eager, outputs_and_grads(compiled, inputs, douts, "triton")))


@pytest.mark.parametrize("kw", [dict(), UNIFIED, dict(arch="gemma")], ids=str)
def test_a_model_whose_heads_share_keys_is_the_same_with_and_without_kernels(kw, launched):
    model, results = shake(tiny(n_layer=1, n_kv_head=1, init_std=0.0, embedding_std=0.0, **kw)).to(DEVICE), []
    for way in ("torch", "triton"):
        with backend(way):
            results.append(loss_and_gradients(model))
    assert {*ROPE} <= {*launched}
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
