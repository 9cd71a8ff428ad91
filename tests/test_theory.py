"""
The paper's theory as statements that run, on the project's own ScaleVector and Branches, in float64.

Theorem numbers are those of arXiv 2605.26895, v1; what has none is derived here. Notation: a branch computes W̃ h with
W̃ = diag(u) W diag(v), and G is ∂L/∂W̃; w_j, w̃_j, G_j are columns. results/theory.py has the paper's setting, its
gradient flow and the picture of these theorems.
"""

import copy
import math
import sys

import pytest
import torch
from conftest import ROOT

from kernels import rms_norm
from norms import Branches, ScaleVector

sys.path.insert(0, str(ROOT / "results"))
import theory
from theory import at_same_state, effective, flow, rate, student

N_IN, N_OUT = 5, {"a": 3, "b": 4}
TEACHERS = theory.teachers()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def branches_of(n_in=N_IN, n_out=N_OUT, **kw):
    """Branches in float64 with W ~ N(0, 1)/√n_in and γ around 1, no two alike."""
    b = Branches(n_in, n_out, eps=0.0, **kw).double()
    with torch.no_grad():
        for name, p in b.named_parameters():
            p.normal_(0, n_in**-0.5) if name.startswith("weight") else p.normal_(1, 0.3)
    return b


def regression(b, n=64):
    """A loss in W̃ that is not quadratic, E log cosh(W̃ h − t) over fixed h and t, and h."""
    h = torch.randn(n, b.weight["a"].size(1), dtype=torch.float64)
    t = torch.randn(n, sum(b.n_out.values()), dtype=torch.float64)
    return lambda out: torch.log(torch.cosh(out - t)).sum(-1).mean(), h


def speed(module, loss, observe, dt=1e-6):
    """d observe(module)/dt under gradient flow: one step of SGD over its length."""
    module = copy.deepcopy(module)
    before = observe(module).detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=dt)
    loss(module).backward()
    optimizer.step()
    return (observe(module).detach() - before) / dt


# ---------------------------------------------------------------------------------------------------------------
# Theorem 2.2: γ speeds up the flow. Column j of W̃ moves by −P_j G_j with P_j = γ_j² I + w_j w_jᵀ, whose eigenvalues
# are γ_j² and γ_j² + ‖w_j‖². A γ of its own gives each branch its own P_j; a shared one couples the branches.


@pytest.mark.parametrize("heterogeneous", [False, True])
def test_gamma_preconditions_each_column(heterogeneous):
    b = branches_of(heterogeneous=heterogeneous)
    w = torch.cat([*b.weight.values()]).detach()
    gamma = torch.cat([v.expand(N_OUT[c], -1) for c, _, v in b.vectors()]).detach()
    coupled = torch.block_diag(*(torch.ones(n, n) for n in N_OUT.values())) if heterogeneous else torch.ones(7, 7)
    for j in range(N_IN):
        P = torch.diag(gamma[:, j]**2) + torch.outer(w[:, j], w[:, j]) * coupled
        # for L = −W̃_ij the speed of w̃_j is column i of P_j
        measured = torch.stack([speed(b, lambda m: -effective(m)[i, j], effective)[:, j] for i in range(7)], dim=1)
        assert (measured - P).abs().max() < 1e-5


def test_with_gamma_the_loss_is_lower_at_all_times():
    teacher = TEACHERS["any"].clone()
    teacher[:, 0] = 0  # a column of zeros stays one, and gives no lead
    plain, scaled = student("plain"), student("gamma")
    without, with_it = (flow(branch, teacher, 4.0, 400) for branch in (plain, scaled))
    for i, value in enumerate(without):
        assert value == pytest.approx(teacher.square().sum().item() / 2 * math.exp(-2 * i / 100), rel=1e-6)
    assert all(a < b for a, b in zip(with_it[1:], without[1:]))
    squares = scaled.v["shared"]().square() - scaled.weight["w"].square().sum(0)
    assert (squares - 1).abs().max() < 1e-6 and scaled.weight["w"].square().sum(0).max() > 0.5  # γ_j² − ‖w_j‖² is kept


# ---------------------------------------------------------------------------------------------------------------
# Theorem 2.3: decay on γ keeps E‖γ‖² bounded, and with it the loss's sharpness.


def test_the_hessian_of_a_scalar_output():
    gamma, w, target = torch.randn(3, 4, dtype=torch.float64)
    f = lambda w, gamma: (gamma * w - target).square().sum() / 2
    blocks = torch.autograd.functional.hessian(f, (w, gamma))
    H = torch.cat([torch.cat(row, 1) for row in blocks])
    off = 2 * gamma * w - target
    root = ((gamma**2 - w**2)**2 + 4 * off**2).sqrt()
    eigenvalues = torch.cat([(gamma**2 + w**2 + root) / 2, (gamma**2 + w**2 - root) / 2])
    assert torch.allclose(torch.linalg.eigvalsh(H), eigenvalues.sort().values)
    assert torch.isclose(H.trace(), (gamma**2 + w**2).sum())
    assert torch.isclose(H.square().sum(), (gamma**4 + w**4 + 2 * off**2).sum())


