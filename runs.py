"""
What a run leaves on disk: its folder, its logs and its checkpoints. A kill can cut only the last row of a log.

Imports settings.py and configurator.py.
"""

import ast
import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tokenize
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import get_type_hints

import numpy as np
import torch

from configurator import ConfigError, check_all, open_file, read_json
from settings import FREE_ON_RESUME, Settings

try:
    import fcntl
except ImportError:
    fcntl = None


@contextmanager
def replacing(path, mode="w", **kw):
    """
    Open a temporary file for writing, and rename it to `path` once all of it is on disk, so that `path` is never half
    written. Raises OSError, whose message names the file.
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
    """Write a text file completely or not at all."""
    with replacing(path, encoding="utf-8") as f:
        f.write(text)


def git_commit():
    """The commit of this code, and whether the code was changed since; 'unknown' and the reason if git cannot tell."""
    # inside a git hook the environment names the hook's repository
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*args):
        return subprocess.run(("git", "--no-optional-locks", *args), cwd=Path(__file__).parent, env=env, text=True,
                              capture_output=True, check=True, timeout=10).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # fails inside another project's repository
        changed = git("status", "--porcelain", "--untracked-files=no", "*.py")  # not results, not README
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError) as e:
        return f"unknown: {((getattr(e, 'stderr', None) or str(e)).splitlines() or ['no reason given'])[0]}"


def versions():
    return {"python": sys.version.split()[0], "torch": str(torch.__version__), "numpy": np.__version__}


CODE = ("norms.py", "kernels.py", "model.py", "moe.py", "optim.py", "train.py", "data/tokens.py")


def code_hash():
    """A digest of the files that decide a run's losses, without their comments, docstrings and empty lines."""
    digest = hashlib.sha256()
    for name in CODE:
        source = (Path(__file__).parent / name).read_text(encoding="utf-8")
        lines = source.splitlines()
        with suppress(SyntaxError, tokenize.TokenError):  # it may be half edited
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


def differing(saved, s):
    """
    'lr 0.001 (here 0.002)' for each setting that differs between saved and s and that a resumed run may not change; ''
    if none does.

    saved: the settings of a run on disk, a dict. A setting that is missing there was added later: it has its default.
    """
    here, saved = asdict(s), {**asdict(Settings()), **saved}
    return ", ".join(f"{name} {saved[name]!r} (here {here[name]!r})" for name in here
                     if saved[name] != here[name] and name not in FREE_ON_RESUME)


def check_settings(saved, path):
    """The settings in a run's file, without those that no longer exist. Raises ConfigError if they are not valid."""
    if type(saved) is not dict:
        raise ConfigError(f"{path} is not a run's; name another --out_dir")
    hints = get_type_hints(Settings, include_extras=True)
    return check_all({name: value for name, value in saved.items() if name in hints}, hints, path)


FILES = ("ckpt.pt", "log.csv", "scales.csv", "experts.csv", "config.json")


def claim_out_dir(s):
    """
    Refuse an out_dir that holds a run which s neither resumes nor overwrites. Sets s.resume to True or False if it is
    'auto'. Raises ConfigError.
    """
    out = Path(os.path.realpath(s.out_dir))
    there = [name for name in FILES if os.path.exists(out / name)]
    if s.resume and s.overwrite:
        raise ConfigError(f"--overwrite=True starts over and --resume={s.resume} goes on: choose one")
    if s.resume == "auto":
        s.resume = "ckpt.pt" in there
    if s.resume:
        if "ckpt.pt" not in there:
            raise ConfigError(f"nothing to resume: there is no {out}/ckpt.pt. Start the run without --resume=True")
    elif "config.json" in there:
        check_settings(read_json(out / "config.json").get("settings"), out / "config.json")
        if "ckpt.pt" in there and not s.overwrite:
            raise ConfigError(f"{out} holds a run already: go on with --resume=True, start over with "
                              f"--overwrite=True, or name another --out_dir")
    elif there:
        raise ConfigError(f"{out}/{there[0]} is there without a config.json; name another --out_dir")


def lock(folder, name="train.lock"):
    """
    Lock the folder until the returned file is closed or the process ends. Raises ConfigError if another process has
    locked it.
    """
    file = open(Path(folder) / name, "a+", encoding="utf-8")
    try:
        if fcntl is not None:  # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise ConfigError(f"{folder} is in use by {holder}: wait for it, or stop it") from None
    except OSError:
        pass  # a file system without locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


