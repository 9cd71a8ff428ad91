"""Import from Hugging Face format: the same logits, every strategy from the same function, refusals."""

import json
import os
from functools import partial
from random import Random

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from test_export import SHARED, export_to, logits, same, save_run

from configurator import ConfigError, configure
from data.tokens import Tokens, write_bin
from hf import adopt, load, open_model, read_config, read_tensors
from model import GPT
from norms import ScaleVector
from runs import load_checkpoint
from settings import FORMS, PLACEMENTS, Settings, gpt_config
from train import main

SHAPES = {
    "plain": dict(),
    "tied": dict(tie_word_embeddings=True),
    "odd": dict(intermediate_size=61, vocab_size=301, num_hidden_layers=3),
    "gqa": dict(num_key_value_heads=2, rms_norm_eps=1e-5),
    "mqa, tied": dict(num_key_value_heads=1, tie_word_embeddings=True, intermediate_size=33),
    "head_dim": dict(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="compares with transformers' Llama")


def save_llama(transformers, folder, seed=0, **kw):
    """A small LlamaForCausalLM on disk, its matrices large and its γ away from 1."""
    config = transformers.LlamaConfig(**{**dict(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, rms_norm_eps=1e-6, pad_token_id=None), **kw})
    torch.manual_seed(seed)
    llama = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in llama.parameters():
            p.mul_(5) if p.ndim == 2 else p.copy_((0.3 * torch.randn_like(p)).exp())
    llama.save_pretrained(folder)
    return llama


def edit(folder, **change):
    """Change what a folder's config.json says; ... takes a line out."""
    path = folder / "config.json"
    said = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in said.items() if value is not ...}))


def from_folder(folder, *flags):
    """The GPT that train.py --init_from starts with."""
    settings, _ = configure(Settings, [f"--init_from={folder}", *flags])
    adopt(settings)
    settings.block_size = 128
    tensors = read_tensors(folder)  # first, as train.py does: a model that they do not fit may take all memory
    model = GPT(gpt_config(settings))
    load(model, tensors)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_llamas(shape, transformers, tmp_path):
    llama = save_llama(transformers, tmp_path, **SHAPES[shape])
    same(logits(from_folder(tmp_path)), logits(llama))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flags", [(), ("--heterogeneous=True",), ("--placement=dual",), ("--placement=after",),
                                   ("--scale_vectors=False",)], ids=str)
def test_every_strategy_starts_from_llamas_function(flags, form, transformers, tmp_path):
    llama = save_llama(transformers, tmp_path, num_key_value_heads=2)
    model = from_folder(tmp_path, f"--reparam={form}", *flags)
    same(logits(model), logits(llama))
    gammas = [module() for module in model.modules() if isinstance(module, ScaleVector) and module.role == "input"]
    assert all((gamma - 1).abs().max() > 0.05 for gamma in gammas)  # theirs, not folded away
    if form == "or":
        alphas = [module.alpha for module in model.modules() if isinstance(module, ScaleVector)]
        assert all(abs(alpha.norm() - alpha.numel() ** 0.5) < 1e-3 for alpha in alphas)


def test_shards_and_half_precision_are_read(transformers, tmp_path):
    save_llama(transformers, tmp_path / "whole").to(torch.bfloat16).save_pretrained(tmp_path / "shards",
                                                                                    max_shard_size="20KB")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = from_folder(tmp_path / "shards")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same(logits(model), logits(llama))


HUGE = 10**400  # no float holds it
REFUSED = [
    (dict(model_type="mistral"), "model_type is 'mistral'; nanoScale reads"),
    (dict(model_type="mixtral"), "model_type is 'mixtral'"), (dict(model_type=["llama"]), "model_type is ['llama']"),
    (dict(hidden_act="gelu"), "its hidden_act is"), (dict(is_causal=False), "its is_causal is False"),
    (dict(attention_bias=True), "its attention_bias is True"), (dict(mlp_bias=True), "its mlp_bias is True"),
    (dict(quantization_config={"bits": 4}), "its quantization_config is"),
    (dict(rope_theta=500.0), "several values of rope_theta: 10000.0, 500.0; keep one"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "its rope_type is 'llama3'"),
    (dict(rope_parameters={"rope_theta": None}), "rope_theta must be a float"), (dict(rope_scaling=5), "config.json: "),
    (dict(rms_norm_eps="1e-6"), "rms_norm_eps must be a float"), (dict(hidden_size=None), "hidden_size must be an int"),
    (dict(tie_word_embeddings=None), "tie_word_embeddings must be True or False"),
    (dict(num_attention_heads=0), "num_attention_heads must be"), (dict(head_dim=7), "d_head 7 is odd"),
    (dict(num_key_value_heads=3), "not divisible by n_kv_head 3"), (dict(intermediate_size=50), "has shape"),
    (dict(num_hidden_layers=1), "model.layers.1.input_layernorm.weight has no place"),
    (dict(num_hidden_layers=3), "no tensor model.layers.2"), (dict(num_hidden_layers=10**9), "must be at most"),
    *((dict([(name, 2**30)]), "config.json describes at least") for name in (
        "hidden_size", "vocab_size", "max_position_embeddings", "intermediate_size", "head_dim")),
    *((dict([(name, HUGE)]), "config.json: ") for name in (
        "hidden_size", "vocab_size", "max_position_embeddings", "head_dim", "rms_norm_eps", "rope_theta"))]


