"""What `make up` starts: MLflow, Prefect's server, a worker, and the deployments; a run of one of them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from tests.end_to_end.conftest import SMALL

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
EXPERIMENT = "from-the-worker"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment(tmp_path, home):
    """The SAMQ folder of the sweep: its store saves the run the work. Prefect's data is the test's own."""
    return {**os.environ, "SAMQ_HOME": str(home), "PREFECT_HOME": str(tmp_path / "prefect")}


@pytest.fixture
def up(tmp_path, environment):
    """(MLflow's address, Prefect's address) of a running `samq up`, which has ended all it started afterwards."""
    log = tmp_path / "up.log"
    command = [
        sys.executable,
        "-m",
        "samq.cli",
        "up",
        "--mlflow-port",
        str(free_port()),
        "--prefect-port",
        str(free_port()),
    ]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while "Ctrl-C ends all" not in log.read_text():
            assert child.poll() is None, log.read_text()
            time.sleep(0.2)
        yield re.findall(r"^(?:MLflow|Prefect) +(\S+)$", log.read_text(), re.M)
    finally:
        child.send_signal(signal.SIGTERM)
        code = child.wait(120)
    assert code == 0, log.read_text()
    assert started_by(tmp_path) == []


def started_by(folder):
    """Command lines of the processes that have the folder in their environment and still run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.name != str(os.getpid()) and str(folder).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue  # it has ended, or is another user's
    return found


def test_a_deployment_run_by_the_worker_completes_and_mlflow_has_its_runs(sweep, home, up, environment, tmp_path):
    mlflow, prefect = up
    parameters = {**SMALL, "tracking": {"experiment": EXPERIMENT, "registered_model": EXPERIMENT}}
    command = [sys.executable, "-m", "prefect", "deployment", "run", "requantize/on-demand", "--watch"]
    command += ["--param", f"parameters={json.dumps(parameters)}"]
    done = subprocess.run(
        command,
        env={**environment, "PREFECT_API_URL": f"{prefect}/api", "COLUMNS": "400"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "Flow run finished successfully" in done.stdout, done.stdout + done.stderr

    client = MlflowClient(tracking_uri=mlflow, registry_uri=mlflow)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} == {"small", *(result.name for result in sweep.results)}
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if run.info.run_name == "small"]
    artifact = f"{parent.info.artifact_uri}/report.md"
    report = download_artifacts(artifact_uri=artifact, dst_path=str(tmp_path), tracking_uri=mlflow)
    assert Path(report).read_text().startswith("# SmolLM2-135M-Instruct")
    assert list((home / "mlartifacts").rglob("report.md")), "served from the SAMQ folder"
    version = client.get_model_version_by_alias(EXPERIMENT, "candidate")
    assert version.tags["sha256"] == sweep.best.model.sha256
