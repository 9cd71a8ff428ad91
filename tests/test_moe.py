"""Mixtures of experts: against a naive formulation; balance; runs as exact as dense ones."""

import csv
import itertools
import signal
from pathlib import Path

import pytest
import test_model
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_ddp import flags, furthest, losses, torchrun
from test_model import assert_close, loss_and_gradients, loud, shake, tokens
from test_train import equal, log, stop_at, weights

import runlog
import train
from configurator import configure
from kernels import rms_norm
from model import GPT
from moe import MoE, Route, balance_routers, mixtures, take_router_statistics
from norms import Branches, ScaleVector
from optim import StackedMuon
from runs import load_checkpoint
from settings import FORMS, PLACEMENTS, Settings, gpt_config
from train import main

SHARING = {"one": {}, "hg": dict(heterogeneous=True), "own": dict(heterogeneous=True, expert_scales="own")}
ROUTERS = ("softmax", "softmax_all", "sigmoid")
MIXED = dict(n_experts=4, experts_per_token=2, expert_dim=8, shared_dim=8)
UNIFIED = dict(heterogeneous=True, placement="dual_norm", reparam="or", scale_decay="input")


def tiny(**kw):
    return test_model.tiny(**{"ffn_dim": 24, "n_experts": 5, **kw})


def naive(self, h, weights=None):
    """MoE.forward once more: every expert on every token, on activations, times a weight that is mostly 0."""
    c = self.config
    B, T, d = h.shape
    x = h.reshape(-1, d)
    hg = c.heterogeneous
    vector = lambda modules, key: modules[key]() if key in modules else torch.ones(())
    of = lambda gamma, e: gamma[e] if gamma.dim() == 2 else gamma
    normed = c.ffn_placement in ("norm", "dual_norm")  # then only the router normalises its input
    n = x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() if normed else x
    logits = (n * vector(self.router.v, "router" if hg else "shared")) @ self.router.weight["router"].T
    scores = logits.sigmoid() if c.router == "sigmoid" else logits.exp() / logits.exp().sum(-1, keepdim=True)
    best = (scores + self.bias).argsort(-1, descending=True)[:, :c.experts_per_token]
    mask = torch.zeros_like(scores).scatter(1, best, 1.0)
    weights = scores * mask
    if c.router != "softmax_all":
        weights = weights / weights.sum(-1, keepdim=True)

    out = torch.zeros_like(x)
    ffn = self.experts
    for e in range(c.n_experts):
        branch = {}
        for name in ("gate", "up"):
            key = None if c.ffn_placement == "after" else name if hg else "shared"
            y = (x * of(vector(ffn.gate_up.v, key), e)) @ ffn.gate_up.weight[name][e].T
            if normed:
                y = y / (y.square().mean(-1, keepdim=True) + ffn.gate_up.eps).sqrt()
            branch[name] = y * of(vector(ffn.gate_up.u, name), e)
        hidden = branch["gate"].sigmoid() * branch["gate"] * branch["up"]
        out = out + weights[:, e:e + 1] * (hidden @ ffn.down[e].T)
    if self.shared is not None:
        out = out + self.shared(x)

    p = scores / scores.sum(-1, keepdim=True)
    balance = 0.0
    for p_b, mask_b in zip(p.view(B, T, -1), mask.view(B, T, -1)):
        balance = balance + c.n_experts * (p_b.mean(0) * mask_b.mean(0)).sum() / c.experts_per_token / B
    self.loss = c.router_aux * balance + c.router_z * logits.exp().sum(-1).log().square().mean()
    return out.view(B, T, d)


# the mixture is what it should be

@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("placement,sharing", list(itertools.product(PLACEMENTS, SHARING)))
def test_loop_and_naive_formulation_agree_in_loss_and_every_gradient(router, placement, sharing, monkeypatch):
    model = loud(tiny(router=router, placement=placement, shared_dim=8, expert_dim=8, router_aux=0.5,
                      router_z=0.1, dtype="float64", **SHARING[sharing]))
    ours = loss_and_gradients(model)
    monkeypatch.setattr(MoE, "forward", naive)
    assert_close(ours, loss_and_gradients(model), 1e-10)


