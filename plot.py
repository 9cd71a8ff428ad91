"""
Draw runs of train.py, or the results of ablate.py:

    python plot.py out/baseline out/unified    loss differences to the first run, and every γ, from the runs' logs
    python plot.py results/figure5             every picture that its CSVs have data for, in that folder
    python plot.py results/figure5 --gamma HG  the γ of this arm, not of the one with the most scale vectors

curves     loss differences to the reference over tokens; one panel per reference
ablation   the differences at the end with their intervals, sorted; one panel per reference
scaling    the differences over compute, where arms are named 'strategy at size'
gammas     every γ of one arm over time, by layer and branch
magnitudes the length of the vectors of each place over time, by arm

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


# ---------------------------------------------------------------------------------------------------------------
# parts of a picture


def new_figure(text, n, columns, height, **kw):
    """A Figure with a title and n axes, `columns` to a row of `height` inches. kw: for Figure.subplots."""
    rows = -(-n // columns)
    figure = Figure(figsize=(WIDTH, 0.9 + height * rows))
    figure.suptitle(readable(text), x=0.01, ha="left", fontsize=10, wrap=True)
    axes = figure.subplots(rows, columns, squeeze=False, **kw).ravel()
    for ax in axes[n:]:
        ax.set_visible(False)
    return figure, axes[:n]


def line(ax, i, x, mean, sd=0.0, **kw):
    """A line in the i-th colour, with a band of ± sd."""
    ax.plot(x, mean, color=colour(i), linestyle=("-", "--", ":")[i // 8 % 3], marker="." if len(x) < 6 else None, **kw)
    ax.fill_between(x, mean - sd, mean + sd, color=colour(i), alpha=0.15, linewidth=0)


def compare_lines(ax, lines, start=None, marks=()):
    """
    {name: (x, mean, sd), or None} as lines with their names at their ends. The axis is fitted to `marks`, to `start`,
    the value that all lines begin with, and to all but the first fifth of the lines, where losses are far larger.
    """
    ends, reach = [], [*marks] if start is None else [start, *marks]
    for i, (name, values) in enumerate(lines.items()):
        if values is None:
            continue
        x, mean, sd = values
        line(ax, i, x, mean, sd)
        ends.append((mean[-1], name, colour(i)))
        late = x >= x[-1] / 5
        reach += [*(mean - sd)[late], *(mean + sd)[late]]
    margin = 0.1 * (max(reach) - min(reach)) or 0.001
    low, high = min(reach) - margin, max(reach) + margin
    ax.set_ylim(low, high)
    if start is not None:
        ax.axhline(start, color=rcParams["text.color"], linewidth=0.8)
    last, placed = -math.inf, []
    for y, name, c in sorted(ends):
        last = max(y, last + 0.08 * (high - low))  # without overlap
        placed.append((last, y, name, c))
    shift = sum(at - y for at, y, _, _ in placed) / len(placed)
    for at, _, name, c in placed:
        ax.annotate(readable(name), (1, at - shift), xycoords=("axes fraction", "data"), xytext=(6, 0), color=c,
                    textcoords="offset points", va="center", fontsize=8, annotation_clip=False)


def tokens_axis(ax):
    ax.set_xlabel("tokens")
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 5M


def ring(ax, x, y, i):
    """Where the paper's number lies."""
    ax.plot(x, y, "o", color=colour(i), markerfacecolor="none", markersize=7, clip_on=False)


def explain(figure, text, paper):
    """A caption, and what a ring is, if there are any."""
    figure.supxlabel(text, fontsize=8)
    if paper:
        ring = Line2D([], [], marker="o", linestyle="", color=rcParams["text.color"], markerfacecolor="none")
        figure.legend([ring], [f"paper, {next(iter(paper.values()))[0]}"], loc="outside lower right")


# ---------------------------------------------------------------------------------------------------------------
# losses


def panels(names, arms):
    """{reference: the arms that are compared with it}."""
    found = defaultdict(list)
    for name in names:
        found[arms[name]["reference"]].append(name)
    return found


