"""
export.py and hf.py: what is handed over computes the same function, by transformers itself and by our own code;
nothing half is left, nothing is overwritten unasked.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from conftest import ROOT

import export
import hf
import model as model_file
import sample
from configurator import ConfigError, configure
from data.tokens import DataError, load_tokenizer
from export import arguments, byte_symbols, main, write_tokenizer
from hf import fold, hf_type, is_norm, load, open_model, read_tensors
from kernels import rms_norm
from model import GPT
from moe import mixtures
from norms import ScaleVector
from runs import save_checkpoint
from settings import FORMS, GPTConfig, Settings, gpt_config

TEXT = (ROOT / "model.py").read_text(encoding="utf-8")[:200] + " café γ ⊙ 你好 \n"
TINY = ["--n_layer=2", "--n_head=4", "--n_embd=32", "--ffn_dim=45", "--block_size=128"]

# every config file, and shapes that none of them has
CASES = {path.stem: [str(path)] for path in sorted((ROOT / "config").glob("*.py"))}
CASES.update({f"{name}-{i}": [str(ROOT / "config" / f"{name}.py"), *flags] for i, (name, *flags) in enumerate([
    ("baseline", "--tie_embeddings=True", "--n_kv_head=2"), ("no_scale", "--tie_embeddings=True", "--n_kv_head=1"),
    ("baseline", "--d_head=6", "--rope_theta=500000", "--norm_eps=0.01"), ("hg", "--vocab_size=300", "--n_head=1"),
    ("gemma_wd_all", "--n_kv_head=2", "--d_head=12", "--tie_embeddings=True"), ("gemma_wd_all", "--qkv_norm=full"),
    ("gemma_wd_all", "--scale_vectors=False"), ("gemma_wd_all", "--placement=dual"),
    ("unified", "--n_kv_head=2", "--tie_embeddings=True"), ("unified_full_norm", "--n_kv_head=1", "--d_head=12"),
    ("dnp", "--scale_vectors=False", "--tie_embeddings=True"), ("dp", "--ffn_placement=norm"),
    ("gemma_unified", "--qkv_norm=full", "--n_kv_head=2"), ("baseline", "--n_embd=30", "--d_head=8"),
])})


def shaken(config, seed=0, size=5.0):
    """A GPT far from its initialisation: every γ away from 1, and matrices so large that attention is not uniform."""
    torch.manual_seed(seed)
    model = GPT(replace(config, init_std=0.02, embedding_std=0.02))
    with torch.no_grad():
        for _, p, role, _ in model.named_roles():
            if role in ("matrix", "embedding", "router"):
                p.mul_(4 * size if role == "router" else size)
        for ffn in mixtures(model):
            if config.router_bias:
                ffn.bias.normal_(0, 0.2)
        for module in model.modules():
            if isinstance(module, ScaleVector):
                for p in module.parameters():
                    p.add_(0.3 * torch.randn_like(p))
                assert (module() - 1).abs().mean() > 0.05
    return model


def save_run(folder, args, tokenizer="bytes"):
    """A run's folder with a checkpoint of a shaken model; returns the model."""
    settings, _ = configure(Settings, args)
    model = shaken(gpt_config(settings))
    folder.mkdir()
    save_checkpoint(folder / "ckpt.pt", model, [], 0, settings, tokenizer, {})
    return model


def logits(model, ids):
    with torch.no_grad():
        return model(ids)[0]


IDS = torch.tensor([[0, *TEXT.encode()[:127]]])

# transformers takes seconds to load: one fresh process reads every folder
READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
results = {}
for folder in sys.argv[3:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with open(sys.argv[2], encoding="utf-8", newline="") as f:
        text = f.read()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    told = tokenizer(text)
    encoded = told["input_ids"]
    ids = torch.load(sys.argv[1])
    with torch.no_grad():
        torch.save(model(ids).logits, f"{folder}/../logits.pt")
    prompt = ids[:, :7]
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    batch = torch.cat((torch.full((1, 3), tokenizer.eos_token_id), prompt), 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    results[folder] = {
        "class": type(model).__name__, "problems": {k: str(v) for k, v in info.items() if v}, "encoded": encoded,
        "told": sorted(told),
        "decoded": tokenizer.decode(encoded, skip_special_tokens=True) == text,
        "norms": [name for name, p in model.named_parameters() if p.ndim == 1 and (p != 1).any()],
        "greedy": model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0, 7:].tolist(),
        "uncached": model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=False,
                                   **options)[0, 7:].tolist(),
        "padded": model.generate(batch, attention_mask=mask, **options)[0, 10:].tolist()}
    model.save_pretrained(f"{folder}/../saved")
