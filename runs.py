"""
What a run leaves on disk: its folder, its logs, its checkpoints. A kill can cut the last row of a log and nothing else.
"""

import csv
import json
import os
import subprocess
import sys
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from configurator import ConfigError


def write_whole(path, text):
    """Write a text file so that it is there entirely or not at all."""
    tmp = Path(f"{path}.tmp")
    tmp.write_text(text, encoding="utf-8")
    os.replace(tmp, path)


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


def differing(there, s, free=frozenset()):
    """
    'lr 0.001 (here 0.002)' for each setting of a run on disk that is another in s; '' where there is none.

    there: the run's settings, a dict. A setting that it does not know was added since, and had its default then.
    """
    here, there = asdict(s), {**asdict(type(s)()), **there}
    names = [name for name in here if name not in free | {"out_dir", "resume"} and there[name] != here[name]]
    return ", ".join(f"{name} {there[name]!r} (here {here[name]!r})" for name in names)


def claim_out_dir(s):
    """Refuse to touch a folder that holds another run, or this one without being told to resume."""
    out = Path(s.out_dir)
    ckpt, config = out / "ckpt.pt", out / "config.json"
    try:
        nearest = next(path for path in (out, *out.absolute().parents) if path.exists())
    except OSError as e:
        raise ConfigError(f"out_dir cannot be used: {e.strerror}") from None
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"out_dir {out} cannot be made: {nearest} is no folder that you can write to")
    if s.resume:
        if not ckpt.exists():
            raise ConfigError(f"nothing to resume: there is no {ckpt}. Start the run without --resume=True")
        return
    if config.exists():
        try:
            there = json.loads(config.read_text(encoding="utf-8"))["settings"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{config} is not a run's; name another --out_dir") from None
        if changed := differing(there, s):
            raise ConfigError(f"{out} holds a run with other settings: {changed}. Name another --out_dir")
        if ckpt.exists():
            raise ConfigError(f"{out} holds this run already: go on with --resume=True, or name another --out_dir")
    elif foreign := [f for f in (ckpt, out / "log.csv", out / "scales.csv", out / "experts.csv") if f.exists()]:
        raise ConfigError(f"{foreign[0]} is there without a config.json; name another --out_dir")


class CSVLog:
    """Rows of a run, written as they come. A resumed run drops those after its checkpoint's step."""

    def __init__(self, path, columns, resume_step):
        kept = []
        if resume_step and path.exists():
            whole, newline, _ = path.read_text(encoding="utf-8", errors="replace").rpartition("\n")  # a kill cuts rows
            kept = [row for row in csv.DictReader((whole + newline).splitlines())
                    if list(row) == columns and None not in row.values()
                    and row["step"].isdigit() and int(row["step"]) <= resume_step]
        tmp = Path(f"{path}.tmp")
        with open(tmp, "w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(tmp, path)
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns, lineterminator="\n")

    def write(self, *rows):
        self.writer.writerows(rows)
        self.file.flush()


# ---------------------------------------------------------------------------------------------------------------
# checkpoints


def checksum(state):
    """CRC-32 over every tensor in nested dicts and lists, in order; a flipped bit on disk changes it."""
    crc = 0
    if isinstance(state, torch.Tensor):
        flat = state.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return zlib.crc32(flat.numpy())
    children = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in children:
        if isinstance(value, (dict, list, tuple, torch.Tensor)):
            crc = zlib.crc32(f"{key}:{checksum(value)}".encode(), crc)
    return crc


def save_checkpoint(path, model, optimizers, step, s, tokenizer, fingerprint):
    """Write to a temporary file, sync, rename: at every moment there is a whole checkpoint or none yet."""
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    ckpt = {**state, "step": step, "settings": asdict(s), "tokenizer": tokenizer, "data": fingerprint,
            "rng": torch.get_rng_state(), "versions": versions(), "checksum": checksum(state)}
    tmp = Path(f"{path}.tmp")
    try:
        with open(tmp, "wb") as f:
            torch.save(ckpt, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except (OSError, RuntimeError) as e:  # torch's zip writer turns a full disk into a RuntimeError of its own
        tmp.unlink(missing_ok=True)
        kept = "the one before it is kept" if path.exists() else "there was none before it"
        raise OSError(f"the checkpoint of step {step} cannot be written to {path} ({str(e).splitlines()[0]}); {kept}. "
                      f"Make room, then --resume=True") from None
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself is on disk only when the folder is
    os.fsync(folder)
    os.close(folder)


def load_checkpoint(path):
    """
    The dict that save_checkpoint wrote, on the CPU. Raises ConfigError where the file is cut, foreign or damaged.

    weights_only: a checkpoint is data, and a stranger's cannot run anything. mmap: processes that read the same file
    share its pages.
    """
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = {"model": ckpt["model"], "optimizers": ckpt["optimizers"]}
        intact = ckpt["checksum"] == checksum(state)
        ckpt["step"], ckpt["settings"], ckpt["tokenizer"], ckpt["data"], ckpt["rng"]
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such checkpoint") from None
    except Exception as e:  # zipfile, pickle and torch each have their own for a file that is not what it should be
        raise ConfigError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): it is cut off or not ours. "
                          f"Start again in another --out_dir") from None
    if not intact:
        raise ConfigError(f"{path} is damaged: its checksum does not fit. Start again in another --out_dir")
    return ckpt
