"""Whatever is fed in: it runs, or it ends with one clear line. Never a traceback, never a changed file."""

import contextlib
import io
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from conftest import snapshot
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train
from configurator import ConfigError, configure, read_file
from settings import Settings

NAMES = st.sampled_from([f.name for f in fields(Settings)])
TEXT = st.text(max_size=20)
VALUES = st.one_of(TEXT, st.integers().map(str), st.floats().map(str), st.sampled_from(
    ["True", "False", "None", "[]", "1e999", "-1", "0", "()", "__import__('os')", "9" * 5000, "(" * 300]))
FLAGS = st.one_of(
    st.builds("--{}={}".format, NAMES, VALUES), st.builds("--{}={}".format, TEXT, VALUES),
    st.builds("--{}".format, TEXT))


def quick(examples):
    return hypothesis_settings(max_examples=examples, deadline=None, derandomize=True, database=None,
                               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def one_line(error):
    text = str(error)
    assert text and len(text.splitlines()) == 1, text


@quick(60)
@given(st.lists(FLAGS, max_size=4))
@example(["--seed=" + "9" * 5000])
def test_flags(args):
    try:
        s, _ = configure(Settings, args)
    except ConfigError as e:
        one_line(e)
    else:
        assert isinstance(s, Settings)


ASSIGNMENT = st.builds("{} = {}".format, st.one_of(NAMES, TEXT), VALUES)


@quick(40)
@given(st.one_of(st.binary(max_size=60), st.lists(ASSIGNMENT, max_size=3).map(lambda lines: "\n".join(lines).encode(
    "utf-8", "surrogatepass"))))
@example(b"class float: pass\nlr = 1")
@example(b"lr = float('nan')")
def test_config_files(tmp_path, content):
    path = tmp_path / "config.py"
    path.write_bytes(content)
    try:
        read_file(str(path), {f.name: f.type for f in fields(Settings)})
    except ConfigError as e:
        one_line(e)
    assert path.read_bytes() == content


# Every choice of the settings that have some, and values of the others that are small enough to run, any of them
# together: batch_tokens of 10**7 would fit, and train for an hour. Each list mixes what works with what cannot.
POOLS = {name: get_args(hint) for name, hint in get_type_hints(Settings).items() if get_origin(hint) is Literal} | dict(
    n_layer=[1, 2], n_head=[1, 2, 3], n_embd=[2, 6, 8, 12], ffn_dim=[0, 1, 7], vocab_size=[1, 255, 256, 300],
    block_size=[1, 8, 10**7], tie_embeddings=[True, False], rope_theta=[1.0, 1e4, 1e300], norm_eps=[0.0, 1e-6, 1e300],
    scale_vectors=[True, False], heterogeneous=[True, False], lr=[0.0, 1e-3, 1e30], scale_lr_mult=[0.0, 1e30],
    min_lr_frac=[0.0, 1.0], warmup_steps=[0, 1, 10**9], decay_frac=[0.0, 1.0], weight_decay=[0.0, 1e30],
    beta1=[0.0, 0.9], beta2=[0.0, 0.95], grad_clip=[0.0, 1.0], batch_tokens=[1, 8, 16, 24, 10**7 + 1],
    micro_batch=[1, 2, 10**6], max_steps=[1, 3], eval_interval=[1, 10**9], eval_tokens=[0, 64], log_interval=[1, 2],
    save_interval=[1, 2], seed=[0, 2**32 - 1], sample_tokens=[0, 9], device=["cpu", "gpu", "meta", "cuda:99", ""],
    dataset=["CORPUS", "nothing", "", "./", "/"], out_dir=["RUN", "RUN/a/b", "FILE", "FILE/a", "n" * 300],
    shard_optimizer=[True, False], n_experts=[0, 1, 4], experts_per_token=[1, 2, 9], shared_dim=[0, 8],
    expert_dim=[0, 3, 8], router_aux=[0.0, 1e30], router_z=[0.0, 1e30], router_bias=[0.0, 1e30], compile=[False])


@quick(40)
@given(st.lists(st.sampled_from([(name, value) for name in POOLS for value in POOLS[name]]), max_size=6).map(dict))
def test_settings(settings, corpus, capsys, changes):
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        (here / "file").write_text("mine")
        paths = {"CORPUS": str(corpus)}
        changes = {k: paths.get(v, v) if k == "dataset" else v for k, v in changes.items()}
        changes["out_dir"] = changes.get("out_dir", "RUN").replace("RUN", f"{here}/run").replace("FILE", f"{here}/file")
        if not changes["out_dir"].startswith(folder):
            changes["out_dir"] = f"{here}/{changes['out_dir']}"
        s = settings(**{"n_layer": 1, "max_steps": 2, "eval_tokens": 64, **changes})
        before, said = snapshot(here), io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                train.run(s)
        except SystemExit as e:
            one_line(said.getvalue().rstrip("\n"))
            assert e.code == 2 and snapshot(here) == before or e.code == 1 and "Try a lower --lr" in said.getvalue()
        assert (here / "file").read_text() == "mine"
        shutil.rmtree(here / "run", ignore_errors=True)
