"""configurator.py: what is accepted, and that every mistake is one line on stderr with exit code 2."""

import os
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Literal

import pytest
from conftest import ROOT, reader_that_left, refused

import configurator
from configurator import Amount, ConfigError, Count, Fraction, Whole, configure, open_file, read_json


@dataclass
class Settings:
    layers: Count = 4  # how many
    warmup: Whole = 0  # steps
    rate: Amount = 1e-3  # peak
    share: Fraction = 0.5  # of all
    tie: bool = False  # or not
    name: str = ""  # of the run
    kind: Literal["auto", True, False] = "auto"  # which


def read(*args):
    return configure(Settings, args)[0]


@pytest.mark.parametrize("flag,name,value", [
    ("--layers=7", "layers", 7), ("--rate=1", "rate", 1.0), ("--rate=3e-4", "rate", 3e-4), ("--tie=True", "tie", True),
    ("--name=2026", "name", "2026"), ("--name=a=b", "name", "a=b"), ("--name=", "name", ""),
    ("--kind=False", "kind", False), ("--kind=auto", "kind", "auto"), ("--share=0", "share", 0.0),
])
def test_flags(flag, name, value):
    got = getattr(read(flag), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("flag,message", [
    ("--layer=7", "no setting 'layer'. Did you mean 'layers'?"),
    ("--zzz=7", "--help lists them all"),
    ("--layers=7.0", "layers must be an int, not 7.0"),
    ("--layers=True", "layers must be an int, not True"),
    ("--layers=0", "layers must be at least 1, not 0"),
    ("--rate=-1", "rate must be at least 0.0, not -1"),
    ("--rate=fast", "rate must be a float, not 'fast'"),
    ("--rate=nan", "rate must be a float, not 'nan'"),
    ("--rate=1e999", "rate must be at most 3.4e+38, not inf"),
    ("--rate=1e39", "rate must be at most 3.4e+38"),  # infinite in float32
    ("--rate=-1" + 400 * "0", "rate must be at least 0.0"),
    (f"--layers={2**31}", "layers must be at most 2147483647"),
    (f"--warmup={2**63}", "warmup must be at most 2147483647"),
    ("--share=1.5", "share must be at most 1.0, not 1.5"),
    ("--tie=1", "tie must be True or False, not 1"),
    ("--tie=true", "tie must be True or False, not 'true'"),
    ("--kind=1", "kind must be one of auto, True, False, not 1"),
    ("--layers", "a flag needs a value, as in --layers=..."),
    ("-layers=3", "flags are written --name=value"),
    ("layers=3", "flags begin with two dashes: --layers=3"),
])
def test_mistakes_in_flags(flag, message):
    with refused(message):
        read(flag)


def test_files_and_flags_apply_left_to_right(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("_half = 3\nlayers, rate = 2 * _half, 1\n")
    assert read("--layers=2", str(file)).layers == 6
    assert read(str(file), "--layers=2").layers == 2
    assert read(str(file)).rate == 1.0
    assert configure(Settings, [str(file)])[1] == [str(file)]


@pytest.mark.parametrize("text,message", [
    ("layer = 3", "there is no setting 'layer'. Did you mean 'layers'?"),
    ("layers = '3'", "layers must be an int, not '3'"),
    ("layers = 10**5000", "4300 digits"),
    ("from math import pi", "there is no setting 'pi'"),
    ("layers = (", ":1: SyntaxError"),
    ("\nlayers = nothing", ":2: NameError"),
    ("raise SystemExit(0)", ":1: SystemExit"),
    ("\ndef f():\n    raise ValueError('a\\nb')\n\nf()", ":3: ValueError: a b"),
    ("\0", ": "),
])
def test_mistakes_in_files(tmp_path, text, message):
    file = tmp_path / "a.py"
    file.write_text(text)
    with refused(str(file), message):
        read(str(file))


@pytest.mark.parametrize("content", [
    b"import time, math\nlayers = 3; rate = float(math.floor(2.5))",  # as nanoGPT's config files do
    b"\xef\xbb\xbflayers = 3; rate = 2.0", b"# coding: latin-1\nlayers = 3; rate = 2.0  # \xe9"])
def test_config_files_are_python(tmp_path, content):
    file = tmp_path / "a.py"
    file.write_bytes(content)
    assert (read(str(file)).layers, read(str(file)).rate) == (3, 2.0)


def test_a_config_file_that_is_not_there_is_refused_with_the_nearest_name(tmp_path):
    (tmp_path / "unified.py").write_text("")
    with refused("unifed.py: there is no such file. Did you mean ", "/unified.py?"):
        read(str(tmp_path / "unifed.py"))


def test_json_is_an_object_in_a_regular_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, null], "ä": {}}', encoding="utf-8")
    assert read_json(path) == {"a": [1, None], "ä": {}}


