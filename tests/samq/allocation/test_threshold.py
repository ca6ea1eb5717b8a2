import pytest
from gguf import GGMLQuantizationType

from samq.allocation.target import OpenTarget, stock_plan
from samq.allocation.threshold import (
    ThresholdPolicy,
    change_points,
    group_scores,
    propose_thresholds,
    resolve_threshold,
    threshold_name,
    threshold_plan,
)
from samq.allocation.types import threshold_types
from samq.errors import SamqError
from samq.llamacpp.quantize import quantize
from samq.records import SensitivityMap, TensorSensitivity
from samq.requirements.candidates import of_threshold
from tests.conftest import write_stacked_gguf, write_tiny_gguf
from tests.samq.tiny_imatrix import write_tiny_imatrix

SCORES = {"token_embd.weight": 1.0, "blk.0.attn_q.weight": 0.5, "blk.1.ffn_up.weight": 0.3, "blk.1.attn_v.weight": 0.31}


def sensitivity_of(target):
    tensors = {
        name: TensorSensitivity(
            shape=tensor.shape,
            gradient_norm=1.0,
            gradient_norm_stderr=0.1,
            score=SCORES.get(name, 0.05),
            sequence_squares=(1.0, 1.2),
        )
        for name, tensor in target.quantizable.items()
    }
    return SensitivityMap(
        model_digest="m",
        calibration_digest="c",
        labels="text",
        seed=0,
        sequence_tokens=(10, 10),
        loss_nats=2.0,
        tied_embeddings=target.tied,
        tensors=tensors,
    )


@pytest.fixture(scope="module")
def target(tiny_gguf, toolchain):
    return OpenTarget.open(tiny_gguf, toolchain)


@pytest.fixture(scope="module")
def sensitivity(target):
    return sensitivity_of(target)


def test_a_block_scores_its_highest_tensor(target, sensitivity):
    scores = group_scores(sensitivity, target.quantizable, "block")
    assert scores == {"token_embd.weight": 1.0, "output.weight": 0.05, "blk.0": 0.5, "blk.1": 0.31}


def test_what_scores_above_the_threshold_keeps_its_bits_and_the_rest_is_the_mixture(target, sensitivity):
    plan = threshold_plan(target, sensitivity, 0.4, ThresholdPolicy())
    stock = stock_plan(target, "Q4_K_M")
    assert plan.types["token_embd.weight"] == "Q8_0"
    assert {kind for name, kind in plan.types.items() if name.startswith("blk.0.")} == {"Q8_0"}
    assert {name: kind for name, kind in plan.types.items() if name.startswith("blk.1.")} == {
        name: kind for name, kind in stock.types.items() if name.startswith("blk.1.")
    }
    assert plan.types.keys() == target.quantizable.keys()
    assert (plan.parameters["threshold"], plan.parameters["kept_tensors"], plan.parameters["kept_groups"]) == (
        0.4,
        8,
        2,
    )
    assert plan.map_digest == sensitivity.digest()


def test_tensors_can_be_kept_one_by_one(target, sensitivity):
    plan = threshold_plan(target, sensitivity, 0.4, ThresholdPolicy(grouping="tensor", base="Q4_K", keep="F16"))
    assert [name for name, kind in plan.types.items() if kind == "F16"] == ["token_embd.weight", "blk.0.attn_q.weight"]
    assert plan.types["blk.0.attn_v.weight"] == "Q4_K"


def test_the_output_is_guarded(target, sensitivity, tmp_path, toolchain):
    everything = ThresholdPolicy(base="Q4_K", embedding_guard="Q6_K")
    plan = threshold_plan(target, sensitivity, 1.0, everything)
    assert (plan.types["output.weight"], plan.types["token_embd.weight"]) == ("Q8_0", "Q6_K")
    unguarded = threshold_plan(target, sensitivity, 1.0, ThresholdPolicy(base="Q4_K", output_guard=None))
    assert set(unguarded.types.values()) == {"Q4_K"}
    tied = OpenTarget.open(write_tiny_gguf(tmp_path / "tied.gguf", tied=True), toolchain)
    assert threshold_plan(tied, sensitivity_of(tied), 1.0, everything).types["token_embd.weight"] == "Q8_0"


