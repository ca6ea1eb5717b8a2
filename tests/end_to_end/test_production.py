"""From a sweep to users and back: promote, serve, promote another while clients stream, roll back; over both registries."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import yaml
from mlflow import MlflowClient
from prefect.settings import PREFECT_API_URL

from flows.parameters import RequantizeParameters
from flows.requantize import requantize
from samq.services import mlflow_page
from samq.tracking.registry import PREVIOUS_ALIAS, PRODUCTION_ALIAS, aliases
from tests.command_line import forked_samq
from tests.end_to_end.conftest import SMALL

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home"), pytest.mark.timeout(1800)]

MODEL = "served"  # registered apart from the shared sweep's: what is promoted here is no other test's affair
CLIENTS = 8
POLICY = {
    "accuracy": None,
    "json_answers": None,
    "max_mean_kld_nats": 0.5,
    "max_predicted_vram_bytes": 10**9,
    "max_latency_p99_ms": 60_000,
    "audit": True,
    "provenance": ["plan", "policy", "version", "model", "model_sha256", "calibration", "llama_cpp"],
}
SERVING = {"context_tokens": 512, "poll_interval_s": 0.3, "queue_size": 64, "request_timeout_s": 300, "kv_type": "F16"}


@pytest.fixture(scope="module")
def requantized(home, prefect_home):
    """Run a sweep, the first time that it is asked for; gives its best candidate's version of the model, and sha256."""
    plain = {"stock": ["Q4_K_M"], "budgets": [], "proposed_thresholds": 0}
    changes = {"first": {}, "another": {"candidates": plain}}

    @cache
    def run(which):
        tracked = {**SMALL, "tracking": {"experiment": MODEL, "registered_model": MODEL}, **changes[which]}
        finished = requantize(RequantizeParameters.model_validate(tracked))
        return finished.tracked.model_version, finished.sweep.best.model.sha256

    return run


@pytest.fixture(params=["SQLite", "REST"])
def environment(request, home, monkeypatch):
    """For the commands: MLflow's database itself, or its server."""
    environment = {**os.environ, "SAMQ_HOME": str(home)}
    if request.param == "SQLite":
        yield environment
    else:
        with mlflow_page(free_port()) as address:
            yield {**environment, "MLFLOW_TRACKING_URI": address}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def samq(environment, *arguments, code=0):
    """Run a command to its end, over the Prefect server of all tests; returns what it printed."""
    more = {name: environment[name] for name in environment.keys() & {"MLFLOW_TRACKING_URI"}}
    more |= {"PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_HOME": f"{environment['SAMQ_HOME']}/prefect"}
    done = forked_samq(*arguments, home=environment["SAMQ_HOME"], **more)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def serve(environment, tmp_path):
    """Start `samq serve` on the alias `production`; gives its address."""
    started = []

    def start():
        config, log = tmp_path / "serving.yaml", tmp_path / "serve.log"
        config.write_text(yaml.safe_dump({**SERVING, "port": free_port()}))
        address = f"http://127.0.0.1:{yaml.safe_load(config.read_text())['port']}"
        command = [
            sys.executable,
            "-m",
            "samq.cli",
            "serve",
            f"models:/{MODEL}@production",
            "--config",
            str(config),
        ]
        with log.open("wb") as output:
            root = Path(__file__).parents[2]
            child = subprocess.Popen(command, env=environment, cwd=root, stdout=output, stderr=output)
        started.append(child)
        wait(lambda: is_ready(address), lambda: (child.poll(), log.read_text()))
        return address

    yield start
    for child in started:
        child.send_signal(signal.SIGTERM)
        assert child.wait(60) == 0


def is_ready(address):
    try:
        return httpx.get(f"{address}/ready").status_code == 200
    except httpx.TransportError:
        return False


def served_sha256(address):
    return httpx.get(f"{address}/ready").json()["model"]["sha256"]