print("RESULTS" + json.dumps(results))
"""


def export_all(root, cases):
    """{case: (original model, folder with hf/, what transformers made of it)}"""
    pytest.importorskip("transformers", reason="the check by transformers itself needs it installed")
    models = {}
    for case, args in cases.items():
        models[case] = save_run(root / case, [*TINY, *args])
        main(arguments([str(root / case), "--to", "hf", "--out", str(root / f"{case}.out" / "hf")]))
    torch.save(IDS, root / "ids.pt")
    (root / "text.txt").write_text(TEXT, encoding="utf-8")
    folders = {case: str(root / f"{case}.out" / "hf") for case in cases}
    env = dict(os.environ, HF_HOME=str(root / "hf_home"), HF_HUB_OFFLINE="1")
    run = subprocess.run([sys.executable, "-c", READER, str(root / "ids.pt"), str(root / "text.txt"),
                          *folders.values()], env=env, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    results = json.loads(run.stdout.split("RESULTS")[-1])
    return {case: (models[case], root / f"{case}.out", results[folders[case]]) for case in cases}


def same_by_transformers(case, model, folder, theirs, expected):
    """Asserts that transformers computes the model's logits, and continues as it does; expected: the class."""
    ours = logits(model, IDS)
    assert theirs["class"] == expected and not theirs["problems"]
    assert ours.std() > 0.25  # logits that say something
    difference = (torch.load(folder / "logits.pt") - ours).abs().max().item()
    print(f"{case}: {theirs['class']}, largest difference {difference:.2g} of logits up to {ours.abs().max():.3g}")
    assert difference < 1e-5
    if expected != "NanoScaleForCausalLM":
        assert not theirs["norms"]  # all ones
    # the same continuation, also without the cache, and from within a batch with padding on the left
    tokens = torch.cat(list(model.generate(IDS[:, :7], 12, temperature=0)), dim=1)[0].tolist()
    assert theirs["greedy"] == theirs["uncached"] == theirs["padded"] == tokens


def same_by_our_own_code(model, folder):
    for by in ("hf", "saved"):  # by us, and by transformers
        again, tokenizer = open_model(folder / by)
        assert tokenizer == "bytes"
        assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 1e-5
        assert again.config.block_size == 128


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return export_all(tmp_path_factory.mktemp("exports"), CASES)


def expected_class(model):
    config = model.config
    if {config.attn_placement, config.ffn_placement} & {"norm", "dual_norm"} or config.n_embd % config.n_head:
        return "NanoScaleForCausalLM"
    return "LlamaForCausalLM" if config.arch == "llama" else "NanoScaleForCausalLM"


@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same_function(case, exports):
    same_by_transformers(case, *exports[case], expected_class(exports[case][0]))


@pytest.mark.parametrize("case", CASES)
def test_our_own_code_computes_the_same_function_from_all_folders(case, exports):
    same_by_our_own_code(*exports[case][:2])


@pytest.mark.parametrize("case", ["baseline", "unified"])
def test_transformers_reads_every_byte_as_we_do(case, exports):
    _, _, theirs = exports[case]
    assert theirs["encoded"] == [0, *TEXT.encode()] and theirs["decoded"]
    assert theirs["told"] == ["attention_mask", "input_ids"]  # all that generate(**tokenizer(…)) may be told


def test_unified_free_leaves_as_a_plain_llama(exports):
    assert exports["unified_free"][2]["class"] == "LlamaForCausalLM"


def test_what_is_folded_is_gone(exports):
    _, folder, _ = exports["baseline"]
    assert all((x == 1).all() for name, x in read_tensors(folder / "hf").items() if is_norm(name))
    _, folder, _ = exports["unified"]
    left = {name.split(".", 2)[2] for name in read_tensors(folder / "hf") if name.endswith("_scale")}
    assert left == {"attn.q_scale", "attn.k_scale", "ffn.gate_scale"}


