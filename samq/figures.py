"""Figures of a sweep: size against fidelity, where the model is sensitive, where the bits went.

Drawn with matplotlib's objects and never its pyplot state, so that worker threads can draw at once. Colours are safe for
colour-blind readers (Okabe and Ito's palette, viridis, plasma).
"""

import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, Locator, LogLocator, NullLocator

from samq.formats import bits_per_weight
from samq.records import Plan, SensitivityMap
from samq.selection import MB, Result, by_size, pareto

# Policy -> marker, colour.
_FAMILIES = {"stock": ("s", "#0072B2"), "threshold": ("o", "#D55E00"), "budget": ("D", "#009E73")}
# The kinds of tensor of a block in the order of computation; others follow in the model's order.
_KINDS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
# Places for a point's name, in points from its centre, the most legible first.
_PLACES = tuple(
    (x, y, side)
    for y in (4, -12, 15, -23)
    for x, side in ((9, "left"), (-9, "right"), (0, "center"))
    if x or abs(y) > 4
)
_DPI = 150


def pareto_figure(results: Sequence[Result], best: str | None = None) -> Figure:
    """Mean KLD (log scale, ± one standard error) against size, with the Pareto front; full precision, at 0, is left out."""
    shown = [r for r in by_size(results) if r.plan.policy != "full" and r.kld and r.kld.value > 0]
    figure = Figure(figsize=(8, 5.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="size of the GGUF (MB)", ylabel="mean KLD to full precision (nats per token)")
    axes.set_title("Size against fidelity: lower left is better", loc="left")
    points = {r.name: (r.bytes / MB, r.kld.value) for r in shown if r.kld}
    if not points:
        axes.text(0.5, 0.5, "no quantized candidate was measured", ha="center", transform=axes.transAxes)
        return figure
    axes.plot(*zip(*(points[name] for name in pareto(shown)), strict=True), color="0.6", lw=1.2, label="Pareto front")
    for policy, (marker, colour) in _FAMILIES.items():
        family = [r for r in shown if r.plan.policy == policy]
        if family:
            x, y = zip(*(points[r.name] for r in family), strict=True)
            errors = [(r.kld and r.kld.stderr) or 0.0 for r in family]
            axes.errorbar(x, y, errors, fmt=marker, color=colour, ms=7, mec="white", capsize=3, lw=1, label=policy)
    if best in points:
        axes.plot(*points[best], "o", ms=15, mfc="none", mec="black", mew=1.3, label="best")
    axes.set_yscale("log", nonpositive="clip")
    _tick(axes, LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.margins(0.12)
    axes.grid(color="0.92", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _name_points(figure, axes, points)
    return figure


def _tick(axes: Axes, locator: Locator) -> None:
    """Mark a log scale at the locator's places, in plain numbers."""
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _name_points(figure: Figure, axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Name each point where the name covers neither a point nor another name, trying places around the point."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # sizes are known from here on
    renderer = canvas.get_renderer()
    centres = axes.transData.transform(list(points.values()))
    names: list[Annotation] = []
    for name, point in points.items():
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8.5)
        crowding = []
        for x, y, side in _PLACES:
            text.set(position=(x, y), ha=side)
            box = text.get_window_extent(renderer).padded(2)
            covered = sum(box.contains(*centre) for centre in centres)
            covered += sum(box.overlaps(other.get_window_extent(renderer)) for other in names)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            crowding.append(covered + (not inside))
        x, y, side = _PLACES[crowding.index(min(crowding))]
        text.set(position=(x, y), ha=side)
        names.append(text)


def sensitivity_heatmap(sensitivity: SensitivityMap) -> Figure:
    """Each tensor's gradient norm over the largest of the model (log colour scale): layers across, kinds down."""
    scores = {name: tensor.score for name, tensor in sensitivity.tensors.items()}
    lowest = min((score for score in scores.values() if score > 0), default=0.1)
    return _heatmap(
        scores,
        {name: f"{score:.2g}" for name, score in scores.items()},
        LogNorm(vmin=lowest, vmax=1, clip=True),
        matplotlib.colormaps["viridis"],
        title=f"Sensitivity on {sensitivity.samples} samples, {sensitivity.tokens} tokens",
        scale_label="gradient norm / largest",
    )


def types_heatmap(plan: Plan) -> Figure:
    """Where the bits went: each tensor's type, coloured by its bits per weight; layers across, kinds down."""
    figure = _heatmap(
        {name: bits_per_weight(kind) for name, kind in plan.types.items()},
        plan.types,
        LogNorm(vmin=2, vmax=16, clip=True),  # the same for every plan: figures can be laid side by side
        matplotlib.colormaps["plasma"],
        title=f"{plan.name}: {plan.tensor_bytes / MB:.1f} MB, {plan.bits_per_weight:.2f} bits per weight",
        scale_label="bits per weight",
    )
    _tick(figure.axes[-1], FixedLocator([2, 3, 4, 5, 6, 8, 16]))
    return figure


def _heatmap(
    values: Mapping[str, float],
    labels: Mapping[str, str],
    norm: Normalize,
    colours: Colormap,
    title: str,
    scale_label: str,
) -> Figure:
    """A cell for each tensor: those of the blocks in a large panel, the others in a small one on its left."""
    cells: dict[tuple[str, int], str] = {}
    others = []
    for name in values:
        if match := re.fullmatch(r"blk\.(\d+)\.(.+?)(\.weight)?", name):
            cells[match[2], int(match[1])] = name
        else:
            others.append(name)
    kinds = sorted({kind: None for kind, _ in cells}, key=lambda kind: _KINDS.index(kind) if kind in _KINDS else 99)
    layers = range(1 + max((layer for _, layer in cells), default=0))
    grids: list[list[list[str | None]]] = [
        [[name] for name in others],
        [[cells.get((kind, layer)) for layer in layers] for kind in kinds],
    ]

    size = (min(4 + 0.36 * len(layers), 16), 1.2 + 0.36 * max(len(kinds), 3))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    *panels, scale = figure.subplots(1, 3, width_ratios=[max(2.0, len(layers) / 16), len(layers), 0.3])
    for axes, grid, rows in zip(panels, grids, (others, kinds), strict=True):
        image = [[values[name] if name else np.nan for name in row] for row in grid] or [[np.nan]]
        axes.pcolormesh(np.array(image), norm=norm, cmap=colours, edgecolors="white", linewidth=0.6)
        axes.set_yticks(np.arange(len(rows)) + 0.5, [name.removesuffix(".weight") for name in rows])
        axes.set_ylim(max(len(kinds), len(others)), 0)  # cells of both panels are of one height
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)
    step = 1 if len(layers) <= 40 else 5
    panels[0].set_xticks([])
    panels[1].set_xticks(np.arange(0, len(layers), step) + 0.5, layers[::step])
    panels[1].set_xlabel("layer", fontsize=9)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.colorbar(ScalarMappable(norm, colours), cax=scale).set_label(scale_label, fontsize=9)
    scale.tick_params(labelsize=8)
    _tick(scale, LogLocator(subs=(1, 2, 5)))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the cells have their final size, and what is written into them changes no more
    backgrounds = colours(norm(list(values.values())))
    inks = {name: _ink(background) for name, background in zip(values, backgrounds, strict=True)}
    for axes, grid in zip(panels, grids, strict=True):
        _write_in_cells(axes, grid, labels, inks)
    return figure


def _write_in_cells(
    axes: Axes, grid: Sequence[Sequence[str | None]], labels: Mapping[str, str], inks: Mapping[str, str]
) -> None:
    """Write each tensor's label into its cell, along or upright, if the longest label fits."""
    if not grid:
        return
    size = 6.5
    longest = 0.66 * size * max(len(labels[name]) for row in grid for name in row if name)
    window = axes.get_window_extent()
    width, height = 72 / _DPI * window.width / len(grid[0]), 72 / _DPI * window.height / len(grid)
    upright = longest > width
    if (longest > height or size > width) if upright else size > height:
        return
    for y, row in enumerate(grid):
        for x, name in enumerate(row):
            if name:
                text = axes.text(x + 0.5, y + 0.5, labels[name], color=inks[name], size=size, ha="center", va="center")
                text.set_rotation(90 if upright else 0)


def _ink(background: np.ndarray) -> str:
    """Black or white, whichever is legible on the colour (red, green, blue, alpha in 0..1)."""
    red, green, blue, _ = background
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