@pytest.mark.parametrize("bias", [[9, 9, 0, 0, 0], [9, 0, 0, 0, -9], [0, 0, 0, 0, 0]], ids=str)
def test_experts_with_all_tokens_and_with_none(bias, monkeypatch):
    model = loud(tiny(dtype="float64"))
    for moe in mixtures(model):
        moe.bias.copy_(torch.tensor(bias))
    ours = loss_and_gradients(model)
    load, _ = take_router_statistics(model)
    if bias[0]:
        assert (load[:, 0] == 36).all() and (load[:, 4] == 0).all()
        assert all((moe.experts.down.grad[4] == 0).all() for moe in mixtures(model))
    monkeypatch.setattr(MoE, "forward", naive)
    assert_close(ours, loss_and_gradients(model), 1e-10)


CHOICES = {"some idle, one with a single token": [[0, 2], [0, 2], [2, 0], [0, 4], [2, 0]], "all to one": [[3]] * 5,
           "no token at all": [], "the last ones": [[4, 3], [3, 4]]}


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grouped", [False, True])
def test_both_ways_of_grouped_linear_and_the_route_around_them(chosen, dtype, grouped):
    if grouped and dtype == torch.float64:
        pytest.skip("grouped_mm has no fp64")
    torch.manual_seed(0)
    chosen = torch.tensor(chosen, dtype=torch.long).view(len(chosen), -1 if chosen else 2)
    load = torch.bincount(chosen.flatten(), minlength=5)
    x = torch.randn(len(chosen), 16).to(dtype).requires_grad_()
    w = torch.randn(5, 8, 16).to(dtype).requires_grad_()
    weights = torch.rand(chosen.shape).requires_grad_()
    dy = torch.randn(len(chosen), 8)
    route = Route(chosen, load, grouped)
    ours = route.combine(route.linear(route.dispatch(x), w), weights)
    exact = torch.zeros(len(chosen), 8, dtype=torch.float64)
    for n, e in itertools.product(range(chosen.size(0)), range(chosen.size(1))):
        exact[n] += weights[n, e].double() * (w[chosen[n, e]].double() @ x[n].double())
    grads = torch.autograd.grad(ours, (x, w, weights), dy.to(dtype))
    exact_grads = (x, w * 0, weights)
    if len(chosen):
        exact_grads = torch.autograd.grad(exact, (x, w, weights), dy.to(dtype).double())
    for o, e in zip((ours, *grads), (exact, *exact_grads)):
        assert o.shape == e.shape
        tol = 1e-10 if o.dtype == dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        assert o.numel() == 0 or (o.double() - e.double()).abs().max() <= tol * max(1, e.abs().max())


@pytest.mark.parametrize("placement,sharing", list(itertools.product(PLACEMENTS, SHARING)))
def test_grouped_and_looped_models_agree(placement, sharing):
    results = []
    for grouped in (False, True):
        model = shake(tiny(expert_dim=8, shared_dim=8, placement=placement, **SHARING[sharing]))
        for moe in mixtures(model):
            moe.grouped = grouped
        results.append(loss_and_gradients(model))
    assert_close(*results, 1e-6)


# scale vectors

def test_a_stack_is_many_scale_vectors():
    for form in FORMS:
        stack, one = ScaleVector(6, "output", form, stack=3), ScaleVector(6, "output", form)
        assert torch.allclose(stack(), torch.ones(3, 6))
        with torch.no_grad():
            for p in stack.parameters():
                p.add_(0.3 * torch.randn(p.shape))
            for e in range(3):
                for name, p in one.named_parameters():
                    p.copy_(getattr(stack, name)[e].view_as(p))
                assert torch.allclose(stack()[e], one(), atol=1e-6), form
            gamma = torch.rand(3, 6) + 0.5
            stack.set(gamma)
            assert torch.allclose(stack(), gamma, atol=1e-6), form


def test_who_has_a_scale_vector_of_its_own():
    # without attention's and the last
    count = lambda **kw: tiny(n_layer=1, expert_dim=8, head_placement="input", **kw).counts()["scale_params"] - 2 * 16
    assert count() == 16 == count(expert_scales="own")
    hg = dict(heterogeneous=True)
    extra = 2 * 16  # attention's q, k, v
    assert count(**hg) - extra == 3 * 16  # router, gate, up
    assert count(**hg, expert_scales="own") - extra == 16 + 2 * 5 * 16
    assert count(**hg, shared_dim=8) - extra == 5 * 16
    assert count(placement="dual") - 3 * 16 == 16 + 2 * 5 * 8  # u of each expert
    assert count(placement="dual", reparam="or", attn_placement="input") == 2 + 16 + 1 + 2 * 5 * 9


