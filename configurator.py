"""
Flat, typed settings from config files and --key=value flags, applied left to right:

    python train.py config/size/llama_0.12b.py config/unified.py --seed=2

The settings are a dataclass. Each field has a type with a range and a trailing comment, and --help prints those lines.
A config file is plain Python assignments. It is executed, so read a stranger's first. Every mistake is one line on
stderr, with exit code 2.

Imports none of the other files.
"""

import argparse
import difflib
import json
import os
import re
import sys
import traceback
from ast import literal_eval
from dataclasses import fields
from inspect import getsource, ismodule
from pathlib import Path
from stat import S_ISREG
from typing import Annotated, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A mistake that the user can fix. The message is one line: what was wrong, and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(message.splitlines()))  # a quoted flag may hold anything


# Ranges are part of a field's type: Annotated[type, lowest, highest]. Numbers end up in float32 and in int32.
LARGEST = 3.4e38
Count = Annotated[int, 1, 2**31 - 1]
Whole = Annotated[int, 0, 2**31 - 1]
Amount = Annotated[float, 0.0, LARGEST]
Fraction = Annotated[float, 0.0, 1.0]


def check(name, value, hint):
    """
    Return value as the type of hint. Only an int is converted, to a float.

    hint: int, float, bool, str, Literal[...] or Annotated[type, lowest, highest].
    Raises ConfigError when the type, the choice or the range is wrong.
    """
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        # 1 == True in Python, but --compile=1 is not --compile=True
        if not any(value == c and type(value) is type(c) for c in choices):
            raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, not {value!r}")
        return value
    hint, lowest, highest = get_args(hint) if get_origin(hint) is Annotated else (hint, -LARGEST, LARGEST)
    if type(value) is not hint and (type(value), hint) != (int, float):
        kind = {int: "an int", float: "a float", bool: "True or False", str: "a string"}[hint]
        raise ConfigError(f"{name} must be {kind}, not {value!r}")
    if hint is not str and not lowest <= value <= highest:
        bound = f"at least {lowest}" if value < lowest else f"at most {highest}"
        raise ConfigError(f"{name} must be {bound}, not {value!r}")
    return hint(value)


def check_all(values, hints, where):
    """
    A dict of what check returns for each value. hints: {name: hint} of the settings that there are.
    Raises ConfigError, whose message begins with `where`.
    """
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else "--help lists them all."
            raise ConfigError(f"{where}: there is no setting {name!r}. {hint}")
    try:
        return {name: check(name, value, hints[name]) for name, value in values.items()}
    except ValueError as e:  # a ConfigError, or Python's own where an int has too many digits to be shown
        raise ConfigError(f"{where}: {e}") from None


def read_file(path, hints):
    """
    Run a config file and return its assignments as a dict, without modules and names that begin with an underscore.

    Raises ConfigError for a file that is not there, cannot run, or sets what is not a setting.
    """
    source, namespace = read_bytes(path), {}  # bytes, which may begin with a mark or name their encoding
    try:
        exec(compile(source, path, "exec"), namespace)
    except (Exception, SystemExit) as e:  # whatever goes wrong in the file's own code
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(e, "lineno", None)
        where = f"{path}:{line}" if line else path
        raise ConfigError(f"{where}: {type(e).__name__}: {e}") from None
    values = {name: value for name, value in namespace.items() if not name.startswith("_") and not ismodule(value)}
    return check_all(values, hints, path)


def open_file(path):
    """Open a file to read bytes. Raises ConfigError, also for a FIFO, which would wait, and a device."""
    try:
        if not S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{path}: not a regular file")
        return open(path, "rb")
    except FileNotFoundError:
        near = difflib.get_close_matches(os.path.basename(path), [p.name for p in Path(path).parent.glob("*")], n=1)
        hint = f". Did you mean {Path(path).with_name(near[0])}?" if near else ""
        raise ConfigError(f"{path}: there is no such file{hint}") from None
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None


def read_bytes(path):
    """The content of a file. Raises ConfigError as open_file does."""
    with open_file(path) as f:
        return f.read()


def read_json(path):
    """The object in a JSON file, as a dict. Raises ConfigError for anything else, and for more than 16 MB."""
    with open_file(path) as f:
        text = f.read(2 ** 24)  # what is longer is cut off here, and then not JSON
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:  # deeply nested brackets exceed Python's stack
        raise ConfigError(f"{path}: not JSON ({e})") from None
    if type(value) is not dict:
        raise ConfigError(f"{path}: holds no JSON object")
    return value


