"""sample.py, and generation with the KV cache: the same tokens as without it, from a run and from its export."""

import json
import sys

import pytest
import torch
from conftest import refused
from test_export import TINY, config_args, export_to, save_run, shaken

import sample
from data.tokens import load_tokenizer
from model import GPT
from settings import GPTConfig, gpt_config

SHAPE = dict(n_layer=2, n_embd=32, n_head=4, ffn_dim=40, block_size=16, vocab_size=64)
MODELS = [dict(), dict(heterogeneous=True, placement="dual_norm", reparam="or"), dict(n_kv_head=2), dict(n_kv_head=1),
          dict(arch="gemma"), dict(arch="gemma", n_kv_head=2, qkv_norm="full", placement="dual"), dict(d_head=6),
          dict(tie_embeddings=True, scale_vectors=False), dict(block_size=1), dict(block_size=7),
          *(dict(n_experts=5, router=router, router_bias=0.01, shared_dim=24, expert_dim=24)
            for router in ("softmax", "softmax_all", "sigmoid")),
          dict(placement="after", head_placement="dual_norm", qk_norm=True),
          dict(n_experts=4, heterogeneous=True, placement="dual_norm", expert_scales="own", reparam="or")]
MIXTURE = ["--n_experts=4", "--expert_dim=24"]


def generate_without_cache(model, idx, n, pick):
    """The definition: each token from a forward pass over the whole window, which drops its older half when full."""
    size, tokens = model.config.block_size, []
    window = idx[:, -size:]
    for _ in range(n):
        if window.size(1) > size:
            window = window[:, -max(1, size // 2):]
        with torch.no_grad():
            new = pick(model(window)[0][:, -1])
        tokens.append(new)
        window = torch.cat((window, new), dim=1)
    return torch.cat(tokens, dim=1)


def prompt(B, T):
    return torch.randint(0, 64, (B, T), generator=torch.Generator().manual_seed(T))


@pytest.mark.parametrize("T", [1, 16, 40])
@pytest.mark.parametrize("kw", MODELS, ids=str)
def test_with_the_cache_as_without_it_token_for_token(kw, T):
    model = shaken(GPTConfig(**{**SHAPE, **kw}))
    cached = torch.cat(list(model.generate(prompt(3, T), 30, temperature=0)), dim=1)  # several windows long
    assert torch.equal(cached, generate_without_cache(model, prompt(3, T), 30, lambda x: x.argmax(-1, keepdim=True)))
    assert len(set(cached.flatten().tolist())) > 3  # no constant


def test_sampling_with_the_cache_draws_the_same_tokens():
    model = shaken(GPTConfig(**SHAPE))
    generator = torch.Generator().manual_seed(3)

    def pick(logits):
        kth = logits.topk(5).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -float("inf"))
        return torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)

    without = generate_without_cache(model, prompt(2, 4), 40, pick)
    cached = model.generate(prompt(2, 4), 40, temperature=0.7, top_k=5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat(list(cached), dim=1), without)


def test_generating_leaves_the_model_as_it_was():
    model = shaken(GPTConfig(**SHAPE))
    steps = model.generate(prompt(1, 3), 5)
    next(steps)
    steps.close()  # as when a reader has enough: nothing may be kept, or training would go on with old weights
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    fresh = GPT(model.config)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(prompt(1, 3))[0], fresh(prompt(1, 3))[0])


def run(*args):
    sample.main(sample.arguments([str(arg) for arg in args]))


def text_of(args, capsys):
    run(*args)
    return capsys.readouterr().out


@pytest.mark.parametrize("case,flags", [
    ("hg_ap", ()), ("unified", ()), ("unified", ("--tie_embeddings=True", "--n_kv_head=2")), ("gemma_wd_all", ()),
    ("hg", MIXTURE), ("unified", (*MIXTURE, "--router=sigmoid", "--router_bias=0.01", "--shared_dim=24"))], ids=str)
def test_a_run_and_its_export_write_the_same_text(case, flags, tmp_path, capsys):
    model, ours = save_run(tmp_path / "run", config_args(case, *flags)), load_tokenizer("bytes")
    export_to(tmp_path / "run", tmp_path / "hf")
    capsys.readouterr()
    flags = ("--device", "cpu", "--prompt", "def é(", "--max_new_tokens", 60, "--temperature", 0)
    texts = {text_of((tmp_path / folder, *flags), capsys) for folder in ("run", "hf")}
    tokens = model.generate(torch.tensor([[0, *"def é(".encode()]]), 60, temperature=0)
    expected = b"".join(ours.token_bytes(token.item()) for token in tokens).decode(errors="replace")
    assert texts == {f"def é({expected}\n"}


def test_seed_samples_and_prompt_file(tmp_path, capsys):
    save_run(tmp_path / "run", TINY)
    flags = ("--device", "cpu", "--max_new_tokens", 30)
    (tmp_path / "prompt.txt").write_bytes("class A:\r\n".encode())
    from_file = text_of((tmp_path / "run", *flags, "--prompt_file", tmp_path / "prompt.txt"), capsys)
    assert from_file == text_of((tmp_path / "run", *flags, "--prompt", "class A:\r\n"), capsys)
    assert from_file != text_of((tmp_path / "run", *flags, "--prompt", "class A:\r\n", "--seed", 2), capsys)
    two = text_of((tmp_path / "run", *flags, "--num_samples", 2), capsys)
    first, second = two.split("--- sample 2 of 2\n")
    assert first.startswith("--- sample 1 of 2\n") and first.split("\n", 1)[1] != second


