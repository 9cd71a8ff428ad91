"""
modeling_nanoscale.py in transformers: what its users expect of a model. test_export.py compares its numbers with
nanoScale's own. What the class inherits from transformers' Llama is not tested again.
"""

import pytest
import torch
import torch.nn.functional as F
from test_export import SHARED, config_args, export_to, save_run

from hf import fold, open_model

transformers = pytest.importorskip("transformers", reason="the modeling file is for transformers")
from modeling_nanoscale import NanoScaleConfig, NanoScaleForCausalLM, NanoScaleModel  # noqa: E402

KINDS = {
    "dnp": dict(attn_placement="dual_norm", v_placement="dual_norm", ffn_placement="dual_norm"),
    "mixture": dict(n_experts=4, expert_dim=24, shared_dim=24, router="sigmoid", ffn_placement="dual_norm"),
    "gemma": dict(arch="gemma"), "head": dict(head_placement="dual_norm", qk_norm=True),
    "norms": dict(attn_placement="norm", ffn_placement="norm", qkv_norm="full")}
IDS = torch.randint(1, 99, (2, 9), generator=torch.Generator().manual_seed(0))
each_kind = pytest.mark.parametrize("kind", KINDS)
each_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def make(kind, attention="sdpa", **kw):
    """A small model whose weights are all large enough to matter."""
    torch.manual_seed(0)
    model = NanoScaleForCausalLM(NanoScaleConfig(
        vocab_size=99, hidden_size=32, intermediate_size=45, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **KINDS[kind], **kw))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.2) if p.ndim == 2 or name.endswith("bias") else p.copy_((0.3 * torch.randn_like(p)).exp())
    model.set_attn_implementation(attention)
    return model.eval()


def logits(model, ids=None, **kw):
    with torch.no_grad():
        return model(ids, **kw).logits


def same(a, b, bar=1e-5):
    assert a.shape == b.shape and b.std() > 0.01
    assert (a - b).abs().max() < bar


# ---------------------------------------------------------------------------------------------------------------
# forward


@each_kind
def test_hidden_states_and_attentions(kind):
    model = make(kind, "eager")
    out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3 and len(out.attentions) == 2
    assert torch.equal(out.hidden_states[0], model.get_input_embeddings()(IDS))
    same(model.lm_head(out.hidden_states[-1]), out.logits)
    same(logits(make(kind, "sdpa"), IDS), out.logits)
    for weights in out.attentions:
        assert weights.shape == (2, 4, 9, 9) and (weights.sum(-1) - 1).abs().max() < 1e-5
        assert not weights.triu(1).any()
    out.hidden_states[1].retain_grad()
    out.logits.sum().backward()
    assert out.hidden_states[1].grad.abs().max() > 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "head"])
@pytest.mark.parametrize("tied", [False, True])
def test_resizing_keeps_what_was_there(kind, tied, tmp_path):
    model = make(kind, tie_word_embeddings=tied)
    before = logits(model, IDS)
    for n in (120, 99):
        model.resize_token_embeddings(n)
        after = logits(model, IDS)
        assert after.size(-1) == n == model.config.vocab_size
        same(after[..., :99], before)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    same(logits(NanoScaleForCausalLM.from_pretrained(tmp_path), IDS), before)


def test_a_head_with_a_norm_over_the_vocabulary_is_not_resized():
    with pytest.raises(ValueError, match="It cannot be resized"):
        make("head").resize_token_embeddings(120)


# ---------------------------------------------------------------------------------------------------------------
# generating, saving


@each_kind
@each_attention
def test_all_ways_to_generate_agree(kind, attention):
    model = make(kind, attention)
    options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    mask = torch.ones_like(IDS)
    idx = IDS
    for _ in range(8):  # the definition
        idx = torch.cat((idx, logits(model, idx, use_cache=False)[:, -1:].argmax(-1)), 1)
    greedy = idx[:, 9:].tolist()
    assert len({token for row in greedy for token in row}) > 3
    for more in (dict(), dict(use_cache=False), dict(cache_implementation="static")):
        assert model.generate(IDS, attention_mask=mask, **options, **more)[:, 9:].tolist() == greedy, more
    ids, padded = (F.pad(x, (3, 0)) for x in (IDS, mask))
    assert model.generate(ids, attention_mask=padded, **options)[:, 12:].tolist() == greedy
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(IDS), attention_mask=mask, **options)
    assert embedded[:, -8:].tolist() == greedy
    beams = [model.generate(IDS, attention_mask=mask, num_beams=3, use_cache=use, **options).tolist()
             for use in (True, False)]
    assert beams[0] == beams[1]


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(kind, dtype, tmp_path):
    model = make(kind).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again, info = NanoScaleForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(info.values())
    assert all(torch.equal(x, before) or name.endswith("bias")
               for (name, x), before in zip(again.state_dict().items(), model.state_dict().values(), strict=True))
    same(logits(again, IDS).float(), logits(model, IDS).float(), 1e-5 if dtype == torch.float32 else 0.1)
    body = NanoScaleModel.from_pretrained(tmp_path, dtype=dtype)
    same(body(IDS).last_hidden_state.float(), again.model(IDS).last_hidden_state.float())
    if kind == "mixture":  # the choice among experts stays as fine as it was trained
        assert again.model.layers[0].mlp.gate.e_score_correction_bias.dtype == torch.float32


