"""
The suites of ablate.py: their arms, what each arm is compared with, and ablate.py's command line.

Imports configurator.py and settings.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_type_hints

from configurator import ConfigError, Count, check, configure, read_flag
from settings import Settings

CONFIGS = Path(__file__).resolve().parent / "config"


class Arm(NamedTuple):
    name: str
    words: str  # config files and flags; a word without dashes is config/<word>.py
    reference: str | None = None  # the arm that it is compared with
    rate: str = ""  # the arm whose best rate it takes, which may be itself; empty leaves that to --tune
    steps: float = 1.0  # times max_steps


BASELINE, UNIFIED = Arm("baseline", "baseline"), Arm("unified", "unified", "baseline")
DECAYS = {"all": "decay on every γ", "input": "decay on the input role", "output": "decay on the output role",
          "none": "no decay on γ"}
QK_NORM = "QK-norm, no decay on γ, own rate"
STARTS = {"N(0, 0.02)": "--init_std=0.02 --embedding_std=0.02", "1/√fan_in": "--init_std=0 --embedding_std=0"}
# figure1 to figure10 are the paper's, the others ours. Unified against the baseline is only in primary, one verdict.
SUITES = {
    "figure1": [BASELINE, Arm("no scale, baseline's rate", "no_scale", "baseline", "baseline"),
                Arm("no scale, own rate", "no_scale", "baseline", "no scale, own rate"),
                Arm("no scale, baseline's rate, 1.4x steps", "no_scale", "baseline", "baseline", 1.4),
                Arm("no scale, own rate, 1.2x steps", "no_scale", "baseline", "no scale, own rate", 1.2)],
    "figure3": [Arm(name + long, f"gemma_wd_{decay} --optimizer=muon", DECAYS["all"] + long if decay != "all" else None,
                    name if long else "", steps)  # the rate is tuned on the short runs
                for long, steps in (("", 1), (", 5x steps", 5)) for decay, name in DECAYS.items()],
    "figure5": [BASELINE, Arm("HG", "hg", "baseline"),
                *(Arm(f"HG+{x}", f"hg_{x.lower()}", "HG") for x in ("AP", "DP", "DNP")),
                *(Arm(f"HG+{x}+{form}", f"hg_{x.lower()}_{form.lower()}", "HG+DP")
                  for x in ("DP", "DNP") for form in ("OR", "ER")),
                Arm("HG+DNP+OR+IWD", "unified", "HG+DNP+OR"), Arm("HG+DNP+ER+IWD", "hg_dnp_er_iwd", "HG+DNP+OR"),
                Arm("HG+DNP+IWD", "hg_dnp_iwd", "HG+DNP")],  # the paper does not have it
    # which part of the LM head makes HG+DNP worse: the norm on the logits, its u, or the decay on that u?
    "head": [Arm("HG+DNP", "hg_dnp"),
             Arm("head DP", "hg_dnp --head_placement=dual", "HG+DNP"),
             Arm("head without u and norm", "hg_dnp --head_placement=input", "HG+DNP"),
             Arm("no decay on u", "hg_dnp_iwd", "HG+DNP"),
             Arm("no decay on the head's u", "hg_dnp --scale_decay=all_but_head_u", "HG+DNP"),
             Arm("head without u and norm, no decay on u", "hg_dnp_iwd --head_placement=input", "no decay on u")],
    "figure6": [BASELINE, UNIFIED],
    "figure7": [BASELINE, UNIFIED],  # mixtures of experts
    "figure8": [Arm("baseline", "baseline --optimizer=muon"), Arm("unified", "unified --optimizer=muon", "baseline")],
    "figure9": [Arm("baseline", "baseline --schedule=wsd"), Arm("unified", "unified --schedule=wsd", "baseline")],
    # the paper widens an FFN of 2048 by 8 channels; of the lab size's 256 channels 1 is the same share
    "figure10": [BASELINE, Arm("1 more FFN channel", "--ffn_extra=1", "baseline"),
                 Arm("8 more FFN channels", "ffn_plus_8", "baseline")],
    "primary": [BASELINE, UNIFIED],
    "controls": [BASELINE, Arm("no decay on γ", "wd_none", "baseline"), Arm("QK-norm", "qk_norm", "baseline"),
                 Arm("QK-norm, a γ per channel", "qk_norm_per_channel", "baseline"),
                 Arm("DNP's norms, γ only before W", "norm", "baseline"),
                 Arm("DNP's norms, no γ", "norm --scale_vectors=False", "baseline"),
                 Arm("u on the LM head only", "--head_placement=dual", "baseline"),
                 Arm("1 + w", "zero_centred", "baseline"),
                 Arm("1 + w, no decay on γ", "zero_centred --scale_decay=none", "baseline"),
                 Arm("free", "unified_free", "baseline"), Arm("light", "unified_light", "baseline")],
    # the strongest control, tuned as unified is
    "qk_norm": [BASELINE, Arm(QK_NORM, "qk_norm --scale_decay=none", "baseline", QK_NORM),
                Arm("unified, own rate", "unified", QK_NORM, "unified, own rate")],
    "readings": [Arm("unified", "unified"), Arm("head DP", "unified --head_placement=dual", "unified"),
                 Arm("head without u and norm", "unified --head_placement=input", "unified"),
                 Arm("decay on α too", "unified_decay_direction", "unified"),
                 Arm("ER for OR", "hg_dnp_er_iwd", "unified")],
    "start": [Arm(f"{name}, {start}", f"{file} {flags}", ref and f"{ref}, {start}") for start, flags in STARTS.items()
              for name, file, ref in (("baseline", "baseline", None), ("light", "unified_light", "baseline"),
                                      ("unified", "unified", "baseline"))],
}
SIZES = {"figure6": "1,2,3,4,1@100,2@100", "figure7": "1,2,3"}  # without --sizes


@dataclass
class Options:
    lrs: str = ""  # peak learning rates, with commas; empty is train.py's one, and one is not tuned
    tune: Literal["each", "reference"] = "each"  # whose rate is tuned: every arm's, or the reference's for all its arms
    tune_seeds: str = "101,102,103"  # seeds on which rates are tuned
    seeds: str = "1,2,3"  # seeds that are reported; the arms share them, and with them the order of the data
    jobs: Count = 1  # cells that run at the same time, each with its share of the threads, or GPUs
    nproc: Count = 1  # processes of each cell; more than 1 is torchrun
    out: str = ""  # folder of the results; empty is out/ablate/ and the suite's name
    sizes: str = ""  # of figure6 and figure7: config files, or k for k layers, k heads and a width of 32 k; with commas
    tokens_per_param: Count = 20  # of each size, by the baseline's active parameters; 2@100 gives one size its own
    dry_run: bool = False  # list the cells and what is left to run, run nothing


def readable(text):
    """A path or a command line as UTF-8; what is not UTF-8 in the name of a file is replaced."""
    return str(text).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def numbers(text, kind, name):
    """'1,2,3' as [1, 2, 3] of `kind`, each once, in order. Raises ConfigError."""
    try:
        values = sorted({kind(word) for word in text.split(",")})
    except ValueError:
        raise ConfigError(f"--{name} takes numbers with commas between them, not {text!r}") from None
    hints = get_type_hints(Settings, include_extras=True)
    return [check(name, value, hints["lr" if kind is float else "seed"]) for value in values]


def parse(args):
    """Return (suite, options, base): base is the files and flags that hold for every cell. Raises ConfigError."""
    if not args or args[0].startswith("-"):
        raise ConfigError(f"name a suite first ({', '.join(SUITES)}), or strategy files with commas between them")
    own, base = [], []
    for arg in args[1:]:
        name = arg[2:].partition("=")[0] if arg.startswith("--") else ""
        if name in ("seed", "lr", "out_dir", "resume", "overwrite", "stop_at"):
            raise ConfigError(f"{arg}: ablate.py sets {name} for each cell; it takes --seeds, --lrs and --out")
        (own if name in get_type_hints(Options) else base).append(arg)
    opt, _ = configure(Options, own)
    opt.lrs = numbers(opt.lrs, float, "lrs") if opt.lrs else []
    opt.seeds, opt.tune_seeds = numbers(opt.seeds, int, "seeds"), numbers(opt.tune_seeds, int, "tune_seeds")
    if len(opt.lrs) == 2:
        raise ConfigError("--lrs takes one rate, or three and more: of two, the best is always at the end of the grid")
    if opt.lrs[1:] and set(opt.seeds) & set(opt.tune_seeds):
        raise ConfigError("--seeds and --tune_seeds share a seed: the rate chosen on it looks better there than it is")
    if (opt.sizes or opt.tokens_per_param != Options.tokens_per_param) and args[0] not in SIZES:
        raise ConfigError(f"--sizes and --tokens_per_param are for {' and '.join(SIZES)}")
    opt.sizes = (opt.sizes or SIZES.get(args[0], "")).split(",")
    return args[0], opt, base


def named_arms(suite, base):
    """The Arms of a suite, at one size; their words are a list of train.py's arguments. Raises ConfigError."""
    if suite.endswith(".py"):
        files = suite.split(",")
        names = [readable(Path(f).stem) for f in files]
        if len(set(names)) < len(names):
            raise ConfigError(f"{suite}: each strategy file once, and of different names")
        return [Arm(n, base + [f], names[0] if n != names[0] else None) for n, f in zip(names, files)]
    if suite not in SUITES:
        raise ConfigError(f"there is no suite {suite!r}; there are {', '.join(SUITES)}, or name strategy files (.py)")
    file = lambda word: word if word.startswith("--") else str(CONFIGS / f"{word}.py")
    return [arm._replace(words=base + [file(word) for word in arm.words.split()]) for arm in SUITES[suite]]


def check_base(base, arms):
    """Raise ConfigError where an arm's own words, which come after those of base, undo a flag of base."""
    hints, flags = get_type_hints(Settings, include_extras=True), {}
    for arg in base:
        flags |= read_flag(arg, hints) if arg.startswith("--") else {}
    flags.pop("warmup_steps", None)  # a size shortens it
    for arm in arms:
        s, _ = configure(Settings, arm.words)
        for name, value in sorted(flags.items()):
            if getattr(s, name) != value:
                raise ConfigError(f"--{name}={value} cannot hold for every cell: {arm.name} has {name} "
                                  f"{getattr(s, name)!r}. Leave it out, or compare strategy files without it")
