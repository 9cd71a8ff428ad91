"""Any folder of UTF-8 text files as a corpus.

Hidden files and files that are not UTF-8 are skipped. About 5% of the files go to validation, by a hash of their path
inside the folder. With too few files for that, the last 5% of the tokens do.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from configurator import ConfigError, Parser
from data.corpus import command_line, find_files, home, write_corpus
from data.tokens import HERE


def prepare(folder, glob=None, tokenizer="bytes", out=HERE / "text"):
    """Writes a corpus of the files that match a pattern in glob and returns its folder. Raises ConfigError."""
    glob = glob or ["*"]
    files = find_files(folder, lambda name: name.startswith("."))
    try:
        chosen = {path for pattern in glob for path in folder.rglob(pattern)}
    except (ValueError, NotImplementedError) as error:  # empty, absolute
        raise ConfigError(f"--glob {' '.join(glob)}: {error}; a pattern looks like *.txt") from None
    chosen.discard(out / "meta.json")  # of an earlier corpus, where out is the folder itself
    files = [(key, path) for key, path in files if path in chosen]
    if not files:
        raise ConfigError(f"{folder}: no files match {' '.join(glob)}; choose another folder or --glob")
    write_corpus(files, out, tokenizer)
    return out


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("folder", type=home, metavar="FOLDER", help="folder of text files, which may have sub-folders")
    parser.add_argument("--glob", action="append", metavar="PATTERN",
                        help="which files, such as '*.txt'; can be repeated (default: all)")
    parser.add_argument("--tokenizer", choices=("bytes", "gpt2"), default="bytes",
                        help="bytes (vocabulary 256) or GPT-2 byte pairs (50257) (default: %(default)s)")
    command_line(prepare, parser, "data/text")