def finding(compared):
    """A title that says what came out. compared: {arm: a dict of summarise()}."""
    tested = {name: a for name, a in compared.items() if a.get("p") is not None}
    if not tested:
        return "One pair of runs each: another seed would move these differences"
    if len(tested) == 1:
        (name, a), = tested.items()
        return (f"{name} is {a['verdict']} than {a['reference']} by {abs(a['delta']):.4f} nats"
                if a["verdict"] != "not significant" else f"{name} does not differ significantly from {a['reference']}")
    said = []
    for verdict in ("better", "worse", "not significant"):
        if names := [name for name in tested if tested[name]["verdict"] == verdict]:
            names.sort(key=lambda name: tested[name]["delta"])
            few = len(names) < 5 and not any("," in name for name in names)
            said.append(f"{verdict}: {', '.join(names) if few else f'{len(names)} of {len(tested)}'}")
    text = "; ".join(said)
    return text[0].upper() + text[1:]


def by_seed(curves, column="val_loss"):
    """{arm: (tokens (k,), losses (seeds, k))} from rows of logs, at the steps that all seeds have a number for."""
    runs = defaultdict(lambda: defaultdict(dict))
    for row in curves:
        if math.isfinite(value := float(row.get(column) or "nan")):
            runs[row["arm"]][row["seed"]][int(row["tokens"])] = value
    found = {}
    for arm, seeds in runs.items():
        if tokens := sorted(set.intersection(*(set(run) for run in seeds.values()))):
            found[arm] = np.array(tokens), np.array([[seeds[s][t] for t in tokens] for s in sorted(seeds)])
    return found


def differences(arms, losses):
    """
    {arm: (tokens (k,), mean (k,), standard deviation)} of its differences to its reference over the seeds, without
    step 0, where there are any.
    """
    found = {}
    for name, a in arms.items():
        if name in losses and a["reference"] in losses:
            (here, ours), (there, theirs) = losses[name], losses[a["reference"]]
            tokens = np.intersect1d(here, there)
            tokens = tokens[tokens > 0]
            if len(tokens):
                values = ours[:, np.isin(here, tokens)] - theirs[:, np.isin(there, tokens)]
                found[name] = tokens, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else 0.0
    return found


def curves(arms, found, paper):
    """A panel per reference: differences() over tokens. paper: {arm: (model, nats)}."""
    groups = panels(found, arms)
    figure, axes = new_figure(finding({name: arms[name] for name in found}), len(groups), min(2, len(groups)), 2.6)
    for ax, (reference, names) in zip(axes, groups.items()):
        marks = [paper[name][1] for name in names if name in paper]
        compare_lines(ax, {name: found[name] for name in names}, 0.0, marks)
        for i, name in enumerate(names):
            if name in paper:
                ring(ax, found[name][0][-1], paper[name][1], i)
        ax.set_title(f"minus {readable(reference)}, nats")
        tokens_axis(ax)
    text = "Validation loss minus the reference's"
    if any(np.ndim(sd) for _, _, sd in found.values()):
        text += ", mean over pairs with the same seed; bands: their standard deviation"
    explain(figure, text, paper)
    return figure


def loss_of_one_run(name, log):
    """Training and validation loss of a run that is not compared with another."""
    lines = {column: (tokens, values[0], 0.0) for column in ("val_loss", "train_loss")
             for tokens, values in by_seed(log, column).values()}
    figure, (ax,) = new_figure(f"{name} ends at {lines['val_loss'][1][-1]:.4f} nats", 1, 1, 2.6)
    compare_lines(ax, lines)
    ax.set_title("nats")
    tokens_axis(ax)
    return figure


