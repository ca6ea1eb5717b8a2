import pytest

from samq.allocation.ladder import DEFAULT_TYPES, Ladder, make_rung, rung_names, rungs_of, threshold_types, uniform_plan
from samq.allocation.target import OpenTarget, full_plan, stock_plan
from samq.allocation.threshold import ThresholdPolicy, threshold_plan
from samq.errors import SamqError
from samq.gguf.file import TensorInfo, read_tensors
from samq.gguf.formats import fallback
from samq.quantization.assembly import assemble
from samq.records import Plan, SensitivityMap, TensorSensitivity
from tests.conftest import write_tiny_gguf
from tests.samq.tiny_imatrix import write_tiny_imatrix


def rows_of(length):
    return [TensorInfo("blk.0.ffn_up.weight", (8, length), "F16", 16 * length)]


def plan_of(name, kind):
    return Plan(name="p", policy="stock", parameters={}, types={name: kind}, tensor_bytes=1, weights=1, gguf_sha256="")


def test_rungs_are_the_types_that_rows_allow():
    assert set(rung_names(rows_of(256), DEFAULT_TYPES, imatrix=True)) == set(DEFAULT_TYPES)


def test_legal_neighbours_join_where_rows_are_too_short():
    tensors = rows_of(96)
    written = [fallback(name, 96) for name in rung_names(tensors, DEFAULT_TYPES, imatrix=True)]
    assert sorted(written) == ["IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def test_types_that_need_an_importance_matrix_are_left_out_without_one():
    assert rung_names(rows_of(256), ["IQ2_S", "Q4_K"], imatrix=False) == ["Q4_K"]
    assert rung_names(rows_of(256), ["IQ2_S", "Q4_K"], imatrix=True) == ["IQ2_S", "Q4_K"]
    plan = plan_of("blk.0.ffn_up.weight", "IQ1_S")
    assert rung_names(rows_of(256), ["Q4_K"], imatrix=False, plans=[plan]) == ["Q4_K"]


def test_plans_join_the_types_that_no_other_rung_gives(tiny_gguf, toolchain):
    target = OpenTarget.open(tiny_gguf, toolchain)
    tensors, plan = target.quantizable.values(), stock_plan(target, "Q4_K_M")
    assert set(plan.types.values()) == {"Q4_K", "Q6_K"}
    assert rung_names(tensors, [], imatrix=False, plans=[plan]) == ["Q4_K", "Q6_K"]
    assert rung_names(tensors, ["Q8_0", "Q4_K"], imatrix=False, plans=[plan]) == ["Q4_K", "Q6_K", "Q8_0"]
    assert rung_names(tensors, ["Q8_0"], imatrix=True, plans=[full_plan(target)]) == ["Q8_0"]


def test_a_plan_takes_the_rungs_that_hold_its_types_and_no_other(tiny_gguf, toolchain):
    target = OpenTarget.open(tiny_gguf, toolchain)
    plan = stock_plan(target, "Q4_K_M")
    tensors_by_rung = rungs_of(plan, target.tensors, ["Q8_0", "Q6_K", "Q4_K"])
    assert tensors_by_rung and list(tensors_by_rung) == ["Q4_K", "Q6_K"]
    assert {name: rung for rung, names in tensors_by_rung.items() for name in names} == plan.types
    assert rungs_of(plan, target.tensors, ["Q8_0", "Q6_K"]) is None
    assert rungs_of(full_plan(target), target.tensors, []) == {}


def test_a_rung_of_a_type_that_rows_do_not_allow_serves_plans_of_its_fallback():
    tensor = rows_of(96)[0]
    plan = plan_of(tensor.name, "Q5_0")
    assert rungs_of(plan, {tensor.name: tensor}, ["Q4_K"]) == {"Q4_K": [tensor.name]}
    assert rung_names([tensor], ["Q4_K"], imatrix=False, plans=[plan]) == ["Q4_K", "Q4_1"]


def test_a_ladder_without_a_rung_is_an_error():
    with pytest.raises(SamqError, match="has no rung"):
        rung_names(rows_of(256), ["F16"], imatrix=True)


def test_a_rung_holds_every_tensor_at_its_type(tiny_gguf, toolchain, tmp_path):
    target = OpenTarget.open(tiny_gguf, toolchain)
    model = make_rung(target, "Q5_K", tmp_path, provenance={"model": "tiny"})
    assert model.plan_digest == uniform_plan(target, "q5_k").digest()
    tensors = read_tensors(tmp_path / model.file)
    assert {tensors[name].type for name in target.quantizable} == {"Q5_K"}
    ladder = Ladder(tiny_gguf, {"Q5_K": tmp_path / model.file})
    files = ladder.sources()["output.weight"]
    assert files == {"F16": tiny_gguf, "Q5_K": tmp_path / model.file}


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
    [(False, kind) for kind in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")]
    + [(True, kind) for kind in ("IQ1_M", "IQ2_XXS", "IQ3_XXS")],
    indirect=["uncovered"],
)
def test_a_rung_gives_tensors_without_an_importance_the_nearest_type_that_needs_none(uncovered, tmp_path, kind):
    plan = uniform_plan(uncovered, kind)
    model = make_rung(uncovered, kind, tmp_path, provenance={})
    nearest = "Q3_K" if kind == "IQ3_XXS" else "Q2_K"
    embedding = nearest if kind in ("IQ1_S", "IQ2_XXS", "IQ2_XS") else kind
    assert (model.types["token_embd.weight"], model.types["blk.0.attn_q.weight"]) == (embedding, nearest)
    others = plan.types.keys() - {"token_embd.weight", "blk.0.attn_q.weight"}
    assert {model.types[name] for name in others} == {kind}
    swap = plan.substitutions["blk.0.attn_q.weight"]
    assert (swap.requested, swap.used, swap.reason) == (kind, nearest, "the importance matrix has no entry for it")


def test_a_type_that_a_tensor_lacks_an_importance_for_says_so(uncovered, tmp_path):
    ladder = Ladder(
        uncovered.full.path, {"IQ2_XXS": tmp_path / make_rung(uncovered, "IQ2_XXS", tmp_path, provenance={}).file}
    )
    plan = uniform_plan(uncovered, "IQ2_XXS")
    plan = plan.model_copy(update={"types": plan.types | {"token_embd.weight": "IQ2_XXS"}})
    with pytest.raises(
        SamqError, match=r"token_embd.*wants IQ2_XXS; .* an importance matrix that has an entry for this"
    ):
        assemble(ladder, plan, tmp_path, provenance={})


@pytest.mark.parametrize("width", [256, 96])
@pytest.mark.parametrize("base", ["Q5_K_M", "Q4_K"])
def test_a_ladder_of_a_threshold_policy_holds_its_plans(toolchain, tmp_path, base, width):
    target = OpenTarget.open(write_tiny_gguf(tmp_path / "tiny.gguf", width=width, hidden=2 * width), toolchain)
    policy = ThresholdPolicy(base=base, keep="Q8_0", output_guard="Q6_K", embedding_guard="Q5_K", grouping="tensor")
    tensors = target.quantizable.values()
    rungs = rung_names(tensors, threshold_types(target, policy), imatrix=False, plans=[stock_plan(target, "Q8_0")])
    sensitivity = SensitivityMap(
        model_digest="", calibration_digest="", labels="text", seed=0, sequence_tokens=(1, 1), loss_nats=1.0,
        tied_embeddings=False,
        tensors={
            tensor.name: TensorSensitivity(
                shape=tensor.shape, gradient_norm=1, gradient_norm_stderr=0, score=index / len(target.quantizable),
                sequence_squares=(1, 1),
            )
            for index, tensor in enumerate(tensors)
        },
    )  # fmt: skip
    for cut in (0.0, 0.3, 1.0):
        assert rungs_of(threshold_plan(target, sensitivity, cut, policy), target.tensors, rungs) is not None
