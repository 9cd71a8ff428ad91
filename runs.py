"""
What a run leaves on disk: its folder, its logs, its checkpoints. A kill can cut the last row of a log and nothing else.
"""

import ast
import csv
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tokenize
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from configurator import ConfigError, open_file, read_json

try:
    import fcntl
except ImportError:
    fcntl = None


@contextmanager
def replacing(path, mode="w", **kw):
    """
    A file to write, beside `path` until all of it is on disk, and then in its place: there entirely or not at all.
    Raises OSError, whose message names the file.
    """
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, mode, **kw) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into a RuntimeError of its own
        raise OSError(f"{path} cannot be written: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}") from None
    finally:
        tmp.unlink(missing_ok=True)


def write_whole(path, text):
    """Write a text file so that it is there entirely or not at all."""
    with replacing(path, encoding="utf-8") as f:
        f.write(text)


def git_commit():
    """The commit of this code, marked if it was changed since; 'unknown' outside a git checkout."""
    here = Path(__file__).parent
    try:
        run = lambda *args: subprocess.run(("git", *args), cwd=here, capture_output=True, text=True, check=True).stdout
        changed = run("status", "--porcelain", "--untracked-files=no", "*.py").strip()  # not results, not README
        return run("rev-parse", "HEAD").strip() + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions():
    return {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}


CODE = ("norms.py", "kernels.py", "model.py", "moe.py", "optim.py", "train.py", "data/tokens.py")


def code_hash():
    """A digest of the files that decide what a run computes, their comments, docstrings and empty lines left out."""
    digest = hashlib.sha256()
    for name in CODE:
        source = (Path(__file__).parent / name).read_text(encoding="utf-8")
        lines = source.splitlines()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                lines[token.start[0] - 1] = lines[token.start[0] - 1][:token.start[1]]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
                lines[node.lineno - 1:node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        digest.update("\n".join([name, *(line.rstrip() for line in lines if line.strip())]).encode())
    return digest.hexdigest()[:10]


# ---------------------------------------------------------------------------------------------------------------
# the folder


RUN_FILES = {"config.json", "log.csv", "scales.csv", "experts.csv", "ckpt.pt", "train.lock"}


def differing(there, s, free=frozenset()):
    """
    'lr 0.001 (here 0.002)' for each setting of a run on disk that is another in s; '' where there is none.

    there: the run's settings, a dict. A setting that it does not know was added since, and had its default then.
    """
    here, there = asdict(s), {**asdict(type(s)()), **there}
    names = [name for name in here if name not in free | {"out_dir", "resume", "overwrite"} and there[name] != here[name]]
    return ", ".join(f"{name} {there[name]!r} (here {here[name]!r})" for name in names)


def claim_out_dir(s):
    """
    Refuse to touch a folder that holds another run, or this one without being told what to do about it. Makes
    s.resume True or False where it was 'auto'. Raises ConfigError.
    """
    out = Path(s.out_dir)
    ckpt, config = out / "ckpt.pt", out / "config.json"
    try:
        nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as e:
        raise ConfigError(f"out_dir cannot be used: {e.strerror}") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"out_dir {out} cannot be made: {nearest} is no folder that you can write to")
    if s.resume and s.overwrite:
        raise ConfigError(f"--overwrite=True starts over and --resume={s.resume} goes on: say one of them")
    if s.resume == "auto":
        s.resume = ckpt.exists()
    if s.resume:
        if not ckpt.exists():
            raise ConfigError(f"nothing to resume: there is no {ckpt}. Start the run without --resume=True")
        return
    if config.exists():
        there = read_json(config).get("settings")
        if not isinstance(there, dict):
            raise ConfigError(f"{config} is not a run's; name another --out_dir")
        if s.overwrite:
            return
        if changed := differing(there, s):
            raise ConfigError(f"{out} holds a run with other settings: {changed}. Name another --out_dir, or start over "
                              f"with --overwrite=True")
        if ckpt.exists():
            raise ConfigError(f"{out} holds this run already: go on with --resume=True, start over with "
                              f"--overwrite=True, or name another --out_dir")
    elif foreign := [f for f in (ckpt, out / "log.csv", out / "scales.csv", out / "experts.csv") if f.exists()]:
        raise ConfigError(f"{foreign[0]} is there without a config.json; name another --out_dir")