def test_decay_on_gamma_bounds_it_and_no_decay_does_not(lam=0.2, q=0.5, d=4, end=80, steps=1600):
    bound = lambda decay, t, start: start * math.exp(-2 * decay * t) + (d * q + d / 2) / (2 * decay) * (
        1 - math.exp(-2 * decay * t))  # of the proof, for w and for γ: a* = 1, so ‖a*‖² = d
    (free, w), (decayed, _) = (theory.gammas_under_noise(mu, end, steps, lam, q) for mu in (0.0, lam))
    assert all(value < 1.02 * bound(lam, end * i / steps, d) for i, value in enumerate(decayed))
    assert all(value <= 1.02 * bound(lam, end * i / steps, 0) for i, value in enumerate(w))
    assert free[steps // 4] > 20 and all(free[n] > 1.3 * free[n // 2] for n in (steps // 4, steps // 2, steps))
    integral = (sum(w) - (w[0] + w[-1]) / 2) * end / steps  # Itô: γ² − w² grows only by 2 λ w², in expectation
    assert free[-1] - w[-1] == pytest.approx(d + 2 * lam * integral, rel=0.03)


# ---------------------------------------------------------------------------------------------------------------
# Theorems 3.1 and D.1 (DP), 3.2 and D.2 (OR), three claims each: against a plain γ, (i) at the same effective weight
# the loss never falls slower, (ii) from the start the lead grows as t³, (iii) for some teachers it holds at all times.
# Claim (i) is not true of every state, as the text before the proof may sound: it takes |u_i| ≥ 1, or |β| ≥ 1 with
# ‖α‖² = d. The flow from the start keeps both, since u_i² − ‖W_i‖² and β² − ‖W‖² stay 1.


@pytest.mark.parametrize("kind", ["DP", "OR"])
def test_at_the_same_state_the_loss_falls_faster(kind):
    b = student(kind)
    leads = flow(b, TEACHERS["any"], 1.0, 100, lambda *state: rate(*state) - rate(at_same_state(b), TEACHERS["any"]))
    assert abs(leads[0]) < 1e-12 and all(lead > 0 for lead in leads[1:])
    rows = b.weight["w"].square().sum(1)
    kept = b.u["w"]()**2 - rows if kind == "DP" else b.v["shared"].beta**2 - rows.sum()
    assert (kept - 1).abs().max() < 1e-6 and rows.min() > 0.1
    with torch.no_grad():  # a state that the flow does not come to; for OR one where magnitude has hardly a gradient
        b.u["w"].set(0.1 * b.u["w"]()) if kind == "DP" else b.v["shared"].set(torch.full((8,), 0.1))
        columns = TEACHERS["any"] / TEACHERS["any"].square().sum(0)
        b.weight["w"].copy_(columns * torch.tensor([1.0, -1.0] + 6 * [0.0]))
    assert rate(b, TEACHERS["any"]) < rate(at_same_state(b), TEACHERS["any"]) - 0.1


@pytest.mark.parametrize("kind", ["DP", "OR"])
def test_the_early_lead_grows_as_derived(kind):
    def relative(t):
        plain, ours = (flow(student(k), TEACHERS["any"], t, 20)[-1] for k in ("gamma", kind))
        return (plain - ours) / (theory.cubic(kind, TEACHERS["any"]) * t**3)
    assert 2 * relative(0.002) - relative(0.004) == pytest.approx(1, abs=1e-3)  # the error is of the order of t
    assert relative(0.002) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind, teacher", [("DP", "matching"), ("OR", "balanced")])
def test_the_lead_lasts_for_some_teachers(kind, teacher):
    plain, ours = (flow(student(k), TEACHERS[teacher], 3.0, 300) for k in ("gamma", kind))
    assert all(a < b for a, b in zip(ours[1:], plain[1:]))


# DP preconditions columns and rows: dW̃_ij/dt = −[u_i² v_j² G_ij + W̃_ij (⟨w̃_j, G_j⟩/v_j² + ⟨w̃^i, G^i⟩/u_i²)], where
# w̃^i and G^i are rows.


def test_dual_placement_preconditions_rows_and_columns():
    b = branches_of(n_out={"a": 4}, placement="dual")
    loss, h = regression(b)
    W = effective(b).detach().requires_grad_()
    G, = torch.autograd.grad(loss(h @ W.T), W)
    W = W.detach()
    u, v = b.u["a"]()[:, None].detach(), b.v["shared"]().detach()
    rate = -(u**2 * v**2 * G + W * ((W * G).sum(0) / v**2 + (W * G).sum(1, keepdim=True) / u**2))
    assert (speed(b, lambda m: loss(m(h)[0]), effective) - rate).abs().max() < 1e-5


# ⟨u,∂u⟩ = ⟨v,∂v⟩ = ⟨W,∂W⟩ for each branch of DP, so that ‖u‖², ‖v‖² and ‖W‖² grow alike. A shared v gets the sum.


@pytest.mark.parametrize("heterogeneous", [False, True])
def test_dual_placement_balances_its_three_factors(heterogeneous):
    b = branches_of(placement="dual", heterogeneous=heterogeneous)
    loss, h = regression(b)
    loss(torch.cat(b(h), -1)).backward()
    dot = lambda p: (p * p.grad).sum().item()
    w = {c: dot(b.weight[c]) for c in N_OUT}
    assert all(abs(x) > 1e-3 for x in w.values())
    assert {c: dot(b.u[c].gamma) for c in N_OUT} == pytest.approx(w)
    if heterogeneous:
        assert {c: dot(b.v[c].gamma) for c in N_OUT} == pytest.approx(w)
    else:
        assert dot(b.v["shared"].gamma) == pytest.approx(sum(w.values()))


# ---------------------------------------------------------------------------------------------------------------
# OR moves γ's magnitude n times faster and its direction as before (at init). ER does so too; product, OR without its
# norm, has n + 1. A shorter α turns faster: γ's direction moves at a speed of n/‖α‖², its magnitude as before. So decay
# on α leaves γ unchanged but raises α's effective learning rate.


@pytest.mark.parametrize("form, n_fold, length", [("direct", 1, 1), ("zero_centred", 1, 1), ("er", 6, 1),
                                                  ("product", 7, 1), ("or", 6, 1), ("or", 6, 0.5), ("or", 6, 2)])
def test_reparameterisation_speeds_up_the_magnitude_and_a_shorter_alpha_the_direction(form, n_fold, length, n=6):
    scale = ScaleVector(n, "input", form).double()
    if form == "or":
        scale.alpha.data.mul_(length)
    P = torch.stack([speed(scale, lambda m: -m()[i], lambda m: m()) for i in range(n)], dim=1)
    magnitude = torch.full((n, n), 1 / n, dtype=torch.float64)  # the projection on (1, …, 1)
    assert (P - n_fold * magnitude - (torch.eye(n) - magnitude) / length**2).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------
# N does not see the length of its input. So under DNP the Pre-Norm is idle, and so is the magnitude of v: without ε its
# gradient is 0, and with ε it is of the order of ε.


@pytest.mark.parametrize("placement, idle", [("dual_norm", True), ("norm", True), ("dual", False), ("input", False)])
@pytest.mark.parametrize("heterogeneous", [False, True])
def test_the_pre_norm_is_idle_where_every_branch_norms_its_output(placement, idle, heterogeneous):
    b = branches_of(placement=placement, heterogeneous=heterogeneous, form="or")
    x = torch.randn(7, N_IN, dtype=torch.float64, requires_grad=True)
    target = torch.randn(7, sum(N_OUT.values()), dtype=torch.float64)
    results = []
    for h in (rms_norm(x, 0.0), x):
        grads = torch.autograd.grad((torch.cat(b(h), -1) * target).sum(), [x, *b.parameters()])
        results.append([torch.cat(b(h), -1), *grads])
    same = [torch.allclose(with_it, without, atol=1e-10) for with_it, without in zip(*results)]
    assert b.idle_norm == idle and all(same) == idle


@pytest.mark.parametrize("eps", [0.0, 1e-3, 2e-3])
def test_the_magnitude_of_v_is_idle_under_dnp(eps):
    b = branches_of(placement="dual_norm", form="or")
    b.v["shared"], b.eps = ScaleVector(N_IN, "input", "or").double(), eps
    x, target = torch.randn(7, N_IN, dtype=torch.float64), torch.randn(7, sum(N_OUT.values()), dtype=torch.float64)
    (torch.cat(b(x), -1) * target).sum().backward()
    gradient, others = b.v["shared"].beta.grad.abs().item(), b.v["shared"].alpha.grad.abs().max().item()
    assert others > 1e-2
    assert gradient < 1e-12 if eps == 0 else 0 < gradient < 2 * eps * others / 1e-2


@pytest.mark.parametrize("dtype, free, moves", [(torch.float32, True, True), (torch.float64, True, False),
                                                (torch.float32, False, False)])
def test_adamw_would_make_steps_of_the_rounding_noise_in_an_idle_magnitudes_gradient(dtype, free, moves):
    torch.manual_seed(0)
    b = Branches(32, {"w": 32}, placement="dual_norm", form="or").to(dtype)
    if free:
        b.v["shared"] = ScaleVector(32, "input", "or").to(dtype)
    b.weight["w"].data.normal_()
    optimizer = torch.optim.AdamW(b.parameters(), 1e-2, (0.9, 0.95), weight_decay=0.0)
    for _ in range(100):
        x, y = torch.randn(2, 256, 32, dtype=dtype)
        (b(x)[0] - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (abs(b.v["shared"].beta.item() - 1) > 0.02) == moves


# ---------------------------------------------------------------------------------------------------------------
# The picture


def test_the_picture_is_drawn_in_both_themes(tmp_path):
    theory.main(tmp_path, steps=3)
    for theme, (paper, *_) in theory.THEMES.items():
        text = (tmp_path / f"theory_{theme}.svg").read_text(encoding="utf-8")
        assert paper in text and all(t.split("\n")[0] in text.replace("&#x27;", "'") for t in theory.TITLES.values())
