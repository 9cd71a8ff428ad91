"""README's code does what it says."""

import torch
from conftest import ROOT

from model import GPT
from norms import Branches
from optim import param_groups
from settings import GPTConfig


def blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [part.split("\n```")[0] for part in text.split(f"```{language}\n")[1:]]


def test_the_method_in_30_lines_is_norms_py():
    space = {}
    exec(blocks("python")[0], space)
    torch.manual_seed(0)
    ours = Branches(12, {"q": 8, "k": 8}, "dual_norm", heterogeneous=True, form="or", group=4)
    theirs = torch.nn.ModuleDict({c: space["Branch"](12, 8, d_head=4) for c in "qk"})
    with torch.no_grad():
        for p in ours.weight.values():
            p.normal_()
        for c in "qk":
            theirs[c].W.weight.copy_(ours.weight[c])
            for p in (*ours.u[c].parameters(), *ours.v[c].parameters()):
                p.add_(0.3 * torch.randn_like(p))
            theirs[c].u.load_state_dict(ours.u[c].state_dict())
            theirs[c].v.copy_(ours.v[c].alpha)
    x = 3 * torch.randn(2, 5, 12)
    for c, y in zip("qk", ours(space["N"](x))):
        assert torch.allclose(theirs[c](x), y, atol=1e-5)

def test_the_rule_for_decay_in_30_lines_is_iwd():
    space = {}
    exec(blocks("python")[0], space)
    model = GPT(GPTConfig(n_layer=1, n_embd=16, heterogeneous=True, placement="dual_norm", reparam="or"))
    decaying = {p for g in param_groups(model.named_roles(), 0.1, "input") if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        if ".v." in name or ".u." in name:
            parent, side, branch, part = name.rsplit(".", 3)
            assert space["decays"](f"{parent}.{branch}.{side}.{part}") == (p in decaying), name
