"""
Draw runs of train.py, or the results of ablate.py:

    python plot.py out/baseline out/unified    loss differences to the first run, and every γ, from the runs' logs
    python plot.py results/figure5             every picture that its CSVs have data for, in that folder
    python plot.py results/figure5 --gamma HG  the γ of this arm, not of the one with the most scale vectors

curves     loss differences to the reference over tokens, with the paper's at the end
ablation   the differences at the end with their intervals and the paper's, sorted
scaling    the differences over compute, where arms are named 'strategy at size'
gammas     every γ of one arm over time, by layer and branch
magnitudes the length of the vectors of each place over time, by arm

Each is a PNG and two SVGs, for light and dark pages. Pictures of runs go to the first run's folder, or to --out FOLDER.
"""

import math
import re
import sys
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np
from cycler import cycler
from matplotlib import rc_context, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

if __name__ == "__main__":  # PYTHONSAFEPATH leaves the script's folder out
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from configurator import ConfigError, Parser, refuse, streams
from stats import PF_DAY, mean_and_half_width, paper_numbers, read_csv, scaling_fits, summarise
from suites import readable

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


def draw(folder, make):
    """Write the Figures of make(), {name: Figure}, in each theme; the same bytes for the same data."""
    for theme in THEMES:
        with rc_context(style(theme)):
            figures = make()
            for name, figure in figures.items():
                figure.savefig(folder / f"{name}_{theme}.svg", metadata={"Date": None, "Creator": None})
                if theme == "light":
                    figure.savefig(folder / f"{name}.png", dpi=200, metadata={"Software": None})
    for name in figures:
        print(f"{readable(folder)}/{name}.png, {name}_light.svg and {name}_dark.svg")


# ---------------------------------------------------------------------------------------------------------------
# parts of a picture


