"""Hugging Face's Llama on disk, in: the same loss and gradients, every strategy from the same function, refusals."""

import json
import os
from random import Random

import pytest
import torch
from test_export import IDS, logits, save_run

from configurator import ConfigError, configure
from data.tokens import BinWriter
from export import arguments as export_arguments
from export import main as export
from hf import adopt, load, open_model, read_config, read_tensors
from model import GPT
from norms import ScaleVector
from runs import load_checkpoint
from settings import FORMS, Settings, gpt_config
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


def from_folder(folder, *flags):
    """The GPT that train.py --init_from starts with."""
    settings, _ = configure(Settings, [f"--init_from={folder}", *flags])
    adopt(settings)
    settings.block_size = 128
    tensors = read_tensors(folder)  # first, as train.py does: a model that they do not fit may take all memory
    model = GPT(gpt_config(settings))
    load(model, tensors)
    return model


def their_names(model):
    """Our parameter -> the name of theirs, written out a second time."""
    yield model.wte, "model.embed_tokens.weight"
    yield model.lm_head.v["lm_head" if model.config.heterogeneous else "shared"].gamma, "model.norm.weight"
    if not model.config.tie_embeddings:
        yield model.lm_head.weight["lm_head"], "lm_head.weight"
    for i, block in enumerate(model.blocks):
        p = f"model.layers.{i}."
        yield block.attn.qkv.v["shared"].gamma, p + "input_layernorm.weight"
        yield block.ffn.gate_up.v["shared"].gamma, p + "post_attention_layernorm.weight"
        yield block.attn.o, p + "self_attn.o_proj.weight"
        yield block.ffn.down, p + "mlp.down_proj.weight"
        for c in "qkv":
            yield block.attn.qkv.weight[c], f"{p}self_attn.{c}_proj.weight"
        for c in ("gate", "up"):
            yield block.ffn.gate_up.weight[c], f"{p}mlp.{c}_proj.weight"


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_equal_llamas(shape, transformers, tmp_path):
    llama = save_llama(transformers, tmp_path, **SHAPES[shape])
    model = from_folder(tmp_path)
    x = torch.randint(0, llama.config.vocab_size, (3, 65), generator=torch.Generator().manual_seed(1))
    ours = model(x[:, :-1], x[:, 1:])[1]
    ours.backward()
    theirs = llama(x, labels=x).loss
    theirs.backward()
    assert abs(ours - theirs) < 1e-5
    theirs = dict(llama.named_parameters())
    pairs = list(their_names(model))
    assert len(pairs) == len(list(model.parameters())) == len(theirs)
    difference = {name: (p.grad - theirs[name].grad).abs().max().item() for p, name in pairs}
    print(f"{shape}: loss {abs(ours.item() - llama(x, labels=x).loss.item()):.1g}, gradients "
          f"{max(difference.values()):.2g} of up to {max(p.grad.abs().max() for p, _ in pairs):.2g}")
    assert max(difference.values()) < 1e-5, max(difference, key=difference.get)
    assert min(p.grad.abs().max() for p, _ in pairs) > 1e-4  # no gradient so small that nothing was compared


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flags", [(), ("--heterogeneous=True",), ("--placement=dual",), ("--scale_vectors=False",)],
                         ids=str)
@pytest.mark.parametrize("shape", ["plain", "gqa"])
def test_every_strategy_starts_from_llamas_function(shape, flags, form, transformers, tmp_path):
    llama = save_llama(transformers, tmp_path, **SHAPES[shape])
    model = from_folder(tmp_path, f"--reparam={form}", *flags)
    with torch.no_grad():
        assert (logits(model, IDS) - llama(IDS).logits).abs().max() < 1e-5
    gammas = [module() for module in model.modules() if isinstance(module, ScaleVector) and module.role == "input"]
    assert all((gamma - 1).abs().max() > 0.05 for gamma in gammas)  # theirs, not folded away
    if form == "or":
        alphas = [module.alpha for module in model.modules() if isinstance(module, ScaleVector)]
        assert all(abs(alpha.norm() - alpha.numel() ** 0.5) < 1e-3 for alpha in alphas)


