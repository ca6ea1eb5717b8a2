"""Figures of a sweep: size against fidelity, predicted against measured KL.

Drawn with matplotlib's objects and never its pyplot state, so that worker threads can draw at once. Colours are safe for
colour-blind readers (Okabe and Ito's palette), and each family has a marker of its own.
"""

import itertools
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import Locator, LogLocator, NullLocator
from numpy.typing import NDArray

from samq.allocation.prices import SECOND_ORDER_LIMIT_NATS
from samq.evaluation.metrics import MB
from samq.records import Metric
from samq.report.prediction import predicted_and_measured, prediction_quality
from samq.sweep.selection import Comparison, Result
from samq.sweep.sweep import Sweep

DPI = 150
_TEXT: dict[str, Any] = {  # legible on lines, too
    "textcoords": "offset points",
    "path_effects": [withStroke(linewidth=2.5, foreground="white")],
}


class _Family(NamedTuple):
    label: str
    marker: str
    colour: str
    line: str


_FAMILIES = {
    "uniform": _Family("one type for every tensor", "^", "#6E6E6E", ":"),
    "stock": _Family("llama-quantize's mixtures", "s", "#0072B2", "--"),
    "threshold": _Family("SAMQ by threshold", "o", "#D55E00", "-."),
    "budget": _Family("SAMQ by budget", "D", "#009E73", "-"),
}
# Places for a point's name, in points from its centre, the most legible first.
_PLACES = tuple(
    (x, y, side)
    for y in (4, -12, 15, -23)
    for x, side in ((9, "left"), (-9, "right"), (0, "center"))
    if x or abs(y) > 4
)


def pareto_figure(sweep: Sweep) -> Figure:
    """Mean KLD (log scale, ± one standard error) against size, a line a family; full precision, at 0, is left out.

    An arrow goes from a stock mixture to the plan of its size that is surely closer, or further, and says by how much.
    """
    shown = [r for r in sweep.by_size if r.plan.policy != "full" and r.kld and r.kld.value > 0]
    figure = Figure(figsize=(9, 5.6), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="size of the GGUF (MB)", ylabel="mean KL divergence to full precision (nats per token)")
    axes.set_title("Size against fidelity: lower left is better", loc="left")
    if not shown:
        axes.text(0.5, 0.5, "no quantized candidate was measured", ha="center", transform=axes.transAxes)
        return figure
    points = {r.name: (r.bytes / MB, r.kld.value) for r in shown if r.kld}
    for policy, family in _FAMILIES.items():
        members = [r for r in shown if r.plan.policy == policy]
        if members:
            x, y = zip(*(points[r.name] for r in members), strict=True)
            errors = [_error(r.kld) for r in members]
            _draw(axes, family, x, y, yerr=errors, ls=family.line, lw=1.8 if policy == "budget" else 1.1)
    if sweep.best and sweep.best.name in points:
        axes.plot(*points[sweep.best.name], "o", ms=16, mfc="none", mec="black", mew=1.3, label="best")
    axes.set_yscale("log", nonpositive="clip")
    axes.margins(0.09)
    _log_ticks(axes.yaxis)
    _tidy(axes)
    _add_bits_per_weight(axes, shown[0])
    arrows = _arrows(sweep, points)
    changes = [_draw_change(axes, points[one.rival], points[one.candidate], one.reduction) for one in arrows]
    pointed_at = {one.candidate for one in arrows}  # named by the mixture that the arrow comes from
    named = [r for r in shown if r.name not in pointed_at]
    _name_points(figure, axes, [(r, *points[r.name]) for r in named], changes)
    return figure


def prediction_figure(sweep: Sweep) -> Figure:
    """Measured mean KLD against predicted KL (log scales, ± one standard error), with the line where they are equal."""
    pairs = predicted_and_measured(sweep.results)
    figure = Figure(figsize=(6.6, 6.4), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="predicted KL (nats per token)", ylabel="measured mean KLD (nats per token)")
    quality = prediction_quality(sweep.results)
    summary = f": rank correlation {quality.rank_correlation:.3f} over {quality.candidates} plans" if quality else ""
    axes.set_title(f"Predicted against measured KL{summary}", loc="left", fontsize=11)
    if not pairs:
        axes.text(0.5, 0.5, "no candidate has a prediction", ha="center", transform=axes.transAxes)
        return figure
    values = [metric.value for _, *metrics in pairs for metric in metrics]
    low, high = min(values) / 1.5, max(values) * 1.5
    axes.plot([low, high], [low, high], color="0.6", lw=1, label="equal")
    limit = SECOND_ORDER_LIMIT_NATS
    if high > limit:
        style: dict[str, Any] = {"facecolor": "0.94", "edgecolor": "0.94", "zorder": 0}
        axes.axvspan(max(low, limit), high, label=f"over {limit:g}: not to be trusted", **style)
        axes.axhspan(max(low, limit), high, **style)
    for policy, family in _FAMILIES.items():
        members = [(p, m) for result, p, m in pairs if result.plan.policy == policy]
        if members:
            x, y = ([metric.value for metric in metrics] for metrics in zip(*members, strict=True))
            xerr, yerr = ([_error(metric) for metric in metrics] for metrics in zip(*members, strict=True))
            _draw(axes, family, x, y, xerr=xerr, yerr=yerr, ls="none")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        _log_ticks(axis)
    _tidy(axes)
    _name_points(figure, axes, [(result, p.value, m.value) for result, p, m in pairs])
    return figure


