"""
Plots from the CSVs that ablate.py leaves, and from nothing else:

    python plot.py out/ablate/buildup          every plot its CSVs have data for, as PNG and SVG, beside them
    python plot.py results/* --gamma=+HG       the γ of this arm, not of the one with most scale parameters

ablation   each arm's difference to its reference with its interval, on the reference's noise
curves     validation loss over tokens, and the paired difference over tokens
tokens     with how many tokens fewer the reference's final loss is reached
gammas     every γ over time, by layer and branch
directions the magnitude of every γ (β under OR) and the angle its direction has turned
scaling    L = a + b C^(-c), where arms are named 'strategy at size'
"""

import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from configurator import ConfigError, refuse
from stats import mean_and_half_width, read_csv, summarise

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


def plot_ablation(folder, arms, curves, scales):
    compared = {name: a for name, a in arms.items() if "delta" in a and not a["same"]}
    if not compared:
        return
    figure = Figure(figsize=(WIDTH, 1.3 + 0.34 * len(compared)))
    ax = figure.subplots()
    for y, (name, a) in enumerate(compared.items()):
        if a["noise"] is not None:
            ax.barh(y, 2 * a["noise"], left=-a["noise"], height=0.7, color=PALE, zorder=0,
                    label="the reference against itself, other seeds" if y == 0 else None)
        ax.errorbar(a["delta"], y, xerr=a["half"], fmt="o", color=COLOURS[0], capsize=3, markersize=6,
                    markerfacecolor=COLOURS[0] if a["beyond"] else PAPER)
    ax.axvline(0, color=INK, linewidth=0.8)
    references = {a["reference"] for a in compared.values()}
    ax.set_yticks(range(len(compared)), [name if len(references) == 1 else f"{name}  vs  {a['reference']}"
                                         for name, a in compared.items()])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    seeds = len(next(iter(compared.values()))["losses"])
    against = f"{references.pop()}'s" if len(references) == 1 else "the reference's"
    figure.supxlabel(f"validation loss minus {against}, nats (95% interval over {seeds} paired seeds); "
                     "filled: beyond noise", fontsize="medium")  # the figure's: long names leave little of the axis
    if any(a["noise"] is not None for a in compared.values()):
        figure.legend(loc="outside upper right")
    save(figure, folder, "ablation")


def by_seed(curves, column="val_loss"):
    """{arm: (tokens (k,), losses (seeds, k))} from curves.csv, at the evaluations that all seeds have."""
    runs = defaultdict(lambda: defaultdict(dict))
    for row in curves:
        if row[column]:
            runs[row["arm"]][row["seed"]][int(row["tokens"])] = float(row[column])
    found = {}
    for arm, seeds in runs.items():
        tokens = sorted(set.intersection(*(set(run) for run in seeds.values())))
        found[arm] = np.array(tokens), np.array([[run[t] for t in tokens] for run in seeds.values()])
    return found


def plot_curves(folder, arms, curves, scales):
    losses, style = by_seed(curves), line_styles(arms)
    compared = [name for name, a in arms.items() if a["reference"] in losses and name in losses]
    figure = Figure(figsize=(WIDTH, 5.4 if compared else 3.2))
    axes = np.atleast_1d(figure.subplots(2 if compared else 1, 1, sharex=True))
    top = 0.0
    for name in (name for name in arms if name in losses):
        tokens, values = losses[name]
        mean = values.mean(0)
        axes[0].plot(tokens, mean, **style[name], label=name)
        axes[0].fill_between(tokens, values.min(0), values.max(0), color=style[name]["color"], alpha=0.15, linewidth=0)
        # from a fifth of the run on: the fall from log(vocabulary) would flatten all that differs
        top = max(top, np.interp(tokens[-1] / 5, tokens, mean))
    axes[0].set_ylim(top=top)
    axes[0].set_ylabel("validation loss, nats")
    axes[0].set_title("mean over seeds; bands: all seeds", loc="left")
    for name in compared:
        tokens, here, there = common(losses[name], losses[arms[name]["reference"]])
        difference = here - there
        axes[1].plot(tokens, difference.mean(0), **style[name])
        if len(difference) > 1:
            sd = difference.std(0, ddof=1)
            axes[1].fill_between(tokens, difference.mean(0) - sd, difference.mean(0) + sd,
                                 color=style[name]["color"], alpha=0.15, linewidth=0)
    if compared:
        axes[1].axhline(0, color=INK, linewidth=0.8)
        last = [abs(np.subtract(*common(losses[n], losses[arms[n]["reference"]])[1:]).mean(0)[-1]) for n in compared]
        reach = max(4 * max(last), 0.005)
        axes[1].set_ylim(-reach, reach)
        axes[1].set_ylabel("difference, nats")
        axes[1].set_title("in pairs of equal seed; bands: a standard deviation of the pairs", loc="left")
    axes[-1].set_xlabel("tokens")
    figure.legend(loc="outside lower center", ncols=4)
    save(figure, folder, "curves")