def ablation(arms, compared, paper):
    """A panel per reference: the arms' differences at the end, the best at the top."""
    groups = {reference: sorted(names, key=lambda name: arms[name]["delta"])
              for reference, names in panels(compared, arms).items()}
    heights = [0.55 + 0.27 * len(names) for names in groups.values()]
    figure, axes = new_figure(finding(compared), len(groups), 1, sum(heights) / len(groups), sharex=True,
                              height_ratios=heights)
    for ax, (reference, names) in zip(axes, groups.items()):
        spread = mean_and_half_width(list(arms[reference]["losses"].values()))[1]
        if spread:
            spread *= math.sqrt(2)  # two sets of the reference's runs with nothing in common
            ax.axvspan(-spread, spread, color=rcParams["grid.color"], alpha=0.7, linewidth=0, zorder=0)
        for y, name in enumerate(names):
            a = arms[name]
            ax.errorbar(a["delta"], y, xerr=a["half"], fmt="s", color=colour(0), capsize=3, markersize=5,
                        markerfacecolor=colour(0) if a["verdict"] != "not significant" else rcParams["axes.facecolor"])
            if name in paper:
                ring(ax, paper[name][1], y, 1)
        ax.axvline(0, color=rcParams["text.color"], linewidth=0.8)
        ax.set_yticks(range(len(names)), [readable(name) for name in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(False, axis="y")
        ax.set_title(f"minus {readable(reference)}")
    pairs = sorted({a["pairs"] for a in compared.values()})
    explain(figure, f"Difference in validation loss, nats, over {' or '.join(map(str, pairs))} paired seeds; bars: "
                    "corrected intervals; filled: significant.\nGrey: how far the reference's mean may move with as "
                    "many other seeds.", paper)
    return figure


def scaling(arms, fits):
    """Paired differences over compute with their intervals, and the difference of the fits."""
    reference, *others = fits
    said, lines, reach = [], {}, []
    for strategy in others:
        if fits[strategy]["ratio"]:
            ratio, low, high = fits[strategy]["ratio"]
            said.append(f"no significant saving of compute by {strategy}" if low <= 1 <= high else
                        f"the {reference} needs {ratio:.2f} times ({low:.2f} … {high:.2f}) the compute of {strategy}")
    figure, (ax,) = new_figure("Fits: " + "; ".join(said), 1, 1, 2.9)
    for i, strategy in enumerate(others):
        flops = [m["flops"] for m in fits[strategy]["members"]]
        for name, a in arms.items():
            if name.partition(" at ")[0] == strategy and "delta" in a:
                ax.errorbar(a["flops"], a["delta"], yerr=a["half"], fmt="o", color=colour(i), capsize=3,
                            markerfacecolor=rcParams["axes.facecolor"] if "," in name else colour(i))
                half = (a["half"] or 0.0) if a["flops"] == max(flops) else 0.0  # those of small sizes hide the rest
                reach += [a["delta"] - half, a["delta"] + half]
        c = np.geomspace(min(flops), max(flops), 100)
        (a, b), (a0, b0) = fits[strategy]["fit"], fits[reference]["fit"]
        lines[strategy] = c, a * (c / PF_DAY) ** -b - a0 * (c / PF_DAY) ** -b0, 0.0
    compare_lines(ax, lines, 0.0, reach)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"1e{math.log10(x):.0f}"))
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel("training compute, FLOPs (hollow: another number of tokens per parameter, not fitted)")
    ax.set_title(f"validation loss minus {readable(reference)}'s, nats; line: difference of the fits L = a C^(−b)")
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
        values = {column: float(row[column]) for column in ("step", "mean", "std", "norm")}
        if all(map(math.isfinite, values.values())):
            rows[place(row["name"])].append(values)
    return {key: {c: np.array([row[c] for row in group]) for c in group[0]} for key, group in rows.items()}


