import pytest

from samq.allocation import Target, full_plan, stock_plan
from samq.errors import SamqError
from samq.formats import fallback
from samq.gguf_file import TensorInfo, read_tensors
from samq.ladder import DEFAULT_TYPES, Ladder, make_rung, rung_names, rungs_of, uniform_plan
from samq.records import Plan


def rows_of(length):
    return [TensorInfo("blk.0.ffn_up.weight", (8, length), "F16", 16 * length)]


def plan_of(name, kind):
    return Plan(name="p", policy="stock", parameters={}, types={name: kind}, tensor_bytes=1, weights=1, gguf_sha256="")


def test_rungs_are_the_types_that_rows_allow():
    assert set(rung_names(rows_of(256), DEFAULT_TYPES, imatrix=True)) == set(DEFAULT_TYPES)


def test_legal_neighbours_join_where_rows_are_too_short():
    tensors = rows_of(96)
    given = [fallback(name, 96) for name in rung_names(tensors, DEFAULT_TYPES, imatrix=True)]
    assert sorted(given) == ["IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def test_types_that_need_an_importance_matrix_are_left_out_without_one():
    assert rung_names(rows_of(256), ["IQ2_S", "Q4_K"], imatrix=False) == ["Q4_K"]
    assert rung_names(rows_of(256), ["IQ2_S", "Q4_K"], imatrix=True) == ["IQ2_S", "Q4_K"]
    plan = plan_of("blk.0.ffn_up.weight", "IQ1_S")
    assert rung_names(rows_of(256), ["Q4_K"], imatrix=False, plans=[plan]) == ["Q4_K"]


def test_plans_join_the_types_that_no_other_rung_gives(tiny_gguf, toolchain):
    target = Target.open(tiny_gguf, toolchain)
    tensors, plan = target.quantizable.values(), stock_plan(target, "Q4_K_M")
    assert set(plan.types.values()) == {"Q4_K", "Q6_K"}
    assert rung_names(tensors, [], imatrix=False, plans=[plan]) == ["Q4_K", "Q6_K"]
    assert rung_names(tensors, ["Q8_0", "Q4_K"], imatrix=False, plans=[plan]) == ["Q4_K", "Q6_K", "Q8_0"]
    assert rung_names(tensors, ["Q8_0"], imatrix=True, plans=[full_plan(target)]) == ["Q8_0"]


def test_a_plan_takes_the_rungs_that_hold_its_types_and_no_other(tiny_gguf, toolchain):
    target = Target.open(tiny_gguf, toolchain)
    plan = stock_plan(target, "Q4_K_M")
    assert rungs_of(plan, target.tensors, ["Q8_0", "Q6_K", "Q4_K"]) == ["Q4_K", "Q6_K"]
    assert rungs_of(plan, target.tensors, ["Q8_0", "Q6_K"]) is None
    assert rungs_of(full_plan(target), target.tensors, []) == []


def test_a_rung_of_a_type_that_rows_do_not_allow_serves_plans_of_its_fallback():
    tensor = rows_of(96)[0]
    plan = plan_of(tensor.name, "Q5_0")
    assert rungs_of(plan, {tensor.name: tensor}, ["Q4_K"]) == ["Q4_K"]
    assert rung_names([tensor], ["Q4_K"], imatrix=False, plans=[plan]) == ["Q4_K", "Q4_1"]


def test_a_ladder_without_a_rung_is_an_error():
    with pytest.raises(SamqError, match="has no rung"):
        rung_names(rows_of(256), ["F16"], imatrix=True)


def test_a_rung_holds_every_tensor_at_its_type(tiny_gguf, toolchain, tmp_path):
    target = Target.open(tiny_gguf, toolchain)
    model = make_rung(target, "Q5_K", tmp_path, provenance={"model": "tiny"})
    assert model.plan_digest == uniform_plan(target, "q5_k").digest()
    tensors = read_tensors(tmp_path / model.file)
    assert {tensors[name].type for name in target.quantizable} == {"Q5_K"}
    ladder = Ladder(tiny_gguf, {"Q5_K": tmp_path / model.file})
    held = ladder.sources()["output.weight"]
    assert held == {"F16": tiny_gguf, "Q5_K": tmp_path / model.file}
