"""
Draw runs of train.py, or the results of ablate.py:

    python plot.py out/baseline out/unified    loss differences to the first run, and every γ, from the runs' logs
    python plot.py results/figure5             every picture that its CSVs have data for, in that folder
    python plot.py results/* --gamma HG        the γ of this arm, not of the one with the most scale parameters

curves     loss differences to the reference over tokens; one panel per reference
ablation   the differences at the end with their intervals, sorted; one panel per reference
scaling    the differences over compute, where arms are named 'strategy at size'
gammas     every γ of one arm over time, by layer and branch
magnitudes how long the vectors of each place are over time, by arm

Each is a PNG and two SVGs, for light and dark pages. Pictures of runs go to the first run's folder, or to --out FOLDER.
"""

import math
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from cycler import cycler
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import ConfigError, Parser, refuse, streams
from stats import PF_DAY, mean_and_half_width, paper_numbers, read_csv, scaling_fits, summarise
from suites import readable

WIDTH = 8.3  # inches; at 100 to the inch, GitHub's column
THEMES = {  # background, text, grid, and Okabe and Ito's colours, which colour-blind readers can tell apart
    "light": ("#fbfaf7", "#24292f", "#d9d6cf", ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56a0c9",
                                                "#7b3fa0", "#5f8f2f"]),
    "dark": ("#161b22", "#e6edf3", "#3d444d", ["#56b4e9", "#e69f00", "#2fc99e", "#e79ac6", "#f0e442", "#7aa7ff",
                                               "#c39bf0", "#a5d46a"])}


def style(theme):
    """matplotlib's settings for a theme."""
    paper, ink, grid, colours = THEMES[theme]
    return {"figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": paper, "font.size": 9,
            "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": grid,
            "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlesize": 9, "axes.titlelocation": "left",
            "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.4,
            "axes.prop_cycle": cycler(color=colours), "figure.constrained_layout.use": True,
            "text.parse_math": False,  # a run may be called $x_1$
            "svg.hashsalt": "nanoScale"}  # without a salt of ours the same data gives another SVG each time


def colour(i):
    colours = rcParams["axes.prop_cycle"].by_key()["color"]
    return colours[i % len(colours)]


def draw(folder, makers):
    """Write the Figure that each of {name: function} makes, in each theme; the same bytes for the same data."""
    for theme in THEMES:
        with rc_context(style(theme)):
            for name, make in makers.items():
                figure = make()
                figure.savefig(folder / f"{name}_{theme}.svg", metadata={"Date": None, "Creator": None})
                if theme == "light":
                    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
    for name in makers:
        print(f"{readable(folder)}/{name}.png, {name}_light.svg and {name}_dark.svg")