def _draw(axes: Axes, family: _Family, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    marker: dict[str, Any] = {"fmt": family.marker, "ms": 7.5, "mec": "white", "mew": 0.8}
    axes.errorbar(x, y, color=family.colour, capsize=2.5, elinewidth=1, label=family.label, **marker, **style)


def _error(metric: Metric | None) -> float:
    return (metric and metric.stderr) or 0.0


def _short_name(result: Result) -> str:
    """The name without its family, which the legend shows."""
    return result.name.removeprefix(f"{result.plan.policy}-").replace("size-of-", "size of ")


def _log_ticks(axis: Axis) -> None:
    """As many marks on a log scale as its range has room for."""
    low, high = axis.get_view_interval()
    tick(axis, LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 20 * low else (1, 2, 5) if high < 2000 * low else (1,)))


def tick(axis: Axis, locator: Locator) -> None:
    """Mark a log scale at the locator's places, in plain numbers."""
    axis.set_major_locator(locator)
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _tidy(axes: Axes) -> None:
    axes.grid(color="0.92", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(facecolor="white", edgecolor="none", framealpha=0.9)


def _add_bits_per_weight(axes: Axes, result: Result) -> None:
    """A second scale, on top: sizes as bits per weight, without the metadata."""
    rest, byte_bits = result.bytes - result.plan.tensor_bytes, 8 * MB / result.plan.weights
    scales = (lambda size: (size - rest / MB) * byte_bits, lambda bits: bits / byte_bits + rest / MB)
    top = axes.secondary_xaxis("top", functions=scales)
    top.set_xlabel("bits per weight", fontsize=9)
    top.tick_params(labelsize=9)
    top.spines[:].set_visible(False)


def _arrows(sweep: Sweep, shown: Collection[str]) -> list[Comparison]:
    """For each stock mixture the plan of its size with the lowest mean KLD, if the two can be told apart."""
    arrows = []
    for mixture in sweep.stock:
        peers = {plan.name for plan in sweep.of_its_size(mixture)}.intersection(shown)
        against = [one for one in sweep.comparisons if one.rival == mixture.name and one.candidate in peers]
        closest = max(against, key=lambda one: one.reduction, default=None)
        if closest and closest.verdict != "tie" and mixture.name in shown:
            arrows.append(closest)
    return arrows


def _draw_change(axes: Axes, start: tuple[float, float], end: tuple[float, float], reduction: float) -> Annotation:
    style = {"arrowstyle": "-|>", "color": "0.35", "lw": 0.9, "shrinkA": 6, "shrinkB": 6}
    axes.annotate("", end, start, arrowprops=style)
    change = f"{-100 * reduction:+.0f} %".replace("-", "−")
    middle = (start[0], (start[1] * end[1]) ** 0.5)
    return axes.annotate(change, middle, (6, 0), va="center", fontsize=9.5, fontweight="bold", **_TEXT)


def _name_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[Result, float, float]],
    others: Sequence[Annotation] = (),
) -> None:
    """Name each point where the name covers no point, no other text and little of a line, trying places around it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # sizes are known from here on
    renderer = canvas.get_renderer()
    centres = axes.transData.transform([(x, y) for _, x, y in points])
    lines = np.concatenate([_along(line) for line in axes.lines if line.get_linestyle() != "None"])
    taken = [other.get_window_extent(renderer) for other in others]
    for result, x, y in points:
        colour = _FAMILIES[result.plan.policy].colour
        text = axes.annotate(_short_name(result), (x, y), (0, 0), fontsize=8.5, color=colour, **_TEXT)
        crowding = []
        for across, up, side in _PLACES:
            text.set(position=(across, up), ha=side)
            box = text.get_window_extent(renderer).padded(2)
            covered = box.count_contains(centres) + 0.01 * box.count_contains(lines)
            covered += sum(box.overlaps(other) for other in taken)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            crowding.append(covered + (not inside))
        across, up, side = _PLACES[crowding.index(min(crowding))]
        text.set(position=(across, up), ha=side)
        taken.append(text.get_window_extent(renderer))


def _along(line: Line2D) -> NDArray[np.float64]:
    """Points along a line, in pixels: (points, 2)."""
    corners = line.get_transform().transform(line.get_xydata())
    steps = np.linspace(0, 1, 50, endpoint=False)[:, None]
    return np.concatenate([corners[-1:], *(a + steps * (b - a) for a, b in itertools.pairwise(corners))])