def common(a, b):
    """(tokens, losses of a, losses of b) of two by_seed() entries, where both were evaluated."""
    tokens = np.intersect1d(a[0], b[0])
    return tokens, a[1][:, np.isin(a[0], tokens)], b[1][:, np.isin(b[0], tokens)]


def tokens_to_reach(tokens, losses, level):
    """The tokens, float, at which a curve first comes down to level, between evaluations linearly; None if never."""
    below = np.flatnonzero(losses <= level)
    if not len(below):
        return None
    i = below[0]
    if i == 0:
        return float(tokens[0])
    part = (losses[i - 1] - level) / (losses[i - 1] - losses[i])
    return float(tokens[i - 1] + part * (tokens[i] - tokens[i - 1]))


def saving(arm, reference):
    """
    How many times the tokens the worse of two by_seed() entries takes: (factor, level, tokens of the better).

    factor > 1: the arm reaches the reference's final loss with 1/factor of its tokens. Below 1: the other way round.
    """
    better, worse = (arm, reference) if arm[1].mean(0)[-1] <= reference[1].mean(0)[-1] else (reference, arm)
    level = worse[1].mean(0)[-1]
    reached = tokens_to_reach(better[0], better[1].mean(0), level)
    factor = worse[0][-1] / reached
    return factor if better is arm else 1 / factor, level, reached


def plot_tokens(folder, arms, curves, scales):
    losses, style = by_seed(curves), line_styles(arms)
    compared = [name for name, a in arms.items() if a["reference"] in losses and name in losses and not a["same"]]
    if not compared:
        return
    figure = Figure(figsize=(WIDTH, 3.6))
    ax = figure.subplots()
    ends = []
    for name in dict.fromkeys(arms[n]["reference"] for n in compared):
        tokens, values = losses[name]
        ax.plot(tokens, values.mean(0), **style[name], label=name)
        ax.axhline(values.mean(0)[-1], color=style[name]["color"], linewidth=0.6, linestyle=":")
    for name in compared:
        tokens, values = losses[name]
        factor, level, reached = saving(losses[name], losses[arms[name]["reference"]])
        word = f"{factor:.2f}× fewer" if factor >= 1 else f"{1 / factor:.2f}× more"
        ax.plot(tokens, values.mean(0), **style[name], label=f"{name}: {word}")
        if factor >= 1:
            ax.plot(reached, level, "o", color=style[name]["color"])
        ends += [values.mean(0)[-1], level, np.interp(tokens[-1] * 0.6, tokens, values.mean(0))]
    margin = 0.1 * (max(ends) - min(ends))
    ax.set_ylim(min(ends) - margin, max(ends) + margin)
    ax.set_xlabel("tokens")
    ax.set_ylabel("validation loss, nats")
    ax.set_title("tokens to the worse one's final loss. Where the learning rate is still to decay there,\n"
                 "the better one is read off too early: the factors are lower bounds", loc="left")
    figure.legend(loc="outside lower center", ncols=3)
    save(figure, folder, "tokens")


# ---------------------------------------------------------------------------------------------------------------
# scale vectors

SITES = {"attn.qkv.v": "attention, input", "attn.qkv.u": "attention, output", "attn": "QK-norm",
         "ffn.gate_up.v": "FFN, input", "ffn.gate_up.u": "FFN, output", "": "post-norm", "lm_head.v": "LM head"}


def place(name):
    """(layer or None, site, branch) of a scale vector's name: 'blocks.3.attn.qkv.v.q' is (3, 'attn.qkv.v', 'q')."""
    layer, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", name).groups()
    site, _, branch = rest.rpartition(".")
    return None if layer is None else int(layer), site, branch


def gamma_series(scales, arm):
    """{(layer, site, branch): {column: (k,)}} of one arm in scales.csv, with 'step'."""
    rows = defaultdict(list)
    for row in scales:
        if row["arm"] == arm:
            rows[place(row["name"])].append(row)
    numeric = ("step", "mean", "std", "norm", "cosine")
    return {key: {c: np.array([float(r[c]) for r in group]) for c in numeric} for key, group in rows.items()}


def plot_gammas(folder, arm, series):
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
    save(figure, folder, "gammas")


def draw_gamma(ax, s, colour, label):
    ax.plot(s["step"], s["mean"], color=colour, label=label)
    ax.fill_between(s["step"], s["mean"] - s["std"], s["mean"] + s["std"], color=colour, alpha=0.15, linewidth=0)


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


def fit_power_law(compute, loss):
    """
    Least squares of L = a + b C^(-c). compute, loss: (k,), k ≥ 3. Returns (a, b, c), b in units of compute^c.

    For each c the rest is linear, so c is searched on a grid, five times finer around the best.
    """
    unit = np.exp(np.log(compute).mean())
    best, centre, width = None, math.log(0.2), math.log(20)
    for _ in range(5):
        for c in np.exp(np.linspace(centre - width, centre + width, 81)):
            design = np.stack([np.ones_like(loss), (compute / unit) ** -c], axis=1)
            (a, b), *_ = np.linalg.lstsq(design, loss, rcond=None)
            error = ((design @ (a, b) - loss) ** 2).sum()
            if best is None or error < best[0]:
                best = error, a, b * unit**c, c
        centre, width = math.log(best[3]), width / 8
    return best[1:]