def test_wrong_usage_is_one_line(tmp_path):
    save_run(tmp_path / "run", TINY)
    for args, message in [((tmp_path / "none",), "none/config.json: there is no such file"),
                          ((tmp_path,), "config.json: there is no such file"),
                          ((tmp_path / "run", "--prompt_file", tmp_path / "none"), "none: there is no such file"),
                          ((tmp_path / "run", "--prompt_file", tmp_path / "run" / "ckpt.pt"), "is not a text in UTF-8"),
                          ((tmp_path / "run", "--prompt_file", "/dev/zero"), "not a regular file"),
                          ((tmp_path / "run", "--device", "abacus"), "device must be")]:
        with refused(message):
            run(*args)
    for flags in (["--prompt=a", "--prompt_file=b"], ["--num_samples=0"], ["--temperature=1e-45"],
                  ["--temperature=nan"], ["--temperature=1e39"], [f"--seed={10**20}"]):
        with pytest.raises(SystemExit):
            sample.arguments(["x", *flags])
    sample.arguments(["x", "--temperature=0", f"--seed={2**63 - 1}"])


def test_home_is_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    args = sample.arguments(["~/run", "--prompt_file=~/prompt"])
    assert (args.model, args.prompt_file) == (f"{tmp_path}/run", f"{tmp_path}/prompt")


def test_a_model_of_nans_is_said_to_be_one(tmp_path, monkeypatch):
    save_run(tmp_path / "run", TINY)
    monkeypatch.setattr("hf.gpt_config", lambda s: GPTConfig(**{**vars(gpt_config(s)), "norm_eps": float("nan")}))
    for temperature in ("0", "1"):
        with refused("run: its logits are not finite: "):
            run(tmp_path / "run", "--device", "cpu", "--temperature", temperature)


# ---------------------------------------------------------------------------------------------------------------
# other people's models


@pytest.fixture
def llama(tmp_path, capsys):
    """A folder with ours, an export, and theirs: the same, but nothing says that it is ours."""
    save_run(tmp_path / "run", TINY)
    for name in ("ours", "theirs"):
        export_to(tmp_path / "run", tmp_path / name)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del config["nanoscale_tokenizer"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    return tmp_path


@pytest.mark.parametrize("prompt", ["def é(", "你好"])
def test_a_foreign_folder_writes_by_its_own_tokenizer(prompt, llama, capsys):
    flags = ("--device", "cpu", "--prompt", prompt, "--max_new_tokens", 100, "--num_samples", 2)
    theirs = text_of((llama / "theirs", *flags), capsys)
    flags = (*flags[:3], "<|endoftext|>" + prompt, *flags[4:])
    begun = text_of((llama / "theirs", *flags), capsys).replace("<|endoftext|>", "")
    ours = text_of((llama / "ours", *flags[:3], prompt, *flags[4:]), capsys)
    kept = lambda text: [c for c in text if c.isascii() and c.isprintable()]
    assert kept(begun) == kept(ours) and theirs.split("\n", 1)[1].startswith(prompt) and len(theirs) > 100


def test_words_keep_the_space_between_them(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="other people's tokenizers need Hugging Face's package")
    vocab = {token: i for i, token in enumerate(["<s>", "▁def", "▁main", "()", "▁x"])}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, "<s>"))
    theirs.pre_tokenizer, theirs.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    theirs.save(str(tmp_path / "tokenizer.json"))
    encode, decode = sample.open_tokenizer(None, tmp_path)
    assert encode("def main") == [1, 2] and encode("") == [] and decode([1, 2, 4, 3, 2]) == "def main x() main"


def test_a_tokenizer_that_does_not_fit_or_cannot_be_read_is_refused(llama, monkeypatch):
    theirs, path = (llama / "theirs", "--device", "cpu"), llama / "theirs" / "tokenizer.json"
    with refused("no token for the start of a document; give a --prompt"):
        run(*theirs)
    told = json.loads(path.read_text())
    told["model"]["vocab"]["a"], told["model"]["vocab"]["<unused256>"] = 256, 97
    path.write_text(json.dumps(told))
    with refused("has token 256, and the model only 256 tokens"):
        run(*theirs, "--prompt=a")
    path.write_text("{")
    with refused("tokenizer.json cannot be read"):
        run(*theirs)
    with monkeypatch.context() as patch, refused("pip install tokenizers"):
        patch.setitem(sys.modules, "tokenizers", None)
        run(*theirs)
    path.unlink()
    with refused("its tokenizer is unknown"):
        run(*theirs)
    path.symlink_to("/dev/zero")
    with refused("not a regular file"):
        run(*theirs)


def test_a_run_on_data_without_meta_json_is_said_to_have_no_known_tokenizer(tmp_path):
    save_run(tmp_path / "run", TINY, tokenizer=None)
    with refused("its tokenizer is unknown", "no meta.json; put a tokenizer.json there"):
        run(tmp_path / "run", "--device", "cpu")
