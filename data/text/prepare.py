"""Any folder of UTF-8 text files as a corpus.

Hidden files and files that are not UTF-8 are skipped. About 5% of the files go to validation, by a hash of their path
inside the folder. With too few files for that, the last 5% of the tokens do.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import Parser
from data.corpus import command_line, find_files, home, write_corpus
from data.tokens import HERE


def prepare(folder, tokenizer="bytes", out=HERE / "text"):
    """Writes a corpus of the text files in a folder and returns the folder of the corpus. Raises ConfigError."""
    files = find_files(folder, lambda name: name.startswith("."))
    own = os.path.realpath(out / "meta.json")  # of an earlier corpus, where out is in the folder
    write_corpus([(key, path) for key, path in files if os.path.realpath(path) != own], out, tokenizer)
    return out


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("folder", type=home, metavar="FOLDER", help="folder of text files, which may have sub-folders")
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes",
                        help="bytes (vocabulary 256) or GPT-2 byte pairs (50257) (default: %(default)s)")
    command_line(prepare, parser, "data/text")