def test_a_file_that_is_not_a_config_is_refused_in_one_line(tmp_path):
    for content in ("[" * 10**6, "[]", "5", "", "{", "{}", '{"model_type": "nanoscale"}'):
        (tmp_path / "config.json").write_text(content)
        with refused(str(tmp_path)):
            read_config(tmp_path)


def retensor(change):
    """A damage to the weights of a folder: change(tensors)."""
    def edit(folder):
        from safetensors.torch import load_file, save_file
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return edit


def fifo(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


NORM, EMBED, HEAD = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"
DAMAGES = [
    (lambda folder: (folder / "config.json").unlink(), (), "config.json: there is no such file"),
    (lambda folder: (folder / "model.safetensors").write_text("no"), (), "cut off or damaged"),
    (lambda folder: (folder / "model.safetensors").unlink(), (), "there is no model.safetensors; nanoScale reads"),
    (fifo, (), "model.safetensors: not a regular file"),
    (retensor(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})), (),
     "model.layers.0.self_attn.q_proj.bias has no place"),
    (retensor(lambda t: t.pop(EMBED)), (), f"there is no tensor {EMBED}"),
    (retensor(lambda t: t.update({EMBED: t[EMBED][:5].clone()})), (), f"{EMBED} has shape [5, 32] and should have ["),
    (retensor(lambda t: t.update({NORM: torch.zeros(32)})), ("--reparam=or",), f"{NORM}: or cannot"),
    (retensor(lambda t: t.update({NORM: -torch.ones(32)})), ("--reparam=er",), f"{NORM}: er cannot"),
    *((partial(edit, **change), (), message) for change, message in REFUSED)]


@pytest.mark.parametrize("damage,flags,message", DAMAGES, ids=[message for *_, message in DAMAGES])
def test_what_no_gpt_can_represent_is_refused_in_one_line(damage, flags, message, transformers, tmp_path):
    save_llama(transformers, tmp_path)
    from_folder(tmp_path, *flags)
    damage(tmp_path)
    with refused(message):
        from_folder(tmp_path, *flags)


@pytest.mark.parametrize("change,message", [
    (dict(num_key_value_heads=..., head_dim=..., n_experts=...), "'n_experts' is missing"),
    (dict(rope_theta=3e4), "several values of rope_theta"), (dict(router=...), "'router' is missing"),
    (dict(rope_scaling={"type": "linear"}), "its type is 'linear'"),
    (dict(head_placement="triple"), "head_placement must be one of"), (dict(arch="palm"), "arch must be one of"),
    (dict(router="hash"), "router must be one of"),
    (dict(nanoscale_tokenizer=["bytes"]), "its nanoscale_tokenizer is"),
    (dict(n_experts=6), "has shape [5] and should have [6]"), (dict(n_experts=-1), "n_experts must be at least 0"),
    (dict(n_experts=0, expert_dim=0, shared_dim=0), ".mlp.down_proj.weight")], ids=str)
def test_an_export_whose_config_was_edited_is_refused(change, message, tmp_path):
    save_run(tmp_path / "run", ["--n_layer=1", "--n_embd=32", "--placement=dual_norm", *SHARED])
    export_to(tmp_path / "run", tmp_path / "out")
    edit(tmp_path / "out", **change)
    with refused(message, str(tmp_path)):
        open_model(tmp_path / "out")


