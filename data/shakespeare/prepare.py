"""Tiny Shakespeare in bytes with nanoGPT's split: the first 90% for training, the rest for validation.

Its 1,115,394 characters are ASCII, so a byte here is a character there. Downloads 1 MB, or takes a copy: --from FILE.
"""

import hashlib
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

if __name__ == "__main__":  # Python has put this folder on the path, not the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from configurator import ConfigError, Parser, open_file
from data.corpus import command_line, home, save
from data.tokens import HERE, load_tokenizer

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def prepare(source=None, out=HERE / "shakespeare"):
    """Writes the corpus from the file source, or from URL where that is None. Raises ConfigError."""
    try:
        with open_file(source) if source else urlopen(URL, timeout=60) as file:
            text = file.read()
    except (OSError, HTTPException) as error:
        raise ConfigError(f"{source or URL}: cannot be read ({error}); give a copy with --from FILE") from None
    if hashlib.sha256(text).hexdigest() != SHA256:
        raise ConfigError(f"{source or URL}: not tiny Shakespeare, its sha256 differs; give a copy with --from FILE")
    tokens, cut = np.frombuffer(text, np.uint8), len(text) * 9 // 10
    out.mkdir(parents=True, exist_ok=True)
    save(out, load_tokenizer("bytes"), [tokens[:cut]], [tokens[cut:]])


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument("--from", dest="source", type=home, metavar="FILE",
                        help="a copy of the text (default: download it)")
    command_line(prepare, parser, "data/shakespeare")
