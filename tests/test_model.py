"""model.py: the two ways to compute it agree, every strategy starts from the same function, counts are exact."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from paper import as_written

from configurator import configure
from kernels import apply_rope, backend
from model import GPT, rope_tables
from norms import ScaleVector
from settings import FORMS, PLACEMENTS, GPTConfig, Settings, gpt_config

TINY = dict(n_layer=2, n_head=2, n_embd=16, ffn_dim=20, vocab_size=31, block_size=12, init_std=0.02,
            embedding_std=0.02)
UNIFIED = dict(heterogeneous=True, placement="dual_norm", reparam="or")
VARIANTS = list(itertools.product(("llama", "gemma"), FORMS, PLACEMENTS, (False, True)))


def tiny(seed=0, **kw):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY, **kw}))


def tokens(seed=0, B=3, T=12):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 31, (B, T), generator=g), torch.randint(0, 31, (B, T), generator=g)


def shake(model, seed=1):
    """Move every γ away from 1, so that a vector applied in the wrong place cannot hide."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ScaleVector):
                for p in module.parameters():
                    p.add_(0.3 * torch.randn(p.shape, generator=g))
    return model


def loss_and_gradients(model, run=None):
    """run: what is called instead of the model itself, such as its compiled form."""
    model.zero_grad(set_to_none=True)
    x, y = (t.to(model.wte.device) for t in tokens())
    loss = (model if run is None else run)(x, y)[1]
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}


def both_ways(model):
    """Loss and gradients of the folded model and of the one as the paper writes it."""
    ours = loss_and_gradients(model)
    with as_written():
        return ours, loss_and_gradients(model)


def loud(model):
    """fp64, with matrices so large that an error cannot hide in flat logits, and without ε, like the paper."""
    shake(model).double()
    for module in model.modules():
        module.eps = 0.0
    with torch.no_grad():
        for _, p, role, _ in model.named_roles():
            if role in ("matrix", "embedding", "router"):
                p.mul_(10)
    return model


def assert_close(a, b, atol):
    assert abs(a[0] - b[0]) < atol
    for name in a[1]:
        assert (a[1][name] - b[1][name]).abs().max() < atol, name


@pytest.mark.parametrize("arch,form,placement,heterogeneous", VARIANTS)
@pytest.mark.parametrize("tie", [False, True])
def test_the_folded_model_equals_the_written_one_in_loss_and_every_gradient(arch, form, placement, heterogeneous, tie):
    model = loud(tiny(arch=arch, reparam=form, placement=placement, heterogeneous=heterogeneous, tie_embeddings=tie,
                      norm_eps=0.0, dtype="float64"))
    assert_close(*both_ways(model), 1e-10)


