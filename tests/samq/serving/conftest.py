import json
import os
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn

from samq.gguf.file import file_sha256
from samq.serving.app import Server
from samq.serving.server import uvicorn_config
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource
from samq.tracking.registry import connect
from tests.samq.serving.tiny_chat import write_chat_gguf, write_silent_gguf

FAST = {"port": 0, "slots": 4, "context_tokens": 2048, "threads": 1, "poll_interval_s": 0.05, "warmup_tokens": 8}
ENGINES = {"llama-server": {}, "llama-cpp-python": {"engine": "llama-cpp-python", "slots": 1}}


@dataclass(frozen=True)
class Running:
    """A server at work, a client of it, and its parts."""

    url: str
    client: httpx.Client
    server: Server
    socket: socket.socket  # that listens

    def complete(self, **body):
        body = {"prompt": "hello", "max_tokens": 8, "temperature": 0, **body}
        return self.client.post("/v1/completions", json=body)

    def chat(self, **body):
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0, **body}
        return self.client.post("/v1/chat/completions", json=body)

    def ready(self):
        return self.client.get("/ready").json()

    @property
    def child(self):
        """The engine's process."""
        return self.server.watcher.serving.child

    def scraped(self, name):
        """A sample of the engine's own at /metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def metric(self, name, /, **labels):
        """A sample's value now; 0 if there is none."""
        value = self.server.metrics.registry.get_sample_value(name, labels)
        return 0 if value is None else value

    def wait(self, condition, seconds=60):
        """Until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.ready()
            time.sleep(0.01)


@contextmanager
def running(source, *, wait=True, **settings):
    server = Server(source, ServingSettings(**{**FAST, **settings}))
    listener = uvicorn.Server(uvicorn_config(server))
    thread = threading.Thread(target=listener.run)
    thread.start()
    while not listener.started:
        assert thread.is_alive()
        time.sleep(0.01)
    listening = listener.servers[0].sockets[0]
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            at_work = Running(url, client, server, listening)
            if wait:
                at_work.wait(lambda: client.get("/ready").status_code == 200)
            yield at_work
    finally:
        listener.should_exit = True
        thread.join()


@contextmanager
def asking(server, clients=8):
    """Clients that ask one completion after another; yields the statuses of their answers."""
    ended, statuses = threading.Event(), []

    def client():
        with httpx.Client(base_url=server.url, timeout=60) as own:
            while not ended.is_set():
                statuses.append(own.post("/v1/completions", json={"prompt": "a", "max_tokens": 20}).status_code)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield statuses
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def put(source, target):
    """Replace a file as a whole, as `samq quantize` does."""
    copy = shutil.copy(source, target.with_suffix(".new"))
    os.replace(copy, target)


def events(response):
    """The bodies of a stream, which must end with [DONE]."""
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def text_of(stream):
    return "".join(choice["text"] for event in stream for choice in event["choices"])


def refused(response, status, *words):
    """It says what was wrong, as OpenAI's clients expect it."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error
    return error


class Occupied:
    """Clients that keep every slot busy for as long as it is wanted."""

    def __init__(self, server, slots=1):
        body = {"prompt": "hello", "max_tokens": 2000, "temperature": 0, "stream": True}
        self._streams = [
            httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) for _ in range(slots)
        ]

    def __enter__(self):
        self._bytes = [stream.__enter__().iter_bytes() for stream in self._streams]  # dropped, it would close
        for pieces in self._bytes:
            next(pieces)

    def __exit__(self, *error):
        for stream in self._streams:
            stream.__exit__(*error)


def serves(server, gguf):
    return lambda: server.ready().get("model", {}).get("sha256") == file_sha256(gguf)


@pytest.fixture(scope="session")
def chat_gguf(tmp_path_factory):
    return write_chat_gguf(tmp_path_factory.mktemp("chat") / "tiny.gguf")


@pytest.fixture(scope="session")
def other_gguf(tmp_path_factory):
    return write_chat_gguf(tmp_path_factory.mktemp("other") / "tiny.gguf", seed=1)


@pytest.fixture(scope="module", params=["llama-server", pytest.param("llama-cpp-python", marks=pytest.mark.slow)])
def engine(request):
    """The settings of an engine."""
    if request.param == "llama-cpp-python":
        pytest.importorskip("starlette_context")
        pytest.importorskip("sse_starlette")
    return ENGINES[request.param]


@pytest.fixture(scope="module")
def either(chat_gguf, engine):
    """A server of each engine, for all tests of a module that leave it as it is."""
    with running(FileSource(chat_gguf), **engine) as server:
        yield server


@pytest.fixture(scope="module")
def served(chat_gguf):
    """A server of llama-server, likewise."""
    with running(FileSource(chat_gguf)) as server:
        yield server


@pytest.fixture
def registered(mlflow_uri, chat_gguf, other_gguf, tmp_path):
    """A registered model with two versions, the first in production."""
    client = connect(mlflow_uri)
    client.create_registered_model("tiny-llama")
    for number, gguf in enumerate((chat_gguf, other_gguf, write_silent_gguf(tmp_path / "bad.gguf")), 1):
        tags = {
            "gguf_uri": gguf.as_uri(),
            "sha256": file_sha256(gguf),
            "size_bytes": str(gguf.stat().st_size),
            "plan_digest": f"plan-{number}",
        }
        client.create_model_version("tiny-llama", source=gguf.as_uri(), tags=tags)
    client.set_registered_model_alias("tiny-llama", "production", "1")
    return client
