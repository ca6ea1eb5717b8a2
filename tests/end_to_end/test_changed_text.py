"""One changed sample of the calibration text makes all again that it shapes, through the real flow, on a tiny model."""

import json
import shutil

import pytest

from samq.data.datasets import DatasetSpec, load_texts
from tests.end_to_end.conftest import STAGES, artifacts, measure, rebuilt
from tests.end_to_end.test_sampling import write_text
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home")]


@pytest.fixture
def parameters(tmp_path):
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, max_position_embeddings=1024)
    return {
        "name": "changed",
        "model": {"source": str(write_llama_gguf(model, tmp_path / "tiny.gguf", tokenizer=tokenizer)), "device": "cpu"},
        "calibration": {
            "dataset": {"name": write_text(tmp_path / "train.jsonl", 7, seed=2)},
            "sequence_tokens": 64,
            "check_sequences": 2,
        },
        "heldout": {"name": write_text(tmp_path / "valid.jsonl", 3, seed=3)},
        "candidates": {"stock": ["Q4_0"], "budgets": ["6bpw"], "ladder": ["Q4_0", "Q8_0"]},
        "evaluation": {"context_tokens": 32, "chunks": 2, "json_prompts": 0, "speed_requests": 0},
        "benchmarks": {"tasks": ["samq_hellaswag"], "limit": 2, "candidates": "all"},
        "tracking": {"experiment": "changed"},
    }


def test_one_changed_calibration_sample_makes_all_again_but_what_no_calibration_text_shapes(parameters, home, tmp_path):
    def run(text):
        """Measure a sweep on a text; returns it, and the stages whose artifacts are new."""
        before = artifacts(home)
        calibration = {**parameters["calibration"], "dataset": {"name": str(text)}}
        measured = measure({**parameters, "calibration": calibration})
        assert measured.failures == ()
        return measured, rebuilt(before, artifacts(home))

    first, other = tmp_path / "train.jsonl", tmp_path / "other.jsonl"
    assert set(run(first)[1]) == set(STAGES)
    shutil.copy(first, other)
    assert run(other)[1] == []  # the same text by another name

    rows = [json.loads(line) for line in first.read_text().splitlines()]
    (number,) = [
        number for number, row in enumerate(rows) if row["text"] == load_texts(DatasetSpec(name=str(first)))[0]
    ]
    rows[number]["text"] = f"then {rows[number]['text']}"
    other.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    measured, stages = run(other)
    assert set(stages) == set(STAGES) - {"convert", "heldout", "baseline"}
    assert stages.count("evaluate") == len(measured.results) - 1  # full precision is what it was
