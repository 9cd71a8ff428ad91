"""
The paper's theory as statements that run, on the project's own ScaleVector, Branches and GPT, in float64.

Notation. A branch computes W̃ h with W̃ = diag(u) W diag(v). G is ∂L/∂W̃; w_j, w̃_j, G_j are columns. Gradient flow is
θ̇ = −∂L/∂θ; `flow` takes one small step of torch's SGD along it and divides by its length.
"""

import copy
import math

import pytest
import torch

from kernels import rms_norm
from model import GPT
from norms import Branches, ScaleVector
from optim import param_groups
from settings import GPTConfig

N_IN, N_OUT = 5, {"a": 3, "b": 4}


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


def effective(b):
    """W̃ of every branch, (sum of n_out, n_in): what the branches make of the unit vectors."""
    return torch.cat(b(torch.eye(b.weight["a"].size(1), dtype=torch.float64)), dim=-1).T


def regression(b, n=64):
    """A loss in W̃ that is not quadratic: E log cosh(W̃ h − t) over fixed h and t."""
    h = torch.randn(n, b.weight["a"].size(1), dtype=torch.float64)
    t = torch.randn(n, sum(b.n_out.values()), dtype=torch.float64)
    return lambda out: torch.log(torch.cosh(out - t)).sum(-1).mean(), h


def gradient(loss, h, w):
    """∂L/∂W̃ at W̃ = w."""
    w = w.detach().requires_grad_()
    return torch.autograd.grad(loss(h @ w.T), w)[0]


def flow(module, loss, observe, dt=1e-6):
    """d observe(module)/dt under gradient flow: one step of SGD, as training takes it, over its length."""
    module = copy.deepcopy(module)
    before = observe(module).detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=dt)
    loss(module).backward()
    optimizer.step()
    return (observe(module).detach() - before) / dt


def preconditioner(b, j):
    """P_j as the code has it, (n, n): the speed of w̃_j for L = −W̃_ij, one column of P_j for each i."""
    n = sum(b.n_out.values())
    return torch.stack([flow(b, lambda m: -effective(m)[i, j], effective)[:, j] for i in range(n)], dim=1)


# ---------------------------------------------------------------------------------------------------------------
# Theorem: in a Pre-Norm net γ adds no expressivity. W̃ in W's place, without any γ, is the same function.


@pytest.mark.parametrize("heterogeneous", [False, True])
@pytest.mark.parametrize("placement", ["input", "dual"])
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_folding_scale_vectors_leaves_the_function_unchanged(arch, placement, heterogeneous):
    shape = dict(arch=arch, n_layer=2, n_head=2, n_embd=8, vocab_size=11, block_size=6, dtype="float64")
    model = GPT(GPTConfig(**shape, placement=placement, heterogeneous=heterogeneous)).double()
    with torch.no_grad():
        for _, p, role, _ in model.named_roles():
            p.normal_(*((0, 0.3) if role in ("matrix", "embedding") else (1, 0.5)))
    folded = copy.deepcopy(model)
    with torch.no_grad():
        for m in folded.modules():
            if isinstance(m, Branches):
                for c, u, v in list(m.vectors()):
                    m.weight[c].mul_(1 if v is None else v).mul_(1 if u is None else u[:, None])
                for gamma in (*m.u.values(), *m.v.values()):
                    gamma.reset()
    idx = torch.arange(6).view(1, 6)
    assert (model(idx)[0] - folded(idx)[0]).abs().max() < 1e-12
    bare = GPT(GPTConfig(**shape, scale_vectors=False)).double()
    if arch == "llama":  # Gemma keeps the γ of its post-norms and QK-norm, which feed no linear map
        bare.load_state_dict({k: v for k, v in folded.state_dict().items() if k in bare.state_dict()})
        assert (model(idx)[0] - bare(idx)[0]).abs().max() < 1e-12


# ---------------------------------------------------------------------------------------------------------------
# Theorem: gradient flow on (W, γ) moves column j of W̃ by −P_j G_j with P_j = γ_j² I + w_j w_jᵀ. A γ of its own
# gives each branch its own P_j; a shared one couples the branches, w_j running through all of them.