@contextmanager
def run_folder(s, master=True):
    """
    out_dir, made and locked, for a run to write to. Raises ConfigError where that cannot be, or another process writes
    there.
    """
    out = Path(os.path.realpath(s.out_dir))
    if not master:  # only the master writes
        yield out
        return
    try:
        ours = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out)
    except OSError as e:
        raise ConfigError(f"out_dir {out} cannot be used: {e.strerror}") from None
    with held:
        claim_out_dir(s)  # again: until now another run may have been here
        try:
            yield out
        finally:
            if ours and os.listdir(out) == ["train.lock"]:  # it failed before its first file
                shutil.rmtree(out, ignore_errors=True)


def set_aside(out):
    """Move the files of an older run to a new folder next to out, out.1 say, so that a new run overwrites nothing."""
    old = next(path for n in count(1) if not (path := out.with_name(f"{out.name}.{n}")).exists())
    old.mkdir()
    for name in FILES:  # config.json is the last, so that after a kill in between this is still a run's folder
        if (out / name).exists():
            os.rename(out / name, old / name)
    print(f"{out} held a run, which is now in {old}")


class CSVLog:
    """A CSV file of a run, written row by row. A resumed run drops the rows after its checkpoint's step."""

    def __init__(self, path, columns, resume_step):
        header, kept = ",".join(columns), []
        if resume_step and path.exists():
            with open_file(path) as f:
                rows = f.read().decode(errors="replace").split("\n")[:-1]  # a kill cuts the last row
            first, *rows = rows or [header]
            if first != header:
                raise ConfigError(f"{path} has other columns than {header}: move it away to go on without it")
            steps = set(map(str, range(resume_step + 1)))
            kept = [row for row in rows if row.count(",") == header.count(",") and row.partition(",")[0] in steps]
        write_whole(path, "\n".join([header, *kept, ""]))
        self.path, self.columns = path, columns
        self.file = open(path, "a", newline="", encoding="utf-8")

    def write(self, *rows):
        """Append rows, dicts. Raises OSError, whose message names the file."""
        try:
            self.file.writelines(",".join(str(row[name]) for name in self.columns) + "\n" for row in rows)
            self.file.flush()
        except OSError as e:
            raise OSError(f"{self.path} cannot be written: {e.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path, model, optimizers, step, s, tokenizer, fingerprint, scaler=None):
    """
    Write a checkpoint; until it is complete, the one before it stays. scaler: the fp16 scaler's numbers, by name.
    Raises OSError.
    """
    ckpt = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
            "settings": asdict(s), "tokenizer": tokenizer, "data": fingerprint, "rng": torch.get_rng_state(),
            "scaler": scaler or {}, "versions": versions()}
    with replacing(path, "wb") as f:
        torch.save(ckpt, f)


def load_checkpoint(path):
    """
    The dict that save_checkpoint wrote, on the CPU. Raises ConfigError if the file is truncated, foreign or damaged.

    weights_only: a stranger's checkpoint cannot run code. mmap: processes that read the same file share its pages. The
    file is a zip archive, with a checksum for every tensor.
    """
    try:
        with open_file(path) as f, zipfile.ZipFile(f) as archive:
            if archive.testzip():
                raise ConfigError(f"{path} is damaged: its checksum does not fit. Start again in another --out_dir")
        utf8 = os.fsencode(path) == str(path).encode(errors="replace")  # torch maps no file with another name
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=utf8)
        kinds = {"model": dict, "optimizers": list, "step": int, "data": dict, "scaler": dict}
        if not all(isinstance(ckpt[name], kind) for name, kind in kinds.items()):
            raise TypeError("of another program")
        check_settings(ckpt["settings"], path)
    except ConfigError:
        raise
    except Exception as e:  # zipfile, pickle and torch raise errors of many kinds
        raise ConfigError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): it is cut off or not ours. "
                          f"Start again in another --out_dir") from None
    return ckpt


def check_tensors(found, wanted, path):
    """
    Raise ConfigError unless `found`, a dict from a file, has tensors with the names, shapes and dtypes of those in
    `wanted`. Kernels rely on it: they would write past the end of a tensor that is too short.
    """
    def kind(tensor):
        return f"{list(tensor.shape)} in {tensor.dtype}" if isinstance(tensor, torch.Tensor) else "no tensor"

    for name in {**wanted, **found}:
        theirs, ours = kind(found.get(name)), kind(wanted.get(name))
        if theirs != ours:
            raise ConfigError(f"{path}: {name} is {theirs}, and the run has {ours}. The file is from another version "
                              f"of nanoScale, or not ours")