# What a config.json may say beyond the shape; those that other kinds of models have are ignored.
SAYINGS = [
    ("rope_theta", [10000.0, 30000.0]), ("rope_parameters", [{"rope_type": "default", "rope_theta": 30000.0}, None]),
    *((part, [{"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 2.0}, {"type": "default"},
              {"rope_type": "default", "type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0},
              {"rope_type": "default", "partial_rotary_factor": 0.5}]) for part in ("rope_parameters", "rope_scaling")),
    ("rms_norm_eps", [..., 1e-2]), ("hidden_act", [..., "silu", "gelu", "swish"]), ("attention_bias", [..., True]),
    ("mlp_bias", [..., True]), ("tie_word_embeddings", [..., True]), ("partial_rotary_factor", [0.5, None]),
    ("is_causal", [False]), ("sliding_window", [5, None]), ("quantization_config", [{"bits": 4}, None]),
    ("head_dim", [..., None, 16]), ("num_key_value_heads", [..., None, 2]), ("max_position_embeddings", [..., 4096]),
    ("dtype", [..., "bfloat16"]), ("eos_token_id", [3, [1, 2]]), ("model_type", ["mistral", "gemma3_text"]),
    ("use_cache", [False]), ("pretraining_tp", [2]), ("rope_interleaved", [True]), ("logits_scaling", [3.0]),
    ("attn_logit_softcapping", [1.0]), ("auto_map", [{"AutoModelForCausalLM": "theirs.Other"}]), ("no_setting", [1])]


def test_whatever_is_accepted_has_the_logits_of_transformers(transformers, tmp_path):
    save_llama(transformers, tmp_path)
    saved, accepted, refused = (tmp_path / "config.json").read_text(), [], []
    for name, value in ((name, value) for name, values in SAYINGS for value in values):
        for base in ({}, {"rope_parameters": ...}):  # as transformers 5 and 4 write it
            (tmp_path / "config.json").write_text(saved)
            edit(tmp_path, **{**base, name: value})
            try:
                model, _ = open_model(tmp_path)
            except ConfigError as e:
                assert "\n" not in str(e) and str(tmp_path) in str(e)
                refused.append(name)
                continue
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
            assert (logits(model) - logits(theirs)).abs().max() < 1e-5, (name, value, base)
            accepted.append(name)
    assert {"rope_theta", "rope_scaling", "no_setting"} <= {*accepted} and len({*refused}) > 10


@pytest.mark.parametrize("tied,head,message", [
    (True, "none", None), (True, "the table", None), (False, "another", None), (False, "the table", None),
    (True, "another", "lm_head.weight has no place"), (False, "none", "there is no tensor lm_head.weight")])
def test_a_tied_head_may_be_stored_but_must_equal_the_table(tied, head, message, transformers, tmp_path):
    save_llama(transformers, tmp_path)
    edit(tmp_path, tie_word_embeddings=tied)
    if head != "another":
        retensor(lambda t: t.pop(HEAD) if head == "none" else t.update({HEAD: t[EMBED].clone()}))(tmp_path)
    if message is None:
        assert open_model(tmp_path)[0].config.tie_embeddings == tied
    else:
        with refused(message):
            open_model(tmp_path)


def test_random_models_are_exported_and_read_back(tmp_path):
    """export.py compares what transformers makes of each folder; this adds our own reading of it."""
    random = Random(1)
    for i in range(15):
        flags = {name: random.choice(values) for name, values in dict(
            arch=["llama", "gemma"], n_head=[1, 2, 4], d_head=[0, 6, 16], ffn_dim=[0, 31], tie_embeddings=[True, False],
            rope_theta=[500.0, 1e6], norm_eps=[0.0, 1e-6, 1e-2], scale_vectors=[True, True, False],
            heterogeneous=[True, False], placement=PLACEMENTS, v_placement=["same", "input", "after"],
            ffn_placement=["same", "same", "input", "dual_norm"], head_placement=["same", "same", *PLACEMENTS],
            qkv_norm=["head", "full"], qk_norm=[True, False], n_experts=[0, 0, 3], experts_per_token=[1, 2],
            expert_dim=[20], shared_dim=[0, 12], router=["softmax", "softmax", "softmax_all", "sigmoid"],
            reparam=FORMS).items()}
        if not flags["n_experts"]:
            del flags["expert_dim"], flags["shared_dim"]
        model = save_run(tmp_path / f"{i}", ["--n_layer=2", "--n_embd=32", "--block_size=128"] + [
            f"--{name}={value}" for name, value in flags.items()])
        export_to(tmp_path / f"{i}", tmp_path / f"{i}.hf")
        same(logits(open_model(tmp_path / f"{i}.hf")[0]), logits(model))


def test_a_tied_llama_without_scale_vectors_is_refused(transformers, tmp_path):
    save_llama(transformers, tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="tied to the token table.*set scale_vectors=True"):
        from_folder(tmp_path, "--scale_vectors=False")


# ---------------------------------------------------------------------------------------------------------------
# train.py --init_from


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    tokens = (torch.arange(6000) * 7 % 97 + 1).to(torch.uint16).numpy()
    for split in ("train", "val"):
        write_bin(folder / f"{split}.bin", [tokens])
    (folder / "meta.json").write_text(json.dumps({"tokenizer": "bytes", "vocab_size": 256}))
    return folder


def train(dataset, out, *flags):
    settings, files = configure(Settings, [
        f"--dataset={dataset}", f"--out_dir={out}", "--device=cpu", "--block_size=32", "--batch_tokens=64",
        "--max_steps=2", "--eval_tokens=256", "--save_interval=1", "--warmup_steps=1", "--sample_tokens=0", *flags])
    main(settings, files)
    return load_checkpoint(out / "ckpt.pt")


def first_val_loss(out):
    return float((out / "log.csv").read_text().splitlines()[1].split(",")[3])


def val_batch(dataset):
    """The validation windows of a run on `dataset`."""
    data = Tokens(dataset, "val", 32, 256)
    return tuple(map(torch.from_numpy, data.window(data.spread(256))))


def test_train_starts_from_a_llama_and_resumes_without_its_folder(dataset, transformers, tmp_path, capsys):
    llama = save_llama(transformers, tmp_path / "llama", num_key_value_heads=2)
    flags = [f"--init_from={tmp_path / 'llama'}", "--heterogeneous=True", "--reparam=or", "--schedule=constant"]
    whole = train(dataset, tmp_path / "whole", *flags)
    assert (whole["settings"]["n_embd"], whole["settings"]["n_kv_head"]) == (32, 2)
    x, y = val_batch(dataset)
    with torch.no_grad():
        expected = F.cross_entropy(llama(x).logits.flatten(0, 1), y.flatten())
    assert abs(first_val_loss(tmp_path / "whole") - expected) < 1e-5
    assert "trained without" not in capsys.readouterr().out

    train(dataset, tmp_path / "parts", *flags, "--max_steps=1")
    (tmp_path / "llama").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="n_layer 3 contradicts"):
        train(dataset, tmp_path / "parts", *flags, "--resume=True", "--n_layer=3")
    resumed = train(dataset, tmp_path / "parts", *flags, "--resume=True")
    assert all(torch.equal(x, whole["model"][name]) for name, x in resumed["model"].items())


@pytest.mark.parametrize("mixture", [[], SHARED], ids=["dense", "mixture"])
def test_training_continues_from_our_own_export(mixture, dataset, tmp_path):
    out = f"--init_from={tmp_path / 'out'}"
    model = save_run(tmp_path / "run", ["--n_layer=2", "--n_embd=32", "--block_size=32", "--placement=dual_norm",
                                        "--reparam=or", *mixture])
    export_to(tmp_path / "run", tmp_path / "out")
    train(dataset, tmp_path / "a", out, "--placement=dual_norm", "--heterogeneous=True", "--expert_scales=own")
    with torch.no_grad():
        assert abs(first_val_loss(tmp_path / "a") - model(*val_batch(dataset))[1]) < 1e-5
    for flags, message in [((), "attn_placement 'input' has none: set it to dual_norm or norm"),
                           (("--placement=dual_norm", "--head_placement=dual"), "head_placement 'dual' has none"),
                           (("--placement=norm", "--head_placement=norm"), "norm.weight has no place"),
                           (("--placement=dual_norm", "--n_layer=3"), "n_layer 3 contradicts .* which has 2; leave"),
                           (("--placement=dual_norm", "--shared_dim=7"), "shared_dim 7 contradicts")]:
        with pytest.raises(ConfigError, match=message):
            train(dataset, tmp_path / "b", out, *flags)
    (dataset / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 256}))
    with pytest.raises(ConfigError, match="knows tokens of 'bytes'"):
        train(dataset, tmp_path / "b", out, "--placement=dual_norm")
    assert [path.name for path in (tmp_path / "b").glob("*")] in ([], ["train.lock"])  # nothing was written


def test_qk_norm_comes_with_the_folder_and_cannot_be_dropped(tmp_path):
    save_run(tmp_path / "run", ["--n_layer=1", "--n_embd=32", "--qk_norm=True"])
    export_to(tmp_path / "run", tmp_path / "out")
    settings, _ = configure(Settings, [f"--init_from={tmp_path / 'out'}"])
    assert adopt(settings) == ("bytes", "") and settings.qk_norm


def test_added_norms_are_reported(transformers, tmp_path):
    save_llama(transformers, tmp_path)
    settings, _ = configure(Settings, [f"--init_from={tmp_path}", "--placement=dual_norm", "--head_placement=input"])
    assert "attn_placement=dual_norm and v_placement=dual_norm and ffn_placement=dual_norm: " in adopt(settings)[1]
    settings, _ = configure(Settings, [f"--init_from={tmp_path}", "--qk_norm=True", "--head_placement=dual_norm"])
    assert adopt(settings)[1].startswith("head_placement=dual_norm and qk_norm=True: ")
