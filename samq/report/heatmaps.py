"""Heat maps over a model's tensors: where it is sensitive, where the bits went.

Drawn with matplotlib's objects and never its pyplot state, so that worker threads can draw at once. Colours are safe for
colour-blind readers (viridis, plasma).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, LogLocator

from samq.evaluation.metrics import MB
from samq.gguf.formats import bits_per_weight
from samq.records import Plan, SensitivityMap
from samq.report.figures import DPI, tick

# The kinds of tensor of a block in the order of computation; others follow in the model's order.
_KINDS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

HeatmapGrid = list[list[str | None]]


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
        title=_headline(plan),
        scale_label="bits per weight",
    )
    tick(figure.axes[-1].yaxis, FixedLocator([2, 3, 4, 5, 6, 8, 16]))
    return figure


def plans_heatmap(plans: Sequence[Plan]) -> Figure:
    """Where the bits went in each of several plans of one model, one above the other in the same colours."""
    kinds = {kind for plan in plans for kind in plan.types.values()}
    bits = {kind: bits_per_weight(kind) for kind in sorted(kinds, key=lambda kind: (-bits_per_weight(kind), kind))}
    norm, colours = LogNorm(vmin=min(bits.values()), vmax=max(bits.values())), matplotlib.colormaps["plasma"]
    layout = _PanelLayout.of(plans[0].types)
    rows = max(len(layout.kinds), len(layout.others))
    figure = Figure(figsize=(layout.width, 0.6 + len(plans) * (0.55 + 0.17 * rows)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(plans), 2, width_ratios=layout.width_ratios, squeeze=False)
    for plan, (side, main) in zip(plans, panels, strict=True):
        values = {name: bits[kind] for name, kind in plan.types.items()}
        layout.draw(side, main, values, norm, colours, label_size=7)
        main.set_title(_headline(plan), loc="left", fontsize=9)
        if plan is not plans[-1]:
            main.set(xticks=[], xlabel="")
    legend = [Patch(color=colours(norm(value)), label=f"{kind}, {value:.3g} bits") for kind, value in bits.items()]
    figure.legend(handles=legend, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def _headline(plan: Plan) -> str:
    return f"{plan.name}: {plan.tensor_bytes / MB:.1f} MB, {plan.bits_per_weight:.2f} bits per weight"


@dataclass(frozen=True)
class _PanelLayout:
    """A cell for each tensor: those of the blocks in a large panel, the others in a small one on its left."""

    others: list[str]
    kinds: list[str]
    layers: range
    cells: dict[tuple[str, int], str]  # (kind, layer) -> tensor

    @classmethod
    def of(cls, names: Iterable[str]) -> Self:
        cells: dict[tuple[str, int], str] = {}
        others = []
        for name in names:
            if match := re.fullmatch(r"blk\.(\d+)\.(.+?)(\.weight)?", name):
                cells[match[2], int(match[1])] = name
            else:
                others.append(name)
        kinds = sorted({kind: None for kind, _ in cells}, key=lambda kind: _KINDS.index(kind) if kind in _KINDS else 99)
        return cls(others, kinds, range(1 + max((layer for _, layer in cells), default=0)), cells)

    @property
    def grids(self) -> list[HeatmapGrid]:
        """The tensors of the small panel and of the large one, row by row."""
        blocks = [[self.cells.get((kind, layer)) for layer in self.layers] for kind in self.kinds]
        return [[[name] for name in self.others], blocks]

    @property
    def width(self) -> float:
        """Of a figure, in inches."""
        return min(4 + 0.36 * len(self.layers), 16)

    @property
    def width_ratios(self) -> list[float]:
        """Of the two panels."""
        return [max(2.0, len(self.layers) / 16), len(self.layers)]

    def draw(
        self, side: Axes, main: Axes, values: Mapping[str, float], norm: Normalize, colours: Colormap, label_size: int
    ) -> None:
        """Colour both panels' cells by their tensors' values, and label rows and layers."""
        for axes, grid, rows in zip((side, main), self.grids, (self.others, self.kinds), strict=True):
            image = [[values[name] if name else np.nan for name in row] for row in grid] or [[np.nan]]
            axes.pcolormesh(np.array(image), norm=norm, cmap=colours, edgecolors="white", linewidth=0.6)
            axes.set_yticks(np.arange(len(rows)) + 0.5, [name.removesuffix(".weight") for name in rows])
            axes.set_ylim(max(len(self.kinds), len(self.others)), 0)  # cells of both panels are of one height
            axes.tick_params(length=0, labelsize=label_size)
            axes.spines[:].set_visible(False)
        step = 1 if len(self.layers) <= 40 else 5
        side.set_xticks([])
        main.set_xticks(np.arange(0, len(self.layers), step) + 0.5, [str(layer) for layer in self.layers[::step]])
        main.set_xlabel("layer", fontsize=label_size + 1)


def _heatmap(
    values: Mapping[str, float],
    labels: Mapping[str, str],
    norm: Normalize,
    colours: Colormap,
    title: str,
    scale_label: str,
) -> Figure:
    """One value a tensor, with its label written into its cell."""
    layout = _PanelLayout.of(values)
    figure = Figure(figsize=(layout.width, 1.2 + 0.36 * max(len(layout.kinds), 3)), dpi=DPI, layout="constrained")
    side, main, scale = figure.subplots(1, 3, width_ratios=[*layout.width_ratios, 0.3])
    layout.draw(side, main, values, norm, colours, label_size=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.colorbar(ScalarMappable(norm, colours), cax=scale).set_label(scale_label, fontsize=9)
    scale.tick_params(labelsize=8)
    tick(scale.yaxis, LogLocator(subs=(1, 2, 5)))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the cells have their final size, and what is written into them changes no more
    backgrounds = colours(norm(list(values.values())))
    inks = {name: _ink(background) for name, background in zip(values, backgrounds, strict=True)}
    for axes, grid in zip((side, main), layout.grids, strict=True):
        _write_in_cells(axes, grid, labels, inks)
    return figure


def _write_in_cells(axes: Axes, grid: HeatmapGrid, labels: Mapping[str, str], inks: Mapping[str, str]) -> None:
    """Write each tensor's label into its cell, along or upright, if the longest label fits."""
    if not grid:
        return
    size = 6.5
    longest = 0.66 * size * max(len(labels[name]) for row in grid for name in row if name)
    window = axes.get_window_extent()
    width, height = 72 / DPI * window.width / len(grid[0]), 72 / DPI * window.height / len(grid)
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