def predicted(b):
    """[P_j], (n_in, n, n), from γ and W."""
    w = torch.cat([b.weight[c] for c in b.n_out])
    if "shared" in b.v:
        return torch.stack([g**2 * torch.eye(len(w)) + torch.outer(w_j, w_j) for g, w_j in zip(b.v["shared"](), w.T)])
    return torch.stack([torch.block_diag(*(b.v[c]()[j]**2 * torch.eye(n) + torch.outer(*[b.weight[c][:, j]] * 2)
                                           for c, n in b.n_out.items())) for j in range(w.size(1))])


@pytest.mark.parametrize("heterogeneous", [False, True])
def test_the_preconditioner(heterogeneous):
    b = branches_of(heterogeneous=heterogeneous)
    for j, P in enumerate(predicted(b).detach()):
        assert (preconditioner(b, j) - P).abs().max() < 1e-5


@pytest.mark.parametrize("heterogeneous", [False, True])
def test_a_run_on_W_and_gamma_is_a_preconditioned_run_on_the_product(heterogeneous, dt=2e-3, steps=500):
    b = branches_of(heterogeneous=heterogeneous)
    loss, h = regression(b)
    start = product = plain = effective(b).detach()
    optimizer = torch.optim.SGD(b.parameters(), lr=dt)
    for _ in range(steps):
        product = product - dt * torch.einsum("jik,kj->ij", predicted(b).detach(), gradient(loss, h, product))
        plain = plain - dt * gradient(loss, h, plain)
        optimizer.zero_grad()
        loss(torch.cat(b(h), -1)).backward()
        optimizer.step()
    moved = (effective(b) - start).norm()
    assert (effective(b) - product).norm() < 3e-3 * moved  # Euler's own error, of the order of dt
    assert (effective(b) - plain).norm() > 0.1 * moved  # without γ the flow goes elsewhere


def test_without_gamma_the_preconditioner_is_the_identity():
    b = branches_of(scale_vectors=False)
    assert (preconditioner(b, 1) - torch.eye(7)).abs().max() < 1e-8


# Corollary: λ_min(P_j) ≥ γ_j², with equality where more than one output shares w_j; λ_max is γ_j² + ‖w_j‖².


def test_the_preconditioners_eigenvalues():
    b = branches_of()
    w = torch.cat([b.weight[c] for c in b.n_out]).detach()
    for j, g in enumerate(b.v["shared"]().tolist()):
        P = preconditioner(b, j)
        eigenvalues = torch.linalg.eigvalsh((P + P.T) / 2)
        assert eigenvalues[0] >= g**2 - 1e-5
        assert (eigenvalues[:-1] - g**2).abs().max() < 1e-5
        assert abs(eigenvalues[-1] - g**2 - w[:, j].square().sum()) < 1e-5


# Theorem: γ_j² − ‖w_j‖² does not change under the flow.


@pytest.mark.parametrize("heterogeneous", [False, True])
def test_the_gap_is_conserved(heterogeneous, dt=1e-3, steps=1000):
    b = branches_of(heterogeneous=heterogeneous)
    loss, h = regression(b)

    def squares():
        w = [b.weight[c].square().sum(0) for c in N_OUT]
        if heterogeneous:
            return torch.stack((torch.stack([b.v[c]().square() for c in N_OUT]), torch.stack(w))).detach()
        return torch.stack((b.v["shared"]().square(), sum(w))).detach()

    start = squares()
    optimizer = torch.optim.SGD(b.parameters(), lr=dt)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(torch.cat(b(h), -1)).backward()
        optimizer.step()
    moved = squares() - start
    assert moved.abs().max() > 0.1
    assert (moved[0] - moved[1]).abs().max() < 2e-3 * moved.abs().max()


# ---------------------------------------------------------------------------------------------------------------
# Theorem: dual placement preconditions columns and rows:
# dW̃_ij/dt = −[u_i² v_j² G_ij + W̃_ij (⟨w̃_j, G_j⟩/v_j² + ⟨w̃^i, G^i⟩/u_i²)], w̃^i and G^i rows.


