import pytest

from samq.allocation.target import OpenTarget, full_plan, stock_plan
from samq.allocation.threshold import ThresholdPolicy, threshold_plan
from samq.allocation.types import DEFAULT_TYPES, legal_types, threshold_types, types_to_price, uniform_plan
from samq.errors import SamqError
from samq.llamacpp.quantize import quantize
from samq.records import SensitivityMap, TensorSensitivity
from tests.conftest import LOW_BIT_TABLES, write_tiny_gguf
from tests.samq.tiny_imatrix import write_tiny_imatrix


@pytest.fixture(scope="module")
def target(tiny_gguf, toolchain):
    return OpenTarget.open(tiny_gguf, toolchain)


@pytest.fixture(scope="module")
def weighted(tiny_gguf, toolchain, tmp_path_factory):
    matrix = write_tiny_imatrix(tmp_path_factory.mktemp("matrix") / "imatrix.gguf", tiny_gguf)
    return OpenTarget.open(tiny_gguf, toolchain, matrix)


@pytest.fixture(scope="module")
def short_rows(toolchain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("short")
    return OpenTarget.open(write_tiny_gguf(folder / "tiny.gguf", width=96, hidden=192), toolchain)


def test_all_types_are_priced_that_rows_allow(target):
    assert types_to_price(target, DEFAULT_TYPES) == sorted(DEFAULT_TYPES, key=DEFAULT_TYPES.index)
    legal = legal_types(target, ["Q8_0", "Q4_K", "F16"])
    assert legal == {name: ["Q4_K", "Q8_0"] for name in target.quantizable}


def test_legal_neighbours_join_where_rows_are_too_short(short_rows):
    legal = legal_types(short_rows, types_to_price(short_rows, DEFAULT_TYPES))
    assert {tuple(sorted(kinds)) for kinds in legal.values()} == {("IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")}


def test_types_that_need_an_importance_matrix_are_left_out_without_one(target, weighted):
    assert types_to_price(target, ["IQ2_S", "Q4_K"]) == ["Q4_K"]
    assert types_to_price(weighted, ["IQ2_S", "Q4_K"]) == ["IQ2_S", "Q4_K"]
    plan = uniform_plan(weighted, "IQ1_S")
    assert types_to_price(target, ["Q4_K"], [plan]) == ["Q4_K"]


def test_the_types_of_plans_are_priced_as_well(target):
    plan = stock_plan(target, "Q4_K_M")
    assert set(plan.types.values()) == {"Q4_K", "Q6_K"}
    assert types_to_price(target, [], [plan]) == ["Q4_K", "Q6_K"]
    assert types_to_price(target, ["Q8_0", "Q4_K"], [plan]) == ["Q4_K", "Q6_K", "Q8_0"]
    assert types_to_price(target, ["Q8_0"], [full_plan(target)]) == ["Q8_0"]


def test_without_a_type_to_price_there_is_an_error(target):
    with pytest.raises(SamqError, match="none of F16 can be priced; name quantized types"):
        types_to_price(target, ["F16"])
    with pytest.raises(SamqError, match="none of no types can be priced"):
        types_to_price(target, [])


@pytest.fixture(scope="module", params=[False, True], ids=["output of its own", "tied"])
def uncovered(request, toolchain, tmp_path_factory):
    """A model whose importance matrix has no entry for the embedding, nor for one other tensor."""
    folder = tmp_path_factory.mktemp("uncovered")
    gguf = write_tiny_gguf(folder / "tiny.gguf", hidden=256, blocks=1, tied=request.param)
    matrix = write_tiny_imatrix(folder / "imatrix.gguf", gguf, without=["token_embd.weight", "blk.0.attn_q.weight"])
    return OpenTarget.open(gguf, toolchain, matrix)


# llama-quantize takes seconds to prepare a type of 1 or 2 bits, so the tied model has one of each kind.
@pytest.mark.parametrize(
    ("uncovered", "kind"),
    [
        pytest.param(tied, kind, marks=[pytest.mark.slow] if kind in LOW_BIT_TABLES else [])
        for tied, kinds in {
            False: ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"),
            True: ("IQ1_M", "IQ2_XXS", "IQ3_XXS"),
        }.items()
        for kind in kinds
    ],
    indirect=["uncovered"],
)
def test_tensors_without_an_importance_have_the_nearest_type_that_needs_none(uncovered, tmp_path, kind):
    plan = uniform_plan(uncovered, kind)
    model = quantize(uncovered.full.path, plan, tmp_path, uncovered.toolchain, provenance={}, imatrix=uncovered.imatrix)
    assert {name: model.types[name] for name in plan.types} == plan.types
    assert {name: [kind] for name, kind in plan.types.items()} == legal_types(uncovered, [kind])
    nearest = "Q3_K" if kind == "IQ3_XXS" else "Q2_K"
    embedding = nearest if kind in ("IQ1_S", "IQ2_XXS", "IQ2_XS") else kind
    assert (model.types["token_embd.weight"], model.types["blk.0.attn_q.weight"]) == (embedding, nearest)
    others = plan.types.keys() - {"token_embd.weight", "blk.0.attn_q.weight"}
    assert {model.types[name] for name in others} == {kind}
    swap = plan.substitutions["blk.0.attn_q.weight"]
    assert (swap.requested, swap.used, swap.reason) == (kind, nearest, "the importance matrix has no entry for it")


@pytest.mark.parametrize("width", [256, 96])
@pytest.mark.parametrize("base", ["Q5_K_M", "Q4_K"])
def test_the_types_of_a_threshold_policy_are_those_of_its_plans(toolchain, tmp_path, base, width):
    target = OpenTarget.open(write_tiny_gguf(tmp_path / "tiny.gguf", width=width, hidden=2 * width), toolchain)
    policy = ThresholdPolicy(base=base, keep="Q8_0", output_guard="Q6_K", embedding_guard="Q5_K", grouping="tensor")
    names = types_to_price(target, threshold_types(target, policy), [stock_plan(target, "Q8_0")])
    legal = legal_types(target, names)
    sensitivity = SensitivityMap(
        model_digest="", calibration_digest="", labels="text", seed=0, sequence_tokens=(1, 1), loss_nats=1.0,
        tied_embeddings=False,
        tensors={
            tensor.name: TensorSensitivity(
                shape=tensor.shape, gradient_norm=1, gradient_norm_stderr=0, score=index / len(target.quantizable),
                sequence_squares=(1, 1),
            )
            for index, tensor in enumerate(target.quantizable.values())
        },
    )  # fmt: skip
    for cut in (0.0, 0.3, 1.0):
        for name, kind in threshold_plan(target, sensitivity, cut, policy).types.items():
            assert kind == target.tensors[name].type or kind in legal[name]
