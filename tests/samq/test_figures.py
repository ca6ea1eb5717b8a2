import dataclasses
import itertools

import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.text import Annotation

from samq.figures import pareto_figure, sensitivity_heatmap, types_heatmap
from tests.samq.sweep import make_sweep


def names_in(figure):
    return {child.get_text(): child for child in figure.axes[0].get_children() if isinstance(child, Annotation)}


def cells(axes):
    (mesh,) = (child for child in axes.get_children() if isinstance(child, QuadMesh))
    return np.ma.filled(mesh.get_array().astype(float), np.nan)


def test_the_pareto_figure_names_every_quantized_candidate_and_leaves_full_precision_out(sweep):
    figure = pareto_figure(sweep.results, best="threshold-0.2")
    assert set(names_in(figure)) == {"threshold-0.4", "threshold-0.2", "Q4_K_M"}
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_legend_handles_labels()[1] == ["Pareto front", "best", "stock", "threshold"]


def test_names_do_not_cover_each_other_even_where_points_crowd(tmp_path):
    crowd = make_sweep(tmp_path, layers=8, thresholds=(0.30, 0.29, 0.28, 0.27, 0.26, 0.25, 0.24))
    figure = pareto_figure(crowd.results)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in names_in(figure).values()]
    assert len(boxes) == 8
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def test_without_a_measured_candidate_the_figure_says_so(sweep):
    figure = pareto_figure([sweep.result("F16")])
    assert figure.axes[0].texts[0].get_text() == "no quantized candidate was measured"


def test_the_sensitivity_heat_map_has_a_cell_for_each_tensor(sweep):
    side, main, _ = sensitivity_heatmap(sweep.sensitivity).axes
    assert [label.get_text() for label in side.get_yticklabels()] == ["token_embd"]
    kinds = [label.get_text() for label in main.get_yticklabels()]
    assert kinds == ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    assert cells(main).shape == (7, 4)
    assert cells(main)[kinds.index("ffn_up"), 2] == sweep.sensitivity.tensors["blk.2.ffn_up.weight"].score
    assert cells(side).tolist() == [[1.0]]


def test_a_layer_without_a_kind_leaves_its_cell_empty(sweep):
    tensors = {name: t for name, t in sweep.sensitivity.tensors.items() if name != "blk.1.attn_k.weight"}
    figure = sensitivity_heatmap(sweep.sensitivity.model_copy(update={"tensors": tensors}))
    assert np.argwhere(np.isnan(cells(figure.axes[1]))).tolist() == [[1, 1]]


def test_a_tensor_without_any_gradient_can_be_drawn(sweep, tmp_path):
    tensors = {name: t.model_copy(update={"score": 0.0}) for name, t in sweep.sensitivity.tensors.items()}
    figure = sensitivity_heatmap(sweep.sensitivity.model_copy(update={"tensors": tensors}))
    figure.savefig(tmp_path / "zero.png")
    assert cells(figure.axes[1]).max() == 0


def test_the_types_heat_map_shows_bits_and_writes_the_types_where_they_fit(sweep):
    plan = sweep.result("threshold-0.2").plan
    side, main, _ = types_heatmap(plan).axes
    assert set(np.unique(cells(main))) <= {5.5, 8.5}
    assert sorted(text.get_text() for axes in (side, main) for text in axes.texts) == sorted(plan.types.values())


@pytest.mark.parametrize(("layers", "rotation"), [(30, 0), (80, 90), (200, None)])
def test_type_names_are_turned_or_left_out_as_cells_get_narrow(tmp_path, layers, rotation):
    plan = make_sweep(tmp_path, layers=layers, thresholds=()).result("Q4_K_M").plan
    figure = types_heatmap(plan)
    rotations = {text.get_rotation() for text in figure.axes[1].texts}
    assert rotations == (set() if rotation is None else {rotation})


def test_drawing_leaves_pyplots_global_state_alone(sweep):
    before = matplotlib.pyplot.get_fignums()
    pareto_figure(sweep.results)
    sensitivity_heatmap(sweep.sensitivity)
    types_heatmap(sweep.results[0].plan)
    assert matplotlib.pyplot.get_fignums() == before


def test_a_policy_of_its_own_has_a_marker_of_its_own(sweep):
    plan = sweep.result("threshold-0.2").plan.model_copy(update={"policy": "budget", "name": "budget-4.5"})
    figure = pareto_figure([*sweep.results, dataclasses.replace(sweep.result("threshold-0.2"), plan=plan)])
    assert "budget" in figure.axes[0].get_legend_handles_labels()[1]