def test_dual_placement_preconditions_rows_and_columns():
    b = branches_of(n_out={"a": 4}, placement="dual")
    loss, h = regression(b)
    W = effective(b).detach()
    G = gradient(loss, h, W)
    u, v = b.u["a"]()[:, None].detach(), b.v["shared"]().detach()
    rate = -(u**2 * v**2 * G + W * ((W * G).sum(0) / v**2 + (W * G).sum(1, keepdim=True) / u**2))
    assert (flow(b, lambda m: loss(m(h)[0]), effective) - rate).abs().max() < 1e-5


# Theorem: ⟨u,∂u⟩ = ⟨v,∂v⟩ = ⟨W,∂W⟩ for each branch, so that ‖u‖², ‖v‖² and ‖W‖² grow alike. A shared v gets the sum.


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
# Theorem: OR moves γ's magnitude n times faster and its direction as before (at init). ER does so too;
# product, OR without its norm, has n + 1.


@pytest.mark.parametrize("form, n_fold", [("direct", 1), ("zero_centred", 1), ("or", 6), ("er", 6), ("product", 7)])
def test_reparameterisation_speeds_up_the_magnitude(form, n_fold, n=6):
    scale = ScaleVector(n, "input", form).double()
    speed = torch.stack([flow(scale, lambda m: -m()[i], lambda m: m()) for i in range(n)], dim=1)
    magnitude = torch.full((n, n), 1 / n, dtype=torch.float64)  # the projection on (1, …, 1)
    assert (speed - n_fold * magnitude - (torch.eye(n) - magnitude)).abs().max() < 1e-4


# A shorter α turns faster: the flow of γ's direction has the speed n/‖α‖², that of its magnitude stays. So decay on α,
# which leaves γ where it is, does not leave the run as it was.


@pytest.mark.parametrize("length", [0.5, 1.0, 2.0])
def test_a_shorter_alpha_turns_faster(length, n=6):
    scale = ScaleVector(n, "input", "or").double()
    with torch.no_grad():
        scale.alpha.mul_(length)
    speed = torch.stack([flow(scale, lambda m: -m()[i], lambda m: m()) for i in range(n)], dim=1)
    magnitude = torch.full((n, n), 1 / n, dtype=torch.float64)
    assert (speed - n * magnitude - (torch.eye(n) - magnitude) / length**2).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------
# What stands beside a norm need not be computed: N does not see the length of its input. Under DNP the Pre-Norm is
# idle, and so is the magnitude of v: without ε its gradient is 0, and with it ε's alone.


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
    b.eps = eps
    x, target = torch.randn(7, N_IN, dtype=torch.float64), torch.randn(7, sum(N_OUT.values()), dtype=torch.float64)
    (torch.cat(b(x), -1) * target).sum().backward()
    gradient, others = b.v["shared"].beta.grad.abs().item(), b.v["shared"].alpha.grad.abs().max().item()
    assert others > 1e-2
    assert gradient < 1e-12 if eps == 0 else 0 < gradient < 2 * eps * others / 1e-2


def test_adam_moves_an_idle_magnitude_all_the_same():
    """Its steps do not see how small a gradient is, only that it is there: with ε, β of v leaves 1 like any other."""
    b = branches_of(placement="dual_norm", form="or").float()
    b.eps = 1e-6
    x, target = torch.randn(64, N_IN), torch.randn(64, sum(N_OUT.values()))
    optimizer = torch.optim.Adam(b.parameters(), lr=1e-2, eps=1e-8)
    for _ in range(50):
        optimizer.zero_grad()
        (torch.cat(b(x), -1) * target).mean().backward()
        optimizer.step()
    assert b.v["shared"].beta.grad.abs() < 1e-5
    assert (b.v["shared"].beta - 1).abs() > 0.02


