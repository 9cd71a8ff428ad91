"""The Python source on this machine as a corpus: the standard library, or everything installed. Needs no network.

Files that are not UTF-8 are skipped. About 5% of the files go to validation, by a hash of their path. A folder whose
files are near-duplicates of each other (encodings, lib2to3) stays on one side of the split.
"""

import sys
import sysconfig
from pathlib import Path

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import Parser
from data.corpus import command_line, find_files, write_corpus
from data.tokens import HERE

# More than half of the lines of a code page in encodings/ are in other code pages too, and lib2to3 has two copies of
# the grammar's test. No other folder of the standard library repeats itself as much.
UNITS = {"encodings", "lib2to3"}


def unit(key):
    """What stays on one side of the split: the file itself, or its folder where that is one of UNITS."""
    top = key.partition("/")[0]
    return top if top in UNITS else key


def source_files(site_packages=False):
    """
    The .py files of the standard library, and of the installed packages if asked: [(path inside its root, path)].
    The path inside the root is the same on every machine, so the split is too.
    """
    names = ["stdlib"] + ["purelib", "platlib"] * site_packages
    skip = {"site-packages", "dist-packages", "__pycache__"}
    files = []
    for root in dict.fromkeys(Path(sysconfig.get_path(name)) for name in names):
        files += find_files(root, skip.__contains__) if root.exists() else []
    return [(key, path) for key, path in files if key.endswith(".py")]


def prepare(out=None, tokenizer="bytes", site_packages=False):
    """Writes the corpus and returns its folder. Raises ConfigError."""
    out = out or HERE / ("pysrc" + "_gpt2" * (tokenizer == "gpt2") + "_site" * site_packages)
    write_corpus(source_files(site_packages), out, tokenizer, unit)
    return out


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes",
                        help="bytes (vocabulary 256) or GPT-2 byte pairs (50257) (default: %(default)s)")
    parser.add_argument("--site_packages", action="store_true",
                        help="add the installed packages to the standard library")
    command_line(prepare, parser, "data/pysrc, with _gpt2 or _site added for --tokenizer gpt2 and --site_packages")
