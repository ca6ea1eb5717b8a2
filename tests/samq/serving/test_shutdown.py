"""`samq serve` as a process of its own, from start to SIGTERM."""

import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.command_line import refused, samq
from tests.samq.serving.conftest import events

ROOT = Path(__file__).parents[3]
BODY = {"prompt": "hello", "temperature": 0, "stream": True}


@contextmanager
def process(model, tmp_path, *, until=lambda client: ready(client), environment=None, **settings):
    """Yields the child and a client of it, when it is ready, or what is waited for holds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = tmp_path / "serving.yaml"
    config.write_text(
        "".join(f"{name}: {value}\n" for name, value in {"context_tokens": 8192, "threads": 1, **settings}.items())
    )
    command = [sys.executable, "-m", "samq.cli", "serve", str(model), "--config", str(config), "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, "SAMQ_HOME": str(tmp_path / "home"), **(environment or {})},
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            deadline = time.monotonic() + 120
            while not until(client):
                assert child.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.05)
            yield child, client
    finally:
        child.kill()
        child.wait()


@contextmanager
def mlflow(answer):
    """A server in MLflow's place, which lets `answer` deal with each request; yields its URL and the paths asked for."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            answer(self)

        do_POST = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", paths
    finally:
        server.shutdown()
        server.server_close()


def problem(client):
    try:
        return client.get("/ready").json()["problem"]
    except httpx.TransportError:
        return None


def ready(client):
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.e2e
def test_after_sigterm_a_stream_is_finished_and_new_requests_are_refused(chat_gguf, tmp_path):
    with process(chat_gguf, tmp_path, drain_timeout_s=300) as (child, client):
        with client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 2000}) as response:
            parts = response.iter_text()
            text = next(parts)
            child.send_signal(signal.SIGTERM)
            while (ready_now := httpx.get(f"{client.base_url}/ready")).status_code == 200:
                time.sleep(0.01)
            assert ready_now.json()["status"] == "shutting down"
            refusal = httpx.post(f"{client.base_url}/v1/completions", json={"prompt": "hello"})
            assert refusal.status_code == 503
            assert refusal.json()["error"]["code"] == "shutting_down"
            assert httpx.get(f"{client.base_url}/health").status_code == 200
            text += "".join(parts)
        assert '"finish_reason":"length"' in text and text.endswith("data: [DONE]\n\n")
        assert child.wait(30) == 0, (tmp_path / "log").read_text()


@pytest.mark.e2e
def test_what_takes_longer_than_the_drain_is_told_so(chat_gguf, tmp_path):
    with process(chat_gguf, tmp_path, drain_timeout_s=0.1) as (child, client):
        with client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 8000}) as response:
            parts = response.iter_text()
            text = next(parts)
            child.send_signal(signal.SIGTERM)
            text += "".join(parts)
        assert '"code": "shutting_down"' in text and text.endswith("data: [DONE]\n\n")
        assert child.wait(30) == 0, (tmp_path / "log").read_text()


@pytest.mark.e2e
def test_an_idle_server_ends_at_once(chat_gguf, tmp_path):
    with process(chat_gguf, tmp_path) as (child, client):
        assert len(events(client.post("/v1/completions", json=BODY))) > 1
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0
        assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.e2e
def test_a_second_signal_ends_the_server_at_once(chat_gguf, tmp_path):
    with (
        process(chat_gguf, tmp_path, drain_timeout_s=300, request_timeout_s=600) as (child, client),
        client.stream("POST", "/v1/completions", json={**BODY, "max_tokens": 8000}) as response,
    ):
        parts = response.iter_text()
        next(parts)
        child.send_signal(signal.SIGTERM)
        while httpx.get(f"{client.base_url}/ready").status_code == 200:
            time.sleep(0.01)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == -signal.SIGTERM
        with pytest.raises(httpx.TransportError):
            "".join(parts)


@pytest.mark.e2e
def test_an_mlflow_that_does_not_answer_does_not_hold_up_the_end(tmp_path):
    hang = threading.Event()
    with mlflow(lambda handler: hang.wait()) as (url, paths):
        environment = {"MLFLOW_TRACKING_URI": url, "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
        asking = process("models:/tiny@production", tmp_path, until=lambda client: paths, environment=environment)
        with asking as (child, _):
            child.send_signal(signal.SIGTERM)
            assert child.wait(30) == 0, (tmp_path / "log").read_text()
        hang.set()


@pytest.mark.e2e
def test_an_mlflow_that_is_down_is_asked_twice_a_lookup_unless_the_user_has_it_otherwise(tmp_path):
    for own, tries in (({}, 2), ({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}, 1)):
        with mlflow(lambda handler: handler.send_error(503)) as (url, paths):
            environment = {"MLFLOW_TRACKING_URI": url, **own}
            target = "models:/tiny@production"
            with process(target, tmp_path, until=problem, environment=environment, poll_interval_s=3600) as (_, client):
                assert f"cannot use MLflow at {url}" in problem(client)
                assert "samq_model_lookup_failures_total 1.0" in client.get("/metrics").text
                assert len(paths) == tries, paths


def test_what_cannot_be_served_is_one_sentence(tmp_path):
    refused(samq("serve", "nowhere.gguf", home=tmp_path), "the file nowhere.gguf does not exist")
    done = samq("serve", "nowhere.gguf", "--host", "0.0.0.0", home=tmp_path)
    refused(done, "other machines can reach host 0.0.0.0: set SAMQ_API_KEY")
