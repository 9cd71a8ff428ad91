"""Mixtures of experts, out and in: every strategy under every router, by transformers itself and by our own code."""

import itertools
import json

import pytest
import torch
from conftest import ROOT
from test_export import IDS, TINY, export_all, logits, same_by_our_own_code, same_by_transformers, save_run, shaken
from test_hf import SAYINGS, accepted_and_refused, dataset, first_val_loss, from_folder, train, transformers

from configurator import ConfigError, configure
from export import arguments, main
from hf import fold, is_norm, load, open_model, read_tensors
from model import GPT
from moe import mixtures, take_router_statistics
from norms import ScaleVector
from settings import FORMS, GPTConfig, Settings
from train import main as train_main

ROUTERS = ("softmax", "softmax_all", "sigmoid")
STRATEGIES = sorted((ROOT / "config").glob("*.py"))
# Each strategy under a router in turn, and four of them under all; shared experts, the bias and whose v it is go round.
ROUND = list(itertools.product((0, 2), (0.0, 0.01), ("shared", "own")))
PAIRS = [(path.stem, ROUTERS[i % 3]) for i, path in enumerate(STRATEGIES)]
PAIRS += [pair for pair in itertools.product(("baseline", "dp", "unified", "gemma_unified"), ROUTERS) if pair not in PAIRS]
CASES = {}
for i, (strategy, router) in enumerate(PAIRS):
    shared, bias, scales = ROUND[i // 3 % len(ROUND)]
    CASES[f"{strategy}-{router}-{shared}-{bias}-{scales}"] = [
        str(ROOT / "config" / f"{strategy}.py"), "--n_experts=5", "--expert_dim=24", f"--router={router}",
        f"--n_shared_experts={shared}", f"--router_bias={bias}", f"--expert_scales={scales}"]
MORE = [("baseline", "--tie_embeddings=True", "--n_kv_head=2", "--experts_per_token=1"),
        ("no_scale", "--tie_embeddings=True", "--router=softmax_all", "--experts_per_token=4"),
        ("hg", "--router=sigmoid", "--d_head=6", "--n_shared_experts=1", "--norm_eps=0.01", "--rope_theta=500000"),
        ("hg", "--n_shared_experts=3", "--router=softmax_all", "--d_head=6", "--n_kv_head=1"),
        ("baseline", "--n_experts=1", "--experts_per_token=1", "--router=sigmoid"),
        ("unified", "--n_experts=12", "--experts_per_token=3", "--expert_dim=7", "--expert_scales=own"),
        *((name, "--expert_scales=own", "--expert_dim=16") for name in (
            "hg", "dp", "er", "product", "zero_centred", "unified_no_dnp")),  # plain Mixtrals
        ("dp", "--ffn_placement=norm"), ("baseline", "--n_embd=30", "--d_head=8"), ("gemma_unified", "--qkv_norm=full")]
CASES.update({f"{name}-more-{i}": [str(ROOT / "config" / f"{name}.py"), "--n_experts=4", *flags]
              for i, (name, *flags) in enumerate(MORE)})


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return export_all(tmp_path_factory.mktemp("mixtures"), CASES)


def expected_class(model):
    """export.py's head, written out a second time."""
    config = model.config
    normed = {config.attn_placement, config.ffn_placement} & {"norm", "dual_norm"}
    biased = any(ffn.bias.any() for ffn in mixtures(model))
    if normed or config.arch == "gemma" or config.n_embd % config.n_head:
        return "NanoScaleForCausalLM"
    plain = config.router == "softmax" and not biased and not config.n_shared_experts
    return "MixtralForCausalLM" if plain else "NanoScaleForCausalLM"


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_function(case, exports):
    same_by_transformers(case, *exports[case], expected_class(exports[case][0]))


@pytest.mark.parametrize("case", CASES)
def test_our_own_code_computes_the_same_function_from_all_folders(case, exports):
    same_by_our_own_code(*exports[case][:2])


def test_every_class_and_every_setting_was_met(exports):
    classes = {theirs["class"] for _, _, theirs in exports.values()}
    assert classes == {"MixtralForCausalLM", "NanoScaleForCausalLM"}
    for router in ROUTERS:
        met = {case.split("-", 2)[2] for case in CASES if f"-{router}-" in case}
        assert len(met) == len(ROUND)


@pytest.mark.parametrize("router", ROUTERS)
def test_the_shaken_models_would_show_an_error(router):
    """Tokens go to different experts, and the bias, every γ and every expert change the logits."""
    model = shaken(GPTConfig(n_layer=2, n_embd=32, n_experts=5, expert_dim=18, n_shared_experts=2, router=router,
                             router_bias=0.01, heterogeneous=True, expert_scales="own"))
    before = logits(model, IDS)
    assert all((load > 0).sum() >= 4 for load in counted(model))
    for ffn in mixtures(model):
        changed = [ffn.bias, *(p for p in ffn.parameters())]
        for p in changed:
            old = p.detach().clone()
            with torch.no_grad():
                p.copy_(p.flip(0))  # other experts' numbers, and γ's channels the other way round
            assert (logits(model, IDS) - before).abs().max() > 1e-3
            with torch.no_grad():
                p.copy_(old)
    assert torch.equal(logits(model, IDS), before)


def counted(model):
    """Each layer's choices of each expert, (n_layer, E)."""
    take_router_statistics(model)
    model(IDS)
    return take_router_statistics(model)[0]


def test_folding_is_exact_and_leaves_the_mixture_alone():
    for arch, router in (("llama", "softmax"), ("gemma", "sigmoid")):
        model = shaken(GPTConfig(arch=arch, n_layer=2, n_embd=32, n_experts=4, n_shared_experts=1, router=router,
                                 router_bias=0.01, heterogeneous=True, expert_scales="own", placement="dual_norm",
                                 reparam="er", dtype="float64")).double()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        config, tensors = fold(model)
        again = GPT(config)
        load(again, tensors)
        again = again.double()
        again.config.dtype = "float64"
        assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 3e-6
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        config.dtype = "float32"
        twice = fold(again)
        assert twice[0] == config and all(torch.allclose(x, tensors[name]) for name, x in twice[1].items())


def test_what_is_folded_is_gone(exports):
    _, folder, _ = exports[next(case for case in CASES if case.startswith("baseline-softmax-0-"))]
    tensors = read_tensors(folder / "hf")
    assert {name.split(".", 2)[2] for name in tensors if name.startswith("blocks.") and not is_norm(name)} == {
        *(f"attn.{c}" for c in "qkvo"), "ffn.router", *(f"ffn.experts.{c}" for c in ("gate", "up", "down"))}
    assert all((x == 1).all() for name, x in tensors.items() if is_norm(name))
    case = next(case for case in CASES if case.startswith("unified") and "no" not in case and "-2-" in case)
    _, folder, _ = exports[case]
    left = {name.split(".", 2)[2] for name in read_tensors(folder / "hf") if name.endswith("_scale")}
    assert left == {"attn.q_scale", "attn.k_scale", "ffn.experts.gate_scale", "ffn.shared.gate_scale"}


# ---------------------------------------------------------------------------------------------------------------
# from folded weights to any strategy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch,kw", [(arch, kw) for arch in ("llama", "gemma") for kw in (
    dict(), dict(heterogeneous=True), dict(heterogeneous=True, expert_scales="own"), dict(placement="dual"))] + [
    ("llama", dict(scale_vectors=False))], ids=str)
