"""What `make up` starts: MLflow, Prefect's server, a worker, and the deployments; runs of one of them; and its end."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from zoneinfo import ZoneInfo

import httpx
import psutil
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from tests.end_to_end.conftest import SMALL

pytestmark = pytest.mark.e2e

EXPERIMENT = "from-the-worker"
ROOT = Path(__file__).parents[2]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="module")
def environment(folder, home):
    """The SAMQ folder of the sweep: its store saves the run the work. Prefect's data is the tests' own."""
    return {**os.environ, "SAMQ_HOME": str(home), "PREFECT_HOME": str(folder / "prefect")}


@contextmanager
def services(folder, environment):
    """(process, MLflow's address, Prefect's address) of a `samq up` at work."""
    log = folder / "up.log"
    command = [sys.executable, "-m", "samq.cli", "up", "--mlflow-port", free_port(), "--prefect-port", free_port()]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while "Press Ctrl-C to stop" not in log.read_text():
            assert child.poll() is None, log.read_text()
            time.sleep(0.2)
        yield child, *re.findall(r"^(?:MLflow|Prefect) +(\S+)$", log.read_text(), re.M)
    finally:
        child.send_signal(signal.SIGTERM)
        code = child.wait(120)
    assert code in (0, -signal.SIGKILL), log.read_text()


@pytest.fixture(scope="module")
def up(folder, home, environment):
    """(MLflow's address, Prefect's address) of a running `samq up`, which afterwards ends all that it started."""
    with services(folder, environment) as (child, *addresses):
        yield addresses
    assert child.returncode == 0
    assert started_by(folder) == []
    assert [name for name in ("mlflow", "prefect") if "Traceback" in (home / f"{name}.log").read_text()] == []
    states = states_of_runs(folder)
    assert states and set(states) <= {"COMPLETED", "CRASHED", "FAILED", "SCHEDULED"}, "none is said to be running"


def states_of_runs(folder):
    with closing(sqlite3.connect(folder / "prefect" / "prefect.db")) as database:
        return [state for (state,) in database.execute("select state_type from flow_run")]


def started_by(folder):
    """Command lines of the processes that have the folder in their environment and still run."""
    command_lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "environ").read_bytes():
                command_lines.append((process / "cmdline").read_text())
        except OSError:
            continue  # it has ended, or is another user's
    return command_lines


def test_prefects_page_asks_the_server_that_it_came_from(up):
    _, prefect = up
    with urllib.request.urlopen(f"{prefect}/ui-settings") as answer:
        assert json.load(answer)["api_url"] == f"{prefect}/api"


def test_the_nightly_runs_are_scheduled(up):
    """Prefect's server creates the runs of the coming nights within a minute."""
    filters = {
        "deployments": {"name": {"any_": ["nightly"]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
    }
    deadline = time.monotonic() + 120
    while not (runs := httpx.post(f"{up[1]}/api/flow_runs/filter", json=filters).json()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    due = min(datetime.fromisoformat(run["next_scheduled_start_time"]) for run in runs)
    assert due - datetime.now(UTC) < timedelta(days=1, hours=1)
    there = due.astimezone(ZoneInfo("Europe/Berlin"))
    assert there.minute == 30 and there.hour in (2, 3)  # 3 where the clock goes from 2 to 3 that night


@pytest.fixture
def deployment_run(up, environment):
    return partial(run_on_demand, up[1], environment)


def run_on_demand(prefect, environment, parameters, *options):
    """Start a run of `on-demand` with these parameters, as a person does."""
    command = [sys.executable, "-m", "prefect", "deployment", "run", "requantize/on-demand", *options]
    command += ["--param", f"parameters={json.dumps(parameters)}"]
    where = {**environment, "PREFECT_API_URL": f"{prefect}/api", "COLUMNS": "400"}
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_by_the_worker_completes_and_mlflow_has_its_runs(sweep, home, up, deployment_run, tmp_path):
    tracking = {"experiment": EXPERIMENT, "registered_model": EXPERIMENT}
    said = deployment_run({**SMALL, "tracking": tracking}, "--watch")
    assert "Flow run finished successfully" in said

    client = MlflowClient(tracking_uri=up[0], registry_uri=up[0])
    experiment = client.get_experiment_by_name(EXPERIMENT)
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if MLFLOW_PARENT_RUN_ID not in run.data.tags]
    dated = rf"{re.escape(sweep.made_from.source.name)} \d{{4}}-\d\d-\d\d \d\d:\d\d"
    assert re.fullmatch(dated, parent.info.run_name)
    assert {run.info.run_name for run in runs} == {parent.info.run_name, *(result.name for result in sweep.results)}
    report = f"{parent.info.artifact_uri}/report.md"
    report = download_artifacts(artifact_uri=report, dst_path=str(tmp_path), tracking_uri=up[0])
    assert Path(report).read_text().startswith("# SmolLM2-135M-Instruct")
    assert list((home / "mlartifacts").rglob("report.md")), "served from the SAMQ folder"
    version = client.get_model_version_by_alias(EXPERIMENT, "candidate")
    assert version.tags["sha256"] == sweep.best.model.sha256


def test_a_run_that_fails_notifies_a_webhook_once(up, environment):
    """Twice set up, it is one automation; the promotion is refused, since nothing has been registered under that name."""
    heard = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    where = {**environment, "PREFECT_API_URL": f"{up[1]}/api"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as hook:
        Thread(target=hook.serve_forever, daemon=True).start()
        secret = f"http://127.0.0.1:{hook.server_port}/a-secret"
        for _ in range(2):
            command = [sys.executable, ROOT / "deployments" / "notify.py", "webhook"]
            done = subprocess.run(command, env=where | {"SAMQ_NOTIFY": secret}, capture_output=True, text=True)
            assert done.returncode == 0 and "a-secret" not in done.stdout + done.stderr, done.stderr
        command = [sys.executable, "-m", "prefect", "deployment", "run", "promote/promote", "--watch"]
        subprocess.run(command, env=where, capture_output=True)
        deadline = time.monotonic() + 60
        while not heard:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
        hook.shutdown()
    (told,) = heard
    assert (told["flow"], told["deployment"], told["state"]) == ("promote", "promote", "Failed")
    assert "has no model smollm2-135m-instruct" in told["message"] and told["url"].startswith(up[1])


def test_a_run_that_is_at_work_ends_with_the_services(sweep, home, deployment_run):
    deployment_run(longer(65))
    wait_until_at_work(home)


def longer(tokens):
    """Parameters with another length of a sequence, so that the store does not save the run the work."""
    return {**SMALL, "calibration": {**SMALL["calibration"], "sequence_tokens": tokens}}


def wait_until_at_work(home):
    while not any((home / "store" / ".tmp").glob("going-on-layer_inputs-*/measured-*")):
        time.sleep(0.05)


def test_the_next_start_reports_the_runs_that_a_killed_one_left(tmp_path):
    environment = {**os.environ, "SAMQ_HOME": str(tmp_path / "home"), "PREFECT_HOME": str(tmp_path / "prefect")}
    with services(tmp_path, environment) as (child, _, prefect):
        run_on_demand(prefect, environment, longer(66))
        wait_until_at_work(tmp_path / "home")
        for process in [child, *psutil.Process(child.pid).children(recursive=True)]:
            process.kill()
    assert "RUNNING" in states_of_runs(tmp_path)
    with services(tmp_path, environment):
        assert "RUNNING" not in states_of_runs(tmp_path)
    assert "CRASHED" in states_of_runs(tmp_path)
