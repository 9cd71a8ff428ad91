"""
Pictures as PNG and SVG, of runs of train.py beside each other and of what ablate.py leaves:

    python plot.py out/baseline out/unified    losses, their difference, and every γ, from the runs' own logs
    python plot.py out/ablate/buildup          everything that its CSVs have data for, beside them
    python plot.py results/* --gamma=+HG       the γ of this arm, not of the one with most scale parameters

curves     losses over tokens, and the difference to the reference, which of runs is the first
gammas     every γ over time, by layer and branch
ablation   each arm's difference to its reference with its interval, and the spread of the reference
directions the magnitude of every γ (β under OR) and the angle its direction has turned
scaling    L = a C^(-b), where arms are named 'strategy at size'

Pictures of runs go to the first one's folder, or to --out.
"""

import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import ConfigError, refuse, streams
from stats import PF_DAY, mean_and_half_width, read_csv, scaling_fits, summarise

# A card of its own: GitHub shows a picture on white and on near-black, and a transparent one is lost on either.
PAPER, INK, PALE = "#fbfaf7", "#24292f", "#d9d6cf"
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56a0c9", "#7b3fa0", "#a0522d", "#5f8f2f", "#c0392b"]
STYLE = {"figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "font.size": 9,
         "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
         "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": PALE,
         "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlesize": 9, "legend.frameon": False,
         "legend.fontsize": 8, "lines.linewidth": 1.4, "figure.constrained_layout.use": True,
         "svg.hashsalt": "nanoScale"}  # without a salt of ours the same data gives another SVG each time
WIDTH = 8.3  # inches; at 100 to the inch, GitHub's column


def save(figure, folder, name):
    """Write name.png and name.svg into folder, the same bytes for the same data, and say so."""
    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
    print(f"{folder}/{name}.png and .svg")


def line_styles(arms):
    """{arm: keywords of ax.plot}: an only reference in ink, one of several dashed in the colour of what has it."""
    compared = [name for name, a in arms.items() if a["reference"]]
    styles = {name: {"color": COLOURS[i % len(COLOURS)]} for i, name in enumerate(compared)}
    references = [name for name in arms if name not in compared]
    for name in references:
        mine = [n for n in compared if arms[n]["reference"] == name]
        styles[name] = {"color": styles[mine[0]]["color"], "dashes": (3, 1.5)} if mine and references[1:] else {
            "color": INK}
    return styles


# ---------------------------------------------------------------------------------------------------------------
# the comparison


def plot_ablation(folder, arms):
    compared = {name: a for name, a in arms.items() if "delta" in a and not a["same"]}
    if not compared:
        return
    figure = Figure(figsize=(WIDTH, 1.3 + 0.34 * len(compared)))
    ax = figure.subplots()
    for y, (name, a) in enumerate(compared.items()):
        spread = mean_and_half_width(list(arms[a["reference"]]["losses"].values()))[1]
        if spread:
            spread *= math.sqrt(2)  # two sets of the reference's runs with nothing in common
            ax.barh(y, 2 * spread, left=-spread, height=0.7, color=PALE, zorder=0,
                    label="the reference against itself, other seeds" if y == 0 else None)
        ax.errorbar(a["delta"], y, xerr=a["half"], fmt="o", color=COLOURS[0], capsize=3, markersize=6,
                    markerfacecolor=PAPER if a["verdict"] == "not significant" else COLOURS[0])
    ax.axvline(0, color=INK, linewidth=0.8)
    references = {a["reference"] for a in compared.values()}
    ax.set_yticks(range(len(compared)), [name if len(references) == 1 else f"{name}  vs  {a['reference']}"
                                         for name, a in compared.items()])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    pairs = [a["pairs"] for a in compared.values()]
    seeds = " to ".join(map(str, sorted({min(pairs), max(pairs)})))
    against = f"{references.pop()}'s" if len(references) == 1 else "the reference's"
    figure.supxlabel(f"validation loss minus {against}, nats (95% interval over {seeds} paired seeds); "
                     "filled: better or worse by the corrected test", fontsize="medium")  # the axis may be too short
    if ax.patches:
        figure.legend(loc="outside upper right")
    save(figure, folder, "ablation")