# ---------------------------------------------------------------------------------------------------------------
# Why decay helps an input-role γ: at a minimum with white inputs the loss's sharpness is max_j (γ_j² + ‖w̃_j‖²/γ_j²).
# As γ decays from 1, W takes over its part, the function stays and the sharpness falls, as long as γ_j² > ‖w̃_j‖.
# An output-role γ scales what a norm has fixed: nothing takes over, and the loss that W can reach rises.


def decayed(b, which, steps=20):
    """b after `steps` of weight decay 0.1 at lr 0.1, by the project's groups, on γ of one role and nothing else."""
    roles = [(name, p, "matrix" if name.startswith("weight") else "input" if name.startswith("v") else "output",
              not name.startswith("weight")) for name, p in b.named_parameters()]
    optimizer = torch.optim.AdamW(param_groups(roles, 0.1, which), lr=0.1)
    for p in b.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    optimizer.zero_grad()
    return 0.99**steps


def sharpness(b, loss, steps=300):
    """The Hessian's largest eigenvalue over all parameters of b, by power iteration."""
    params = list(b.parameters())
    x = [torch.randn_like(p) for p in params]
    for _ in range(steps):
        norm = math.sqrt(sum((t * t).sum().item() for t in x))
        x = [t / norm for t in x]
        grads = torch.autograd.grad(loss(b), params, create_graph=True)
        Hx = torch.autograd.grad(sum((g * t).sum() for g, t in zip(grads, x)), params)
        x, value = Hx, sum((a * t).sum().item() for a, t in zip(Hx, x))
    return value


def white_inputs(n, n_in):
    """h, (n, n_in), with hᵀh/n = I."""
    return torch.linalg.qr(torch.randn(n, n_in, dtype=torch.float64))[0] * math.sqrt(n)


@pytest.mark.parametrize("steps, flatter", [(20, True), (300, False)])
def test_decay_on_an_input_role_gamma_flattens_the_minimum(steps, flatter):
    b = branches_of(n_out={"a": 4})
    with torch.no_grad():
        b.v["shared"].reset()
        b.weight["a"].mul_(0.3)
    h = white_inputs(64, N_IN)
    target, teacher = b(h)[0].detach(), effective(b).detach()
    loss = lambda m: (m(h)[0] - target).square().sum(-1).mean() / 2
    formula = lambda gamma: (gamma**2 + teacher.square().sum(0) / gamma**2).max().item()
    assert sharpness(b, loss) == pytest.approx(formula(torch.ones(N_IN)), rel=1e-6)
    before = sharpness(b, loss)
    s = decayed(b, "input", steps)
    assert b.v["shared"]().tolist() == pytest.approx([s] * N_IN)
    with torch.no_grad():  # the minimum at this γ
        b.weight["a"].div_(s)
    assert loss(b).item() < 1e-25
    assert sharpness(b, loss) == pytest.approx(formula(torch.full((N_IN,), s)), rel=1e-6)
    # 20 steps leave γ at 0.82; after 300 it is 0.05, γ_j² is far below ‖w̃_j‖, and the sharpness is W's large part
    assert sharpness(b, loss) < 0.9 * before if flatter else sharpness(b, loss) > before


@pytest.mark.parametrize("which", ["input", "output"])
def test_decay_on_an_output_role_gamma_raises_the_reachable_loss(which):
    b = branches_of(n_out={"a": 4}, placement="dual_norm")
    with torch.no_grad():
        b.u["a"].reset(), b.v["shared"].reset()
    h = white_inputs(64, N_IN)
    target = b(h)[0].detach()
    loss = lambda m: (m(h)[0] - target).square().mean()
    s = decayed(b, which)
    with torch.no_grad():
        b.weight["a"].add_(0.3 * torch.randn_like(b.weight["a"]))
    optimizer = torch.optim.LBFGS([b.weight["a"]], lr=1, max_iter=300, tolerance_grad=1e-14, tolerance_change=1e-18,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(b)
        value.backward()
        return value

    optimizer.step(closure)
    # |u ⊙ N(·)| is √n s whatever W is, and the target's is √n: what is left is (1 − s)² for each channel
    assert loss(b).item() == pytest.approx(0 if which == "input" else (1 - s)**2, abs=1e-10)
