"""
Where runs start from: the rms of what the first block's sublayers add to the residual stream, beside the embeddings
are added to, at three widths, under both initialisations, with and without DNP's norms.

    python results/start/measure.py        writes results.csv and results.md beside it
"""

import csv
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import torch

from model import GPT
from runs import git_commit, versions
from settings import GPTConfig

WIDTHS = {128: 4, 768: 12, 1792: 28}  # n_embd: n_head
STARTS = {"N(0, 0.02)": (0.02, 0.02), "1/√fan_in, table 1": (0.0, 0.0)}
STRATEGIES = {"baseline": {}, "unified": dict(heterogeneous=True, placement="dual_norm", reparam="or")}


@torch.no_grad()
def sizes(width, start, strategy):
    """{what: its rms} of the first block on 256 random tokens."""
    torch.manual_seed(0)
    init_std, embedding_std = STARTS[start]
    model = GPT(GPTConfig(n_layer=1, n_head=WIDTHS[width], n_embd=width, vocab_size=1024, init_std=init_std,
                          embedding_std=embedding_std, **STRATEGIES[strategy]))
    found, block = {}, model.blocks[0]
    for name, layer in (("attention", block.attn), ("FFN", block.ffn)):
        layer.register_forward_hook(lambda module, _, out, name=name: found.update({name: out}))
    idx = torch.randint(0, 1024, (1, 256))
    model(idx)
    return {name: x.square().mean().sqrt().item() for name, x in {"embeddings": model.wte[idx], **found}.items()}


if __name__ == "__main__":
    rows = [{"n_embd": width, "start": start, "strategy": strategy,
             **{name: f"{rms:.4f}" for name, rms in sizes(width, start, strategy).items()},
             "commit": git_commit(), **versions()}
            for start in STARTS for width in WIDTHS for strategy in STRATEGIES]
    with open(HERE / "results.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    columns = ["start", "n_embd", "strategy", "embeddings", "attention", "FFN"]
    lines = ["| " + " | ".join(columns) + " |", "|---|---:|---|---:|---:|---:|",
             *("| " + " | ".join(str(row[c]) for c in columns) + " |" for row in rows)]
    (HERE / "results.md").write_text("\n".join([
        "# The rms of the first block's outputs", "", *lines, "",
        "Of one forward pass at the start. `python results/start/measure.py`.", ""]), encoding="utf-8")
    print("\n".join(lines))
