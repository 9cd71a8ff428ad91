"""
The paper's theory as a picture: results/theory_light.svg and results/theory_dark.svg. Takes half a minute on a CPU.

    python results/theory.py

The paper's Setting 2.1 (arXiv 2605.26895): x ~ N(0, I), a linear teacher W*, squared loss, gradient flow from W = 0
with every scale vector at 1. N(x) is white, so the loss is ½ ‖A − W*‖², where A is the student's effective matrix:
W diag(γ) for a branch with a scale vector. The upper row is the paper's figure 11, for OR. The lower row shows the
same three claims for DP. At the right are Theorems 2.2 and 2.3. tests/test_theory.py checks all of them.
"""

import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from norms import Branches
from plot import THEMES, style

C, D = 6, 8  # outputs and inputs of the teacher
KINDS = {"plain": {"scale_vectors": False}, "gamma": {}, "OR": {"form": "or"}, "DP": {"placement": "dual"}}


# ---------------------------------------------------------------------------------------------------------------
# Setting 2.1. A student is one branch of norms.py, in float64.


def student(kind, c=C, d=D):
    """A branch (c, d) with W = 0 and scale vectors of 1: without any ('plain'), with γ ('gamma'), with OR, with DP."""
    branch = Branches(d, {"w": c}, eps=0.0, **KINDS[kind]).double()
    torch.nn.init.zeros_(branch.weight["w"])
    return branch


def effective(branch):
    """A, (c, d): what the branch, or several one below the other, make of the unit vectors."""
    (n_in,) = {weight.size(1) for weight in branch.weight.values()}
    return torch.cat(branch(torch.eye(n_in, dtype=torch.float64)), -1).T


def loss(branch, teacher):
    return (effective(branch) - teacher).square().sum() / 2


def gradients(branch, teacher):
    return torch.autograd.grad(loss(branch, teacher), list(branch.parameters()))


def rate(branch, teacher):
    """−dL/dt under gradient flow: the squared length of the gradient."""
    return sum(g.square().sum().item() for g in gradients(branch, teacher))


@torch.no_grad()
def at_same_state(branch):
    """The 'gamma' student with this one's effective matrix and its γ: Theorems 3.1 and 3.2 compare the two."""
    (_, u, v), = branch.vectors()
    other = student("gamma", *branch.weight["w"].shape)
    other.weight["w"].copy_(branch.weight["w"] if u is None else u[:, None] * branch.weight["w"])
    other.v["shared"].set(v)
    return other


def flow(branch, teacher, end, steps, observe=lambda *state: loss(*state).item()):
    """
    Gradient flow from the branch as it is to time `end`, by Runge and Kutta's fourth-order steps. Returns the list of
    observe(branch, teacher) at the steps + 1 times, and leaves the branch at the end.
    """
    params, dt = list(branch.parameters()), end / steps

    def shifted(start, slope, by):
        with torch.no_grad():
            for p, s, k in zip(params, start, slope):
                p.copy_(s - by * k)
        return gradients(branch, teacher)

    seen = [observe(branch, teacher)]
    for _ in range(steps):
        start = [p.detach().clone() for p in params]
        k1 = gradients(branch, teacher)
        k2 = shifted(start, k1, dt / 2)
        k3 = shifted(start, k2, dt / 2)
        k4 = shifted(start, k3, dt)
        shifted(start, [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4)], dt)
        seen.append(observe(branch, teacher))
    return seen