@each_kind
def test_every_weight_of_a_fresh_model_is_initialised(kind):
    torch.manual_seed(1)
    fresh = NanoScaleForCausalLM(make(kind).config)
    for name, p in fresh.named_parameters():
        expected = 0.0 if name.endswith("bias") else 1.0
        assert 0.015 < p.std() < 0.025 if p.ndim == 2 else (p == expected).all(), name


# ---------------------------------------------------------------------------------------------------------------
# training


@each_kind
def test_gradients_with_and_without_checkpointing(kind):
    grads = []
    for checkpointing in (False, True):
        model, runs = make(kind).train(), []
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        hook = model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
        model(IDS, labels=IDS).loss.backward()
        hook.remove()
        assert len(runs) == 1 + checkpointing  # it ran again for the backward pass
        grads.append([p.grad for p in model.parameters()])
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*grads, strict=True))


@each_kind
def test_trainers_label_smoothing_is_its_definition(kind, tmp_path):
    pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    model = make(kind)
    args = transformers.TrainingArguments(output_dir=tmp_path, label_smoothing_factor=0.1, use_cpu=True)
    loss = transformers.Trainer(model, args).compute_loss(model, {"input_ids": IDS, "labels": IDS})
    logp = logits(model, IDS)[:, :-1].log_softmax(-1)
    expected = -0.9 * logp.gather(-1, IDS[:, 1:, None]).mean() - 0.1 * logp.mean()
    assert abs(loss - expected) < 1e-5


@pytest.mark.parametrize("flags", [[], SHARED], ids=["dense", "mixture"])
def test_a_step_on_an_export_is_ours(flags, tmp_path):
    """The loss, and by the weights after the step every gradient; transformers shifts the labels itself."""
    save_run(tmp_path / "run", config_args("unified", *flags))
    export_to(tmp_path / "run", tmp_path / "out")
    ours, _ = open_model(tmp_path / "out")
    ours.config.router_aux = ours.config.router_z = 0.0  # only our training has these losses
    theirs = NanoScaleForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(1, 256, (8, 24), generator=torch.Generator().manual_seed(1))  # so many that no expert is idle
    losses = ours(ids[:, :-1], ids[:, 1:])[1], theirs(ids, labels=ids).loss
    assert abs(losses[0] - losses[1]) < 1e-5
    idle = (".v.", ".u.v.", ".u.up.")  # scale vectors that are 1 there, since the weights have them
    trained = [p for name, p in ours.named_parameters() if not any(part in name for part in idle)]
    before, weights = fold(ours)[1], dict(theirs.named_parameters())
    for loss, parameters in zip(losses, (trained, weights.values())):
        loss.backward()
        torch.optim.SGD(parameters, lr=0.1).step()
    after = fold(ours)[1]
    for name, x in weights.items():
        assert (after[name] - x).abs().max() < 1e-5 and (x - before[name]).abs().max() > 1e-4, name


@each_kind
def test_from_pretrained_leaves_no_parameter_without_a_gradient(kind, tmp_path):
    """DDP waits for a gradient of every trainable parameter, and from_pretrained makes all parameters trainable."""
    make(kind).save_pretrained(tmp_path)
    model = NanoScaleForCausalLM.from_pretrained(tmp_path)
    model(IDS.repeat(4, 1), labels=IDS.repeat(4, 1)).loss.backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["dnp", "mixture"])
def test_peft_adapts_and_merges(kind):
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    for modules in (["q_proj", "up_proj"], "all-linear"):
        adapted = peft.get_peft_model(make(kind), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=modules))
        optimizer, losses = torch.optim.SGD(adapted.parameters(), lr=1.0), []
        for _ in range(5):
            loss = adapted(IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        trained = logits(adapted, IDS)
        same(logits(adapted.merge_and_unload(), IDS), trained)