def lock(folder):
    """
    Hold the folder for one run at a time, until the file that it returns is closed or the process ends. Raises
    ConfigError where another holds it.
    """
    file = open(Path(folder) / "train.lock", "a+", encoding="utf-8")
    try:
        if fcntl is not None:  # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ConfigError(f"{folder} is in use by {file.read().strip() or 'another process'}: wait for it, or name "
                          f"another --out_dir") from None
    except OSError:
        pass  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


@contextmanager
def run_folder(s, master=True):
    """
    The folder to write a run to, locked: out_dir, or, where --overwrite=True is to replace a run there, a hidden one
    beside it. Raises ConfigError where another process writes there.
    """
    out = Path(s.out_dir)
    if not master:  # the master alone writes
        yield out
        return
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        if not (s.overwrite and (out / "config.json").exists()):
            yield out
            return
        new = out.absolute().with_name(f".{out.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        with lock(new):
            yield new


def take_place(out, s):
    """Once a new run in `out` has a checkpoint, put it where the old one is. Returns the folder to go on in."""
    there = Path(s.out_dir)
    if out == there:
        return there
    old = out.with_name(f".{there.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(there, old)
    os.rename(out, there)
    for file in old.iterdir():
        if file.name not in RUN_FILES:  # what else people keep in the folder
            os.rename(file, there / file.name)
    shutil.rmtree(old)
    return there


class CSVLog:
    """Rows of a run, written as they come. A resumed run drops those after its checkpoint's step."""

    def __init__(self, path, columns, resume_step):
        kept = []
        if resume_step and path.exists():
            whole, newline, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")  # a kill cuts rows
            kept = [row for row in csv.DictReader((whole + newline).splitlines())
                    if list(row) == columns and None not in row.values()
                    and row["step"].isdigit() and int(row["step"]) <= resume_step]
        with replacing(path, newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")

    def write(self, *rows):
        self.writer.writerows(rows)
        self.file.flush()


# ---------------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path, model, optimizers, step, s, tokenizer, fingerprint):
    """Write a checkpoint: at every moment there is a whole one or none yet. Raises OSError."""
    ckpt = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
            "settings": asdict(s), "tokenizer": tokenizer, "data": fingerprint, "rng": torch.get_rng_state(),
            "versions": versions()}
    try:
        with replacing(path, "wb") as f:
            torch.save(ckpt, f)
    except OSError as e:
        kept = ("the one before it is kept. Make room, then --resume=True" if path.exists()
                else "there was none before it. Make room, then start again")
        raise OSError(f"the checkpoint of step {step}: {e}; {kept}") from None
    if os.name == "posix":  # the rename itself is on disk only when the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def load_checkpoint(path):
    """
    The dict that save_checkpoint wrote, on the CPU. Raises ConfigError where the file is cut, foreign or damaged.

    weights_only: a checkpoint is data, and a stranger's cannot run anything. mmap: processes that read the same file
    share its pages. The file is a zip archive, with a checksum for every tensor.
    """
    try:
        with open_file(path) as f, zipfile.ZipFile(f) as archive:
            damaged = archive.testzip()
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for name in ("model", "optimizers", "step", "settings", "tokenizer", "data", "rng"):
            ckpt[name]
    except ConfigError:
        raise
    except Exception as e:  # zipfile, pickle and torch each have their own for a file that is not what it should be
        raise ConfigError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): it is cut off or not ours. "
                          f"Start again in another --out_dir") from None
    if damaged:
        raise ConfigError(f"{path} is damaged: its checksum does not fit. Start again in another --out_dir")
    return ckpt