def teachers(seed=0):
    """
    {name: W*, (C, D)}: 'any'; 'balanced' has columns of one length, OR's condition for being ahead at all times;
    'matching' has at most one entry in each row and column, DP's condition.
    """
    any_ = torch.randn(C, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 2
    matching = torch.zeros_like(any_)
    matching[range(C), range(C)] = any_.norm(dim=1)
    return {"any": any_, "balanced": any_ / any_.norm(dim=0) * any_.norm() / D**0.5, "matching": matching}


def cubic(kind, teacher):
    """The factor of t³ in L_gamma − L_kind just after the start (Theorems D.1 and D.2)."""
    if kind == "OR":
        return 2 / 3 * (1 - 1 / teacher.size(1)) * teacher.square().sum().item()**2
    return 2 / 3 * teacher.square().sum(1).square().sum().item()


def gammas_under_noise(mu, end, steps, lam=0.2, q=0.5, paths=2048, d=4, seed=0):
    """
    Theorem 2.3: dw = −(γ ⊙ (a − a*) + λ w) dt + √q dB and dγ = −(w ⊙ (a − a*) + μ γ) dt + √q dB' with a = γ ⊙ w, from
    w = 0 and γ = 1, with a* = 1. Returns (E‖γ‖², E‖w‖²) over the paths, a list of steps + 1 numbers each.

    A step takes w with γ held, then γ with w held. Each is a linear equation, solved exactly. Euler's steps would bound
    γ by themselves: they are unstable beyond γ² = 2/dt.
    """
    random, dt = torch.Generator().manual_seed(seed), end / steps
    w, gamma = torch.zeros(paths, d, dtype=torch.float64), torch.ones(paths, d, dtype=torch.float64)

    def solved(x, other, decay):
        pull = other.square() + decay
        kept = (-dt * pull).exp()
        noise = torch.randn(paths, d, dtype=torch.float64, generator=random)
        return other / pull + kept * (x - other / pull) + (q * (1 - kept.square()) / (2 * pull)).sqrt() * noise

    seen = [], []
    for i in range(steps + 1):
        for values, x in zip(seen, (gamma, w)):
            values.append(x.square().sum(1).mean().item())
        w = solved(w, gamma, lam)
        gamma = solved(gamma, w, mu)
    return seen


# ---------------------------------------------------------------------------------------------------------------
# the picture


def curves(steps):
    """{panel: (x, {label: (y, colour, dashed)})}; `steps` of each flow."""
    W, out = teachers(), {}
    for kind, condition in (("OR", "balanced"), ("DP", "matching")):
        both = lambda branch, teacher: rate(branch, teacher) / rate(at_same_state(branch), teacher)
        times = lambda end: [end * i / steps for i in range(steps + 1)]
        out[kind, "rate"] = times(1.5), {
            f"{kind} over a plain γ": (flow(student(kind), W["any"], 1.5, steps, both), "ours", False),
            "equal": ([1.0] * (steps + 1), "base", True)}
        early = [flow(student(k), W["any"], 0.02, steps) for k in ("gamma", kind)]
        out[kind, "early"] = times(0.02), {
            "measured": ([a - b for a, b in zip(*early)], "ours", False),
            "c t³ of the theorem": ([cubic(kind, W["any"]) * t**3 for t in times(0.02)], "other", True)}
        out[kind, "all"] = times(2.0), {
            "a plain γ": (flow(student("gamma"), W[condition], 2.0, steps), "base", False),
            kind: (flow(student(kind), W[condition], 2.0, steps), "ours", False)}
    out["gamma", "all"] = times(2.0), {
        "no γ": (flow(student("plain"), W["any"], 2.0, steps), "base", False),
        "with γ": (flow(student("gamma"), W["any"], 2.0, steps), "ours", False)}
    every = 20  # of its steps of 0.05 is drawn
    noisy = {mu: gammas_under_noise(mu, 100, 20 * steps)[0][::every] for mu in (0.0, 0.2)}
    out["gamma", "decay"] = [100 / steps * i for i in range(steps + 1)], {
        "no decay on γ": (noisy[0.0], "other", False), "decay on γ": (noisy[0.2], "ours", False)}
    return out


TITLES = {("OR", "rate"): "At the same weights, OR learns faster\nthan a plain γ",
          ("OR", "early"): "OR is ahead from the first moment,\nby as much as derived",
          ("OR", "all"): "OR stays ahead where the teacher's\ncolumns are equally long",
          ("gamma", "all"): "A γ that adds nothing to what a net\ncan express still helps it learn",
          ("DP", "rate"): "At the same weights, DP learns faster\nthan a plain γ",
          ("DP", "early"): "DP is ahead from the first moment,\nby as much as derived",
          ("DP", "all"): "DP stays ahead where rows and columns\nhave one entry at most",
          ("gamma", "decay"): "Under noise γ grows without bound\nunless it decays"}
LABELS = {"rate": "speed of the loss, ratio", "early": "lead in loss", "all": "loss", "decay": "E ‖γ‖²"}


def draw(panels):
    """The Figure of curves()."""
    colours = {"base": "0.5", "ours": "C0", "other": "C1"}
    figure = Figure(figsize=(12.5, 5.2))
    for ax, (panel, title) in zip(figure.subplots(2, 4).flat, TITLES.items()):
        x, lines = panels[panel]
        for label, (y, name, dashed) in lines.items():
            ax.plot(x, y, color=colours[name], label=label, dashes=(3, 2) if dashed else ())
        if panel[1] == "all":
            ax.set_yscale("log")
            ax.minorticks_off()
        ax.set_title(title)
        ax.set(xlabel="time", ylabel=LABELS[panel[1]])
        ax.legend()
    return figure


def main(folder=HERE, steps=100):
    panels = curves(steps)
    for theme in THEMES:
        path = Path(folder) / f"theory_{theme}.svg"
        small = {"font.size": 8, "axes.titlesize": 8.5, "legend.fontsize": 7.5}
        with rc_context(style(theme) | small | {"svg.fonttype": "none", "text.parse_math": True}):  # text as text
            draw(panels).savefig(path, metadata={"Date": None, "Creator": None})
        print(path)


if __name__ == "__main__":
    main()
