"""optim.py: groups, where weight decay lands, Muon, schedules."""

import pytest
import torch

from model import GPT
from optim import lr_at, make_optimizers, param_groups, set_lr
from settings import FORMS, GPTConfig

WD, LR = 0.25, 0.1


def tiny(**kw):
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=4, **kw))


def step_on_zero_gradients(model, scale_decay, optimizer="adamw"):
    """One optimizer step in which nothing but weight decay moves. Returns name -> (before, after, role)."""
    before = {n: (p.detach().clone(), role) for n, p, role, _ in model.named_roles()}
    optimizers = make_optimizers(param_groups(model.named_roles(), WD, scale_decay), optimizer, (0.9, 0.95))
    set_lr(optimizers, LR)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for o in optimizers:
        o.step()
    return {n: (before[n][0], p.detach(), before[n][1]) for n, p in model.named_parameters()}


MIXTURE = dict(n_experts=3, expert_dim=6, expert_scales="own")


@pytest.mark.parametrize("scale_decay", ["input", "all", "none", "output", "all_but_head_u"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("optimizer,kw", [("adamw", dict(arch="gemma")), ("muon", dict(arch="gemma")),
                                          ("adamw", MIXTURE), ("muon", MIXTURE)], ids=str)
def test_weight_decay_lands_where_the_name_says(scale_decay, form, optimizer, kw):
    model = tiny(placement="dual", heterogeneous=True, reparam=form, **kw)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)  # zero_centred's w and er's β and α start at 0, where decay would not show
    seen = set()
    for name, (before, after, role) in step_on_zero_gradients(model, scale_decay, optimizer).items():
        if role in ("input", "output"):
            assert (role == "input") == (".v." in name and ".u." not in name), name
            # written out once more, by name: decay on or's α would not move γ
            decays = scale_decay in (role, "all")
            decays |= scale_decay == "all_but_head_u" and not name.startswith("lm_head.u")
            decays &= not (form == "or" and name.endswith("alpha"))
            seen.add((role, decays))
        else:
            assert (role == "router") == ("router" in name), name
            decays = True
        factor = 1 - LR * WD if decays else 1.0
        assert torch.allclose(after, before * factor, rtol=1e-6, atol=0), name
    assert {role for role, _ in seen} == {"input", "output"}


def test_groups_name_roles_and_multiply_lr():
    model = tiny(placement="dual", reparam="or")
    groups = {g["name"]: g for g in param_groups(model.named_roles(), WD, "input", scale_lr_mult=3.0)}
    assert set(groups) == {"matrix", "embedding", "scale_input", "scale_input_no_decay", "scale_output_no_decay"}
    assert sum(p.numel() for g in groups.values() for p in g["params"]) == sum(p.numel() for p in model.parameters())
    optimizers = make_optimizers(list(groups.values()), "adamw", (0.9, 0.95))
    set_lr(optimizers, LR)
    assert {g["name"]: g["lr"] for g in optimizers[0].param_groups} == {
        n: LR * (3.0 if n.startswith("scale") else 1.0) for n in groups}


def test_a_parameter_in_two_groups_is_refused():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(AssertionError, match="in two"):
        param_groups([("a", p, "matrix", True), ("b", p, "embedding", True)], WD, "all")


@pytest.mark.parametrize("kw", [dict(), MIXTURE], ids=["dense", "mixture"])
def test_muon_takes_hidden_matrices_and_adamw_the_rest(kw):
    model = tiny(heterogeneous=True, **kw)
    adamw, muon = make_optimizers(param_groups(model.named_roles(), WD, "all"), "muon", (0.9, 0.95))
    hidden = {p for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() > 1
              and "router" not in name and ".v." not in name}
    assert {p for g in muon.param_groups for p in g["params"]} == hidden
    assert {p for g in adamw.param_groups for p in g["params"]} == set(model.parameters()) - hidden
    set_lr([adamw, muon], 1e-2)
    before = model.blocks[0].attn.o.detach().clone()
    x = torch.randint(0, 11, (8, 4))
    model(x, x)[1].backward()
    for o in (adamw, muon):
        o.step()
    # an orthogonalised update has singular values near 1, times lr · 0.2 · √max(shape)
    update = (model.blocks[0].attn.o - before * (1 - 1e-2 * WD)) / (1e-2 * 0.2 * 8 ** 0.5)
    update = torch.linalg.svdvals(update)
    assert 0.6 < update.median() and update.max() < 1.3


def schedule(kind, steps=100, warmup=10, low=0.1, decay=0.3):
    return [lr_at(i, 2.0, kind, warmup, steps, low, decay) for i in range(steps + 1)]


def test_schedules():
    for kind in ("cosine", "wsd", "constant"):
        lrs = schedule(kind)
        assert lrs[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)]) and max(lrs) == lrs[10] == 2.0
    cosine, wsd, constant = (schedule(kind) for kind in ("cosine", "wsd", "constant"))
    assert cosine[55] == pytest.approx(1.1) and cosine[100] == pytest.approx(0.2)
    assert all(a > b for a, b in zip(cosine[10:], cosine[11:]))
    assert wsd[10:71] == [2.0] * 61 and wsd[85] == pytest.approx(1.0) and wsd[100] == 0.0
    assert constant[10:] == [2.0] * 91
    assert lr_at(0, 1.0, "cosine", 0, 1, 0.1, 0.3) == 1.0  # no warm-up, one step: no division by zero