def test_every_strategy_with_the_same_norms_starts_from_the_same_function(arch, kw, form):
    shape = dict(arch=arch, n_layer=2, n_embd=32, n_experts=5, expert_dim=18, n_shared_experts=1, router="sigmoid")
    model = shaken(GPTConfig(**shape, placement="dual", reparam="or", router_bias=0.01))
    _, tensors = fold(model)
    again = GPT(GPTConfig(**shape, reparam=form, **kw))
    load(again, tensors)
    assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 1e-5
    assert all((module() - 1).abs().max() < 1e-6 for module in again.modules()
               if isinstance(module, ScaleVector) and module.role == "input")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_folded_dnp_goes_on_as_dnp(arch, form):
    shape = dict(arch=arch, n_layer=2, n_embd=32, n_experts=5, expert_dim=18, n_shared_experts=1,
                 placement="dual_norm")
    model = shaken(GPTConfig(**shape, reparam="zero_centred"))
    again = GPT(GPTConfig(**shape, heterogeneous=True, expert_scales="own", reparam=form))
    load(again, fold(model)[1])
    assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 1e-5


@pytest.mark.parametrize("change,message", [
    (lambda t: t.pop("blocks.1.ffn.router"), "there is no tensor blocks.1.ffn.router"),
    (lambda t: t.pop("blocks.1.ffn.shared.up"), "there is no tensor blocks.1.ffn.shared.up"),
    (lambda t: t.update({"blocks.0.ffn.experts.up": t["blocks.0.ffn.experts.up"][:3]}),
     r"blocks.0.ffn.experts.up has shape \[3, 18, 32\], where \[4, 18, 32\] belongs"),
    (lambda t: t.update({"blocks.0.ffn.bias": torch.zeros(3)}), r"blocks.0.ffn.bias has shape \[3\]"),
    (lambda t: t.update({"blocks.0.ffn.experts.gate_scale": torch.ones(4, 18)}), "experts.gate_scale has no place"),
    (lambda t: t.update({"blocks.0.ffn.gate": torch.ones(18, 32)}), "blocks.0.ffn.gate has no place"),
])
def test_tensors_that_do_not_fit_are_refused(change, message):
    config = GPTConfig(n_layer=2, n_embd=32, n_experts=4, expert_dim=18, n_shared_experts=1)
    _, tensors = fold(GPT(config))
    change(tensors)
    with pytest.raises(ConfigError, match=message):
        load(GPT(config), tensors)