def test_folding_is_exact_and_leaves_the_model_alone():
    for arch in ("llama", "gemma"):
        model = shaken(GPTConfig(arch=arch, n_layer=2, n_embd=32, n_kv_head=2, heterogeneous=True,
                                 placement="dual_norm", reparam="er", dtype="float64")).double()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        config, tensors = fold(model)
        again = GPT(replace(config, dtype="float64"))
        load(again, tensors)
        # rounded once, to fp32: nothing but that may differ
        assert (logits(again.double(), IDS) - logits(model, IDS)).abs().max() < 3e-6
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        twice = fold(again)
        assert twice[0] == config and all(torch.allclose(x, tensors[name]) for name, x in twice[1].items())


# ---------------------------------------------------------------------------------------------------------------
# from folded weights to any strategy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch,kw", [(arch, kw) for arch in ("llama", "gemma") for kw in (
    dict(), dict(heterogeneous=True), dict(placement="dual"))] + [("llama", dict(scale_vectors=False))], ids=str)
def test_every_strategy_with_the_same_norms_starts_from_the_same_function(arch, kw, form):
    shape = dict(arch=arch, n_layer=2, n_embd=32, ffn_dim=45)
    model = shaken(GPTConfig(**shape, placement="dual", reparam="or"))
    _, tensors = fold(model)
    again = GPT(GPTConfig(**shape, reparam=form, **kw))
    load(again, tensors)
    assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 1e-5
    assert all((module() - 1).abs().max() < 1e-6 for name, module in again.named_modules()
               if isinstance(module, ScaleVector) and module.role == "input")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_folded_dnp_goes_on_as_dnp(arch, form):
    shape = dict(arch=arch, n_layer=2, n_embd=32, ffn_dim=45, n_kv_head=2, placement="dual_norm")
    model = shaken(GPTConfig(**shape, reparam="zero_centred"))
    again = GPT(GPTConfig(**shape, heterogeneous=True, reparam=form))
    load(again, fold(model)[1])
    assert (logits(again, IDS) - logits(model, IDS)).abs().max() < 1e-5


def test_a_scale_vector_of_zeros_has_no_direction():
    for form, message in (("or", "a γ of zeros"), ("er", "a γ that is not positive")):
        with pytest.raises(ValueError, match=message):
            ScaleVector(4, "input", form).set(torch.zeros(4))
    ScaleVector(4, "input", "product").set(torch.zeros(4))


@pytest.mark.parametrize("change,message", [
    (lambda t: t.pop("blocks.1.attn.k"), "there is no tensor blocks.1.attn.k"),
    (lambda t: t.update(wte=t["wte"][:5]), r"wte has shape \[5, 32\], where \[256, 32\] belongs"),
    (lambda t: t.update({"blocks.0.ffn.gate_scale": torch.ones(45)}), "blocks.0.ffn.gate_scale has no place"),
])
def test_tensors_that_do_not_fit_are_refused(change, message):
    config = GPTConfig(n_layer=2, n_embd=32, ffn_dim=45)
    _, tensors = fold(GPT(config))
    change(tensors)
    with pytest.raises(ConfigError, match=message):
        load(GPT(config), tensors)


# ---------------------------------------------------------------------------------------------------------------
# changes to the model that nobody told hf.py about


def after_both_sublayers(monkeypatch, change, scaled):
    """Every attention's and FFN's output goes through change(y, γ), γ a new scale vector of theirs or None."""
    for layer in (model_file.Attention, model_file.FFN):
        init, forward = layer.__init__, layer.forward

        def new_init(self, config, *args, init=init, **kw):
            init(self, config, *args, **kw)
            self.new_scale = ScaleVector(config.n_embd, "output") if scaled else None

        def new_forward(self, *args, forward=forward, **kw):
            return change(forward(self, *args, **kw), self.new_scale and self.new_scale())

        monkeypatch.setattr(layer, "__init__", new_init)
        monkeypatch.setattr(layer, "forward", new_forward)


def norm(y, gamma):
    return rms_norm(y, 1e-6, gamma)