def by_seed(curves, column="val_loss"):
    """{arm: (tokens (k,), losses (seeds, k))} from rows of logs, at the steps that all seeds have."""
    runs = defaultdict(lambda: defaultdict(dict))
    for row in curves:
        if row.get(column):
            runs[row["arm"]][row["seed"]][int(row["tokens"])] = float(row[column])
    found = {}
    for arm, seeds in runs.items():
        tokens = sorted(set.intersection(*(set(run) for run in seeds.values())))
        found[arm] = np.array(tokens), np.array([[seeds[s][t] for t in tokens] for s in sorted(seeds)])
    return found


def plot_curves(folder, arms, curves):
    losses, style = by_seed(curves), line_styles(arms)
    compared = [name for name, a in arms.items() if a["reference"] in losses and name in losses]
    single = all(len(values) == 1 for _, values in losses.values())
    figure = Figure(figsize=(WIDTH, 5.4 if compared else 3.2))
    axes = np.atleast_1d(figure.subplots(2 if compared else 1, 1, sharex=True))
    ends = []
    for name in (name for name in arms if name in losses):
        tokens, values = losses[name]
        mean = values.mean(0)
        axes[0].plot(tokens, mean, **style[name], label=name)
        draw_band(axes[0], tokens, values.min(0), values.max(0), style[name]["color"])
        # from a fifth of the run on: the fall from log(vocabulary) would flatten all that differs
        ends += [np.interp(tokens[-1] / 5, tokens, mean), mean.min()]
    for name, (tokens, values) in by_seed(curves, "train_loss").items() if single else ():
        axes[0].plot(tokens, values[0], **{**style[name], "linewidth": 0.7}, alpha=0.3, zorder=0)
    margin = 0.05 * (max(ends) - min(ends)) or 0.1
    axes[0].set_ylim(min(ends) - margin, max(ends) + margin)
    axes[0].set_ylabel("validation loss, nats")
    axes[0].set_title("faint: training loss" if single else "mean over seeds; bands: all seeds", loc="left")
    reach = 0.005
    for name in compared:
        tokens, here, there = common(losses[name], losses[arms[name]["reference"]])
        mean = (here - there).mean(0)
        sd = (here - there).std(0, ddof=1) if len(here) > 1 else 0.0
        axes[1].plot(tokens, mean, **style[name])
        draw_band(axes[1], tokens, mean - sd, mean + sd, style[name]["color"])
        reach = max(reach, 4 * abs(mean[-1]))
    if compared:
        axes[1].axhline(0, color=INK, linewidth=0.8)
        axes[1].set_ylim(-reach, reach)
        axes[1].set_ylabel("difference, nats")
        axes[1].set_title("one run each: another seed would move this line" if single else
                          "in pairs of equal seed; bands: a standard deviation of the pairs", loc="left")
    axes[-1].set_xlabel("tokens")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))  # 5M
    figure.legend(loc="outside lower center", ncols=4)
    save(figure, folder, "curves")


def draw_band(ax, x, low, high, colour):
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def common(a, b):
    """(tokens, losses of a, losses of b) of two by_seed() entries, where both were evaluated."""
    tokens = np.intersect1d(a[0], b[0])
    return tokens, a[1][:, np.isin(a[0], tokens)], b[1][:, np.isin(b[0], tokens)]


# ---------------------------------------------------------------------------------------------------------------
# scale vectors

SITES = {"attn.qkv.v": "attention, input", "attn.qkv.u": "attention, output", "attn": "QK-norm",
         "ffn.gate_up.v": "FFN, input", "ffn.gate_up.u": "FFN, output", "": "post-norm", "lm_head.v": "LM head"}


def place(name):
    """(layer or None, site, branch) of a scale vector's name: 'blocks.3.attn.qkv.v.q' is (3, 'attn.qkv.v', 'q')."""
    layer, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", name).groups()
    site, _, branch = rest.rpartition(".")
    return None if layer is None else int(layer), site, branch