def finite(text):
    """The number in a CSV's field; None for an empty one, and for what a run that diverged leaves."""
    try:
        return float(text) if math.isfinite(float(text)) else None
    except (TypeError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------
# the comparison


def panels(names, arms):
    """{reference: the arms that are compared with it}."""
    found = defaultdict(list)
    for name in names:
        found[arms[name]["reference"]].append(name)
    return found


def finding(compared):
    """What the comparisons say, as a title. compared: {arm: a dict of summarise()}."""
    tested = {name: a for name, a in compared.items() if a.get("p") is not None}
    if not tested:
        return "One pair of runs each: another seed would move these differences"
    if len(tested) == 1:
        (name, a), = tested.items()
        return (f"{name} is {a['verdict']} than {a['reference']} by {abs(a['delta']):.4f} nats"
                if a["verdict"] != "not significant" else f"No significant difference of {name} to {a['reference']}")
    said = []
    for verdict in ("better", "worse", "not significant"):
        names = sorted((name for name in tested if tested[name]["verdict"] == verdict),
                       key=lambda name: tested[name]["delta"])
        if names:
            few = len(names) < 5 and not any("," in name for name in names)
            said.append(f"{verdict}: {', '.join(names) if few else f'{len(names)} of {len(tested)}'}")
    said[0] = said[0][0].upper() + said[0][1:]
    return "; ".join(said)


def title(figure, text):
    figure.suptitle(readable(text), x=0.01, ha="left", fontsize=10, wrap=True)


def grid_of(figure, n, columns):
    """n axes, `columns` to a row."""
    axes = figure.subplots(-(-n // columns), columns, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.set_visible(False)
    return axes[:n]


def label_ends(ax, ends, reach=None, height=2.6):
    """
    Fit the axis to the values of `reach` and mark 0, if there are any; then write each name at the end of its line,
    without overlap. ends: (y, name, colour). height: of the panel, in inches.
    """
    if reach:
        margin = 0.1 * (max(reach) - min(reach)) or 0.001
        ax.set_ylim(min(reach) - margin, max(reach) + margin)
        ax.axhline(0, color=rcParams["text.color"], linewidth=0.8)
    low, high = ax.get_ylim()
    gap, last, placed = 0.14 * (high - low) / height, -math.inf, []
    for y, name, c in sorted(ends):
        last = max(y, last + gap)
        placed.append((last, y, name, c))
    shift = sum(at - y for at, y, _, _ in placed) / len(placed)
    for at, _, name, c in placed:
        ax.annotate(readable(name), (1, at - shift), xycoords=("axes fraction", "data"), xytext=(6, 0), color=c,
                    textcoords="offset points", va="center", fontsize=8, annotation_clip=False)


def by_seed(curves, column="val_loss"):
    """{arm: (tokens (k,), losses (seeds, k))} from rows of logs, at the steps that all seeds have a number for."""
    runs = defaultdict(lambda: defaultdict(dict))
    for row in curves:
        if (value := finite(row.get(column))) is not None:
            runs[row["arm"]][row["seed"]][int(row["tokens"])] = value
    found = {}
    for arm, seeds in runs.items():
        if tokens := sorted(set.intersection(*(set(run) for run in seeds.values()))):
            found[arm] = np.array(tokens), np.array([[seeds[s][t] for t in tokens] for s in sorted(seeds)])
    return found


def differences(arms, losses):
    """{arm: (tokens (k,), differences to its reference (seeds, k))}, without step 0, where there are any."""
    found = {}
    for name, a in arms.items():
        if name in losses and a["reference"] in losses:
            here, there = losses[name], losses[a["reference"]]
            tokens = np.intersect1d(here[0], there[0])
            tokens = tokens[tokens > 0]
            if len(tokens):
                found[name] = tokens, (here[1][:, np.isin(here[0], tokens)] - there[1][:, np.isin(there[0], tokens)])
    return found


def curves(arms, found, paper):
    """A panel per reference: differences() over tokens. paper: {(arm, reference): (model, nats)}."""
    groups = panels(found, arms)
    columns = min(2, len(groups))
    figure = Figure(figsize=(WIDTH, 0.9 + 2.6 * -(-len(groups) // columns)))
    marked = []
    for ax, (reference, names) in zip(grid_of(figure, len(groups), columns), groups.items()):
        ends, reach = [], [0.0]
        for i, name in enumerate(names):
            tokens, values = found[name]
            mean, sd = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
            ax.plot(tokens, mean, color=colour(i), marker="." if len(tokens) < 6 else None)
            ax.fill_between(tokens, mean - sd, mean + sd, color=colour(i), alpha=0.15, linewidth=0)
            ends.append((mean[-1], name, colour(i)))
            reach += mean[tokens >= tokens[-1] / 5].tolist()  # differences of the first steps are far larger
            if (name, reference) in paper:
                model, number = paper[name, reference]
                ax.plot(tokens[-1], number, "o", color=colour(i), markerfacecolor="none", clip_on=False)
                marked, reach = [model], [*reach, number]
        label_ends(ax, ends, reach)
        ax.set_title(f"minus {readable(reference)}, nats")
        ax.set_xlabel("tokens")
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 5M
    several = any(len(values) > 1 for _, values in found.values())
    title(figure, finding({name: arms[name] for name in found}))
    figure.supxlabel("Validation loss minus the reference's"
                     + (", mean over pairs of equal seed; bands: their standard deviation" if several else ""),
                     fontsize=8)
    explain_paper(figure, marked)
    return figure


def explain_paper(figure, marked):
    if marked:
        ring = Line2D([], [], marker="o", linestyle="", color=rcParams["text.color"], markerfacecolor="none")
        figure.legend([ring], [f"paper, {marked[0]}"], loc="outside lower right")


def loss_of_one_run(name, log):
    """Training and validation loss of a run that is compared with none."""
    figure = Figure(figsize=(WIDTH, 3.2))
    ax = figure.subplots()
    for column, width, alpha in (("train_loss", 0.7, 0.4), ("val_loss", 1.4, 1.0)):
        for tokens, (values,) in by_seed(log, column).values():
            ax.plot(tokens, values, color=colour(0), linewidth=width, alpha=alpha)
    later = values[tokens >= tokens[-1] / 5]  # the fall from log(vocabulary) would flatten the rest
    margin = 0.1 * np.ptp(later) or 0.1
    ax.set_ylim(later.min() - margin, later.max() + margin)
    ax.set_title(f"{readable(name)} ends at {values[-1]:.4f} nats (faint: training loss)")
    ax.set_xlabel("tokens")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def ablation(arms, compared, paper):
    """A panel per reference: the arms' differences at the end, the best at the top."""
    groups = {reference: sorted(names, key=lambda name: arms[name]["delta"])
              for reference, names in panels(compared, arms).items()}
    figure = Figure(figsize=(WIDTH, 1.2 + sum(0.55 + 0.27 * len(names) for names in groups.values())))
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False,
                           height_ratios=[1 + len(names) for names in groups.values()])[:, 0]
    marked = []
    for ax, (reference, names) in zip(axes, groups.items()):
        spread = mean_and_half_width(list(arms[reference]["losses"].values()))[1]
        if spread:
            spread *= math.sqrt(2)  # two sets of the reference's runs with nothing in common
            ax.axvspan(-spread, spread, color=rcParams["grid.color"], alpha=0.7, linewidth=0, zorder=0)
        for y, name in enumerate(names):
            a = arms[name]
            ax.errorbar(a["delta"], y, xerr=a["half"], fmt="s", color=colour(0), capsize=3, markersize=5,
                        markerfacecolor=colour(0) if a["verdict"] != "not significant" else rcParams["axes.facecolor"])
            if (name, reference) in paper:
                marked = [paper[name, reference][0]]
                ax.plot(paper[name, reference][1], y, "o", color=colour(1), markerfacecolor="none", markersize=7)
        ax.axvline(0, color=rcParams["text.color"], linewidth=0.8)
        ax.set_yticks(range(len(names)), [readable(name) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(False, axis="y")
        ax.set_title(f"minus {readable(reference)}")
    pairs = sorted({a["pairs"] for a in compared.values()})
    title(figure, finding(compared))
    figure.supxlabel(f"Difference in validation loss, nats, over {' or '.join(map(str, pairs))} paired seeds; bars: "
                     "intervals, corrected; filled: significant.\nGrey: how far the reference's mean over as many "
                     "other seeds may lie from its own.", fontsize=8)
    explain_paper(figure, marked)
    return figure


# ---------------------------------------------------------------------------------------------------------------
# scaling


def scaling(arms, fits):
    """Paired differences over compute with their intervals, and the difference of the fits."""
    figure = Figure(figsize=(WIDTH, 3.8))
    ax = figure.subplots()
    reference, *others = fits
    titles, ends, reach = [], [], [0.0]
    for i, strategy in enumerate(others):
        fit, largest = fits[strategy], max(m["flops"] for m in fits[strategy]["members"])
        for name, a in arms.items():
            if name.partition(" at ")[0] == strategy and "delta" in a:
                ax.errorbar(a["flops"], a["delta"], yerr=a["half"], fmt="o", color=colour(i), capsize=3,
                            markerfacecolor=rcParams["axes.facecolor"] if "," in name else colour(i))
                half = (a["half"] or 0.0) if a["flops"] == largest else 0.0  # the smallest sizes' would hide the rest
                reach += [a["delta"] - half, a["delta"] + half]
        c = np.geomspace(min(m["flops"] for m in fit["members"]), largest, 100)
        (a, b), (a0, b0) = fit["fit"], fits[reference]["fit"]
        difference = a * (c / PF_DAY) ** -b - a0 * (c / PF_DAY) ** -b0
        ax.plot(c, difference, color=colour(i))
        ends.append((difference[-1], strategy, colour(i)))
        if fit["ratio"]:
            ratio, low, high = fit["ratio"]
            titles.append(f"no significant saving of compute by {strategy}" if low <= 1 <= high else
                          f"the {reference} needs {ratio:.2f} times ({low:.2f} … {high:.2f}) the compute of {strategy}")
    label_ends(ax, ends, reach)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1e{math.log10(x):.0f}"))
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel("training compute, FLOPs (hollow: another number of tokens per parameter, not fitted)")
    ax.set_title(f"validation loss minus {readable(reference)}'s, nats; line: difference of the fits L = a C^(−b)")
    title(figure, "Fits: " + "; ".join(titles))
    return figure


# ---------------------------------------------------------------------------------------------------------------
# scale vectors

SITES = {"attn.qkv.v": "attention, input", "attn.qkv.u": "attention, output", "attn": "QK-norm",
         "ffn.gate_up.v": "FFN, input", "ffn.gate_up.u": "FFN, output", "": "post-norm", "lm_head.v": "LM head, input",
         "lm_head.u": "LM head, output", "lm_head": "LM head, output"}


def place(name):
    """(layer or None, site, branch) of a scale vector's name: 'blocks.3.attn.qkv.v.q' is (3, 'attn.qkv.v', 'q')."""
    layer, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.*)", name).groups()
    site, _, branch = rest.rpartition(".")
    return None if layer is None else int(layer), site, branch


def gamma_series(scales):
    """{(layer, site, branch): {column: (k,)}} of one run's scales.csv, with 'step'; rows without a number are left."""
    rows = defaultdict(list)
    for row in scales:
        values = {column: finite(row[column]) for column in ("step", "mean", "std", "norm")}
        if None not in values.values():
            rows[place(row["name"])].append(values)
    return {key: {c: np.array([row[c] for row in group]) for c in group[0]} for key, group in rows.items()}


def gammas(arm, series):
    """Mean and standard deviation over channels of every γ, a row of panels per place, a column per layer."""
    layers = sorted({layer for layer, _, _ in series if layer is not None}) or [None]
    shown = layers if len(layers) <= 6 else [layers[round(i * (len(layers) - 1) / 5)] for i in range(6)]
    sites = list(dict.fromkeys(site for _, site, _ in series))
    figure = Figure(figsize=(WIDTH, 0.9 + 1.45 * len(sites)))
    axes = figure.subplots(len(sites), len(shown), sharex=True, sharey="row", squeeze=False)
    for row, site in zip(axes, sites):
        layered = any(key[1] == site and key[0] is not None for key in series)
        for ax, layer in zip(row, shown if layered else [None]):
            for i, key in enumerate(key for key in series if key[:2] == (layer, site)):
                s = series[key]
                ax.plot(s["step"], s["mean"], color=colour(i), label=key[2])
                ax.fill_between(s["step"], s["mean"] - s["std"], s["mean"] + s["std"], color=colour(i), alpha=0.15,
                                linewidth=0)
        for ax in row[1:] if not layered else ():
            ax.set_visible(False)
        row[0].set_ylabel(SITES.get(site, site))
        if row[0].lines:
            row[0].legend(loc="best", handlelength=1)
    for ax, layer in zip(axes[0], shown):
        ax.set_title("" if layer is None else f"layer {layer}")
    title(figure, f"{arm}: γ over steps, mean and standard deviation over channels")
    return figure


def magnitudes(series_of):
    """A panel per place: ‖γ‖/√n of each arm, the mean over layers and branches. series_of: {arm: gamma_series()}."""
    sites = [site for site in SITES if any(site == s for series in series_of.values() for _, s, _ in series)]
    figure = Figure(figsize=(WIDTH, 0.9 + 2.3 * -(-len(sites) // 2)))
    for ax, site in zip(grid_of(figure, len(sites), min(2, len(sites))), sites):
        ends = []
        for i, (arm, series) in enumerate(series_of.items()):
            lines = [s for (_, where, _), s in series.items() if where == site]
            lines = [s for s in lines if len(s["step"]) == len(lines[0]["step"]) and s["norm"][0]]
            if lines:
                mean = np.mean([s["norm"] / s["norm"][0] for s in lines], axis=0)  # every γ starts as ones
                ax.plot(lines[0]["step"], mean, color=colour(i), linestyle=("-", "--", ":")[i // 8 % 3])
                ends.append((mean[-1], arm, colour(i)))
        if ends:
            label_ends(ax, ends)
        ax.set_title(SITES[site])
        ax.set_xlabel("step")
    title(figure, "Magnitude ‖γ‖/√n (|β| under OR), mean over layers and branches")
    return figure


# ---------------------------------------------------------------------------------------------------------------


def plot_suite(folder, gamma=None):
    """Make every picture that the CSVs in folder have data for. Raises ConfigError where there is nothing to draw."""
    rows = [row for row in read_csv(folder / "results.csv") if row.get("use") == "report"]
    arms = summarise(rows)
    if not arms:
        raise ConfigError(f"{folder} has neither a run's log.csv nor finished cells in a results.csv of this ablate.py")
    paper = {key[1:]: (panel.split(",")[0], number) for key, (panel, number) in paper_numbers().items()
             if key[0] == rows[0]["suite"]}
    compared = {name: a for name, a in arms.items() if "delta" in a and not a["same"]}
    # only the seeds that all arms have make pairs
    seeds = set.intersection(*(set(a["losses"]) for a in arms.values()))
    of_cell = defaultdict(list)
    for row in rows:
        if row["arm"] in arms and int(row["seed"]) in seeds:
            of_cell[row["cell"]].append({"arm": row["arm"], "seed": int(row["seed"])})
    logs, scales = ([{**row, **names} for row in read_csv(folder / f"{log}.csv") for names in of_cell[row["cell"]]]
                    for log in ("curves", "scales"))
    vectors = defaultdict(list)
    for row in scales:
        vectors[row["arm"]].append(row)
    if gamma and gamma not in vectors:
        raise ConfigError(f"{folder}/scales.csv has no arm {gamma!r}; it has {', '.join(vectors) or 'none'}")
    makers, fits = {}, scaling_fits(arms)
    if compared:
        makers["ablation"] = partial(ablation, arms, compared, paper)
    if len(fits) > 1:
        makers["scaling"] = partial(scaling, arms, fits)
    elif found := {name: d for name, d in differences(arms, by_seed(logs)).items() if name in compared}:
        makers["curves"] = partial(curves, arms, found, paper)
    series_of = {arm: series for arm in vectors if (series := gamma_series(vectors[arm]))}
    if series_of:
        arm = gamma or max(series_of, key=lambda arm: len(series_of[arm]))
        makers["gammas"] = partial(gammas, arm, series_of[arm])
        if len(fits) < 2:
            makers["magnitudes"] = partial(magnitudes, series_of)
    draw(folder, makers)


def plot_runs(folders, out):
    """Draw runs of train.py from their own logs into out, the first as the reference. Raises ConfigError."""
    names = [folder.name for folder in folders]
    arms, logs, makers = {}, [], {}
    for folder in folders:
        name = folder.name if names.count(folder.name) == 1 else str(folder)
        log = [{**row, "arm": name, "seed": 0} for row in read_csv(folder / "log.csv")]
        if not by_seed(log):
            raise ConfigError(f"{folder}/log.csv holds no evaluation with a finite loss yet")
        arms[name] = {"reference": next(iter(arms), None)}
        logs += log
    if found := differences(arms, by_seed(logs)):
        makers["curves"] = partial(curves, arms, found, {})
    elif not folders[1:]:
        makers["curves"] = partial(loss_of_one_run, name, logs)
    for folder, name in zip(folders, arms):
        if series := gamma_series(read_csv(folder / "scales.csv")):
            makers["gammas" + (f"-{folder.name}" if folders[1:] else "")] = partial(gammas, name, series)
    out.mkdir(parents=True, exist_ok=True)
    draw(out, makers)


def main(args):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's, or one with a results.csv")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for pictures of runs; default: the first run's")
    parser.add_argument("--gamma", metavar="ARM", help="whose γ are drawn; default: the arm with the most")
    opt = parser.parse_args(args)
    folders = [folder.expanduser() for folder in opt.folders]
    runs = [folder for folder in folders if (folder / "log.csv").exists()]
    if runs:
        plot_runs(runs, (opt.out or runs[0]).expanduser())
    for folder in folders:
        if folder not in runs:
            plot_suite(folder, opt.gamma)


if __name__ == "__main__":
    streams()
    try:
        main(sys.argv[1:])
    except ConfigError as e:
        refuse(e)
    except OSError as e:
        sys.exit(f"plot.py: {e}")
