import json
from pathlib import Path

import pytest

from samq.errors import SamqError
from samq.records import ModelSource, Plan, TextSet, digest_of

PLAN = Plan(
    name="p",
    policy="stock",
    parameters={"mixture": "Q8_0"},
    types={"a.weight": "Q8_0"},
    tensor_bytes=34,
    weights=32,
    gguf_sha256="0" * 64,
)


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    path = PLAN.save(tmp_path / "plan.json")
    assert Plan.load(path) == PLAN
    assert json.loads(path.read_text())["schema"] == "samq.plan/1"
    assert PLAN.bits_per_weight == 8.5


def test_a_digest_is_of_the_content_and_not_of_the_place(tmp_path):
    here = ModelSource(name="m", weights_digest="w", tokenizer_digest="t", folder=tmp_path)
    there = here.model_copy(update={"folder": tmp_path / "other"})
    assert here.digest() == there.digest()
    assert here.digest() != here.model_copy(update={"weights_digest": "v"}).digest()
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})


def test_a_name_is_identity_where_it_gets_into_the_bytes_only():
    assert TextSet(dataset="a.txt", texts=("x",)).digest() == TextSet(dataset="b.txt", texts=("x",)).digest()
    assert TextSet(dataset="a.txt", texts=("x",)).digest() != TextSet(dataset="a.txt", texts=("y",)).digest()
    folder = ModelSource(name="m", weights_digest="w", tokenizer_digest="t", folder="/models/m")
    gguf = folder.model_copy(update={"folder": None, "gguf": Path("/models/m.gguf")})
    assert gguf.digest() == gguf.model_copy(update={"name": "n"}).digest()
    assert gguf.digest() != gguf.model_copy(update={"weights_digest": "v"}).digest()
    assert folder.digest() != folder.model_copy(update={"name": "n"}).digest(), "the converter writes it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no record, not samq.plan/1"),
        ('{"schema": "samq.plan/0"}', "holds samq.plan/0, not samq.plan/1"),
        ('{"schema": "samq.plan/1", "name": "x"}', "is damaged at policy: Field required"),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, text, message):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(SamqError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_folder_that_is_not_there_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(SamqError, match="cannot write"):
        PLAN.save(tmp_path / "nothing" / "plan.json")
    assert list(tmp_path.iterdir()) == []
