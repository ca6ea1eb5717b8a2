import pytest

from samq.allocation.target import OpenTarget, stock_plan
from samq.allocation.threshold import ThresholdPolicy, threshold_plan
from samq.allocation.types import DEFAULT_TYPES
from samq.errors import SamqError
from samq.gguf.file import HashedFile
from samq.records import SensitivityMap, TensorSensitivity
from samq.requirements.candidates import of_budget, of_mixture, of_threshold, thresholds_kept
from samq.requirements.outline import read_outline, write_even_importance


@pytest.fixture
def target(tiny_gguf, tmp_path, toolchain):
    outline = read_outline(str(tiny_gguf), None, "F16", tmp_path)
    return OpenTarget.open(
        HashedFile(tiny_gguf, "full"), toolchain, HashedFile(write_even_importance(outline, tmp_path), "matrix")
    )


def test_a_mixture_has_its_plans_bytes_and_types(target):
    plan, candidate = stock_plan(target, "Q4_K_M"), of_mixture(target, "Q4_K_M")
    assert candidate.bytes == plan.tensor_bytes
    assert sum(candidate.weights.values()) == sum(tensor.weights for tensor in target.quantizable.values())
    assert candidate.weights.keys() == set(plan.types.values())


@pytest.mark.parametrize(
    "budget, kind", [("2.7bpw", "Q2_K"), ("4.4bpw", "Q4_K"), ("size-of:Q5_K_M", "Q5_K"), ("1GB", "Q8_0")]
)
def test_a_budget_takes_its_bytes_at_most_and_the_largest_types_at_most(target, budget, kind):
    candidate = of_budget(target, budget, DEFAULT_TYPES)
    weights = sum(tensor.weights for tensor in target.tensors.values())
    expected = {
        "2.7bpw": int(2.7 * weights / 8),
        "4.4bpw": int(4.4 * weights / 8),
        "size-of:Q5_K_M": stock_plan(target, "Q5_K_M").tensor_bytes,
        "1GB": stock_plan(target, "Q8_0").tensor_bytes,
    }
    assert candidate.bytes == expected[budget]
    assert max(candidate.weights, key=candidate.weights.__getitem__) == kind


def test_a_budget_of_vram_takes_no_more_than_that_and_the_embedding(target):
    embedding = target.tensors["token_embd.weight"].bytes
    assert of_budget(target, "vram:300KB@8192", DEFAULT_TYPES).bytes == 300_000 + embedding
    with pytest.raises(SamqError, match="no room for the model's metadata"):
        of_budget(target, "1KB", DEFAULT_TYPES)


@pytest.mark.parametrize("threshold", [0.0, 0.35, "q0.5"])
def test_a_threshold_takes_no_more_than_is_said(target, threshold):
    scores = dict.fromkeys(target.quantizable, 0.3) | {"blk.1.ffn_down.weight": 0.9}
    sensitivity = SensitivityMap(
        model_digest="m", calibration_digest="c", labels="model", seed=0, sequence_tokens=(4, 4), loss_nats=1.0,
        tied_embeddings=False,
        tensors={
            name: TensorSensitivity(
                shape=target.tensors[name].shape, gradient_norm=score, gradient_norm_stderr=0.1, score=score, fisher=1.0,
                sequence_squares=(1.0, 1.0),
            )
            for name, score in scores.items()
        },
    )  # fmt: skip
    policy = ThresholdPolicy()
    (kept,) = thresholds_kept([threshold], 0)
    plan = threshold_plan(target, sensitivity, threshold, policy)
    assert plan.tensor_bytes <= of_threshold(target, policy, kept).bytes


def test_the_share_of_blocks_that_thresholds_keep():
    assert thresholds_kept([0.85, "q0.75"], 3) == [1.0, 0.25, 0.25, 0.5, 0.75]
    assert thresholds_kept([], 0) == []