def test_there_and_back_again(transformers, tmp_path):
    llama = save_llama(transformers, tmp_path / "llama", num_key_value_heads=2)
    model, tokenizer = open_model(tmp_path / "llama")
    assert tokenizer is None and (logits(model, IDS) - llama(IDS).logits).abs().max() < 1e-5
    with pytest.raises(ConfigError, match="its tokenizer is unknown"):
        export(export_arguments([str(tmp_path / "llama"), "--to", "hf", "--out", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()


def test_shards_and_half_precision_are_read(transformers, tmp_path):
    save_llama(transformers, tmp_path / "whole").to(torch.bfloat16).save_pretrained(tmp_path / "shards",
                                                                                    max_shard_size="20KB")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "shards", dtype=torch.float32)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model = from_folder(tmp_path / "shards")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (logits(model, IDS) - llama(IDS).logits).abs().max() < 1e-5


def test_configs_of_transformers_4_are_read(transformers, tmp_path):
    save_llama(transformers, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("rope_parameters", "head_dim", "num_key_value_heads"):
        del config[name]
    path.write_text(json.dumps({**config, "rope_theta": 500000, "rope_scaling": None}))
    config, _ = read_config(tmp_path)
    assert (config.rope_theta, config.d_head, config.n_kv_head) == (500000.0, 8, 4)


REFUSED = [
    (dict(model_type="mistral"), "model_type is 'mistral'; nanoScale reads"),
    (dict(model_type="gemma3_text"), "model_type is 'gemma3_text'"),
    (dict(model_type="gemma3"), "model_type is 'gemma3'"),
    (dict(model_type="qwen2"), "model_type is 'qwen2'"),
    (dict(model_type=["llama"]), r"model_type is \['llama'\]"),
    (dict(auto_map={"AutoModelForCausalLM": "theirs.Other"}), "does not know what auto_map"),
    (dict(sliding_window=64), "its sliding_window is 64"),
    (dict(rope_interleaved=True), "its rope_interleaved is True"),
    (dict(rope_theta=500.0), "rope_theta more than once: 500.0, 10000.0"),
    (dict(rope_parameters=None, rope_scaling=dict(rope_theta=1e6), rope_theta=1e4), "rope_theta more than once: 10000.0, 1"),
    (dict(rope_parameters={"full_attention": {"rope_type": "default"}}), "its rope_parameters says full_attention"),
    (dict(rope_parameters={"partial_rotary_factor": 0.5}), "its rope_parameters says partial_rotary_factor 0.5"),
    (dict(rope_parameters={"rope_theta": None}), "rope_theta must be a float"),
    (dict(rms_norm_eps="1e-6"), "rms_norm_eps must be a float"),
    (dict(tie_word_embeddings=None), "tie_word_embeddings must be True or False"),
    (dict(num_key_value_heads=0), "its num_key_value_heads is 0, which no model can have"),
    (dict(head_dim=0), "its head_dim is 0, which no model can have"),
    (dict(intermediate_size=0), "its intermediate_size is 0, which no model can have"),
    (dict(new_kind_of_attention=True), "does not know what new_kind_of_attention True does"),
    (dict(attention_bias=True), "its attention_bias is True"),
    (dict(mlp_bias=True), "its mlp_bias is True"),
    (dict(hidden_act="gelu"), "its hidden_act is 'gelu'"),
    (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "its rope_scaling says rope_type 'llama3'"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "its rope_scaling says type 'linear'"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "its rope_parameters says rope_type 'yarn'"),
    (dict(partial_rotary_factor=0.5), "its partial_rotary_factor is 0.5"),
    (dict(quantization_config={"bits": 4}), "its quantization_config is"),
    (dict(hidden_size=None), "hidden_size must be an int"),
    (dict(num_attention_heads=0), "num_attention_heads must be at least 1"),
    (dict(num_key_value_heads=3), "not divisible by n_kv_head 3"),
    (dict(head_dim=7), "a head's 7 are odd"),
    (dict(intermediate_size=50), "has shape"),
    (dict(num_hidden_layers=1), "nanoScale's models have no model.layers.1"),
    (dict(num_hidden_layers=3), "there is no tensor blocks.2"),
    (dict(num_hidden_layers=10**9), "num_hidden_layers must be at most 10000"),
    (dict(hidden_size=2**40), "config.json asks for"), (dict(hidden_size=2**62), "config.json asks for"),
    (dict(max_position_embeddings=10**12), "config.json asks for"), (dict(vocab_size=2**40), "config.json asks for"),
    (dict(intermediate_size=2**40), "config.json asks for"), (dict(head_dim=2**40), "config.json asks for"),
]


@pytest.mark.parametrize("change,message", REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_represented_is_refused_in_one_line(change, message, transformers, tmp_path):
    save_llama(transformers, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message) as e:
        from_folder(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("names,message", [
    ({"x": 5}, "its weight_map names"), ([], "its weight_map names"), ({"x": "../model.safetensors"}, "its weight_map names"),
    ({"x": "/etc/passwd"}, "its weight_map names"), ({"x": "none.safetensors"}, "there is no none.safetensors"),
    ({"x": "pipe"}, "not a regular file"), (5, "its weight_map names"), (None, "its weight_map names")], ids=str)
def test_an_index_names_regular_files_beside_it(names, message, transformers, tmp_path):
    (tmp_path / "model").mkdir()
    save_llama(transformers, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model.safetensors")
    os.mkfifo(tmp_path / "model" / "pipe")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(ConfigError, match=message) as e:
        open_model(tmp_path / "model")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", ["[" * 10**6, "[]", "5", "", "{", "{}", '{"model_type": "nanoscale"}',
                                     '{"model_type": ["llama"]}', '{"model_type": "llama", "rope_scaling": 5}'])
def test_a_config_that_is_none_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError) as e:
        read_config(tmp_path)
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value) and len(str(e.value)) < 400


def retensor(change):
    """A damage to the weights of a folder: change(tensors)."""
    def edit(folder):
        from safetensors.torch import load_file, save_file
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return edit


def unsay(*keys):
    """A damage to config.json: lines that are not there."""
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in keys}))
    return edit


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


NORM, EMBED, HEAD = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"
DAMAGES = [
    (unsay("vocab_size"), (), "'vocab_size' is missing"),
    (unsay("num_attention_heads"), (), "'num_attention_heads' is missing"),
    (unsay("model_type"), (), "neither an export's nor a Hugging Face model's"),
    (lambda folder: (folder / "config.json").unlink(), (), "there is no config.json: neither an exported model nor a run"),
    (write("config.json", "{"), (), "config.json: not JSON"),
    (write("config.json", "[1]"), (), "holds no JSON object"),
    (write("model.safetensors", "no"), (), "cut off or damaged"),
    (lambda folder: (folder / "model.safetensors").unlink(), (), "only weights in safetensors are read"),
    (write("model.safetensors.index.json", "no"), (), "index.json: not JSON"),
    (write("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'), (), "there is no gone.safetensors"),
    (retensor(lambda t: t.update({EMBED: t[EMBED].to(torch.int8)})), (), "quantised weights are not read"),
    (retensor(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})), (),
     "have no model.layers.0.self_attn.q_proj.bias"),
    (retensor(lambda t: t.pop(EMBED)), (), "there is no tensor wte"),
    (retensor(lambda t: t.update({EMBED: t[EMBED][:5].clone()})), (), r"wte has shape \[5, 32\]"),
    (retensor(lambda t: t.pop(HEAD)), (), "there is no lm_head.weight; if it is the token table, set tie_word_embeddings"),
    (retensor(lambda t: t.update({NORM: torch.zeros(32)})), ("--reparam=or",), "blocks.0.attn_norm: .*a γ of zeros"),
    (retensor(lambda t: t.update({NORM: -torch.ones(32)})), ("--reparam=er",), "blocks.0.attn_norm: .*not positive"),
    (write("config.json", '{"model_type": "nanoscale"}'), (), "is missing"),
]


@pytest.mark.parametrize("damage,flags,message", DAMAGES, ids=[message for *_, message in DAMAGES])
def test_what_is_damaged_is_refused_in_one_line(damage, flags, message, transformers, tmp_path):
    save_llama(transformers, tmp_path)
    from_folder(tmp_path, *flags)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message) as e:
        from_folder(tmp_path, *flags)
    assert "\n" not in str(e.value)


