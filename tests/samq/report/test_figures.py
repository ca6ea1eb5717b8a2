import dataclasses
import itertools

import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation

from samq.report.figures import pareto_figure, prediction_figure
from samq.report.heatmaps import plans_heatmap, sensitivity_heatmap, types_heatmap
from samq.report.prediction import prediction_quality
from samq.sweep.selection import Comparison, SelectionRule
from tests.samq.sweeps import make_sweep, with_results

RULE = SelectionRule(max_size_ratio=1.6)  # so that there is a best


def texts_in(figure):
    annotations = [child for child in figure.axes[0].get_children() if isinstance(child, Annotation)]
    return {text.get_text(): text for text in annotations if text.get_text()}


def labels(figure):
    return figure.axes[0].get_legend_handles_labels()[1]


def line_of(figure, label):
    """The points of a family, and whether they are joined."""
    (container,) = (one for one in figure.axes[0].containers if one.get_label() == label)
    line = container.lines[0]
    return [tuple(point) for point in line.get_xydata().tolist()], line.get_linestyle() != "None"


def test_the_pareto_figure_names_every_quantized_candidate_and_leaves_full_precision_out(sweep):
    figure = pareto_figure(dataclasses.replace(sweep, comparisons=()))
    assert set(texts_in(figure)) == {"0.4", "0.2", "Q4_K_M", "Q5_K_M", "size of Q4_K_M", "size of Q5_K_M"}
    assert figure.axes[0].get_yscale() == "log"


def test_each_family_is_a_line_by_size_with_a_marker_and_a_colour_of_its_own(sweep):
    uniform = sweep.result("Q5_K_M").plan.model_copy(update={"policy": "uniform", "name": "uniform-Q5_1"})
    sweep = dataclasses.replace(
        sweep, results=(*sweep.results, dataclasses.replace(sweep.result("Q5_K_M"), plan=uniform)), rule=RULE
    )
    figure = pareto_figure(sweep)
    assert sweep.best
    families = ["one type for every tensor", "llama-quantize's mixtures", "SAMQ by threshold", "SAMQ by budget"]
    assert labels(figure) == ["best", *families]
    points, joined = line_of(figure, "SAMQ by budget")
    plans = [sweep.result(f"budget-size-of-{mixture}") for mixture in ("Q5_K_M", "Q4_K_M")]
    assert joined and points == [(plan.bytes / 1e6, plan.kld.value) for plan in plans]
    lines = [container.lines[0] for container in figure.axes[0].containers]
    assert len({line.get_marker() for line in lines}) == len({line.get_color() for line in lines}) == 4


def test_an_arrow_says_what_a_plan_changes_at_a_mixtures_bytes(sweep):
    figure = pareto_figure(sweep)
    won = {one.rival: one for one in sweep.comparisons if one.candidate.endswith(f"size-of-{one.rival}")}
    changes = {f"−{100 * one.reduction:.0f} %" for one in won.values()}
    assert len(changes) == 2
    assert set(texts_in(figure)) == {"0.4", "0.2", "Q4_K_M", "Q5_K_M", *changes}, "the arrow names the plan"


@pytest.mark.parametrize(("interval", "said"), [((-0.1, 0.1), None), ((-0.3, -0.1), "+20 %")])
def test_no_arrow_is_drawn_where_nothing_is_known_to_change(sweep, interval, said):
    comparison = Comparison("budget-size-of-Q4_K_M", "Q4_K_M", sum(interval) / 2, *interval)
    texts = texts_in(pareto_figure(dataclasses.replace(sweep, comparisons=(comparison,))))
    assert {text for text in texts if text.endswith("%")} == ({said} if said else set())


def test_bits_per_weight_are_on_top(sweep):
    figure = pareto_figure(sweep)
    FigureCanvasAgg(figure).draw()
    (top,) = figure.axes[0].child_axes
    result = sweep.result("Q4_K_M")
    low, high = figure.axes[0].get_xlim()
    share = (result.bytes / 1e6 - low) / (high - low)
    bottom, upper = top.get_xlim()
    assert bottom + share * (upper - bottom) == pytest.approx(result.plan.bits_per_weight)


def test_names_do_not_cover_each_other_even_where_points_crowd(tmp_path):
    thresholds = (0.30, 0.29, 0.28, 0.27, 0.26, 0.25, 0.24)
    crowd = make_sweep(tmp_path, layers=8, thresholds=thresholds, stock=("Q4_K_M",), budgets=())
    figure = pareto_figure(crowd)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts_in(figure).values()]
    assert len(boxes) == 8
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_without_a_measured_candidate_the_figure_says_so(sweep):
    figure = pareto_figure(with_results(sweep, [sweep.result("F16")]))
    assert figure.axes[0].texts[0].get_text() == "no quantized candidate was measured"


def test_predicted_is_drawn_against_measured_with_the_line_where_they_are_equal(sweep):
    figure = prediction_figure(sweep)
    axes = figure.axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert axes.get_xlim() == axes.get_ylim()
    points, joined = line_of(figure, "llama-quantize's mixtures")
    mixtures = [sweep.result("Q5_K_M"), sweep.result("Q4_K_M")]
    assert not joined and points == [(one.predicted.value, one.kld.value) for one in mixtures]
    (equal,) = (line for line in axes.lines if line.get_label() == "equal")
    assert np.array_equal(equal.get_xdata(), equal.get_ydata())
    quality = prediction_quality(sweep.results)
    assert axes.get_title(loc="left").endswith(f"rank correlation {quality.rank_correlation:.3f} over 6 plans")
    assert "over 0.3: not to be trusted" not in labels(figure)


def test_where_predictions_are_not_to_be_trusted_is_shaded(tmp_path):
    assert "over 0.3: not to be trusted" in labels(prediction_figure(make_sweep(tmp_path, worst_nats=0.5)))


def test_without_predictions_the_figure_says_so(sweep):
    unpredicted = with_results(sweep, (dataclasses.replace(result, predicted=None) for result in sweep.results))
    assert prediction_figure(unpredicted).axes[0].texts[0].get_text() == "no candidate has a prediction"


def test_drawing_leaves_pyplots_global_state_alone(sweep):
    before = matplotlib.pyplot.get_fignums()
    pareto_figure(sweep)
    prediction_figure(sweep)
    sensitivity_heatmap(sweep.sensitivity)
    types_heatmap(sweep.results[0].plan)
    plans_heatmap([result.plan for result in sweep.results])
    assert matplotlib.pyplot.get_fignums() == before