@pytest.mark.parametrize("vocab_size", [31, 128])  # below and above the 8 · n_embd from which the Gram matrix is used
@pytest.mark.parametrize("head_placement", PLACEMENTS)
@pytest.mark.parametrize("tie", [False, True])
def test_the_heads_placement_in_both_ways(vocab_size, head_placement, tie):
    model = loud(tiny(head_placement=head_placement, heterogeneous=True, reparam="or", vocab_size=vocab_size,
                      tie_embeddings=tie, qk_norm=True, norm_eps=0.0, dtype="float64"))
    assert model.lm_head.gram_pays == (vocab_size == 128 and head_placement in ("dual_norm", "norm"))
    assert ("lm_head" in model.lm_head.u) == (head_placement in ("after", "dual", "dual_norm"))
    assert_close(*both_ways(model), 1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_gram_matrix_rounds_no_worse_than_a_norm_of_the_logits(dtype):
    kw = dict(head_placement="dual_norm", heterogeneous=True, reparam="or", vocab_size=4096)
    exact, model = tiny(**kw, dtype="float64").double(), tiny(**kw, dtype=dtype)
    assert model.lm_head.gram_pays

    def logits_and_gradients(model):
        logits = model(tokens()[0])[0]
        grads = loss_and_gradients(model)[1].values()
        return [logits, *(g for g in grads if g.dim())]  # the error of a single number says nothing

    ours = logits_and_gradients(model)
    with as_written():
        written = logits_and_gradients(model)
    assert ours[0].dtype == getattr(torch, dtype)
    for o, w, e in zip(ours, written, logits_and_gradients(exact)):
        assert (o.double() - e).norm() <= 2 * (w.double() - e).norm() + 1e-3 * e.norm()


@pytest.mark.parametrize("kw", [dict(), UNIFIED], ids=["baseline", "unified"])
def test_torch_compile_changes_neither_the_loss_nor_a_gradient(kw):
    model = shake(tiny(n_layer=1, vocab_size=128, init_std=0.0, embedding_std=0.0, **kw))
    torch._dynamo.reset()
    with backend("torch"):
        compiled = loss_and_gradients(model, torch.compile(model, backend="aot_eager"))
        torch.testing.assert_close(compiled, loss_and_gradients(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("placement,kw,head", [
    ("dual_norm", {}, "dual_norm"), ("after", {}, "after"), ("norm", {}, "input"),
    ("dual_norm", dict(scale_vectors=False), "input"), ("dual", dict(head_placement="dual_norm"), "dual_norm")])
def test_the_heads_placement_follows_the_others_unless_its_logits_would_have_size_1(placement, kw, head):
    assert GPTConfig(placement=placement, **kw).head_placement == head


@pytest.mark.parametrize("rms", [1e-3, 1.0])
def test_an_idle_pre_norm_is_idle_at_any_size_of_the_stream(rms):
    """v is 0.05, where decay may bring it, and the stream small: with or without the Pre-Norm, the loss is the same."""
    model = tiny(placement="dual_norm", heterogeneous=True, dtype="float64").double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(".gamma") and ".v." in name and "lm_head" not in name:
                p.fill_(0.05)
        model.wte.mul_(rms / model.wte.square().mean().sqrt())
    ours = model(*tokens())[1]
    with as_written():
        assert abs(ours - model(*tokens())[1]) < 1e-4 * ours


@pytest.mark.parametrize("heterogeneous", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("arch,qk_norm", [("llama", False), ("llama", True), ("gemma", False)])
def test_every_magnitude_moves_the_loss(arch, qk_norm, placement, heterogeneous):
    """Where a norm further on removes a vector's length, β's gradient would be rounding noise: there is no such β."""
    model = loud(tiny(arch=arch, qk_norm=qk_norm, placement=placement, heterogeneous=heterogeneous, reparam="or",
                      dtype="float64"))
    for name, gradient in loss_and_gradients(model)[1].items():
        assert not name.endswith(".beta") or abs(gradient) > 1e-8, name


def test_training_while_a_generator_is_open_gives_every_parameter_its_gradient():
    model, fresh = (tiny(placement="dual_norm", heterogeneous=True) for _ in range(2))
    next(model.generate(tokens(B=1, T=3)[0], 5))
    for (name, a), b in zip(loss_and_gradients(model)[1].items(), loss_and_gradients(fresh)[1].values()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("arch", ["llama", "gemma"])
@pytest.mark.parametrize("kw", [dict(), dict(heterogeneous=True), dict(placement="dual"),
                                *(dict(reparam=form) for form in FORMS)], ids=str)
def test_every_strategy_without_a_new_norm_starts_as_no_scale(arch, kw):
    reference, _ = tiny(arch=arch, scale_vectors=False)(tokens()[0])
    logits, _ = tiny(arch=arch, **kw)(tokens()[0])  # the same seed: the same matrices, whatever the vectors
    assert torch.allclose(logits, reference, atol=1e-6)


def test_the_new_norms_do_change_the_function():
    reference, _ = tiny(scale_vectors=False)(tokens()[0])
    assert not torch.allclose(tiny(placement="norm", scale_vectors=False)(tokens()[0])[0], reference, atol=1e-3)


@pytest.mark.parametrize("qkv_norm", ["head", "full"])
def test_qkv_norm_has_unit_mean_square_over_its_group(qkv_norm):
    model = tiny(placement="norm", qkv_norm=qkv_norm)
    q, _, v = model.blocks[0].attn.qkv(torch.randn(2, 3, 16) * 5)
    for y in (q, v):
        by_head = y.unflatten(-1, (2, 8)).square().mean(-1)
        assert torch.allclose(y.square().mean(-1), torch.ones(2, 3), atol=1e-3)
        assert torch.allclose(by_head, torch.ones(2, 3, 2), atol=1e-3) == (qkv_norm == "head")


def test_placements_of_attention_of_v_and_of_the_ffn_can_differ():
    block = tiny(attn_placement="dual_norm", v_placement="dual", ffn_placement="dual").blocks[0]
    assert block.attn.qkv.placement == {"q": "dual_norm", "k": "dual_norm", "v": "dual"}
    assert block.ffn.gate_up.placement == {"gate": "dual", "up": "dual"}


def test_model_is_causal():
    model, (x, _) = shake(tiny(placement="dual_norm", heterogeneous=True)), tokens()
    changed = x.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 31
    a, b = model(x)[0], model(changed)[0]
    assert torch.equal(a[:, :7], b[:, :7]) and not torch.allclose(a[:, 7:], b[:, 7:])


def test_rope_turns_by_relative_position():
    cos, sin = rope_tables(8, 32, 10000.0)
    q, k = torch.randn(1, 1, 1, 8).expand(1, 32, 1, 8), torch.randn(1, 1, 1, 8).expand(1, 32, 1, 8)
    q, k = apply_rope(q, cos, sin)[0, :, 0], apply_rope(k, cos, sin)[0, :, 0]
    scores = q @ k.T
    assert torch.allclose(scores.diagonal(3)[0], scores.diagonal(3), atol=1e-5)
    assert torch.allclose(q.norm(dim=-1), q[0].norm().expand(32), atol=1e-5)
    # position 1 turns the first pair by one radian
    assert math.isclose(math.atan2(sin[1, 0], cos[1, 0]), 1.0, rel_tol=1e-6)


def size(name, *strategies):
    files = [ROOT / "config" / "size" / f"{name}.py", *(ROOT / "config" / f"{s}.py" for s in strategies)]
    with torch.device("meta"):
        return GPT(gpt_config(configure(Settings, map(str, files))[0])).counts()


# The paper prints 748 as the width of its mixture of 0.5B, and 0.38B active parameters for the shape of its 1B.
@pytest.mark.parametrize("name,params,active", [
    ("llama_0.12b", 119_744_256, 119_744_256), ("llama_0.25b", 254_018_560, 254_018_560),
    ("llama_0.5b", 482_696_960, 482_696_960), ("llama_0.75b", 749_142_528, 749_142_528),
    ("llama_1b", 1_028_065_024, 1_028_065_024),
    ("moe_0.25b", 251_044_480, 113_633_920),  # 0.25B (0.11B)
    ("moe_0.5b", 480_942_336, 183_671_040),  # 0.5B (0.18B)
    ("moe_0.8b", 797_327_040, 281_231_040),  # 0.8B (0.28B)
    ("moe_1b", 1_058_931_712, 354_976_768),  # 1B (0.38B)
    ("moe_2b", 1_996_574_720, 620_856_320),  # 2B (0.62B)
])
def test_counts_of_the_papers_ten_sizes(name, params, active):
    counts = size(name)
    assert (counts["params"], counts["active_params"]) == (params, active)


@pytest.mark.parametrize("strategy,params,scale_params", [
    ("unified", 119_846_815, 112_543),  # the paper's 0.11985B; without the head's u it is 0.11980B
    ("ffn_plus_8", 119_854_848, 13 * 768),  # the paper's Llama-large
    ("no_scale", 119_744_256 - 13 * 768, 0),
])
def test_counts_of_strategies_at_the_papers_smallest_size(strategy, params, scale_params):
    counts = size("llama_0.12b", strategy)
    assert (counts["params"], counts["scale_params"]) == (params, scale_params)


def test_flops_by_hand():
    d, f, L, V, T = 16, 20, 2, 31, 12
    matmuls = L * (4 * d * d + 3 * d * f) + V * d
    for kw in (dict(), dict(tie_embeddings=True), dict(heterogeneous=True, placement="dual")):
        assert tiny(**kw).flops_per_token() == 6 * matmuls + 12 * L * d * T


def test_roles_cover_every_parameter_once_and_a_new_one_is_refused():
    model = tiny(arch="gemma", heterogeneous=True, placement="dual", reparam="or")
    named = [name for name, *_ in model.named_roles()]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    model.blocks[0].surprise = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match="blocks.0.surprise"):
        model.init_weights()


@pytest.mark.parametrize("role", ["input", "output"])
def test_final_norm_role(role):
    roles = {name: r for name, _, r, _ in tiny(final_norm_role=role).named_roles()}
    assert roles["lm_head.v.shared.gamma"] == role and roles["blocks.0.attn.qkv.v.shared.gamma"] == "input"


def test_bf16_activations_with_fp32_parameters_and_loss():
    model = tiny(dtype="bfloat16", placement="dual_norm", heterogeneous=True)
    logits, loss = model(*tokens())
    loss.backward()
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32} == {p.grad.dtype for p in model.parameters()}
    assert abs(loss - tiny(placement="dual_norm", heterogeneous=True)(*tokens())[1]) < 0.01


def test_loss_is_the_mean_over_all_tokens():
    model, (x, y) = tiny(), tokens()
    logits, loss = model(x, y)
    by_hand = -logits.double().log_softmax(-1).gather(-1, y[..., None]).mean()
    assert abs(loss - by_hand) < 1e-5


def test_generate_respects_top_k_temperature_and_block_size():
    model, (x, _) = tiny(), tokens(B=2, T=5)
    greedy = torch.cat(list(model.generate(x, 20, temperature=0)), dim=1)
    assert greedy.shape == (2, 20)  # past block_size 12, too
    assert torch.equal(greedy, torch.cat(list(model.generate(x, 20, top_k=1)), dim=1))
    assert torch.equal(greedy[:, :1], model(x)[0][:, -1].argmax(-1, keepdim=True))
    seeded = lambda s: torch.cat(list(model.generate(x, 20, generator=torch.Generator().manual_seed(s))), dim=1)
    assert torch.equal(seeded(1), seeded(1)) and not torch.equal(seeded(1), seeded(2))


@pytest.mark.parametrize("kw,message", [(dict(n_embd=15), "divisible by n_head"), (dict(n_embd=6), "odd")])
def test_impossible_shapes_are_refused(kw, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**TINY, **kw})
    with pytest.raises(ValueError, match="do not fit"):
        tiny()(torch.zeros(1, 13, dtype=torch.long))


def test_two_models_in_one_process_share_nothing():
    a, b = tiny(0), tiny(1)
    before = b(tokens()[0])[0]
    F.cross_entropy(a(tokens()[0])[0].flatten(0, 1), tokens()[1].flatten()).backward()
    assert all(p.grad is None for p in b.parameters()) and torch.equal(before, b(tokens()[0])[0])
