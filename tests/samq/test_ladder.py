import pytest

from samq.allocation import Target
from samq.errors import SamqError
from samq.formats import fallback
from samq.gguf_file import TensorInfo, read_tensors
from samq.ladder import DEFAULT_TYPES, Ladder, make_rung, rung_names, uniform_plan


def rows_of(length):
    return [TensorInfo("blk.0.ffn_up.weight", (8, length), "F16", 16 * length)]


def test_rungs_are_the_types_that_rows_allow():
    assert set(rung_names(rows_of(256), DEFAULT_TYPES, imatrix=True)) == set(DEFAULT_TYPES)


def test_legal_neighbours_join_where_rows_are_too_short():
    tensors = rows_of(96)
    given = [fallback(name, 96) for name in rung_names(tensors, DEFAULT_TYPES, imatrix=True)]
    assert sorted(given) == ["IQ4_NL", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def test_types_that_need_an_importance_matrix_are_left_out_without_one():
    assert rung_names(rows_of(256), ["IQ2_S", "Q4_K"], imatrix=False) == ["Q4_K"]
    assert rung_names(rows_of(256), ["IQ2_S", "Q4_K"], imatrix=True) == ["IQ2_S", "Q4_K"]


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
