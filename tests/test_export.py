"""
export.py and the folding in hf.py: an export computes the model's function, by transformers and by our own code, its
tokenizer is right for every reader, and no half-written folder is left.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from hashlib import sha256

import pytest
import torch
from conftest import ROOT, refused, snapshot

import export
from configurator import ConfigError, configure
from data.tokens import load_tokenizer
from export import arguments, main, write_tokenizer
from hf import fold, load, open_model
from model import FFN, GPT
from moe import mixtures
from norms import ScaleVector
from runs import save_checkpoint
from settings import FORMS, GPTConfig, Settings, gpt_config

TEXT = (ROOT / "model.py").read_text(encoding="utf-8")[:200] + " café γ ⊙ 你好 \n"
IDS = torch.tensor([[0, *TEXT.encode()[:127]]])
TINY = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--ffn_dim=45", "--block_size=128"]
CONFIGS = sorted(path.stem for path in (ROOT / "config").glob("*.py"))
SHARED = ["--n_experts=5", "--router=sigmoid", "--expert_dim=24", "--shared_dim=20", "--router_bias=0.01"]


def shaken(config, seed=0):
    """A GPT far from its initialisation: every γ away from 1, and matrices so large that attention is not uniform."""
    torch.manual_seed(seed)
    model = GPT(replace(config, init_std=0.02, embedding_std=0.02))
    with torch.no_grad():
        for _, p, role, _ in model.named_roles():
            if role in ("matrix", "embedding", "router"):
                p.mul_(20 if role == "router" else 5)
        for ffn in mixtures(model):
            if config.router_bias:
                ffn.bias.normal_(0, 0.2)
        for module in model.modules():
            if isinstance(module, ScaleVector):
                for p in module.parameters():
                    p.add_(0.3 * torch.randn_like(p))
                assert (module() - 1).abs().mean() > 0.05
    return model


def config_args(name, *flags):
    return [*TINY, str(ROOT / "config" / f"{name}.py"), *flags]


def save_run(folder, args, tokenizer="bytes"):
    """A run's folder with a checkpoint of a shaken model; returns the model."""
    settings, _ = configure(Settings, args)
    model = shaken(gpt_config(settings))
    folder.mkdir()
    save_checkpoint(folder / "ckpt.pt", model, [], 0, settings, tokenizer, {})
    return model


def export_to(run, out):
    pytest.importorskip("transformers", reason="an export needs transformers")
    main(arguments([str(run), "--out", str(out)]))


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids)[0]


def same(a, b, bar=3e-5):
    assert b.std() > 0.1 and (a - b).abs().max() < bar  # logits that say something


# ---------------------------------------------------------------------------------------------------------------
# folding


@pytest.mark.parametrize("flags", [(), SHARED], ids=["dense", "mixture"])
@pytest.mark.parametrize("name", CONFIGS)
def test_folding_every_config_is_exact_and_leaves_the_model_alone(name, flags):
    config = gpt_config(configure(Settings, config_args(name, "--n_kv_head=2", *flags))[0], "float64")
    model = shaken(config).double()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    folded, tensors = fold(model)
    again = GPT(replace(folded, dtype="float64"))
    load(again, tensors)
    same(logits(again.double()), logits(model), 2e-5 if "norm" in config.head_placement else 3e-6)  # rounded to fp32
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    twice = fold(again)
    assert twice[0] == folded and all(torch.allclose(x, tensors[key]) for key, x in twice[1].items())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mixture", [dict(), dict(n_experts=5, expert_dim=18, shared_dim=12, router="sigmoid")],
                         ids=["dense", "mixture"])
@pytest.mark.parametrize("kw", [dict(), dict(heterogeneous=True, expert_scales="own"), dict(placement="dual"),
                                dict(placement="after"), dict(arch="gemma", placement="dual"),
                                dict(scale_vectors=False), dict(qk_norm=True),
                                dict(placement="dual_norm", heterogeneous=True)], ids=str)