def test_a_tensor_that_is_published_in_mxfp4_keeps_it_unless_the_base_is_smaller(toolchain, tmp_path, sensitivity):
    name = "blk.0.ffn_up.weight"
    target = OpenTarget.open(write_tiny_gguf(tmp_path / "in.gguf", mxfp4=[name]), toolchain)
    unmeasured = sensitivity.model_copy(update={"tensors": dict(sensitivity.tensors)})
    del unmeasured.tensors[name]
    for threshold, base, known, kind in (
        (0.0, "Q4_K_M", sensitivity, "MXFP4"),
        (1.0, "Q4_K_M", sensitivity, "MXFP4"),
        (1.0, "Q2_K", sensitivity, "Q2_K"),
        (1.0, "Q2_K", unmeasured, "MXFP4"),
    ):
        plan = threshold_plan(target, known, threshold, ThresholdPolicy(base=base))
        assert plan.types[name] == kind and name not in plan.substitutions
    assert plan.types["blk.0.attn_q.weight"] != "MXFP4"


def test_types_that_rows_do_not_allow_are_replaced_visibly(toolchain, tmp_path):
    target = OpenTarget.open(write_tiny_gguf(tmp_path / "in.gguf", width=96, hidden=192), toolchain)
    plan = threshold_plan(target, sensitivity_of(target), 0.4, ThresholdPolicy(keep="Q6_K", base="Q4_K"))
    kept, rest = plan.substitutions["blk.0.attn_q.weight"], plan.substitutions["blk.1.attn_q.weight"]
    assert (kept.requested, kept.used, rest.requested, rest.used) == ("Q6_K", "Q8_0", "Q4_K", "Q5_0")
    assert plan.types["blk.1.attn_q.weight"] == "Q5_0"


@pytest.mark.slow
@pytest.mark.parametrize("base", ["IQ3_XXS", "IQ1_M"])
def test_types_that_lack_an_importance_are_replaced_visibly(toolchain, tmp_path, base):
    gguf = write_tiny_gguf(tmp_path / "in.gguf", hidden=256)
    matrix = write_tiny_imatrix(
        tmp_path / "imatrix.gguf", gguf, without=["token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_q.weight"]
    )
    target = OpenTarget.open(gguf, toolchain, matrix)
    policy = ThresholdPolicy(keep="IQ2_XXS", base=base, output_guard=None, embedding_guard="IQ2_XXS")
    plan = threshold_plan(target, sensitivity_of(target), 0.4, policy)
    swap = plan.substitutions["blk.0.attn_q.weight"]
    assert (swap.requested, swap.used, swap.reason) == ("IQ2_XXS", "Q2_K", "the importance matrix has no entry for it")
    assert plan.types["token_embd.weight"] == "Q2_K"
    assert plan.types["blk.0.attn_v.weight"] == "IQ2_XXS"
    (out := tmp_path / "out").mkdir()
    written = quantize(gguf, plan, out, toolchain, provenance={}, imatrix=target.imatrix)
    assert written.types.items() >= plan.types.items()


def test_a_type_that_needs_an_importance_matrix_is_replaced_where_there_is_none(target, sensitivity):
    plan = threshold_plan(target, sensitivity, 0.4, ThresholdPolicy(keep="IQ2_S"))
    swap = plan.substitutions["blk.0.attn_q.weight"]
    assert (swap.requested, swap.used, swap.reason) == ("IQ2_S", "Q2_K", "IQ2_S needs an importance matrix")


def test_bytes_fall_as_the_threshold_rises(target, sensitivity):
    sizes = [threshold_plan(target, sensitivity, cut, ThresholdPolicy()).tensor_bytes for cut in (0, 0.31, 0.5, 1)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 4


def test_a_threshold_may_be_a_quantile_of_the_scores():
    scores = {"a": 0.1, "b": 0.2, "c": 0.9}
    assert resolve_threshold("q0.5", scores) == 0.2
    assert resolve_threshold("q0.75", scores) == pytest.approx(0.55)
    assert resolve_threshold(0.3, scores) == 0.3


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "q2", "q-1", "half", "nan", float("nan"), ""])
def test_a_threshold_outside_its_range_is_one_sentence(threshold):
    with pytest.raises(SamqError, match=r"threshold .* is not in 0\.\.1; give a score"):
        resolve_threshold(threshold, {"a": 0.5})


def test_every_threshold_has_a_name_of_its_own(target, sensitivity):
    names = [
        threshold_plan(target, sensitivity, cut, ThresholdPolicy()).name
        for cut in (0.5, 0.50001, 0.126, "0.35", "q0.75")
    ]
    assert names == ["threshold-0.5", "threshold-0.50001", "threshold-0.126", "threshold-0.35", "threshold-q0.75"]
    assert len({threshold_name(cut) for cut in (0.1 + 0.2, 0.3, 1 / 3, 0.3333)}) == 4
    assert threshold_name(1.0) == threshold_name("1") == "threshold-1"