# Our own class has other defaults than Llama's, and reads no rope_parameters.
@pytest.mark.parametrize("change,message", [
    (dict(num_key_value_heads=...), "'num_key_value_heads' is missing"), (dict(head_dim=...), "'head_dim' is missing"),
    (dict(num_key_value_heads=None), "num_key_value_heads must be an int"), (dict(head_dim=None), "head_dim must be an int"),
    (dict(rope_theta=..., rope_parameters={"rope_theta": 30000.0}), "does not know what rope_parameters"),
    (dict(rms_norm_eps=...), "'rms_norm_eps' is missing"), (dict(ffn_placement="same"), "its ffn_placement is 'same', which no"),
    (dict(ffn_placement="triple"), "ffn_placement must be one of"), (dict(arch="palm"), "arch must be one of"),
    (dict(router="hash"), "router must be one of"), (dict(colour="red"), "does not know what colour 'red' does"),
    (dict(placement="norm"), "does not know what placement"),
    (dict(nanoscale_tokenizer=["bytes"]), "nanoscale_tokenizer must be a string")], ids=str)
def test_an_export_whose_config_was_edited_is_refused(change, message, tmp_path):
    save_run(tmp_path / "run", ["--n_layer=2", "--n_embd=32", "--placement=dual_norm"])
    export(export_arguments([str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]))
    path = tmp_path / "out" / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(ConfigError, match=message) as e:
        open_model(tmp_path / "out")
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)