def gamma_series(scales):
    """{(layer, site, branch): {column: (k,)}} of one run's scales.csv, with 'step'."""
    rows = defaultdict(list)
    for row in scales:
        rows[place(row["name"])].append(row)
    numeric = ("step", "mean", "std", "norm", "cosine")
    return {key: {c: np.array([float(r[c]) for r in group]) for c in numeric} for key, group in rows.items()}


def plot_gammas(folder, arm, series, name="gammas"):
    layers = sorted({layer for layer, _, _ in series if layer is not None})
    shown = layers if len(layers) <= 6 else [layers[round(i * (len(layers) - 1) / 5)] for i in range(6)]
    sites = list(dict.fromkeys(site for layer, site, _ in series if layer is not None))
    others = [key for key in series if key[0] is None]
    figure = Figure(figsize=(WIDTH, 0.9 + 1.45 * (len(sites) + bool(others))))
    axes = figure.subplots(len(sites) + bool(others), len(shown), sharex=True, sharey="row", squeeze=False)
    for i, site in enumerate(sites):
        branches = list(dict.fromkeys(b for _, s, b in series if s == site))
        for j, layer in enumerate(shown):
            for n, branch in enumerate(branches):
                if (layer, site, branch) in series:
                    draw_gamma(axes[i, j], series[layer, site, branch], COLOURS[n], branch)
            if i == 0:
                axes[i, j].set_title(f"layer {layer}")
        axes[i, 0].set_ylabel(SITES.get(site, site))
        if axes[i, -1].lines:
            axes[i, -1].legend(loc="best", handlelength=1)
    if others:
        for ax in axes[-1, 1:]:
            ax.set_visible(False)
        for n, key in enumerate(others):
            draw_gamma(axes[-1, 0], series[key], COLOURS[n], key[2])
        axes[-1, 0].set_ylabel(SITES.get(others[0][1], others[0][1]))
        for ax in axes[-2, 1:]:
            ax.tick_params(labelbottom=True)
    figure.suptitle(f"{arm}: γ over steps, mean and standard deviation over channels", fontsize=9, x=0.01, ha="left")
    save(figure, folder, name)


def draw_gamma(ax, s, colour, label):
    ax.plot(s["step"], s["mean"], color=colour, label=label)
    draw_band(ax, s["step"], s["mean"] - s["std"], s["mean"] + s["std"], colour)


def plot_directions(folder, arm, series):
    figure = Figure(figsize=(WIDTH, 3.4))
    left, right = figure.subplots(1, 2)
    sites = list(dict.fromkeys(site for _, site, _ in series))
    for (_, site, _), s in series.items():
        colour = COLOURS[sites.index(site)]
        start = s["norm"][0]  # √n: every γ begins as ones
        left.plot(s["step"], s["norm"] / start, color=colour, linewidth=0.9)
        right.plot(s["step"], np.degrees(np.arccos(np.clip(s["cosine"], -1, 1))), color=colour, linewidth=0.9)
    for site in sites:
        left.plot([], [], color=COLOURS[sites.index(site)], label=SITES.get(site, site))
    left.set_title("magnitude ‖γ‖/√n, which is |β| under OR", loc="left")
    right.set_title("angle between γ and its start, degrees", loc="left")
    left.set_xlabel("step")
    right.set_xlabel("step")
    figure.suptitle(f"{arm}: a line for every scale vector", fontsize=9, x=0.01, ha="left")
    figure.legend(loc="outside lower center", ncols=4)
    save(figure, folder, "directions")


# ---------------------------------------------------------------------------------------------------------------
# scaling