def read_flag(arg, hints):
    """Return one --key=value as a dict. Raises ConfigError."""
    name, equals, text = arg[2:].partition("=")
    if not equals:
        raise ConfigError(f"{arg}: a flag needs a value, as in {arg}=...")
    try:  # a string is taken as it was typed: a folder may be called 007
        value = text if hints.get(name) is str else literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        value = text
    return check_all({name: value}, hints, arg)


def configure(settings_class, args):
    """
    Apply config files and --key=value flags to settings_class's defaults, left to right.

    Returns (settings, files): an instance of the dataclass, and the config files named. Raises ConfigError.
    """
    hints = get_type_hints(settings_class, include_extras=True)
    values, files = {}, []
    for arg in args:
        if arg.startswith("--"):
            values.update(read_flag(arg, hints))
        elif arg.startswith("-"):
            raise ConfigError(f"{arg}: flags are written --name=value")
        elif "=" in arg and not os.path.exists(arg):
            raise ConfigError(f"{arg}: flags begin with two dashes: --{arg}")
        else:
            values.update(read_file(arg, hints))
            files.append(arg)
    return settings_class(**values), files


def help_text(settings_class):
    """One line per setting of settings_class and its bases: name, default, comment and choices."""
    hints = get_type_hints(settings_class, include_extras=True)
    source, lines = "".join(map(getsource, settings_class.__mro__[:-1])), []
    for f in fields(settings_class):
        default = f.default if f.default != "" else '""'
        comment = re.search(rf"^ +{f.name}: .*?  # (.*)", source, re.MULTILINE)[1]
        choices = f" [{'|'.join(map(str, get_args(hints[f.name])))}]" if get_origin(hints[f.name]) is Literal else ""
        lines.append(f"  {f'--{f.name}={default}':<32} {comment}{choices}")
    return "\n".join(lines)


class _Stream:
    """A standard stream. Once writing to it has failed it is lost, and what is printed goes nowhere."""

    def __init__(self, stream):
        self._stream, self.lost = stream, False

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        return self._unless_lost(self._stream.write, text)

    def flush(self):
        return self._unless_lost(self._stream.flush)

    def _unless_lost(self, do, *args):
        try:
            return do(*args)
        except OSError as e:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self.lost = True
            if not isinstance(e, BrokenPipeError):  # as `| head` causes on purpose
                print(f"{os.path.basename(sys.argv[0])}: cannot print any more: {e.strerror}", file=sys.stderr)


def streams():
    """
    Make the standard streams safe to print to; every script calls this first. A character that the terminal cannot show
    becomes a question mark. A closed stream, a full disk or a reader that has gone (`| head`) ends the printing but not
    the script, and unheard() is True from then on. Ctrl-C prints one line.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # in this order they take the numbers 0, 1 and 2, which no other file may get
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        stream.reconfigure(errors="replace", line_buffering=True)  # a pipe gets each line at once
        setattr(sys, name, _Stream(stream))
    sys.excepthook = _ended


def _ended(kind, error, trace):
    if issubclass(kind, KeyboardInterrupt):
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def unheard():
    """Whether printing goes nowhere: the reader or the terminal has gone, or the disk is full."""
    return any(getattr(stream, "lost", False) for stream in (sys.stdout, sys.stderr))


def from_command_line(settings_class, usage):
    """Apply sys.argv as configure does. --help prints and exits with 0; a mistake is one line on stderr and exit 2."""
    streams()
    args = sys.argv[1:]
    if "--help" in args or "-h" in args:
        print((usage or "").strip() + "\n\nsettings, with their defaults:\n" + help_text(settings_class))
        sys.exit(0)
    try:
        return configure(settings_class, args)
    except ConfigError as e:
        refuse(e)


class Parser(argparse.ArgumentParser):
    """argparse with the module's docstring as it is, and with mistakes in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def refuse(error, code=2):
    """Print one line on stderr and exit: with 2 for the user's mistake, with 1 for a failure later."""
    rank = os.environ.get("RANK", "0")  # torchrun's processes may fail in different ways
    who = f"process {rank}: " if rank.isdecimal() and rank != "0" else ""
    print(f"{os.path.basename(sys.argv[0])}: {who}{' '.join(str(error).splitlines())}", file=sys.stderr)
    sys.exit(code)