def wait(condition, state, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, state()
        time.sleep(0.05)


class Streaming:
    """Clients that stream one answer after another; what failed, and how many answers came whole."""

    def __init__(self, address):
        self.failed, self.answers = [], 0
        self._address, self._ended, self._lock = address, threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self._stream, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()
        for thread in self._threads:
            thread.join()

    def _stream(self, number):
        client = openai.OpenAI(base_url=f"{self._address}/v1", api_key="none needed", max_retries=0, timeout=300)
        while not self._ended.is_set():
            try:
                stream = client.chat.completions.create(
                    model=MODEL,
                    messages=[{"role": "user", "content": f"Count from {number} to ten."}],
                    max_tokens=12,
                    stream=True,
                )
                reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
                assert reasons[-1] in ("length", "stop"), reasons
            except Exception as error:
                self.failed.append(repr(error))
                return
            with self._lock:
                self.answers += 1


def registry(environment):
    """What the commands look into."""
    uri = environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{environment['SAMQ_HOME']}/mlflow.db"
    return MlflowClient(tracking_uri=uri)


def test_promoted_versions_reach_the_running_server_without_a_failed_request_and_go_back(
    requantized, environment, serve, tmp_path
):
    first, first_sha256 = requantized("first")
    policy = tmp_path / "policy.yaml"
    policy.write_text(yaml.safe_dump(POLICY))
    client = registry(environment)
    for alias in (PRODUCTION_ALIAS, PREVIOUS_ALIAS):  # which the same test over the other registry has moved
        client.delete_registered_model_alias(MODEL, alias)
    said = samq(environment, "promote", MODEL, "--version", first, "--policy", policy)
    assert f"version {first} is in production" in said and "already" not in said
    address = serve()
    assert served_sha256(address) == first_sha256
    user = openai.OpenAI(base_url=f"{address}/v1", api_key="none needed", max_retries=0)
    question = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    before = user.chat.completions.create(**question, max_tokens=8, temperature=0).choices[0].message.content
    assert before
    second, second_sha256 = requantized("another")
    assert second_sha256 != first_sha256 == served_sha256(address)

    reason = f"going back over {urlsplit(client.tracking_uri).scheme}"
    with Streaming(address) as streaming:
        wait(lambda: streaming.answers > CLIENTS or streaming.failed, lambda: streaming.answers)
        samq(environment, "promote", MODEL, "--version", second, "--policy", policy)
        wait(lambda: served_sha256(address) == second_sha256, lambda: httpx.get(f"{address}/ready").text)
        swapped = streaming.answers
        wait(lambda: streaming.answers > swapped + CLIENTS or streaming.failed, lambda: streaming.answers)
        samq(environment, "rollback", MODEL, "--reason", reason)
        assert aliases(client, MODEL).items() >= {PRODUCTION_ALIAS: first, PREVIOUS_ALIAS: second}.items()
        wait(lambda: served_sha256(address) == first_sha256, lambda: httpx.get(f"{address}/ready").text)
        swapped = streaming.answers
        wait(lambda: streaming.answers > swapped + CLIENTS or streaming.failed, lambda: streaming.answers)
    assert streaming.failed == []
    assert user.chat.completions.create(**question, max_tokens=8, temperature=0).choices[0].message.content == before
    history = samq(environment, "status", MODEL)
    assert reason in history and "rolled back" in history


def test_a_version_that_fails_a_gate_stays_out_with_exit_code_3(requantized, environment, tmp_path):
    client = registry(environment)
    versions = [requantized(which)[0] for which in ("first", "another")]
    before = client.get_registered_model(MODEL).aliases
    other = next(version for version in versions if version != str(before.get("production")))
    strict = tmp_path / "strict.yaml"
    strict.write_text(yaml.safe_dump({**POLICY, "max_mean_kld_nats": 1e-9}))
    said = samq(environment, "promote", MODEL, "--version", other, "--policy", strict, code=3)
    assert "mean KLD" in said and "fail" in said
    assert client.get_registered_model(MODEL).aliases == before
    samq(environment, "promote", MODEL, "--version", other, "--policy", strict, "--force", code=2)