def test_a_dense_model_is_no_mixture_and_a_mixture_not_dense():
    dense, mixture = GPTConfig(n_layer=1, n_embd=32), GPTConfig(n_layer=1, n_embd=32, n_experts=3)
    for a, b in ((dense, mixture), (mixture, dense)):
        with pytest.raises(ConfigError, match="there is no tensor blocks.0.ffn"):
            load(GPT(a), fold(GPT(b))[1])


# ---------------------------------------------------------------------------------------------------------------
# Hugging Face's Mixtral on disk, in

SHAPES = {
    "plain": dict(),
    "tied, gqa": dict(tie_word_embeddings=True, num_key_value_heads=2),
    "odd": dict(intermediate_size=19, vocab_size=301, num_local_experts=3, rms_norm_eps=1e-6),
    "three of six": dict(num_local_experts=6, num_experts_per_tok=3, head_dim=16),
}


def save_moe(transformers, folder, seed=0, **kw):
    """A small Mixtral on disk, its matrices large and its γ away from 1."""
    config = transformers.MixtralConfig(**{**dict(
        vocab_size=256, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=None, experts_implementation="eager"), **kw})
    torch.manual_seed(seed)
    theirs = transformers.MixtralForCausalLM(config)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_((0.3 * torch.randn_like(p)).exp()) if p.ndim == 1 else p.mul_(20 if name.endswith("gate.weight") else 5)
    theirs.save_pretrained(folder)
    return theirs


def their_pairs(model, theirs):
    """(name, our gradient, theirs) of every parameter, the names written out a second time."""
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    yield "embedding", model.wte.grad, grads.pop("model.embed_tokens.weight")
    yield "norm", model.lm_head.v["shared"].gamma.grad, grads.pop("model.norm.weight")
    if not model.config.tie_embeddings:
        yield "lm_head", model.lm_head.weight["lm_head"].grad, grads.pop("lm_head.weight")
    for i, block in enumerate(model.blocks):
        p, moe = f"model.layers.{i}.", block.ffn
        yield p + "attn_norm", block.attn.qkv.v["shared"].gamma.grad, grads.pop(p + "input_layernorm.weight")
        yield p + "ffn_norm", moe.router.v["shared"].gamma.grad, grads.pop(p + "post_attention_layernorm.weight")
        yield p + "o", block.attn.o.grad, grads.pop(p + "self_attn.o_proj.weight")
        for c in "qkv":
            yield p + c, block.attn.qkv.weight[c].grad, grads.pop(f"{p}self_attn.{c}_proj.weight")
        yield p + "router", moe.router.weight["router"].grad, grads.pop(p + "mlp.gate.weight")
        gate, up = grads.pop(p + "mlp.experts.gate_up_proj").chunk(2, dim=1)
        yield p + "gate", moe.experts.gate_up.weight["gate"].grad, gate
        yield p + "up", moe.experts.gate_up.weight["up"].grad, up
        yield p + "down", moe.experts.down.grad, grads.pop(p + "mlp.experts.down_proj")
    assert not grads


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_equal_mixtrals(shape, transformers, tmp_path):
    theirs = save_moe(transformers, tmp_path, **SHAPES[shape])
    model = from_folder(tmp_path, "--router_aux=0", "--router_z=0")  # training's losses: the class adds its own or none
    x = torch.randint(0, theirs.config.vocab_size, (3, 65), generator=torch.Generator().manual_seed(1))
    ours = model(x[:, :-1], x[:, 1:])[1]
    ours.backward()
    loss = theirs(x, labels=x).loss
    loss.backward()
    assert abs(ours - loss) < 1e-5
    pairs = list(their_pairs(model, theirs))
    assert len({id(grad) for _, grad, _ in pairs}) == len(list(model.parameters()))
    difference = {name: (a - b).abs().max().item() for name, a, b in pairs}
    print(f"{shape}: loss {abs(ours - loss).item():.1g}, gradients {max(difference.values()):.2g} "
          f"of up to {max(a.abs().max() for _, a, _ in pairs):.2g}")
    assert max(difference.values()) < 1e-5, max(difference, key=difference.get)
    assert min(a.abs().max() for _, a, _ in pairs) > 1e-4  # no gradient so small that nothing was compared