@pytest.mark.parametrize("change,scaled,message", [
    (norm, True, "does not know what blocks.0.attn.new_scale.gamma does"),
    (norm, False, "would compute another function than the model, off by"),
    (lambda y, gamma: 1.01 * y, False, "would compute another function than the model, off by"),
], ids=["a norm with a γ", "a norm", "a factor"])
@pytest.mark.parametrize("flags", [(), ("--n_experts=4",), ("--placement=dual_norm",)], ids=str)
def test_a_new_operation_is_sampled_as_it_is_and_refused_by_export(flags, change, scaled, message, tmp_path, monkeypatch,
                                                                   capsys):
    after_both_sublayers(monkeypatch, change, scaled)
    model = save_run(tmp_path / "run", [*TINY, *flags])
    with pytest.raises(ConfigError, match=message) as e:
        export_to(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()

    sample.main(sample.arguments([str(tmp_path / "run"), "--device", "cpu", "--temperature", "0", "--max_new_tokens", "30"]))
    idx = torch.zeros(1, 1, dtype=torch.int64)
    for _ in range(30):  # without cache and kept weights, by what the model computes now
        idx = torch.cat((idx, logits(model, idx)[:, -1:].argmax(-1)), dim=1)
    assert capsys.readouterr().out.encode()[:-1] == bytes(idx[0, 1:].tolist()).decode(errors="replace").encode()


def test_without_transformers_an_export_says_that_nobody_compared_it(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run", TINY)
    export_to(tmp_path / "run", tmp_path / "a")
    assert "Its logits equal the model's" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "transformers", None)
    export_to(tmp_path / "run", tmp_path / "b")
    assert "transformers is not installed here: nobody has compared" in capsys.readouterr().out
    assert content(tmp_path / "a") == content(tmp_path / "b")


@dataclass
class NewConfig(GPTConfig):
    o_norm: bool = False


def test_a_new_setting_is_refused_until_a_class_is_taught_it(monkeypatch):
    monkeypatch.setattr(hf, "GPTConfig", NewConfig)
    shape = dict(n_layer=1, n_embd=32)
    for config in (NewConfig(**shape), NewConfig(**shape, router_aux=0.5, reparam="or", dtype="float64")):
        assert hf_type(*fold(GPT(config))) == "llama"
    for kw in (dict(), dict(placement="dual_norm"), dict(n_experts=2)):
        with pytest.raises(ConfigError, match="does not know what o_norm=True does") as e:
            hf_type(*fold(GPT(NewConfig(**shape, **kw, o_norm=True))))
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name,value", [("arch", "palm"), ("qkv_norm", "none"), ("router", "hash")])
def test_a_new_value_of_a_setting_is_refused(name, value):
    config, tensors = fold(GPT(GPTConfig(n_layer=1, n_embd=32, n_experts=3, n_shared_experts=1, expert_dim=8)))
    assert hf_type(config, tensors) == "nanoscale"
    with pytest.raises(ConfigError, match=f"does not know what {name}='{value}' does"):
        hf_type(replace(config, **{name: value}), tensors)


def test_a_new_placement_is_refused():
    model = GPT(GPTConfig(n_layer=1, n_embd=32))
    model.config.ffn_placement = "triple"
    with pytest.raises(ConfigError, match="does not know ffn_placement 'triple'"):
        fold(model)


def test_gemmas_vectors_need_a_place():
    config = dict(arch="gemma", n_layer=1, n_embd=32)
    with pytest.raises(ConfigError, match="no place"):
        load(GPT(GPTConfig(**config, scale_vectors=False)), fold(shaken(GPTConfig(**config)))[1])


# ---------------------------------------------------------------------------------------------------------------
# tokenizers


@pytest.mark.parametrize("to", ["hf", "llama.cpp"])
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_tokenizer_json_encodes_and_decodes_as_ours(name, to, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="needs Hugging Face's tokenizers")
    try:
        ours = load_tokenizer(name)
    except DataError as e:
        pytest.skip(str(e))
    write_tokenizer(tmp_path, ours, GPTConfig(), to)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    odd = "".join(map(chr, range(1, 0x800))) + " \t\n  x'll '  1234 \r\n\u3000\U0001f600 " + TEXT
    code = [p.read_text(encoding="utf-8").replace("<|endoftext|>", "") for p in sorted(ROOT.glob("*.py"))]
    for text in (*code, odd, "", " "):
        if (name, to) == ("bytes", "llama.cpp"):
            text = text.replace("▁", " ")  # the one sign that is lost
        ids = ours.encode(text).tolist()
        encoded = theirs.encode(text).ids
        # llama.cpp puts the separator in front itself: without it, its converter knows GPT-2's BPE by these ids
        assert encoded == ([ours.separator] if to == "hf" else []) + ids
        assert theirs.decode(encoded) == text
    assert theirs.encode("<|endoftext|>").ids[-1] == ours.separator  # written out it is the separator there
    assert theirs.get_vocab_size() == ours.vocab_size
    assert [theirs.token_to_id(theirs.id_to_token(i)) for i in range(ours.vocab_size)] == list(range(ours.vocab_size))


LLAMA_CPP = os.environ.get("LLAMA_CPP", "")


@pytest.mark.skipif(not LLAMA_CPP, reason="set LLAMA_CPP to a checkout of llama.cpp, whose converter this Python can run")
@pytest.mark.parametrize("flags,tokenizer", [
    ((), "bytes"), ((), "gpt2"), (("--n_experts=4", "--expert_dim=64"), "gpt2"), (("--d_head=24",), "gpt2"),
    (("--tie_embeddings=True", "--scale_vectors=False", "--placement=input"), "bytes")], ids=str)
def test_llama_cpp_computes_the_same_function(flags, tokenizer, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    ours = load_tokenizer(tokenizer)
    model = save_run(tmp_path / "run", [str(ROOT / "config" / "unified_free.py"), "--n_layer=2", "--n_embd=64",
                                        "--n_kv_head=2", "--ffn_dim=128", f"--vocab_size={ours.vocab_size + 47}", *flags],
                     tokenizer)
    export_to(tmp_path / "run", tmp_path / "out", to="llama.cpp")
    done = subprocess.run([sys.executable, f"{LLAMA_CPP}/convert_hf_to_gguf.py", tmp_path / "out", "--outtype", "f32",
                           "--outfile", tmp_path / "model.gguf"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=256, logits_all=True, verbose=False, n_threads=1,
                             type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False)
    text = TEXT[:60]
    ids = [ours.separator, *ours.encode(text).tolist()]
    assert theirs.tokenize(text.encode()) == ids and theirs.detokenize(ids[1:]).decode() == text
    theirs.eval(ids)
    computed = torch.tensor(theirs.scores[:len(ids)])
    expected = logits(model, torch.tensor([ids]))[0]
    print(f"off by {(computed - expected).abs().max():.2g} of {expected.abs().max():.2g}")
    assert (computed - expected).abs().max() < 4e-3
    for token in model.generate(torch.tensor([ids]), 40, temperature=0):
        assert theirs.scores[theirs.n_tokens - 1].argmax() == token.item()
        theirs.eval([token.item()])


@pytest.mark.parametrize("flags", [("--placement=dual_norm",), ("--arch=gemma",), ("--n_experts=4", "--router=sigmoid")],
                         ids=str)
def test_what_llama_cpp_does_not_compute_is_refused(flags, tmp_path):
    save_run(tmp_path / "run", [*TINY, *flags])
    with pytest.raises(ConfigError, match="llama.cpp computes Llamas and Mixtrals") as e:
        export_to(tmp_path / "run", tmp_path / "out", to="llama.cpp")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_byte_symbols_are_256_different_ones_without_space():
    symbols = byte_symbols()
    assert sorted(symbols) == list(range(256)) and len(set(symbols.values())) == 256
    assert not any(c.isspace() for c in symbols.values()) and symbols[32] == "Ġ"


# ---------------------------------------------------------------------------------------------------------------
# the folder


@pytest.fixture
def run(tmp_path):
    save_run(tmp_path / "run", [*TINY, *CASES["unified"]])
    return tmp_path / "run"


def export_to(run, out, *flags, to="hf"):
    main(arguments([str(run), "--to", to, "--out", str(out), *flags]))


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk full"), SystemExit(143)])
@pytest.mark.parametrize("step", ["write_tokenizer", "write_json", "compare"])
def test_an_interrupted_export_leaves_nothing_and_takes_nothing(run, tmp_path, monkeypatch, error, step):
    def interrupt(*args):
        raise error

    export_to(run, tmp_path / "old")
    before = content(tmp_path / "old")
    monkeypatch.setattr(export, step, interrupt)
    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        export_to(run, tmp_path / "new")
    with pytest.raises(type(error) if isinstance(error, BaseException) else error):
        export_to(run, tmp_path / "old", "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "run"] and content(tmp_path / "old") == before


def test_an_export_whose_last_rename_fails_gives_the_old_one_back(run, tmp_path, monkeypatch):
    export_to(run, tmp_path / "old")
    before, rename = content(tmp_path / "old"), os.rename

    def fail(source, target):
        if str(source).endswith(".part"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError):
        export_to(run, tmp_path / "old", "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "run"] and content(tmp_path / "old") == before


def test_an_export_is_overwritten_only_when_asked(run, tmp_path):
    export_to(run, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds an export already.*--overwrite"):
        export_to(run, tmp_path / "out")
    assert content(tmp_path / "out") == before
    (tmp_path / "out" / "config.json").write_text("")
    (tmp_path / "out" / "tokenizer.json").unlink()
    export_to(run, tmp_path / "out", "--overwrite")
    assert content(tmp_path / "out") == before


def test_a_folder_with_anything_else_in_it_is_never_overwritten(run, tmp_path):
    for target in (run, tmp_path):
        before = {p.name for p in target.iterdir()}
        with pytest.raises(ConfigError, match="holds what is no export"):
            export_to(run, target, "--overwrite")
        assert {p.name for p in target.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        export_to(run, tmp_path / "file", "--overwrite")
    (tmp_path / "empty").mkdir()
    export_to(run, tmp_path / "empty")
    assert "config.json" in content(tmp_path / "empty")


def test_files_are_as_readable_as_others(run, tmp_path):
    export_to(run, tmp_path / "out")
    (tmp_path / "other").touch()
    assert {p.stat().st_mode for p in (tmp_path / "out").iterdir()} == {(tmp_path / "other").stat().st_mode}


def test_an_export_can_be_exported_again(run, tmp_path):
    export_to(run, tmp_path / "a")
    export_to(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def damage(path, how):
    if how == "nothing there":
        return "there is no such folder"
    path.mkdir()
    if how == "empty":
        return "neither an exported model nor a run"
    if how == "text":
        (path / "ckpt.pt").write_text("not a checkpoint")
        return "cannot be read as a checkpoint"
    if how == "another's":
        torch.save({"model": {}, "iter_num": 3}, path / "ckpt.pt")
        return "cannot be read as a checkpoint"
    if how == "a run's config":
        (path / "config.json").write_text(json.dumps({"settings": {}}))
        return "neither an export's nor"
    if how == "not json":
        (path / "config.json").write_text("{")
        return "not JSON"
    if how == "old settings":
        settings = {**asdict(configure(Settings, TINY)[0]), "colour": "red"}
        state = {"model": GPT(GPTConfig(n_layer=1)).state_dict(), "optimizers": []}
        torch.save({**state, "step": 0, "settings": settings, "tokenizer": "bytes", "data": {},
                    "rng": torch.get_rng_state()}, path / "ckpt.pt")
        return "of another version of nanoScale"


@pytest.mark.parametrize("how", ["nothing there", "empty", "text", "another's", "a run's config", "not json",
                                 "old settings"])
def test_what_is_not_ours_is_refused_in_one_line(how, tmp_path):
    message = damage(tmp_path / "run", how)
    with pytest.raises(ConfigError, match=message) as e:
        export_to(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(e.value) and "run" in str(e.value)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_command_line(run, tmp_path):
    def call(*args):
        return subprocess.run([sys.executable, ROOT / "export.py", *args], capture_output=True, text=True)

    done = call(run, "--to", "hf", "--out", tmp_path / "out")
    assert done.returncode == 0 and "trust_remote_code" in done.stdout and done.stderr == ""
    again = call(run, "--to", "hf", "--out", tmp_path / "out")
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and "--overwrite" in again.stderr
    (run / "ckpt.pt").write_bytes((run / "ckpt.pt").read_bytes()[:-900])
    cut = call(run, "--to", "hf", "--out", tmp_path / "other")
    assert cut.returncode == 2 and cut.stderr.count("\n") == 1 and not (tmp_path / "other").exists()


def test_a_cut_off_export_is_refused(run, tmp_path):
    export_to(run, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cut off or damaged") as e:
        open_model(tmp_path / "out")
    assert "\n" not in str(e.value)
    weights.unlink()
    with pytest.raises(ConfigError, match="there is no model.safetensors"):
        open_model(tmp_path / "out")
