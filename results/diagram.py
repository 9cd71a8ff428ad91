"""
Draws a block, the LM head, and which parts each strategy has: results/block_light.svg and results/block_dark.svg.

    python results/diagram.py
"""

from pathlib import Path

THEMES = {"light": {"ink": "#24292f", "line": "#8c959f", "norm": "#1a7f37", "input": "#0969da", "output": "#bc4c00",
                    "weight": "#57606a"},
          "dark": {"ink": "#e6edf3", "line": "#6e7681", "norm": "#3fb950", "input": "#58a6ff", "output": "#f0883e",
                   "weight": "#9ea7b3"}}
# the columns that the block and the table below it share
X = {"norm": 128, "v": 236, "W": 330, "N": 424, "u": 518, "rope": 612, "mix": 720, "out": 814}
KIND = {"norm": "norm", "v": "input", "W": "weight", "N": "norm", "u": "output"}
TABLE, STEP, RIGHT = 474, 34, 870  # the table's first row, and from one to the next
IDLE = "idle"  # N(W (v ⊙ x)) does not see the length of x: a norm before it is left out
# name, its boxes in the columns norm, v, W, N, u, and a remark
STRATEGIES = [("baseline", ("N", "γ", "W_c", "", ""), "one γ for all branches of a norm"),
              ("HG", ("N", "v_c", "W_c", "", ""), "one vector per branch"),
              ("AP", ("N", "", "W_c", "", "u_c"), "a vector on the output side only"),
              ("DP", ("N", "γ", "W_c", "", "u_c"), "on both sides"),
              ("DNP", (IDLE, "γ", "W_c", "N", "u_c"), "with a norm, which makes the one before idle"),
              ("unified", (IDLE, "v_c", "W_c", "N", "u_c"), "HG + DNP, γ = β N(α) (OR), decay only on v (IWD)"),
              ("light", ("N", "v_c", "W_c", "q k v", "u_c"), "ours: unified in attention, free elsewhere"),
              ("free", ("N", "v_c", "W_c", "", "u_c"), "ours: unified without its norms")]


class Picture:
    """SVG elements in one theme's colours."""

    def __init__(self, colours):
        self.colours, self.parts = colours, []

    def text(self, x, y, words, colour="ink", size=13, anchor="middle", bold=False):
        """Words centred at (x, y); what follows an underscore is a subscript."""
        words, _, below = words.partition("_")
        if below:  # set by hand: renderers do not agree on how to centre text of two sizes
            x, anchor = x - (len(below) * 5.6 + (13 if words == "W" else 8)) / 2, "start"
            self.text(x + (13 if words == "W" else 8.5), y + 4, below, colour, size - 3, anchor)
        self.parts.append(f'<text x="{x:g}" y="{y + size * 0.35:g}" fill="{self.colours[colour]}" font-size="{size}" '
                          f'text-anchor="{anchor}" font-weight="{"bold" if bold else "normal"}">{words}</text>')

    def box(self, x, y, w, h, words, kind):
        dash, opacity = (' stroke-dasharray="3 3"', 0) if words == IDLE else ("", 0.13)
        colour = self.colours[kind]
        self.parts.append(f'<rect x="{x - w / 2:g}" y="{y - h / 2:g}" width="{w}" height="{h}" rx="6" '
                          f'stroke="{colour}" stroke-width="1.4"{dash} fill="{colour}" fill-opacity="{opacity}"/>')
        self.text(x, y, words, kind)

    def line(self, *points, arrow=True):
        path, end = " L ".join(f"{x} {y}" for x, y in points), ' marker-end="url(#arrow)"' * arrow
        self.parts.append(f'<path d="M {path}" fill="none" stroke="{self.colours["line"]}" stroke-width="1.3"{end}/>')

    def svg(self, width, height):
        return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                f'height="{height}" font-family="-apple-system, Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif">\n'
                '<marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
                f'<path d="M 0 0.8 L 7 4 L 0 7.2" fill="none" stroke="{self.colours["line"]}" stroke-width="1.4"/>'
                "</marker>\n" + "\n".join(self.parts) + "\n</svg>\n")


def sublayer(p, name, branches, top, mix, out):
    """A Pre-Norm and its branches; then, in a block, what joins them, a last matrix and the sum."""
    rows = [top + 38 * i for i in range(len(branches))]
    middle, tall, stream = (rows[0] + rows[-1]) / 2, rows[-1] - rows[0] + 26, top - 40
    p.line((24, stream), (RIGHT if mix else 66, stream), arrow=bool(mix))
    p.line((66, stream), (66, middle), (X["norm"] - 22, middle))
    p.text(24, stream - 13, "x", anchor="start")
    p.text(X["norm"] - 20, stream - 13, name, anchor="start", bold=True)
    p.box(X["norm"], middle, 40, tall, "N", "norm")
    for row, branch in zip(rows, branches):
        before = X["norm"] + 21
        for column, words in (("v", f"v_{branch}"), ("W", f"W_{branch}"), ("N", "N"), ("u", f"u_{branch}"),
                              *[("rope", "RoPE")] * (branch in "qk")):
            p.line((before, row), (X[column] - 31, row))
            p.box(X[column], row, 60, 26, words, KIND.get(column, "weight"))
            before = X[column] + 31
        p.line((before, row), (X["mix"] - 57, row))
    if not mix:
        return p.text(X["mix"] - 50, middle, out, anchor="start")
    p.box(X["mix"], middle, 112, tall, mix, "weight")
    p.line((X["mix"] + 57, middle), (X["out"] - 28, middle))
    p.box(X["out"], middle, 54, 26, f"W_{out}", "weight")
    p.line((X["out"] + 28, middle), (856, middle), (856, stream + 9))
    p.parts.append(f'<circle cx="856" cy="{stream}" r="7" fill="none" stroke="{p.colours["line"]}"/>')
    p.text(856, stream, "+")


def draw(colours):
    p = Picture(colours)
    sublayer(p, "attention", ("q", "k", "v"), 70, "softmax(q kᵀ) v", "o")
    sublayer(p, "FFN", ("gate", "up"), 238, "silu(gate) ⊙ up", "down")
    sublayer(p, "LM head", ("head",), 368, "", "logits")
    p.line((24, TABLE - 52), (RIGHT, TABLE - 52), arrow=False)
    for (column, kind), words in zip(KIND.items(), ("Pre-Norm", "input side", "matrix", "norm", "output side")):
        p.text(X[column], TABLE - 30, words, kind, size=11)
    for i, (name, boxes, remark) in enumerate(STRATEGIES):
        y = TABLE + STEP * i
        p.text(24, y, name, anchor="start", bold=True)
        for (column, kind), words in zip(KIND.items(), boxes):
            if words:
                p.box(X[column], y, 60, 24, words, kind)
        p.text(X["u"] + 44, y, remark, anchor="start", size=12)
    return p.svg(894, TABLE + STEP * len(STRATEGIES) - 4)


if __name__ == "__main__":
    for theme, colours in THEMES.items():
        (Path(__file__).parent / f"block_{theme}.svg").write_text(draw(colours), encoding="utf-8")