def gammas(arm, series):
    """Mean and standard deviation over channels of every γ, a row of panels per place, a column per layer."""
    layers = sorted({layer for layer, _, _ in series if layer is not None}) or [None]
    shown = layers if len(layers) <= 6 else [layers[round(i * (len(layers) - 1) / 5)] for i in range(6)]
    sites = list(dict.fromkeys(site for _, site, _ in series))
    figure, axes = new_figure(f"{arm}: γ over steps, mean and standard deviation over channels",
                              len(sites) * len(shown), len(shown), 1.45, sharex=True, sharey="row")
    rows = axes.reshape(len(sites), len(shown))
    for row, site in zip(rows, sites):
        for ax, layer in zip(row, shown):  # what is in no layer stands in the first column
            keys = [key for key in series if key[1] == site and (key[0] == layer or key[0] is None and ax is row[0])]
            for i, key in enumerate(keys):
                line(ax, i, series[key]["step"], series[key]["mean"], series[key]["std"], label=key[2])
            ax.set_visible(bool(keys))
        row[0].set_ylabel(SITES.get(site, site))
        row[0].legend(loc="best", handlelength=1)
    for ax, layer in zip(rows[0], shown):
        ax.set_title("" if layer is None else f"layer {layer}")
    return figure


def magnitudes(series_of):
    """A panel per place: ‖γ‖/√n of each arm, the mean over layers and branches. series_of: {arm: gamma_series()}."""
    panels = {}
    for site in SITES:
        lines = dict.fromkeys(series_of)  # so that an arm has one colour in all panels
        for arm, series in series_of.items():
            found = [s for (_, where, _), s in series.items() if where == site]
            found = [s for s in found if len(s["step"]) == len(found[0]["step"]) and s["norm"][0]]
            if found:  # every γ starts as ones
                lines[arm] = found[0]["step"], np.mean([s["norm"] / s["norm"][0] for s in found], axis=0), 0.0
        if any(lines.values()):
            panels[site] = lines
    figure, axes = new_figure("Magnitude ‖γ‖/√n (|β| under OR), mean over layers and branches", len(panels),
                              min(2, len(panels)), 2.3)
    for ax, (site, lines) in zip(axes, panels.items()):
        compare_lines(ax, lines, 1.0)
        ax.set_title(SITES[site])
        ax.set_xlabel("step")
    return figure


# ---------------------------------------------------------------------------------------------------------------


def plot_suite(folder, gamma=None):
    """Make every picture that the CSVs in folder have data for. Raises ConfigError where there is nothing to draw."""
    rows = [row for row in read_csv(folder / "results.csv") if row.get("use") == "report"]
    arms = summarise(rows)
    if not arms:
        raise ConfigError(f"{folder} has neither a run's log.csv nor finished cells in a results.csv of this ablate.py")
    compared = {name: a for name, a in arms.items() if "delta" in a and not a["same"]}
    paper = {arm: (panel.split(",")[0], number) for (suite, arm, reference), (panel, number) in paper_numbers().items()
             if suite == rows[0]["suite"] and arm in compared and arms[arm]["reference"] == reference}
    # only the seeds that all arms have make pairs
    seeds = set.intersection(*(set(a["losses"]) for a in arms.values()))
    of_cell = defaultdict(list)
    for row in rows:
        if row["arm"] in arms and int(row["seed"]) in seeds:
            of_cell[row["cell"]].append({"arm": row["arm"], "seed": int(row["seed"])})
    logs, scales = ([{**row, **names} for row in read_csv(folder / f"{log}.csv") for names in of_cell[row["cell"]]]
                    for log in ("curves", "scales"))
    series_of = {arm: gamma_series(row for row in scales if row["arm"] == arm) for arm in arms}
    series_of = {arm: series for arm, series in series_of.items() if series}
    if gamma and gamma not in series_of:
        raise ConfigError(f"{folder}/scales.csv has no arm {gamma!r}; it has {', '.join(series_of) or 'none'}")
    makers, fits = {}, scaling_fits(arms)
    if compared:
        makers["ablation"] = partial(ablation, arms, compared, paper)
    if len(fits) > 1:
        makers["scaling"] = partial(scaling, arms, fits)
    elif found := {name: d for name, d in differences(arms, by_seed(logs)).items() if name in compared}:
        makers["curves"] = partial(curves, arms, found, paper)
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
    except (ConfigError, OSError) as e:
        refuse(e, 1 if isinstance(e, OSError) else 2)