def test_folded_weights_go_on_in_every_strategy_with_the_same_norms(kw, mixture, form):
    if mixture and kw.get("expert_scales") != "own":
        mixture = dict(mixture, router_bias=0.01)
    shape = dict(n_layer=2, n_embd=32, ffn_dim=45, n_kv_head=2, arch=kw.get("arch", "llama"),
                 qk_norm=kw.get("qk_norm", False), **mixture)
    source = "dual_norm" if kw.get("placement") == "dual_norm" else "dual"
    model = shaken(GPTConfig(**shape, placement=source, reparam="er"))
    again = GPT(GPTConfig(**{**shape, **kw}, reparam=form))
    load(again, fold(model)[1])
    same(logits(again), logits(model))
    assert all((module() - 1).abs().max() < 1e-6 for module in again.modules()
               if isinstance(module, ScaleVector) and module.role == "input")


# ---------------------------------------------------------------------------------------------------------------
# what hf.py does not know


@pytest.mark.parametrize("flags", [(), ("--n_experts=4",), ("--placement=dual_norm",)], ids=str)
def test_a_new_operation_in_the_model_is_refused(flags, tmp_path, monkeypatch):
    model, forward = save_run(tmp_path / "run", [*TINY, *flags]), FFN.forward
    monkeypatch.setattr(FFN, "forward", lambda *args, **kw: 1.01 * forward(*args, **kw))
    with pytest.raises(ConfigError, match="would differ from the model's by") as e:
        export_to(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()
    model.blocks[0].attn.new_scale = ScaleVector(32, "output")
    with pytest.raises(ConfigError, match="does not know the parameter blocks.0.attn.new_scale"):
        fold(model)


# ---------------------------------------------------------------------------------------------------------------
# by transformers

CLASSES = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "ours": "NanoScaleForCausalLM"}
EXPORTS = [
    ("llama", "baseline", "--tie_embeddings=True", "--n_kv_head=2"), ("llama", "hg_ap", "--n_kv_head=1"),
    ("llama", "baseline", "--d_head=6", "--rope_theta=500000", "--norm_eps=0.01"), ("llama", "unified_free"),
    ("llama", "no_scale", "--tie_embeddings=True"), ("llama", "hg_dp_or", "--vocab_size=300", "--n_head=1"),
    ("ours", "unified"), ("ours", "unified", "--n_kv_head=2", "--tie_embeddings=True", "--qkv_norm=full"),
    ("ours", "dnp", "--n_embd=30", "--d_head=12"), ("ours", "dnp", "--scale_vectors=False", "--tie_embeddings=True"),
    ("ours", "dp", "--ffn_placement=norm"), ("ours", "qk_norm", "--n_kv_head=2"), ("ours", "qk_norm_per_channel"),
    ("ours", "gemma_unified", "--n_kv_head=2"), ("ours", "gemma_wd_all", "--scale_vectors=False", "--qkv_norm=full"),
    ("mixtral", "hg", "--n_experts=4", "--expert_dim=24", "--n_kv_head=2", "--tie_embeddings=True"),
    ("mixtral", "hg_dp_er", "--n_experts=12", "--experts_per_token=3", "--expert_dim=7", "--expert_scales=own"),
    ("ours", "unified", *SHARED, "--expert_scales=own"), ("ours", "hg_dp", "--n_experts=4", "--router_bias=0.01"),
    ("ours", "gemma_unified", "--n_experts=4", "--router=softmax_all"), ("ours", "hg_ap", *SHARED)]

# transformers takes seconds to load: one fresh process reads every folder
READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
results = {}
ids, text = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    told = tokenizer(text)
    with torch.no_grad():
        torch.save(model(ids).logits, f"{folder}.logits.pt")
    prompt = ids[:, :7]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = torch.cat((torch.full((1, 3), tokenizer.eos_token_id), prompt), 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    results[folder] = {
        "class": type(model).__name__, "problems": {k: str(v) for k, v in info.items() if v}, "told": told.data,
        "decoded": tokenizer.decode(told["input_ids"]) == text,
        "begun": tokenizer(tokenizer.bos_token + "a")["input_ids"],
        "norms": [name for name, p in model.named_parameters() if p.ndim == 1 and (p != 1).any()],
        "greedy": model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 7:].tolist(),
        "padded": model.generate(batch, attention_mask=mask, **options)[0, 10:].tolist()}
    model.save_pretrained(f"{folder}.saved")
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """[(original model, folder, what transformers made of it)] of EXPORTS."""
    root, models = tmp_path_factory.mktemp("exports"), []
    for i, (_, *args) in enumerate(EXPORTS):
        models.append(save_run(root / f"run{i}", config_args(*args)))
        export_to(root / f"run{i}", root / f"hf{i}")
    torch.save((IDS, TEXT), root / "ids.pt")
    folders = [str(root / f"hf{i}") for i in range(len(models))]
    run = subprocess.run([sys.executable, "-c", READER, str(root / "ids.pt"), *folders], cwd=root, capture_output=True,
                         env=dict(os.environ, HF_HOME=str(root / "home"), HF_HUB_OFFLINE="1"), text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.split("RESULTS")[-1])
    return [(model, root / f"hf{i}", results[folder]) for i, (model, folder) in enumerate(zip(models, folders))]


