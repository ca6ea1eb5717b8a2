"""Figures of a sweep: size against fidelity, where the model is sensitive, where the bits went.

Drawn with matplotlib's objects and never its pyplot state, so that worker threads can draw at once. Colours are safe for
colour-blind readers (Okabe and Ito's palette; viridis and cividis for scales).
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from samq.formats import bits_per_weight
from samq.records import Plan, SensitivityMap
from samq.selection import MB, Result, by_size, pareto

# Policy -> marker, colour.
_FAMILIES = {"stock": ("s", "#0072B2"), "threshold": ("o", "#D55E00"), "budget": ("D", "#009E73")}
# The kinds of tensor of a block in the order of computation; others follow in the model's order.
_KINDS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_DPI = 150


def pareto_figure(results: Sequence[Result], best: str | None = None) -> Figure:
    """Mean KLD (log scale, ± one standard error) against size, with the Pareto front; full precision, at 0, is left out."""
    shown = [result for result in by_size(results) if result.plan.policy != "full" and result.kld and result.kld.value > 0]
    figure = Figure(figsize=(8, 5.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="size of the GGUF (MB)", ylabel="mean KLD to full precision (nats per token)")
    axes.set_title("Size against fidelity: lower left is better", loc="left")
    if not shown:
        axes.text(0.5, 0.5, "no quantized candidate was measured", ha="center", transform=axes.transAxes)
        return figure
    front = pareto(shown)
    points = {result.name: (result.bytes / MB, result.kld.value if result.kld else np.nan) for result in shown}
    axes.plot(*zip(*(points[name] for name in front), strict=True), color="0.6", lw=1.2, zorder=1, label="Pareto front")
    for policy, (marker, colour) in _FAMILIES.items():
        family = [result for result in shown if result.plan.policy == policy]
        if family:
            x, y = np.array([points[result.name] for result in family]).T
            errors = [(result.kld.stderr if result.kld else None) or 0.0 for result in family]
            style = {"fmt": marker, "ms": 7, "mec": "white", "capsize": 3, "elinewidth": 1}
            axes.errorbar(x, y, errors, color=colour, label=policy, **style)
    if best in points:
        axes.plot(*points[best], "o", ms=15, mfc="none", mec="black", mew=1.3, label="best")
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.margins(x=0.12, y=0.12)
    axes.grid(which="both", color="0.92", lw=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _label_points(axes, points)
    return figure


def _label_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """Name each point where its name covers neither a point nor another name, trying places around the point."""
    figure = axes.figure
    figure.draw_without_rendering()  # sizes are known from here on
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    centres = axes.transData.transform(list(points.values()))
    around = [(9, 5, "left"), (9, -13, "left"), (-9, 5, "right"), (-9, -13, "right"), (0, 13, "center"), (0, -21, "center")]
    around += [(9, 17, "left"), (9, -25, "left"), (-9, 17, "right"), (-9, -25, "right")]
    taken: list[Annotation] = []
    for name, point in points.items():
        label = axes.annotate(name, point, textcoords="offset points", fontsize=8.5)
        crowding = {}
        for place in around:
            label.set(position=place[:2], ha=place[2])
            box = label.get_window_extent(renderer).padded(2)
            covered = sum(box.contains(*centre) for centre in centres)
            outside = not axes.bbox.contains(box.x0, box.y0) or not axes.bbox.contains(box.x1, box.y1)
            crowding[place] = covered + sum(box.overlaps(other.get_window_extent(renderer)) for other in taken) + outside
        chosen = min(crowding, key=lambda place: crowding[place])
        label.set(position=chosen[:2], ha=chosen[2])
        taken.append(label)


def sensitivity_heatmap(sensitivity: SensitivityMap) -> Figure:
    """Gradient norm of every tensor over the largest (log colour scale): layers across, kinds of tensor down."""
    scores = {name: tensor.score for name, tensor in sensitivity.tensors.items()}
    positive = [score for score in scores.values() if score > 0] or [1.0]
    norm = LogNorm(vmin=min(positive), vmax=1.0, clip=True)
    title = f"Sensitivity: {sensitivity.samples} samples, {sensitivity.tokens} tokens, loss {sensitivity.loss_nats:.3f} nats"
    return _heatmap(scores, norm, "viridis", title, "gradient norm, relative to the largest", lambda name: f"{scores[name]:.2g}")