# What a config.json may say beyond the shape, each in a random half of the folders below: None takes the line out.
SAYINGS = [
    ("rope_theta", [None, 10000.0, 30000.0]), ("rms_norm_eps", [None, 1e-2, 1e-5]), ("head_dim", [None, 8, 16]),
    ("rope_parameters", [None, None, {"rope_type": "default", "rope_theta": 30000.0}, {"rope_theta": 10000.0},
                         {"type": "linear", "factor": 2.0}, {"rope_type": "default", "type": "linear", "factor": 2.0},
                         {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
                         {"rope_type": "default", "partial_rotary_factor": 0.5}]),
    ("rope_scaling", [None, None, {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 30000.0},
                      {"rope_type": "dynamic", "factor": 2.0}, {"type": "default"}]),
    ("hidden_act", [None, "silu", "gelu", "swish"]), ("attention_bias", [None, False, True]),
    ("mlp_bias", [None, False]), ("tie_word_embeddings", [None, None, True, False]), ("num_key_value_heads", [4, 4, None, 2]),
    ("sliding_window", [None, None, 5]), ("partial_rotary_factor", [None, None, 0.5]), ("is_causal", [None, None, False]),
    ("pretraining_tp", [None, 1, 2]), ("max_position_embeddings", [None, 128, 4096]), ("use_cache", [None, False]),
    ("layer_types", [None, None, ["sliding_attention"] * 2]), ("rope_interleaved", [None, False]),
    ("logits_scaling", [None, None, 3.0]), ("dtype", [None, "float32", "bfloat16"]), ("eos_token_id", [None, 3, [1, 2]]),
    ("model_type", ["llama"] * 9 + ["mistral", "gemma3_text"])]


def accepted_and_refused(transformers, tmp_path, save, sayings, n):
    """
    Edit the config.json of n models on disk at random, and assert that each is refused in one line or read with
    transformers' logits. Returns (how many were accepted, what was said of the others).
    """
    random, accepted, refused = Random(0), 0, []
    for i in range(n):
        folder = tmp_path / str(i)
        tied = random.random() < 0.3
        save(transformers, folder, seed=i, num_key_value_heads=random.choice([2, 4]), tie_word_embeddings=tied)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        for name, values in random.sample(sayings, random.randrange(5)):
            value = random.choice(values)
            config = {key: x for key, x in config.items() if key != name} | ({} if value is None else {name: value})
        path.write_text(json.dumps(config))
        try:
            model, _ = open_model(folder)
        except ConfigError as e:
            assert "\n" not in str(e) and str(folder) in str(e)
            refused.append(str(e).split(": ", 1)[1])
            continue
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert (logits(model, IDS) - theirs(IDS).logits).abs().max() < 1e-5, config
        accepted += 1
    return accepted, refused


def test_whatever_is_accepted_has_the_logits_of_transformers(transformers, tmp_path):
    accepted, refused = accepted_and_refused(transformers, tmp_path, save_llama, SAYINGS, 150)
    assert accepted > 40 and len(refused) > 40  # both kinds were met
    reasons = " ".join(refused)
    for reason in ("rope_parameters says", "rope_scaling says", "rope_theta more than once", "hidden_act", "attention_bias",
                   "sliding_window", "is_causal", "layer_types", "logits_scaling"):
        assert reason in reasons, reason


@pytest.mark.parametrize("change", [
    dict(), dict(rope_theta=30000, rope_parameters=None), dict(rope_parameters=None), dict(rms_norm_eps=None),
    dict(rope_parameters=None, rope_scaling={"rope_type": "default", "rope_theta": 30000.0}), dict(hidden_act=None),
    dict(rope_parameters={"rope_theta": 30000.0}), dict(max_position_embeddings=None), dict(tie_word_embeddings=None),
    dict(head_dim=None, num_key_value_heads=None)], ids=str)
def test_what_a_llama_leaves_unsaid_is_read_as_its_class_reads_it(change, transformers, tmp_path):
    save_llama(transformers, tmp_path)
    path = tmp_path / "config.json"
    config = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert (logits(open_model(tmp_path)[0], IDS) - theirs(IDS).logits).abs().max() < 1e-5


def test_heads_are_tied_by_the_config_and_the_file_alike(transformers, tmp_path):
    from safetensors.torch import load_file, save_file
    path, weights = tmp_path / "config.json", tmp_path / "model.safetensors"

    def said(tied, head):
        save_llama(transformers, tmp_path)
        path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": tied}))
        tensors = load_file(weights)
        tensors["lm_head.weight"] = {"another": tensors["lm_head.weight"],
                                     "the table": tensors["model.embed_tokens.weight"].clone(), "none": None}[head]
        save_file({name: x for name, x in tensors.items() if x is not None}, weights, metadata={"format": "pt"})
        return open_model(tmp_path)[0].config.tie_embeddings

    assert said(True, "none") and said(True, "the table") and not said(False, "another") and not said(False, "the table")
    with pytest.raises(ConfigError, match="the file has another lm_head; set tie_word_embeddings to the one that is meant"):
        said(True, "another")  # transformers 4 takes the table, and 5 the head
    with pytest.raises(ConfigError, match="there is no lm_head.weight; if it is the token table, set tie_word_embeddings"):
        said(False, "none")  # transformers makes one up at random


def test_random_models_leave_as_what_they_are(transformers, tmp_path):
    """export.py compares what transformers makes of each folder; here our own reading of it is compared as well."""
    random = Random(1)
    for i in range(25):
        flags = {name: random.choice(values) for name, values in dict(
            arch=["llama", "gemma"], n_head=[1, 2, 4], d_head=[0, 6, 16], ffn_dim=[0, 31], tie_embeddings=[True, False],
            rope_theta=[500.0, 1e6], norm_eps=[0.0, 1e-6, 1e-2], scale_vectors=[True, True, False],
            heterogeneous=[True, False], placement=["input", "dual", "dual_norm", "norm"], v_placement=["same", "input"],
            ffn_placement=["same", "same", "input", "dual_norm"], qkv_norm=["head", "full"], n_experts=[0, 0, 3],
            experts_per_token=[1, 2], expert_dim=[20], router=["softmax", "softmax", "softmax_all", "sigmoid"],
            reparam=["direct", "or", "er", "product", "zero_centred"]).items()}
        if not flags["n_experts"]:
            del flags["expert_dim"]
        model = save_run(tmp_path / f"{i}", ["--n_layer=2", "--n_embd=32", "--block_size=128"] + [
            f"--{name}={value}" for name, value in flags.items()])
        export(export_arguments([str(tmp_path / f"{i}"), "--to", "hf", "--out", str(tmp_path / f"{i}.hf")]))
        again, _ = open_model(tmp_path / f"{i}.hf")
        assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 1e-5, flags


def test_a_tied_llama_without_scale_vectors_is_refused(transformers, tmp_path):
    save_llama(transformers, tmp_path, tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="tied to the token table; keep scale_vectors=True"):
        from_folder(tmp_path, "--scale_vectors=False")


# ---------------------------------------------------------------------------------------------------------------
# train.py --init_from


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    tokens = (torch.arange(6000) * 7 % 97 + 1).to(torch.uint16).numpy()
    for split in ("train", "val"):
        with BinWriter(folder / f"{split}.bin") as out:
            out.write(tokens)
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


def test_train_starts_from_a_llama_and_resumes_without_its_folder(dataset, transformers, tmp_path, capsys):
    llama = save_llama(transformers, tmp_path / "llama", num_key_value_heads=2)
    flags = [f"--init_from={tmp_path / 'llama'}", "--heterogeneous=True", "--reparam=or"]
    ckpt = train(dataset, tmp_path / "whole", *flags)
    assert (ckpt["settings"]["n_embd"], ckpt["settings"]["n_kv_head"]) == (32, 2)
    x = (torch.arange(6000) * 7 % 97 + 1)[:257]
    x = torch.stack([x[i * 32:i * 32 + 33] for i in range(8)])
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(llama(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())
    assert abs(first_val_loss(tmp_path / "whole") - expected) < 1e-5
    assert "trained without" not in capsys.readouterr().out

    train(dataset, tmp_path / "parts", *flags, "--max_steps=1", "--schedule=constant")
    (tmp_path / "llama").rename(tmp_path / "gone")
    with pytest.raises(ConfigError, match="n_layer 3 contradicts"):
        train(dataset, tmp_path / "parts", *flags, "--schedule=constant", "--resume=True", "--n_layer=3")
    resumed = train(dataset, tmp_path / "parts", *flags, "--schedule=constant", "--resume=True")
    (tmp_path / "gone").rename(tmp_path / "llama")
    whole = train(dataset, tmp_path / "whole again", *flags, "--schedule=constant")
    assert all(torch.equal(x, whole["model"][name]) for name, x in resumed["model"].items())


def test_train_goes_on_from_our_own_export(dataset, tmp_path):
    shape = ["--n_layer=2", "--n_embd=32", "--block_size=32"]
    save_run(tmp_path / "run", [*shape, "--placement=dual_norm", "--reparam=or"])
    export(export_arguments([str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]))
    (tmp_path / "ckpt").mkdir()
    train(dataset, tmp_path / "a", f"--init_from={tmp_path / 'out'}", "--placement=dual_norm", "--heterogeneous=True")
    reference, _ = open_model(tmp_path / "run")
    x = (torch.arange(6000) * 7 % 97 + 1)[:257]
    x = torch.stack([x[i * 32:i * 32 + 33] for i in range(8)])
    with torch.no_grad():
        assert abs(first_val_loss(tmp_path / "a") - reference(x[:, :-1], x[:, 1:])[1]) < 1e-5
    with pytest.raises(ConfigError, match="attn_placement 'input' has none: set it to dual_norm or norm"):
        train(dataset, tmp_path / "b", f"--init_from={tmp_path / 'out'}")
    with pytest.raises(ConfigError, match="_scale has no place"):
        train(dataset, tmp_path / "b", f"--init_from={tmp_path / 'out'}", "--placement=norm")
    with pytest.raises(ConfigError, match="n_layer 3 contradicts .* which has 2; leave it out"):
        train(dataset, tmp_path / "b", f"--init_from={tmp_path / 'out'}", "--placement=dual_norm", "--n_layer=3")
    (dataset / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 256}))
    with pytest.raises(ConfigError, match="knows tokens of 'bytes'"):
        train(dataset, tmp_path / "b", f"--init_from={tmp_path / 'out'}", "--placement=dual_norm")
    assert [path.name for path in (tmp_path / "b").glob("*")] in ([], ["train.lock"])  # nothing was written


def test_norms_that_are_added_are_said(dataset, transformers, tmp_path, capsys):
    save_llama(transformers, tmp_path / "llama")
    train(dataset, tmp_path / "a", f"--init_from={tmp_path / 'llama'}", "--placement=dual_norm")
    assert "attn_placement=dual_norm and v_placement=dual_norm and ffn_placement=dual_norm: norms that" in capsys.readouterr().out


def test_shape_in_a_dry_run(transformers, tmp_path, capsys):
    llama = save_llama(transformers, tmp_path / "llama", num_key_value_heads=2)
    main(configure(Settings, [f"--init_from={tmp_path / 'llama'}", "--dry_run=True"])[0])
    assert f"params: {sum(p.numel() for p in llama.parameters())}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="there is no config.json"):
        main(configure(Settings, [f"--init_from={tmp_path}", "--dry_run=True"])[0])