@pytest.mark.parametrize("content, said", [
    (b"", "not JSON"), (b"{", "not JSON"), (b"\xff\xfe\xfd", "not JSON"), (b"[1]", "no JSON object"),
    (b"9" * 5000, "not JSON"), (b'{"a": ' * 200_000, "not JSON"), (b"[" * 2 ** 20, "not JSON"),
    (b"{" + b" " * 2 ** 24 + b"}", "not JSON")])
def test_a_file_without_a_json_object_is_refused_by_name(tmp_path, content, said):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with refused(str(path), said):
        read_json(path)


@pytest.mark.parametrize("opened", [open_file, read_json, lambda path: read(str(path))])
def test_only_regular_files_are_opened(tmp_path, opened):
    os.mkfifo(tmp_path / "fifo")  # to open it would wait for ever
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        with pytest.raises(ConfigError, match=f"{path}: not a regular file"):
            opened(path)
    with pytest.raises(ConfigError, match="no such file"):
        opened(tmp_path / "nothing")


@pytest.mark.parametrize("opened", [open_file, lambda path: read(str(path))], ids=["file", "config"])
def test_a_file_that_cannot_be_reached_says_why(nobody, opened):
    (nobody / "a").symlink_to(nobody / "b")
    (nobody / "b").symlink_to(nobody / "a")
    (nobody / "closed").mkdir(mode=0)
    with pytest.raises(ConfigError, match="a: cannot be read: Too many levels"):
        opened(nobody / "a")
    with pytest.raises(ConfigError, match="file: cannot be read: Permission denied"):
        opened(nobody / "closed" / "file")


def test_help_lists_every_setting_with_its_default_and_a_comment():
    from settings import Settings
    lines = {line.split("=")[0].strip(): line for line in configurator.help_text(Settings).splitlines()}
    assert list(lines) == [f"--{f.name}" for f in fields(Settings)]
    for name, line in lines.items():
        default, comment = line.split("=", 1)[1].split(maxsplit=1)
        assert comment, f"{name} has no comment"
        assert default.strip('"') == str(getattr(Settings(), name[2:]))


def test_a_mistake_on_the_command_line_is_one_line_before_torch_is_loaded():
    code = (f"import runpy, sys; sys.argv = ['train.py', '--n_lyer=3']\n"
            f"try: runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
            f"finally: print('torch' in sys.modules)")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (2, "False\n")
    assert run.stderr.startswith("train.py: --n_lyer=3: there is no setting") and run.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "sample.py", "export.py", "ablate.py", "bench.py", "plot.py", *(
    f"data/{name}/prepare.py" for name in ("pysrc", "text", "fineweb", "shakespeare"))])
def test_help_is_shown_however_python_runs(script, tmp_path):
    """In another folder and an ASCII terminal, without docstrings and without the script's folder on the path."""
    run = subprocess.run([sys.executable, "-OO", str(ROOT / script), "--help"], capture_output=True, cwd=tmp_path,
                         env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONSAFEPATH": "1"})
    assert run.returncode == 0 and run.stdout.isascii() and not run.stderr, run.stderr


# standard streams

@pytest.mark.parametrize("lost, said", [
    (lambda: reader_that_left(os.pipe), ""),
    (lambda: reader_that_left(os.openpty), "script.py: cannot print any more: Input/output error\n"),
    (lambda: open("/dev/full", "w"), "script.py: cannot print any more: No space left on device\n")])
def test_a_stream_that_is_lost_ends_the_printing_and_nothing_else(printing_to, capsys, lost, said):
    """No OSError reaches the script, which would take it for an error of the file that it writes."""
    file = lost()
    printing_to(file)
    assert not configurator.unheard()
    for _ in range(2):
        print("a line")
        print("a part", end="", flush=True)
    assert configurator.unheard() and capsys.readouterr().err == said
    file.close()  # what was left in its buffer goes nowhere too, where Python would end with exit code 120


def test_a_stream_that_was_closed_from_the_start_is_not_lost(printing_to, capsys):
    printing_to(None)
    print("to nobody")
    assert not configurator.unheard() and capsys.readouterr().err == ""


def test_a_character_that_a_stream_cannot_show_becomes_a_question_mark(printing_to, tmp_path):
    with open(tmp_path / "out", "w", encoding="ascii") as file:
        printing_to(file)
        print("γ", os.fsdecode(b"\xff"))
    assert (tmp_path / "out").read_text() == "? ?\n"


def test_prepare_finishes_its_corpus_after_stdout_was_closed(tmp_path):
    (tmp_path / "source").mkdir()
    for i in range(40):
        (tmp_path / "source" / f"{i}.txt").write_text(f"text {i}\n" * 100)
    with reader_that_left(os.pipe) as gone:
        run = subprocess.run([sys.executable, str(ROOT / "data/text/prepare.py"), str(tmp_path / "source"),
                              "--out", str(tmp_path / "out")], stdout=gone, stderr=subprocess.PIPE, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["meta.json", "train.bin", "val.bin"]