FLAGS = [(), ("--heterogeneous=True",), ("--heterogeneous=True", "--expert_scales=own"), ("--placement=dual",),
         ("--scale_vectors=False",)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_every_strategy_starts_from_mixtrals_function(flags, form, transformers, tmp_path):
    theirs = save_moe(transformers, tmp_path, **SHAPES["three of six"])
    model = from_folder(tmp_path, f"--reparam={form}", *flags)
    with torch.no_grad():
        assert (logits(model, IDS) - theirs(IDS).logits).abs().max() < 1e-5
    gammas = [module() for module in model.modules() if isinstance(module, ScaleVector) and module.role == "input"]
    assert all((gamma - 1).abs().max() > 0.05 for gamma in gammas)  # theirs, not folded away
    if form == "or":
        lengths = [module.alpha.norm(dim=-1) / module.n ** 0.5 for module in model.modules()
                   if isinstance(module, ScaleVector)]
        assert all((length - 1).abs().max() < 1e-5 for length in lengths)


REFUSED = [
    (dict(sliding_window=64), "its sliding_window is 64"),
    (dict(num_local_experts=5), "experts.0.w1.weight and the other experts' are not 5"),
    (dict(num_local_experts=3), "have no model.layers.0.block_sparse_moe.experts.3"),
    (dict(num_local_experts="4"), "num_local_experts must be an int"),
    (dict(num_experts_per_tok=None), "num_experts_per_tok must be an int"),
    (dict(num_experts_per_tok=5), "experts_per_token 5 is more than n_experts 4"),
    (dict(intermediate_size=23), "experts.down has shape"),
    (dict(model_type="llama"), "does not know what num_experts_per_tok 2 does"),
    (dict(model_type="qwen3_moe"), "model_type is 'qwen3_moe'"),
    (dict(hidden_act="gelu"), "its hidden_act is 'gelu'"),
]


@pytest.mark.parametrize("change,message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_represented_is_refused_in_one_line(change, message, transformers, tmp_path):
    save_moe(transformers, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message) as e:
        from_folder(tmp_path)
    assert "\n" not in str(e.value)


def test_whatever_is_accepted_has_the_logits_of_transformers(transformers, tmp_path):
    sayings = [(name, values) for name, values in SAYINGS if name != "model_type"] + [
        ("auto_map", [{"AutoModelForCausalLM": "theirs.Other"}]), ("head_dim", [None, 0, 16]),
        ("num_experts", [None, 4, 7]), ("num_experts_per_tok", [1, 2, 3, None]), ("router_jitter_noise", [None, 0.0, 0.1]),
        ("norm_topk_prob", [None, False]), ("output_router_logits", [None, True])]
    accepted, refused = accepted_and_refused(transformers, tmp_path, save_moe, sayings, 100)
    assert accepted > 15 and len(refused) > 15
    assert "num_experts" in " ".join(refused) and "num_experts_per_tok' is missing" in " ".join(refused)


@pytest.mark.parametrize("key", [
    "rms_norm_eps", "num_experts_per_tok", "num_local_experts", "rope_parameters", "num_key_value_heads",
    "max_position_embeddings"])
def test_what_a_config_leaves_to_the_class_is_asked_for(key, transformers, tmp_path):
    save_moe(transformers, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(ConfigError, match="is missing") as e:  # Mixtral's defaults are not Llama's
        from_folder(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("settings,message", [
    (dict(router="hash"), "router must be one of softmax, softmax_all, sigmoid, not 'hash'"),
    (dict(n_experts=-1, experts_per_token=-1), "n_experts must be at least 0"),
    (dict(n_experts="4"), "n_experts must be an int"),
    (dict(n_experts=5), "experts' are not 5 of one shape"),
    (dict(n_experts=0, expert_dim=0), "nanoScale's models have no model.layers.0.mlp.experts.0")])
def test_a_folder_of_ours_that_was_tampered_with_is_refused(settings, message, tmp_path):
    save_run(tmp_path / "run", [*TINY, "--n_experts=4", "--router=sigmoid"])
    main(arguments([str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]))
    path = tmp_path / "out" / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, **settings}))
    with pytest.raises(ConfigError, match=message) as e:
        open_model(tmp_path / "out")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


# ---------------------------------------------------------------------------------------------------------------
# train.py --init_from


def test_train_starts_from_a_mixtral(dataset, transformers, tmp_path, capsys):
    theirs = save_moe(transformers, tmp_path / "mixtral", num_key_value_heads=2)
    flags = [f"--init_from={tmp_path / 'mixtral'}", "--heterogeneous=True", "--reparam=or"]
    ckpt = train(dataset, tmp_path / "a", *flags)
    assert [ckpt["settings"][name] for name in ("n_experts", "expert_dim", "router")] == [4, 24, "softmax"]
    x = (torch.arange(6000) * 7 % 97 + 1)[:257]
    x = torch.stack([x[i * 32:i * 32 + 33] for i in range(8)])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(theirs(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
    assert abs(first_val_loss(tmp_path / "a") - expected) < 1e-5
    assert "trained without" not in capsys.readouterr().out
    train(dataset, tmp_path / "b", flags[0], "--ffn_placement=dual_norm")
    assert "ffn_placement=dual_norm: norms that" in capsys.readouterr().out
    for flag, message in (("--n_experts=8", "n_experts 8 contradicts .* which has 4; leave it out"),
                          ("--router=sigmoid", "router 'sigmoid' contradicts .* which has 'softmax'"),
                          ("--n_shared_experts=1", "n_shared_experts 1 contradicts")):
        with pytest.raises(ConfigError, match=message):
            train(dataset, tmp_path / "c", flags[0], flag)
    train(dataset, tmp_path / "d", *flags, "--max_steps=1", "--schedule=constant")
    (tmp_path / "mixtral").rename(tmp_path / "gone")
    resumed = train(dataset, tmp_path / "d", *flags, "--schedule=constant", "--resume=True")
    assert resumed["step"] == 2


def test_train_goes_on_from_our_own_export(dataset, tmp_path):
    save_run(tmp_path / "run", ["--n_layer=2", "--n_embd=32", "--block_size=32", "--n_experts=4", "--router=sigmoid",
                                "--n_shared_experts=1", "--router_bias=0.01", "--placement=dual_norm", "--reparam=or"])
    main(arguments([str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]))
    train(dataset, tmp_path / "a", f"--init_from={tmp_path / 'out'}", "--placement=dual_norm", "--heterogeneous=True",
          "--expert_scales=own")
    reference, _ = open_model(tmp_path / "run")
    x = (torch.arange(6000) * 7 % 97 + 1)[:257]
    x = torch.stack([x[i * 32:i * 32 + 33] for i in range(8)])
    with torch.no_grad():
        assert abs(first_val_loss(tmp_path / "a") - reference(x[:, :-1], x[:, 1:])[1]) < 1e-5
    with pytest.raises(ConfigError, match="placement 'input' has none: set it to dual_norm or norm"):
        train(dataset, tmp_path / "b", f"--init_from={tmp_path / 'out'}")


def test_shape_in_a_dry_run(transformers, tmp_path, capsys):
    theirs = save_moe(transformers, tmp_path / "mixtral")
    train_main(configure(Settings, [f"--init_from={tmp_path / 'mixtral'}", "--dry_run=True"])[0])
    assert f"params: {sum(p.numel() for p in theirs.parameters())}" in capsys.readouterr().out