@pytest.mark.parametrize("i", range(len(EXPORTS)), ids=[" ".join(args) for args in EXPORTS])
def test_an_export_computes_the_same_function(i, exports):
    model, folder, theirs = exports[i]
    assert theirs["class"] == CLASSES[EXPORTS[i][0]] and not theirs["problems"]
    same(torch.load(f"{folder}.logits.pt"), logits(model))
    assert theirs["class"] == CLASSES["ours"] or not theirs["norms"]  # theirs have γ = 1
    tokens = torch.cat(list(model.generate(IDS[:, :7], 12, temperature=0)), dim=1)[0].tolist()
    assert theirs["greedy"] == theirs["padded"] == tokens
    for saved in (folder, f"{folder}.saved"):  # by us, and by transformers
        again, tokenizer = open_model(saved)
        assert tokenizer == "bytes" and again.config.block_size == 128
        same(logits(again), logits(model))


@pytest.mark.parametrize("i", [0, 6])
def test_transformers_reads_every_byte_as_we_do(i, exports):
    theirs = exports[i][2]
    assert theirs["told"] == {"input_ids": list(TEXT.encode()), "attention_mask": [1] * len(TEXT.encode())}
    assert theirs["decoded"] and theirs["begun"] == [0, ord("a")]


# ---------------------------------------------------------------------------------------------------------------
# tokenizers

# The text by whose tokens llama.cpp's converter recognises a BPE, and GPT-2's hash of them (get_vocab_base_pre).
SAMPLE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 "
    "33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= "
    "нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL")
GPT2 = "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454"


@pytest.fixture(params=["bytes", "gpt2"])
def tokenizer(request, tmp_path):
    """Our tokenizer, and its folder as export.py writes it."""
    pytest.importorskip("transformers", reason="an export needs transformers")
    try:
        ours = load_tokenizer(request.param)
    except ConfigError as e:
        pytest.skip(str(e))
    write_tokenizer(tmp_path, ours, GPTConfig(vocab_size=ours.vocab_size))
    return ours, tmp_path


def test_tokenizer_json_encodes_and_decodes_as_ours(tokenizer):
    from tokenizers import Tokenizer
    ours, folder = tokenizer
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    odd = "".join(map(chr, range(1, 0x800))) + " \t\n  x'll '  1234 \r\n\u3000\U0001f600 " + TEXT
    code = [p.read_text(encoding="utf-8").replace("<|endoftext|>", "") for p in sorted(ROOT.glob("*.py"))]
    for text in (*code, odd, SAMPLE, "", " "):
        text = text.replace("▁", " ") if ours.name == "bytes" else text  # the one character that is lost
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text).tolist() and theirs.decode(ids) == text
    assert theirs.encode("<|endoftext|>a").ids == [ours.separator, *ours.encode("a").tolist()]
    assert theirs.get_vocab_size() == ours.vocab_size
    assert [theirs.token_to_id(theirs.id_to_token(i)) for i in range(ours.vocab_size)] == list(range(ours.vocab_size))
    if ours.name == "bytes":  # a character that is cut off takes no others with it
        assert theirs.decode([*b"ab c\xe4\xbd"]).startswith("ab c")


