"""
The suites of ablate.py: which arms there are, and which arm each is compared with. Knows none of the other files.
"""

from typing import NamedTuple


class Arm(NamedTuple):
    name: str
    words: str  # config files and flags; a word without dashes is config/<word>.py
    reference: str | None = None  # the arm that it is compared with
    rate: str = ""  # the arm whose best rate it takes, which may be itself; empty leaves that to --tune
    steps: float = 1.0  # times max_steps


BASELINE, UNIFIED = Arm("baseline", "baseline"), Arm("unified", "unified", "baseline")
DECAYS = {"all": "decay on every γ", "input": "decay on the input role", "output": "decay on the output role",
          "none": "no decay on γ"}
STARTS = {"N(0, 0.02)": "--init_std=0.02 --embedding_std=0.02", "1/√fan_in": "--init_std=0 --embedding_std=0"}
SUITES = {  # figure1 to figure10 are the paper's; the others are ours
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
                Arm("HG+DNP+IWD", "hg_dnp_iwd", "HG+DNP"),  # the paper does not have it
                UNIFIED],  # the same runs as HG+DNP+OR+IWD, compared with the baseline
    # which part of the LM head makes HG+DNP worse: the norm on the logits, its u, or the decay on that u?
    "head": [Arm("HG+DNP", "hg_dnp"), Arm("HG", "hg", "HG+DNP"),
             Arm("head DP", "hg_dnp --head_placement=dual", "HG+DNP"),
             Arm("head without u and norm", "hg_dnp --head_placement=input", "HG+DNP"),
             Arm("no decay on u", "hg_dnp_iwd", "HG+DNP"),
             Arm("head without u and norm, no decay on u", "hg_dnp_iwd --head_placement=input", "no decay on u")],
    "figure6": [BASELINE, UNIFIED],
    "figure7": [BASELINE, UNIFIED],  # mixtures of experts
    "figure8": [Arm("baseline", "baseline --optimizer=muon"), Arm("unified", "unified --optimizer=muon", "baseline")],
    "figure9": [Arm("baseline", "baseline --schedule=wsd"), Arm("unified", "unified --schedule=wsd", "baseline")],
    # the paper widens an FFN of 2048 by 8 channels; of the lab size's 256 channels 1 is the same share
    "figure10": [BASELINE, Arm("1 more FFN channel", "--ffn_extra=1", "baseline"),
                 Arm("8 more FFN channels", "ffn_plus_8", "baseline"), UNIFIED],
    "primary": [BASELINE, UNIFIED],
    "controls": [BASELINE, Arm("no decay on γ", "wd_none", "baseline"), Arm("QK-norm", "qk_norm", "baseline"),
                 Arm("QK-norm, a γ per channel", "qk_norm_per_channel", "baseline"),
                 Arm("QK-norm, no decay on γ", "qk_norm --scale_decay=none", "baseline"),
                 Arm("DNP's norms, γ only before W", "norm", "baseline"),
                 Arm("DNP's norms, no γ", "norm --scale_vectors=False", "baseline"),
                 Arm("u on the LM head only", "--head_placement=dual", "baseline"),
                 Arm("1 + w", "zero_centred", "baseline"), Arm("free", "unified_free", "baseline"),
                 Arm("light", "unified_light", "baseline"), UNIFIED,
                 Arm("unified vs QK-norm, no decay on γ", "unified", "QK-norm, no decay on γ")],
    "readings": [Arm("unified", "unified"), Arm("head DP", "unified --head_placement=dual", "unified"),
                 Arm("head without u and norm", "unified --head_placement=input", "unified"),
                 Arm("decay on α too", "unified_decay_direction", "unified"),
                 Arm("ER for OR", "hg_dnp_er_iwd", "unified"), Arm("baseline", "baseline", "unified")],
    "start": [Arm(f"{name}, {start}", f"{file} {flags}", ref and f"{ref}, {start}") for start, flags in STARTS.items()
              for name, file, ref in (("baseline", "baseline", None), ("light", "unified_light", "baseline"),
                                      ("unified", "unified", "baseline"))],
}
SIZES = {"figure6": "1,2,3,4,1@100,2@100", "figure7": "1,2,3"}  # without --sizes