def test_change_points_are_where_the_plan_changes(target, sensitivity):
    points = change_points(sensitivity, target.quantizable, "block")
    assert [kept for _, kept in points] == [1, 2, 3, 4]
    for (cut, kept), (low, high) in zip(points, [(0.5, 1.0), (0.31, 0.5), (0.05, 0.31), (0, 0.05)], strict=True):
        assert low <= cut < high
        assert threshold_plan(target, sensitivity, cut, ThresholdPolicy()).parameters["kept_groups"] == kept


def test_proposed_thresholds_give_plans_that_differ_and_grow(target, sensitivity):
    cuts = propose_thresholds(target, sensitivity, ThresholdPolicy(), 3)
    sizes = [threshold_plan(target, sensitivity, cut, ThresholdPolicy()).tensor_bytes for cut in cuts]
    assert cuts == sorted(cuts, reverse=True)
    assert sizes == sorted(set(sizes))
    # Of the four, keeping the output costs nothing: its guard has given it Q8_0 anyway.
    assert len(propose_thresholds(target, sensitivity, ThresholdPolicy(), 99)) == 3


def test_a_map_of_another_model_is_one_sentence(target, sensitivity):
    other = sensitivity.model_copy(
        update={"tensors": {"blk.0.attn_q.weight": sensitivity.tensors["blk.0.attn_q.weight"]}}
    )
    with pytest.raises(
        SamqError, match=r"of the GGUF's weights cannot be told from this model; give the sensitivities that"
    ):
        threshold_plan(target, other, 0.5, ThresholdPolicy())


def test_a_tensor_that_was_not_measured_is_safe(target, sensitivity):
    name = "blk.1.ffn_down.weight"
    others = {other: tensor for other, tensor in sensitivity.tensors.items() if other != name}
    plan = threshold_plan(target, sensitivity.model_copy(update={"tensors": others}), 0.4, ThresholdPolicy())
    assert plan.types == threshold_plan(target, sensitivity, 0.4, ThresholdPolicy()).types | {name: "Q8_0"}


def test_experts_that_saw_few_tokens_get_no_small_type_for_want_of_data(toolchain, tmp_path):
    target = OpenTarget.open(write_stacked_gguf(tmp_path / "full.gguf", GGMLQuantizationType.F16), toolchain)
    sensitivity, policy = sensitivity_of(target), ThresholdPolicy(base="Q2_K")
    gate, down = "blk.0.ffn_gate_exps.weight", "blk.0.ffn_down_exps.weight"
    known = threshold_plan(target, sensitivity, 1.0, policy)
    assert known.types[gate] == "Q2_K" and "expert_guard" not in known.parameters
    plan = threshold_plan(target, sensitivity, 1.0, policy, guarded=policy.guarded([gate]))
    assert plan.types == known.types | {gate: "Q3_K"} and plan.parameters["expert_guard"] == "Q3_K"
    stronger, unguarded = (ThresholdPolicy(base="Q2_K", expert_guard=guard) for guard in ("q6_K", None))
    both = threshold_plan(target, sensitivity, 1.0, stronger, guarded=stronger.guarded([gate, down]))
    assert both.types == known.types | {gate: "Q6_K", down: "Q8_0"}
    assert (both.substitutions[down].requested, both.substitutions[down].used) == ("Q6_K", "Q8_0")
    assert threshold_plan(target, sensitivity, 1.0, unguarded, guarded=unguarded.guarded([gate])) == known
    assert threshold_plan(target, sensitivity, 0.0, policy, guarded=policy.guarded([gate])).types[gate] == "Q8_0"
    assert threshold_types(target, policy) - threshold_types(target, unguarded) == {"Q3_K"}
    assert threshold_types(target, ThresholdPolicy(base="Q4_K")) == {"Q8_0", "Q4_K"}
    assert (
        of_threshold(target, policy, 0.0).bytes
        >= threshold_plan(target, sensitivity, 1.0, policy, guarded=policy.guarded([gate, down])).tensor_bytes
    )


@pytest.mark.parametrize("parameters", [{"keep": "Q9"}, {"base": "Q4_K_X"}, {"output_guard": "nothing"}])
def test_unknown_types_are_refused(parameters):
    with pytest.raises(SamqError, match="unknown"):
        ThresholdPolicy(**parameters)