def new_figure(text, n, columns, height, **kw):
    """A Figure with a title and n axes, `columns` to a row of `height` inches. kw: for Figure.subplots."""
    rows = -(-n // columns)
    figure = Figure(figsize=(8.3, 0.9 + height * rows))  # at 100 to the inch, GitHub's column
    figure.suptitle(text, x=0.01, ha="left", fontsize=10, wrap=True)
    axes = figure.subplots(rows, columns, squeeze=False, **kw).ravel()
    for ax in axes[n:]:
        ax.set_visible(False)
    return figure, axes[:n]


def line(ax, i, x, mean, sd, **kw):
    """A line in the i-th colour, with a band of ± sd."""
    ax.plot(x, mean, color=f"C{i}", linestyle=("-", "--", ":")[i // 8 % 3], marker="." if len(x) < 6 else None, **kw)
    ax.fill_between(x, mean - sd, mean + sd, color=f"C{i}", alpha=0.15, linewidth=0)


def compare_lines(ax, title, x_label, lines, start=None):
    """{name: (x, mean, sd), or None} as lines with their names at their ends. start: the value that all begin with."""
    ends = []
    if start is not None:
        ax.axhline(start, color=rcParams["text.color"], linewidth=0.8)
    for i, (name, values) in enumerate(lines.items()):
        if values is not None:
            line(ax, i, *values)
            ends.append((values[1][-1], name, f"C{i}"))
    ends.sort()
    y = np.array([end[0] for end in ends])
    apart = 0.08 * np.ptp(ax.get_ylim()) * np.arange(len(ends))
    labels = np.maximum.accumulate(y - apart) + apart  # as low as they can be without overlap
    for label, (_, name, color) in zip(labels - (labels - y).mean(), ends):
        ax.annotate(name, (1, label), xycoords=("axes fraction", "data"), xytext=(6, 0), color=color,
                    textcoords="offset points", va="center", fontsize=8, annotation_clip=False)
    ax.set_title(title)
    ax.set_xlabel(x_label)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 5M


def ring(ax, x, y, i):
    """Where the paper's number lies."""
    ax.plot(x, y, "o", color=f"C{i}", markerfacecolor="none", markersize=7, clip_on=False)


def explain(figure, text, paper):
    """A caption, which says what a ring is, if there are any. paper: {arm: (panel, nats)}, as from paper_numbers()."""
    if paper:
        text += f"\nRings: the paper's numbers, {next(iter(paper.values()))[0].partition(', ')[0]}."
    figure.supxlabel(text, fontsize=8)


# ---------------------------------------------------------------------------------------------------------------
# losses


def panels(names, arms, paper):
    """[(title, reference, names)]: as in the paper, a panel has arms that follow each other and share a reference."""
    found = []
    for reference, group in groupby(names, lambda name: arms[name]["reference"]):
        group = list(group)
        in_paper = next((paper[name][0].partition(", ")[2] for name in group if name in paper), "")
        title = f"{in_paper}: minus {reference}" if in_paper else f"minus {reference}"
        found.append((title, reference, group))
    return found


def finding(compared):
    """A title that says what came out. compared: {arm: a dict of summarise()}."""
    tested = {name: a for name, a in compared.items() if a.get("p") is not None}
    if not tested:
        return "One pair of runs each: another seed would move these differences"
    if len(tested) == 1:
        (name, a), = tested.items()
        if a["verdict"] == "not significant":
            return f"{name} does not differ significantly from {a['reference']}"
        return f"{name} is {a['verdict']} than {a['reference']} by {abs(a['delta']):.4f} nats"
    said = []
    for verdict in ("better", "worse", "not significant"):
        if names := [name for name in tested if tested[name]["verdict"] == verdict]:
            which = "; ".join(names) if len(names) < 5 else f"{len(names)} of {len(tested)}"
            said.append(f"{verdict.capitalize()}: {which}")
    return ". ".join(said)


def losses(log, column="val_loss"):
    """{tokens: loss} of a run's log, where it is finite, without the first fifth, where losses are far larger."""
    found = {int(row["tokens"]): value for row in log if math.isfinite(value := float(row.get(column) or "nan"))}
    return {tokens: loss for tokens, loss in found.items() if 5 * tokens > max(found)}


def differences(arms, runs):
    """
    {arm: (tokens (k,), mean (k,), standard deviation)} of its differences to its reference over pairs with the same
    seed, at the evaluations that all of these runs have. runs: {arm: {seed: losses()}}.
    """
    found = {}
    for name, a in arms.items():
        theirs = runs.get(a["reference"], {})
        pairs = [(run, theirs[seed]) for seed, run in runs[name].items() if run and theirs.get(seed)]
        evaluated = [set(run) for pair in pairs for run in pair]
        if pairs and (tokens := sorted(set.intersection(*evaluated))):
            values = np.array([[run[t] - other[t] for t in tokens] for run, other in pairs])
            found[name] = np.array(tokens), values.mean(0), values.std(0, ddof=1) if len(pairs) > 1 else 0.0
    return found


def curves(arms, found, paper):
    """differences() over tokens."""
    groups = panels(found, arms, paper)
    figure, axes = new_figure(finding({name: arms[name] for name in found}), len(groups), min(2, len(groups)), 2.6)
    for ax, (title, _, names) in zip(axes, groups):
        for i, name in enumerate(names):
            if name in paper:
                ring(ax, found[name][0][-1], paper[name][1], i)
        compare_lines(ax, f"{title}, nats", "tokens", {name: found[name] for name in names}, 0.0)
    text = "Validation loss minus the reference's"
    if any(np.ndim(sd) for _, _, sd in found.values()):
        text += ", mean over pairs with the same seed; bands: their standard deviation."
    explain(figure, text, paper)
    return figure


def loss_of_one_run(name, log):
    """Training and validation loss of a run that is not compared with another."""
    lines = {column: (np.array([*run]), np.array([*run.values()]), 0.0)
             for column in ("val_loss", "train_loss") if (run := losses(log, column))}
    figure, (ax,) = new_figure(f"{name} ends at {lines['val_loss'][1][-1]:.4f} nats", 1, 1, 2.6)
    compare_lines(ax, "nats", "tokens", lines)
    return figure


def ablation(arms, compared, paper):
    """The arms' differences at the end, in each panel the best at the top."""
    groups = panels(compared, arms, paper)
    heights = [0.55 + 0.27 * len(names) for _, _, names in groups]
    figure, axes = new_figure(finding(compared), len(groups), 1, sum(heights) / len(groups), sharex=True,
                              height_ratios=heights)
    for ax, (title, reference, names) in zip(axes, groups):
        names.sort(key=lambda name: arms[name]["delta"])
        spread = mean_and_half_width(list(arms[reference]["losses"].values()))[1]
        if spread:
            spread *= math.sqrt(2)  # two sets of the reference's runs with nothing in common
            ax.axvspan(-spread, spread, color=rcParams["grid.color"], alpha=0.7, linewidth=0, zorder=0)
        for y, name in enumerate(names):
            a = arms[name]
            ax.errorbar(a["delta"], y, xerr=a["half"], fmt="s", color="C0", capsize=3, markersize=5,
                        markerfacecolor="C0" if a["verdict"] != "not significant" else rcParams["axes.facecolor"])
            if name in paper:
                ring(ax, paper[name][1], y, 1)
        ax.axvline(0, color=rcParams["text.color"], linewidth=0.8)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(False, axis="y")
        ax.set_title(title)
    pairs = sorted({a["pairs"] for a in compared.values()})
    explain(figure, f"Difference in validation loss, nats, over {' or '.join(map(str, pairs))} paired seeds; bars: "
                    "corrected intervals; filled: significant.\nGrey: how far the reference's own mean would move with "
                    "other seeds (95%).", paper)
    return figure


def scaling(arms, fits):
    """Paired differences over compute with their intervals, and the difference of the fits."""
    reference, *others = fits
    said, lines = [], {}
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
                ax.errorbar(a["flops"], a["delta"], yerr=a["half"], fmt="o", color=f"C{i}", capsize=3,
                            markerfacecolor=rcParams["axes.facecolor"] if "," in name else f"C{i}")
        c = np.geomspace(min(flops), max(flops), 100)
        (a, b), (a0, b0) = fits[strategy]["fit"], fits[reference]["fit"]
        lines[strategy] = c, a * (c / PF_DAY) ** -b - a0 * (c / PF_DAY) ** -b0, 0.0
    ax.set_xscale("log")
    compare_lines(ax, f"validation loss minus {reference}'s, nats; line: difference of the fits L = a C^(−b)",
                  "training compute, FLOPs (hollow: another number of tokens per parameter, not fitted)", lines, 0.0)
    ax.xaxis.set_major_formatter("{x:.0e}")
    ax.xaxis.set_minor_formatter("")
    return figure


# ---------------------------------------------------------------------------------------------------------------
# scale vectors

SITES = {"attn.qkv.v": "attention, input", "attn.qkv.u": "attention, output", "attn": "QK-norm",
         "ffn.gate_up.v": "FFN, input", "ffn.gate_up.u": "FFN, output", "ffn.router.v": "router, input",
         "ffn.experts.gate_up.v": "experts, input", "ffn.experts.gate_up.u": "experts, output",
         "ffn.shared.gate_up.v": "shared expert, input", "ffn.shared.gate_up.u": "shared expert, output",
         "": "post-norm", "lm_head.v": "LM head, input", "lm_head.u": "LM head, output"}


def gamma_series(scales):
    """
    {(layer, site, branch): {column: (k,)}} of one run's scales.csv. The key of 'blocks.3.attn.qkv.v.q' is
    ('3', 'attn.qkv.v', 'q'), an expert's branch 'gate.3'; what a name does not have is empty.
    """
    rows, columns = defaultdict(list), ("step", "mean", "std", "norm")
    for row in scales:
        key = re.fullmatch(r"(?:blocks\.(\d+)\.)?(?:(.*?)\.)?([^.]*(?:\.\d+)?)", row["name"]).groups("")
        rows[key].append([float(row[column]) for column in columns])
    return {key: dict(zip(columns, np.array(group).T)) for key, group in rows.items()}


def gammas(arm, series):
    """Mean and standard deviation over channels of every γ, a row of panels per place, a column per layer."""
    layers = sorted({layer for layer, _, _ in series if layer}, key=int) or [""]
    shown = [layers[i] for i in sorted({*np.linspace(0, len(layers) - 1, 6).round().astype(int)})]
    sites = sorted(dict.fromkeys(site for _, site, _ in series), key=lambda site: [*SITES, site].index(site))
    figure, axes = new_figure(f"{arm}: γ over steps, mean and standard deviation over channels",
                              len(sites) * len(shown), len(shown), 1.45, sharex=True, sharey="row")
    rows = axes.reshape(len(sites), len(shown))
    for row, site in zip(rows, sites):
        for ax, layer in zip(row, shown):  # what is in no layer stands in the first column
            keys = [key for key in series if key[1] == site and (key[0] == layer or not key[0] and ax is row[0])]
            for i, key in enumerate(keys):
                line(ax, i, series[key]["step"], series[key]["mean"], series[key]["std"], label=key[2])
            ax.set_visible(bool(keys))
        row[0].set_ylabel(SITES.get(site, site))
        row[0].legend(loc="best", handlelength=1)
    for ax, layer in zip(rows[0], shown):
        ax.set_title(f"layer {layer}" if layer else "")
    return figure


def magnitudes(series_of):
    """A panel per place: ‖γ‖/√n of each arm, the mean over layers and branches. series_of: {arm: gamma_series()}."""
    sites = [site for site in SITES if any(key[1] == site for series in series_of.values() for key in series)]
    figure, axes = new_figure("Magnitude ‖γ‖/√n (|β| under OR), mean over layers and branches", len(sites),
                              min(2, len(sites)), 2.3)
    for ax, site in zip(axes, sites):
        lines = dict.fromkeys(series_of)  # so that an arm has one colour in all panels
        for arm, series in series_of.items():
            if found := [s for key, s in series.items() if key[1] == site]:  # every γ starts as ones
                lines[arm] = found[0]["step"], np.mean([s["norm"] / s["norm"][0] for s in found], axis=0), 0.0
        compare_lines(ax, SITES[site], "step", lines, 1.0)
    return figure


# ---------------------------------------------------------------------------------------------------------------


def suite_figures(folder, gamma=None):
    """{name: Figure}, all that the CSVs in folder have data for. Raises ConfigError where there is nothing to draw."""
    rows = read_csv(folder / "results.csv")
    arms = summarise(rows)
    if not arms:
        raise ConfigError(f"{folder} has neither a run's log.csv nor finished cells in a results.csv of this ablate.py")
    compared = {name: a for name, a in arms.items() if "delta" in a}
    numbers, suite = paper_numbers(), rows[0]["suite"]
    paper = {name: numbers[key] for name in compared if (key := (suite, name, arms[name]["reference"])) in numbers}
    logs, scales = (read_csv(folder / f"{log}.csv") for log in ("curves", "scales"))
    runs = {name: {seed: losses(row for row in logs if row["cell"] == cell) for seed, cell in a["runs"].items()}
            for name, a in arms.items()}
    # at the same number of tokens a run with more steps is not at its end
    found = differences({name: a for name, a in compared.items()
                         if a["tokens"] == arms[a["reference"]]["tokens"]}, runs)
    series_of = {name: series for name, a in arms.items()  # scales.csv holds one seed
                 if (series := gamma_series(row for row in scales if row["cell"] in a["runs"].values()))}
    if gamma and gamma not in series_of:
        raise ConfigError(f"{folder}/scales.csv has no arm {gamma!r}; it has {', '.join(series_of) or 'none'}")
    figures, fits = {}, scaling_fits(arms)
    if compared:
        figures["ablation"] = ablation(arms, compared, paper)
    if len(fits) > 1:
        figures["scaling"] = scaling(arms, fits)
    elif found:
        figures["curves"] = curves(arms, found, paper)
    if series_of:
        arm = gamma or max(reversed(series_of), key=lambda arm: len(series_of[arm]))
        figures["gammas"] = gammas(arm, series_of[arm])
        if len(fits) < 2:
            figures["magnitudes"] = magnitudes(series_of)
    return figures


def run_figures(folders):
    """{name: Figure} of runs of train.py, from their own logs, the first as the reference. Raises ConfigError."""
    names = [folder.name for folder in folders]
    arms, runs, figures = {}, {}, {}
    for folder in folders:
        name = readable(folder if names.count(folder.name) > 1 else folder.name)
        arms[name] = {"reference": next(iter(arms), None)}
        runs[name] = {0: losses(read_csv(folder / "log.csv"))}
        if not runs[name][0]:
            raise ConfigError(f"{folder}/log.csv holds no evaluation after step 0 with a finite loss yet")
    if found := differences(arms, runs):
        figures["curves"] = curves(arms, found, {})
    elif not folders[1:]:
        figures["curves"] = loss_of_one_run(name, read_csv(folder / "log.csv"))
    for folder, name in zip(folders, arms):
        if series := gamma_series(read_csv(folder / "scales.csv")):
            figures["gammas" + (f"-{name}".replace("/", "-") if folders[1:] else "")] = gammas(name, series)
    return figures


def main(args):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run's, or one with a results.csv")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for pictures of runs; default: the first run's")
    parser.add_argument("--gamma", metavar="ARM", help="whose γ are drawn; default: the arm with the most")
    opt = parser.parse_args(args)
    folders = [folder.expanduser() for folder in opt.folders]
    if runs := [folder for folder in folders if (folder / "log.csv").exists()]:
        out = (opt.out or runs[0]).expanduser()
        out.mkdir(parents=True, exist_ok=True)
        draw(out, lambda: run_figures(runs))
    for folder in folders:
        if folder not in runs:
            draw(folder, lambda: suite_figures(folder, opt.gamma))


if __name__ == "__main__":
    streams()
    try:
        main(sys.argv[1:])
    except (ConfigError, OSError) as e:
        refuse(e, 1 if isinstance(e, OSError) else 2)