# the optimizer

def test_muon_is_torchs_for_matrices_and_for_each_expert():
    torch.manual_seed(0)
    for shape in ((4, 12, 8), (4, 8, 12), (3, 5, 5)):
        stack = torch.nn.Parameter(torch.randn(shape))
        each = [torch.nn.Parameter(w.clone()) for w in stack.detach()]
        ours = [StackedMuon([stack], lr=0.1, weight_decay=0.2)]
        theirs = [torch.optim.Muon(each, lr=0.1, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")]
        for step in range(3):
            stack.grad = torch.randn(shape) * torch.logspace(-6, 0, shape[0]).view(-1, 1, 1)
            for w, g in zip(each, stack.grad):
                w.grad = g.clone()
            for optimizer in ours + theirs:
                optimizer.step()
        assert (stack - torch.stack(list(each))).abs().max() < 0.02 * 0.1 * 0.2 * max(shape[1:]) ** 0.5


# balance

def test_losses_have_a_gradient_and_no_value():
    x, y = tokens()
    plain, with_losses = (tiny(router_aux=a, router_z=z) for a, z in ((0.0, 0.0), (0.3, 0.1)))
    assert torch.equal(plain(x, y)[1], with_losses(x, y)[1])
    a, b = (loss_and_gradients(m)[1] for m in (plain, with_losses))
    assert not torch.allclose(a["blocks.0.ffn.router.weight.router"], b["blocks.0.ffn.router.weight.router"])
    assert all(torch.equal(a[n], b[n]) for n in a if n.startswith(("lm_head", "blocks.1.ffn.experts")))


def test_balance_loss_is_one_when_balanced_and_a_mean_over_sequences():
    model = tiny(router_aux=1.0, router_z=0.0, n_layer=1)
    moe, h = model.blocks[0].ffn, rms_norm(torch.randn(4, 12, 16), 1e-6)
    moe(h)
    whole = moe.loss
    parts = [(moe(part), moe.loss)[1] for part in h.chunk(2)]
    assert abs(whole - sum(parts) / 2) < 1e-6
    with torch.no_grad():
        moe.router.weight["router"].zero_()
    moe(h)
    assert abs(moe.loss - 1) < 1e-6
    with torch.no_grad():
        moe.router.weight["router"][:2] = 100 * h[0, 0]
    moe(h[:1, :1])
    assert abs(moe.loss - 5 / 2) < 1e-3  # all to two of five


@pytest.mark.parametrize("router", ROUTERS)
def test_the_bias_moves_by_counts_and_chooses_without_weighing(router):
    model = tiny(router_bias=0.25, router=router, n_layer=1)
    (moe,) = mixtures(model)
    balance_routers(model, torch.tensor([[10, 2, 5, 5, 3]]))
    assert moe.bias.tolist() == [-0.25, 0.25, 0, 0, 0.25]
    assert "blocks.0.ffn.bias" in model.state_dict() and "blocks.0.ffn.bias" not in dict(model.named_parameters())
    with torch.no_grad():
        moe.bias.copy_(torch.tensor([0, 0, 7.0, 5.0, 0]))
    h = rms_norm(torch.randn(2, 12, 16), 1e-6)
    moe(h)
    assert moe.load.tolist() == [0, 0, 24, 24, 0]
    logits = moe.router(h.flatten(0, 1))[0]
    weights = {"softmax": logits[:, 2:4].softmax(-1), "softmax_all": logits.softmax(-1)[:, 2:4],
               "sigmoid": logits[:, 2:4].sigmoid() / logits[:, 2:4].sigmoid().sum(-1, keepdim=True)}[router]
    y2, y3 = (moe.experts(h.flatten(0, 1), Route(torch.full((24, 1), e), 24 * F.one_hot(torch.tensor(e), 5), False))
              for e in (2, 3))
    assert torch.allclose(moe(h).flatten(0, 1), weights[:, :1] * y2 + weights[:, 1:] * y3, atol=1e-6)


def test_statistics_count_what_trains_and_nothing_else():
    model, (x, y) = tiny(), tokens()
    for _ in range(2):
        model(x, y)
    with torch.no_grad():
        model(x, y)
    load, entropy = take_router_statistics(model)
    assert load.sum(1).tolist() == [2 * 36 * 2] * 2 and load.dtype == torch.int64
    assert (entropy / 2 < torch.tensor(5.0).log()).all() and (entropy / 2 > 1).all()
    assert take_router_statistics(model)[0].sum() == 0
    assert runlog.expert_statistics(torch.tensor([[6, 0, 0]]), torch.tensor([0.5]), 7) == [
        dict(step=7, layer=0, load_max="3", idle=2, entropy="0.5")]


def experts_csv(s):
    with open(Path(s.out_dir) / "experts.csv", newline="") as f:
        return list(csv.DictReader(f))


@pytest.mark.parametrize("kw", [dict(router_aux=0.05), dict(router_aux=0.0, router_bias=0.005, router="sigmoid")],
                         ids=str)
def test_a_balanced_router_stays_balanced_and_another_does_not(settings, tmp_path, kw):
    common = dict(n_embd=32, block_size=32, batch_tokens=2048, micro_batch=64, max_steps=160, lr=3e-3, warmup_steps=20,
                  n_experts=8, expert_dim=8, log_interval=5, eval_interval=200, save_interval=200,
                  init_std=0.02, embedding_std=0.02)
    balanced, left = settings(**common, **kw), settings(**common, **{**kw, "router_aux": 0.0, "router_bias": 0.0},
                                                        out_dir=str(tmp_path / "left"))
    late = {}
    for s in (balanced, left):
        main(s)
        late[s.out_dir] = [r for r in experts_csv(s) if int(r["step"]) > 100]
        assert len(late[s.out_dir]) == 2 * 12
    assert all(float(r["load_max"]) < 2 and r["idle"] == "0" for r in late[balanced.out_dir])
    assert max(float(r["load_max"]) for r in late[left.out_dir]) > 3.5  # 4 is all tokens to the same two of eight
    assert any(int(r["idle"]) for r in late[left.out_dir])


# runs

@pytest.mark.parametrize("kw", [UNIFIED, dict(router_bias=0.01, router="sigmoid", router_aux=0.0),
                                dict(optimizer="muon", arch="gemma", expert_scales="own", heterogeneous=True)], ids=str)
def test_a_resumed_run_is_bit_for_bit_the_same(settings, tmp_path, monkeypatch, kw):
    kw = {**MIXED, **kw}
    reference = settings(**kw)
    main(reference)
    resumed = settings(out_dir=str(tmp_path / "resumed"), **kw)
    for step in (0, 4):
        with monkeypatch.context() as m:
            stop_at(m, step, signal.SIGTERM)
            with pytest.raises(SystemExit):
                main(resumed)
        resumed.resume = True
    main(resumed)
    assert log(resumed) == log(reference) and equal(weights(resumed), weights(reference))
    for file in ("scales.csv", "experts.csv"):
        assert (Path(resumed.out_dir) / file).read_text() == (Path(reference.out_dir) / file).read_text()
    if "router_bias" in kw:
        assert weights(reference)["blocks.0.ffn.bias"].abs().max() > 0


@pytest.mark.parametrize("kw", [{}, dict(router_bias=0.01, router_aux=0.0, router="sigmoid")], ids=str)
def test_losses_and_loads_do_not_depend_on_micro_batches_and_processes(settings, corpus, tmp_path, kw):
    common = dict(batch_tokens=128, micro_batch=8, max_steps=24, eval_interval=12, **UNIFIED, **MIXED, **kw)
    alone, parts = settings(**common), settings(**{**common, "micro_batch": 2}, out_dir=str(tmp_path / "parts"))
    main(alone)
    main(parts)
    two = settings(**{**common, "micro_batch": 2}, out_dir=str(tmp_path / "two"))
    run = torchrun(2, ROOT / "train.py", *flags(two))
    assert run.returncode == 0, run.stderr
    for s in (parts, two):
        assert furthest(losses(s.out_dir), losses(alone.out_dir)) <= 1e-5
        for a, b in zip(experts_csv(s), experts_csv(alone), strict=True):
            assert abs(float(a["entropy"]) - float(b["entropy"])) < 1e-4
            assert abs(float(a["load_max"]) - float(b["load_max"])) < 0.05 and a["idle"] == b["idle"]
    biases = [{n: x for n, x in load_checkpoint(Path(s.out_dir) / "ckpt.pt")["model"].items() if n.endswith("ffn.bias")}
              for s in (alone, two)]
    assert all((biases[0][n] - biases[1][n]).abs().max() <= 0.021 for n in biases[0])


def test_a_run_reports_the_load_of_its_experts(settings, capsys):
    s = settings(**MIXED)
    main(s)
    out = capsys.readouterr().out
    assert "load_max " in out and "idle " in out
    rows = experts_csv(s)
    assert [(r["step"], r["layer"]) for r in rows] == [(str(i), str(j)) for i in range(1, 9) for j in range(2)]
    assert all(1 <= float(r["load_max"]) <= 4 and 0 < float(r["entropy"]) <= 1.3863 for r in rows)
    printed = dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)
    assert int(printed["active_params"]) < int(printed["params"])
    assert not (Path(settings(out_dir=s.out_dir + "d").out_dir) / "experts.csv").exists()


def test_bf16_leaves_the_router_in_fp32(monkeypatch):
    model, (x, y) = tiny(dtype="bfloat16", shared_dim=8, heterogeneous=True, placement="dual_norm"), tokens()
    seen, folded_weight = [], Branches.folded_weight

    def recorded(branches, dtype, *args):
        if "router" in branches.n_out:
            seen.append(dtype)
        return folded_weight(branches, dtype, *args)

    monkeypatch.setattr(Branches, "folded_weight", recorded)
    for grouped in (False, True):
        seen.clear()
        for moe in mixtures(model):
            moe.grouped = grouped
        loss_and_gradients(model)
        list(model.generate(x[:, :5], 2))  # with weights kept, too
        assert seen and set(seen) == {torch.float32}
        exact = tiny(shared_dim=8, heterogeneous=True, placement="dual_norm")(x, y)[1]
        assert abs(model(x, y)[1] - exact) < 0.01


# counts and settings

def test_counts_and_flops_by_hand():
    d, f, E, K, S, L, V, T = 16, 8, 5, 2, 1, 2, 31, 12
    attention, expert = 4 * d * d, 3 * d * f
    model = tiny(expert_dim=f, shared_dim=S * f, scale_vectors=False)
    hidden = lambda n: L * (attention + E * d + n * expert)
    assert model.counts() == {"params": hidden(E + S) + 2 * V * d, "active_params": hidden(K + S) + 2 * V * d,
                              "scale_params": 0}
    assert model.flops_per_token() == 6 * (hidden(K + S) + V * d) + 12 * L * d * T
    own = dict(heterogeneous=True, ffn_placement="dual", reparam="or", expert_scales="own")
    counts = tiny(expert_dim=f, **own).counts()
    each = 2 * (d + 1) + 2 * (f + 1)  # v and u of gate and up
    assert counts["params"] - counts["active_params"] == L * (E - K) * (expert + each)
    assert counts["scale_params"] == L * (4 * (d + 1) + E * each) + d + 1


@pytest.mark.parametrize("kw,message", [
    (dict(n_experts=2, experts_per_token=3), "experts_per_token 3 is more than n_experts 2"),
    (dict(n_experts=0, shared_dim=8), "need n_experts"), (dict(n_experts=0, expert_dim=4), "need n_experts"),
    (dict(n_experts=64, experts_per_token=30), "leaves no channel"),
])
def test_impossible_mixtures_are_refused(kw, message, settings, capsys):
    with pytest.raises(ValueError, match=message):
        tiny(**kw)
    s = settings(**{**kw, "ffn_dim": 24})
    with pytest.raises(SystemExit) as stop:
        train.run(s)
    assert stop.value.code == 2 and message in capsys.readouterr().err and not Path(s.out_dir).exists()


@pytest.mark.parametrize("name", ["moe_quickstart", "moe_lab"])
def test_the_counts_in_the_comment_of_a_size_are_true(name):
    path = ROOT / "config" / "size" / f"{name}.py"
    counts = GPT(gpt_config(configure(Settings, [str(path)])[0])).counts()
    comment = path.read_text().partition("\nn_layer")[0]
    assert f"{counts['params']:,} parameters, {counts['active_params']:,} active" in comment
