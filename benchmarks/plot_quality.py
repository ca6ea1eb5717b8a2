"""The README's picture, of the same run as its table: mean KLD against size, from what `quality.py --json` wrote.

python benchmarks/plot_quality.py quality.json docs/images/pareto.png
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullLocator

# Key of a row -> its name, marker, colour (Okabe and Ito's palette) and line.
FAMILIES = {
    "kld_threshold": ("threshold method", "o", "#D55E00", "-."),
    "kld_stock": ("llama-quantize's mixtures", "s", "#0072B2", "--"),
    "kld_samq_nearest": ("SAMQ, allocation alone", "v", "#56B4E9", ":"),
    "kld_samq": ("SAMQ", "D", "#009E73", "-"),
}
MB = 1e6


def main() -> None:
    """Draw the result's mixtures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    rows = sorted(json.loads(arguments.result.read_text())["mixtures"], key=lambda row: row["bytes"])
    draw(rows).savefig(arguments.picture)


def draw(rows: list[dict]) -> Figure:
    """A line for each family; an arrow from each mixture to SAMQ's plan of its bytes says by how much KLD falls."""
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for key, (label, marker, colour, line) in FAMILIES.items():
        points = [(row["bytes"] / MB, row[key]) for row in rows if row.get(key) is not None]
        width = 2.0 if key == "kld_samq" else 1.1
        axes.plot(*zip(*points, strict=True), marker, ls=line, lw=width, ms=7.5, mec="white", color=colour, label=label)
    for row in rows:
        size, stock, ours = row["bytes"] / MB, row["kld_stock"], row["kld_samq"]
        arrow = {"arrowstyle": "-|>", "color": "0.35", "shrinkA": 6, "shrinkB": 6}
        axes.annotate("", (size, ours), (size, stock), arrowprops=arrow)
        text = {"textcoords": "offset points", "path_effects": [withStroke(linewidth=2.5, foreground="white")]}
        change = f"{-100 * row['reduction']:+.0f} %".replace("-", "−")
        axes.annotate(change, (size, ours), (-4, -14), ha="right", fontsize=10, fontweight="bold", **text)
        axes.annotate(row["mixture"], (size, stock), (8, 6), fontsize=9, color=FAMILIES["kld_stock"][2], **text)
    axes.set_xlabel("size of all tensors (MB)")
    axes.set_ylabel("mean KL divergence to full precision\n(nats per token, held-out text)")
    axes.set_title("Same file size, same importance matrix: lower is better", loc="left")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12, y=0.1)
    axes.grid(color="0.92", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    order = [1, 0, 2, 3]  # as the lines lie above each other at the right
    axes.legend([handles[i] for i in order], [labels[i] for i in order], frameon=False)
    return figure


if __name__ == "__main__":
    main()