def plot_scaling(folder, arms):
    fits = scaling_fits(arms)
    if not fits:
        return
    figure = Figure(figsize=(WIDTH, 3.8))
    ax = figure.subplots()
    colours = dict(zip(fits, [INK, *COLOURS]))
    for name, a in arms.items():
        if (strategy := name.partition(" at ")[0]) in fits:
            ax.plot([a["flops"]] * len(a["losses"]), list(a["losses"].values()), "x" if "," in name else ".",
                    color=colours[strategy], alpha=0.5)
    for name, fit in fits.items():
        (a, b), compute = fit["fit"], np.array([m["flops"] for m in fit["members"]])
        dense = np.geomspace(compute.min(), compute.max(), 100)
        ax.plot(dense, a * (dense / PF_DAY) ** -b, color=colours[name], label=f"{name}: {fit['text']}")
    ax.set_xscale("log")
    ax.set_xlabel("training compute C, FLOPs")
    ax.set_ylabel("validation loss, nats")
    others = "; crosses: other budgets, not fitted" if any(" at " in name and "," in name for name in arms) else ""
    ax.set_title(f"L = a C^(−b){others}", loc="left")
    figure.legend(loc="outside lower center", ncols=1)
    save(figure, folder, "scaling")


# ---------------------------------------------------------------------------------------------------------------


def plot_suite(folder, gamma=None):
    """Make every picture that the CSVs in folder have data for. Raises ConfigError where there is nothing to draw."""
    rows = [row for row in read_csv(folder / "results.csv") if row.get("use") == "report"]
    arms = summarise(rows)
    if not arms:
        raise ConfigError(f"{folder} has neither a run's log.csv nor finished cells in a results.csv of this ablate.py")
    # only the seeds that all arms have make pairs
    seeds = set.intersection(*(set(a["losses"]) for a in arms.values()))
    of_cell = defaultdict(list)
    for row in rows:
        if row["arm"] in arms and int(row["seed"]) in seeds:
            of_cell[row["cell"]].append({"arm": row["arm"], "seed": int(row["seed"])})
    curves, scales = ([{**row, **names} for row in read_csv(folder / f"{log}.csv") for names in of_cell[row["cell"]]]
                      for log in ("curves", "scales"))
    vectors = defaultdict(list)
    for row in scales:
        vectors[row["arm"]].append(row)
    if gamma and gamma not in vectors:
        raise ConfigError(f"{folder}/scales.csv has no arm {gamma!r}; it has {', '.join(vectors) or 'none'}")
    with rc_context(STYLE):
        plot_ablation(folder, arms)
        plot_curves(folder, arms, curves)
        plot_scaling(folder, arms)
        if vectors:
            arm = gamma or max(vectors, key=lambda arm: len({row["name"] for row in vectors[arm]}))
            plot_gammas(folder, arm, gamma_series(vectors[arm]))
            plot_directions(folder, arm, gamma_series(vectors[arm]))


def plot_runs(folders, out):
    """Draw runs of train.py from their own logs into out, the first as the reference. Raises ConfigError."""
    names = [folder.name for folder in folders]
    arms, curves = {}, []
    for folder in folders:
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        log = read_csv(folder / "log.csv")
        if not any(row["val_loss"] for row in log):
            raise ConfigError(f"{folder}/log.csv holds no evaluation yet")
        arms[name] = {"reference": next(iter(arms), None)}
        curves += [{**row, "arm": name, "seed": 0} for row in log]
    out.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        plot_curves(out, arms, curves)
        for folder, name in zip(folders, arms):
            if series := gamma_series(read_csv(folder / "scales.csv")):
                plot_gammas(out, name, series, "gammas" + (f"-{folder.name}" if folders[1:] else ""))


def main(args):
    if not args or {"--help", "-h"} & set(args):
        print((__doc__ or '').strip())
        return
    flags, folders = {}, []
    for arg in args:
        name, equals, value = arg.partition("=")
        if name in ("--gamma", "--out") and equals:
            flags[name] = value
        elif arg.startswith("-"):
            raise ConfigError(f"{arg}: the flags are --gamma=ARM and --out=FOLDER")
        else:
            folders.append(Path(arg).expanduser())
    runs = [folder for folder in folders if (folder / "log.csv").exists()]
    if runs:
        plot_runs(runs, Path(flags.get("--out", runs[0])).expanduser())
    for folder in folders:
        if folder not in runs:
            plot_suite(folder, flags.get("--gamma"))


if __name__ == "__main__":
    streams()
    try:
        main(sys.argv[1:])
    except ConfigError as e:
        refuse(e)
    except OSError as e:
        sys.exit(f"plot.py: {e}")