def test_llama_cpps_converter_knows_the_tokenizer(tokenizer):
    from transformers import AutoTokenizer
    ours, folder = tokenizer
    told = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if ours.name == "gpt2":
        assert sha256(str(AutoTokenizer.from_pretrained(folder).encode(SAMPLE)).encode()).hexdigest() == GPT2
    else:  # what gguf's LlamaHfVocab asks for
        assert told["model"]["byte_fallback"] and told["decoder"]["type"] == "Sequence"
        vocab = pytest.importorskip("gguf.vocab", reason="needs llama.cpp's gguf").LlamaHfVocab(folder)
        tokens = [(text.decode(), kind.name) for text, _, kind in vocab.all_tokens()]
        assert len(tokens) == 256 and tokens[0] == ("<|endoftext|>", "CONTROL") and tokens[32] == ("▁", "NORMAL")
        assert tokens[10] == ("\n", "NORMAL") and tokens[200] == ("<0xC8>", "BYTE")


# ---------------------------------------------------------------------------------------------------------------
# the folder


@pytest.fixture
def run(tmp_path):
    save_run(tmp_path / "run", config_args("unified"))
    return tmp_path / "run"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("step", ["write_tokenizer", "compare"])
def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch, error, step):
    def interrupt(*args):
        raise error

    monkeypatch.setattr(export, step, interrupt)
    with pytest.raises((KeyboardInterrupt, ConfigError)) as e:
        export_to(run, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert error is KeyboardInterrupt or "new cannot be written: disk full" in str(e.value)


def test_an_export_can_be_exported_again_and_replaces_nothing(run, tmp_path):
    (tmp_path / "a").mkdir()  # an empty folder is free
    export_to(run, tmp_path / "a")
    export_to(tmp_path / "a", tmp_path / "b")
    before = snapshot(tmp_path / "a")
    assert [*before.values()] == [*snapshot(tmp_path / "b").values()]
    (tmp_path / "other").touch()
    assert {p.stat().st_mode for p in (tmp_path / "a").iterdir()} == {(tmp_path / "other").stat().st_mode}
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").write_text("mine")
    for taken in ("a", "run", "file", "circle"):
        with pytest.raises(ConfigError, match="is there already; delete it, or name another folder"):
            export_to(run, tmp_path / taken)
    assert snapshot(tmp_path / "a") == before and (tmp_path / "file").read_text() == "mine"


def test_paths_that_are_not_utf8(tmp_path):
    sys.stdout.reconfigure(errors="replace")  # as streams() does
    name = os.fsdecode(b"r\xffn")
    model = save_run(tmp_path / name, config_args("unified"))
    export_to(tmp_path / name, tmp_path / f"{name}.out")
    same(logits(open_model(tmp_path / f"{name}.out")[0]), logits(model))


def old_settings(path):
    settings = {**asdict(configure(Settings, TINY)[0]), "colour": "red"}
    torch.save({"model": GPT(GPTConfig(n_layer=1)).state_dict(), "optimizers": [], "step": 0, "settings": settings,
                "tokenizer": "bytes", "data": {}, "scaler": {}, "rng": torch.get_rng_state()}, path / "ckpt.pt")


@pytest.mark.parametrize("damage,message", [
    (lambda path: path.rmdir(), "config.json: there is no such file"),
    (lambda path: path.rmdir() or path.symlink_to(path), "config.json: cannot be read: Too many levels"),
    (lambda path: None, "config.json: there is no such file"),
    (lambda path: (path / "ckpt.pt").write_text("not a checkpoint"), "cannot be read as a checkpoint"),
    (lambda path: (path / "config.json").write_text('{"settings": {}}'), "reads Llamas and folders that export.py"),
    (old_settings, "of another version of nanoScale")],
    ids=["nothing there", "circle", "empty", "text", "a run's config", "old settings"])
def test_what_is_not_ours_is_refused_in_one_line(damage, message, tmp_path):
    (tmp_path / "run").mkdir()
    damage(tmp_path / "run")
    with refused("run", message):
        export_to(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_a_folder_of_another_user_is_named_as_the_one_that_cannot_be_read(nobody):
    (nobody / "run").mkdir(mode=0)
    with refused("run/config.json: cannot be read: Permission denied"):
        export_to(nobody / "run", nobody / "out")


def test_a_run_on_data_without_meta_json_has_no_known_tokenizer(tmp_path):
    save_run(tmp_path / "run", TINY, tokenizer=None)
    with pytest.raises(ConfigError, match="its tokenizer is unknown.*its data has no meta.json"):
        export_to(tmp_path / "run", tmp_path / "out")


def test_without_transformers_an_export_says_what_it_needs(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        main(arguments([str(run), "--out", str(tmp_path / "out")]))
