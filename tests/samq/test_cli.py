"""The command line as a person meets it: exit code 2 and one sentence for every kind of bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from samq.records import Plan
from tests.conftest import write_tiny_gguf


def samq(*arguments, home, **environment):
    """Run the command line in a process of its own, with a SAMQ folder of its own."""
    import os

    env = {**os.environ, "SAMQ_HOME": str(home), "COLUMNS": "400", **environment}
    command = [sys.executable, "-m", "samq.cli", *map(str, arguments)]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])


def refused(done, message):
    """It said so in one sentence and exited with code 2."""
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    return True


@pytest.fixture
def gguf(tmp_path):
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def sensitivity(tmp_path, gguf):
    from samq.gguf_file import read_tensors
    from samq.records import SensitivityMap, TensorSensitivity

    matrices = [tensor for tensor in read_tensors(gguf).values() if len(tensor.shape) == 2]
    tensors = {
        tensor.name: TensorSensitivity(
            shape=tensor.shape,
            gradient_norm=1,
            gradient_norm_stderr=0,
            score=(index + 1) / len(matrices),
            sequence_squares=(1.0, 1.0),
        )
        for index, tensor in enumerate(matrices)
    }
    made = SensitivityMap(
        model_digest="m",
        calibration_digest="c",
        labels="text",
        seed=0,
        sequence_tokens=(1, 1),
        loss_nats=1,
        tied_embeddings=False,
        tensors=tensors,
    )
    return made.save(tmp_path / "map.json")


def test_plan_quantize_and_inspect_follow_each_other(tmp_path, gguf, sensitivity):
    planned = samq(
        "plan", "--map", sensitivity, "--gguf", gguf, "--threshold", "0.85", "--out", tmp_path / "p.json", home=tmp_path
    )
    assert planned.returncode == 0, planned.stderr
    assert "threshold 0.85 keeps" in planned.stderr
    assert "thresholds change the plan" in planned.stderr
    out = tmp_path / "out.gguf"
    built = samq("quantize", "--gguf", gguf, "--plan", tmp_path / "p.json", "--out", out, home=tmp_path)
    assert built.returncode == 0, built.stderr
    shown = samq("inspect", out, home=tmp_path)
    assert shown.returncode == 0
    assert f"samq.plan = {Plan.load(tmp_path / 'p.json').digest()}" in shown.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "map.json", "p.json", "out.gguf"}


def test_a_threshold_outside_its_range_and_an_unknown_type_are_refused(tmp_path, gguf, sensitivity):
    plan = ("plan", "--map", sensitivity, "--gguf", gguf)
    assert refused(samq(*plan, "--threshold", "1.5", home=tmp_path), "threshold 1.5 is not in 0..1")
    assert refused(samq(*plan, "--keep", "Q9_9", home=tmp_path), "unknown ggml type 'Q9_9'")
    assert refused(samq(*plan, "--grouping", "layer", home=tmp_path), "neither block nor tensor")


def test_a_truncated_or_missing_gguf_is_refused(tmp_path, gguf):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:20000])
    assert refused(samq("inspect", cut, home=tmp_path), "cut.gguf is not a whole GGUF file")
    assert refused(samq("inspect", tmp_path / "nothing.gguf", home=tmp_path), "there is no GGUF file at")


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, gguf, sensitivity):
    arguments = ("quantize", "--gguf", gguf, "--plan", sensitivity, "--out")
    assert refused(samq(*arguments, tmp_path / "no" / "out.gguf", home=tmp_path), "the folder of")
    assert refused(samq(*arguments, "/proc/out.gguf", home=tmp_path), "/proc")


def test_a_missing_llama_quantize_is_named(tmp_path, gguf, sensitivity):
    done = samq("plan", "--map", sensitivity, "--gguf", gguf, home=tmp_path, SAMQ_LLAMA_CPP=str(tmp_path))
    assert refused(done, "llama-quantize is not in")


def test_a_plan_for_another_file_is_refused(tmp_path, gguf, sensitivity):
    plan = tmp_path / "p.json"
    assert samq("plan", "--map", sensitivity, "--gguf", gguf, "--out", plan, home=tmp_path).returncode == 0
    other = write_tiny_gguf(tmp_path / "other.gguf", seed=1)
    done = samq("quantize", "--gguf", other, "--plan", plan, "--out", tmp_path / "o.gguf", home=tmp_path)
    assert refused(done, "is a plan for another file")


def test_a_model_folder_without_config_and_a_dataset_without_the_field_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    done = samq("calibrate", tmp_path / "model", "--out", tmp_path / "m.json", home=tmp_path / "h")
    assert refused(done, "config.json")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": "text"}) + "\n" for _ in range(40)))
    gguf = write_tiny_gguf(tmp_path / "tiny.gguf")
    arguments = ("calibrate", gguf, "--dataset", rows, "--field", "text", "--out", tmp_path / "m.json")
    assert refused(samq(*arguments, home=tmp_path / "h"), "text")
    assert not (tmp_path / "m.json").exists()


def test_a_wrong_parameter_file_is_refused(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("name: x\n")
    assert refused(samq("requantize", "--config", config, home=tmp_path), "model: Field required")