def compute_ratio(reference, arm, at):
    """How many times `at` a reference of fit (a, b, c) needs for the arm's loss there; nan if no compute is enough."""
    a, b, c = reference
    level = arm[0] + arm[1] * at ** -arm[2] - a
    return (level / b) ** (-1 / c) / at if level / b > 0 else math.nan


def plot_scaling(folder, arms, curves, scales):
    families = defaultdict(list)
    for name, a in arms.items():
        if " at " in name:
            families[name.rpartition(" at ")[0]].append(a)
    families = {name: members for name, members in families.items() if len(members) >= 3}
    if len(families) < 2:
        return
    reference = next(name for name, members in families.items() if not members[0]["reference"])
    fits = {name: fit_family(members) for name, members in families.items()}
    figure = Figure(figsize=(WIDTH, 3.8))
    ax = figure.subplots()
    for (name, members), colour in zip(families.items(), [INK, *COLOURS]):
        compute = np.array([a["flops"] for a in members])
        for a in members:
            ax.plot([a["flops"]] * len(a["losses"]), list(a["losses"].values()), ".", color=colour, alpha=0.5)
        dense = np.geomspace(compute.min(), compute.max(), 100)
        a, b, c = fits[name][0]
        label = f"{name}: {a:.3f} + {b:.3g} C^(−{c:.3f})"
        if name != reference:
            at = compute.max()
            ratio = compute_ratio(fits[reference][0], fits[name][0], at)
            logs = [math.log(compute_ratio(r, f, at)) for r, f in zip(fits[reference][1], fits[name][1])]
            label += f"; the same loss for 1/{ratio:.2f} of the compute"
            if len(logs) > 1 and all(map(math.isfinite, logs)):
                mean, half = mean_and_half_width(logs)
                label += f" (95%: {math.exp(mean - half):.2f} … {math.exp(mean + half):.2f})"
        ax.plot(dense, a + b * dense**-c, color=colour, label=label)
    ax.set_xscale("log")
    ax.set_xlabel("training compute C, FLOPs")
    ax.set_ylabel("validation loss, nats")
    ax.set_title("L = a + b C^(−c); the ratio at the largest C, its interval over fits to single seeds", loc="left")
    figure.legend(loc="outside lower center", ncols=1)
    save(figure, folder, "scaling")


def fit_family(members):
    """(the fit to the means over seeds, [the fit to each seed]) of one strategy's sizes."""
    compute = np.array([a["flops"] for a in members])
    mean = fit_power_law(compute, np.array([a["mean"] for a in members]))
    return mean, [fit_power_law(compute, np.array([a["losses"][s] for a in members])) for s in members[0]["losses"]]


# ---------------------------------------------------------------------------------------------------------------


def plot_folder(folder, gamma=None):
    """Make every plot that the CSVs in folder have data for. Raises ConfigError where there is nothing to plot."""
    rows = read_csv(folder / "results.csv")
    if not rows:
        raise ConfigError(f"{folder} has no results.csv with finished cells; name a folder that ablate.py wrote")
    arms = summarise(rows)
    curves, scales = ([row for row in read_csv(folder / f"{name}.csv")
                       if row["arm"] in arms and float(row["lr"]) == arms[row["arm"]]["lr"]]
                      for name in ("curves", "scales"))
    seeds = defaultdict(set)
    for row in curves:
        seeds[row["arm"]].add(row["seed"])
    shared = set.intersection(*seeds.values()) if seeds else ()  # only what all arms have makes pairs
    curves = [row for row in curves if row["seed"] in shared]
    there = dict.fromkeys(row["arm"] for row in scales)
    if gamma and gamma not in there:
        raise ConfigError(f"{folder}/scales.csv has no arm {gamma!r}; it has {', '.join(there) or 'none'}")
    with rc_context(STYLE):
        for plot in (plot_ablation, plot_curves, plot_tokens, plot_scaling):
            plot(folder, arms, curves, scales)
        if there:
            most = {row["arm"]: int(row["scale_params"]) for row in rows if row["arm"] in there}
            arm = gamma or max(most, key=most.get)
            series = gamma_series(scales, arm)
            plot_gammas(folder, arm, series)
            plot_directions(folder, arm, series)


def main(args):
    if not args or {"--help", "-h"} & set(args):
        print(__doc__.strip())
        return
    gamma, folders = None, []
    for arg in args:
        if arg.startswith("--gamma="):
            gamma = arg.partition("=")[2]
        elif arg.startswith("-"):
            raise ConfigError(f"{arg}: the one flag is --gamma=ARM")
        else:
            folders.append(Path(arg))
    for folder in folders:
        plot_folder(folder, gamma)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ConfigError as e:
        refuse(e)
