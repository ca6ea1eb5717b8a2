import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from samq.gguf.formats import bits_per_weight
from samq.report.heatmaps import plans_heatmap, sensitivity_heatmap, types_heatmap
from tests.samq.sweeps import make_sweep


def cells(axes):
    (mesh,) = (child for child in axes.get_children() if isinstance(child, QuadMesh))
    return np.ma.filled(mesh.get_array().astype(float), np.nan)


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


@pytest.mark.parametrize(("layers", "rotation"), [(30, 0), (80, 90), pytest.param(200, None, marks=pytest.mark.slow)])
def test_type_names_are_turned_or_left_out_as_cells_get_narrow(tmp_path, layers, rotation):
    plan = make_sweep(tmp_path, layers=layers, thresholds=(), budgets=()).result("Q4_K_M").plan
    figure = types_heatmap(plan)
    rotations = {text.get_rotation() for text in figure.axes[1].texts}
    assert rotations == (set() if rotation is None else {rotation})


def test_all_plans_are_drawn_in_the_same_colours_one_above_the_other(sweep):
    plans = [sweep.result(f"budget-size-of-{mixture}").plan for mixture in ("Q5_K_M", "Q4_K_M")]
    figure = plans_heatmap(plans)
    panels = np.array(figure.axes).reshape(2, 2)
    for plan, (side, main) in zip(plans, panels, strict=True):
        assert main.get_title(loc="left").startswith(f"{plan.name}: ")
        assert cells(side).tolist() == [[bits_per_weight(plan.types["token_embd.weight"])]]
        assert cells(main)[5, 2] == bits_per_weight(plan.types["blk.2.ffn_up.weight"])
    scales = {axes.collections[0].norm for axes in figure.axes}
    assert len(scales) == 1
    used = {kind for plan in plans for kind in plan.types.values()}
    entries = [text.get_text() for text in figure.legends[0].get_texts()]
    assert entries == sorted((f"{kind}, {bits_per_weight(kind):.3g} bits" for kind in used), reverse=True)
