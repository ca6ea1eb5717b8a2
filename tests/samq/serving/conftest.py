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
from samq.serving.app import Server, create_app
from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource
from tests.samq.serving.tiny_chat import write_chat_gguf

FAST = {"port": 0, "context_tokens": 8192, "poll_interval_s": 0.05, "warmup_tokens": 8}


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

    def metric(self, name, /, **labels):
        """A sample's value now; 0 if there is none."""
        found = self.server.metrics.registry.get_sample_value(name, labels)
        return 0 if found is None else found

    def wait(self, condition, seconds=60):
        """Until the condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.ready()
            time.sleep(0.01)


@contextmanager
def running(source, *, wait=True, **settings):
    server = Server(source, ServingSettings(**{**FAST, **settings}))
    config = uvicorn.Config(create_app(server), port=0, log_config=None)
    listener = uvicorn.Server(config)
    thread = threading.Thread(target=listener.run)
    thread.start()
    while not listener.started:
        time.sleep(0.01)
    listening = listener.servers[0].sockets[0]
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            made = Running(url, client, server, listening)
            if wait:
                made.wait(lambda: client.get("/ready").status_code == 200)
            yield made
    finally:
        listener.should_exit = True
        thread.join()


def put(source, target):
    """Replace a file as a whole, as `samq quantize` does."""
    copy = shutil.copy(source, target.with_suffix(".new"))
    os.replace(copy, target)


def serves(server, gguf):
    return lambda: server.ready().get("model", {}).get("sha256") == file_sha256(gguf)


@pytest.fixture(scope="session")
def chat_gguf(tmp_path_factory):
    return write_chat_gguf(tmp_path_factory.mktemp("chat") / "tiny.gguf")


@pytest.fixture(scope="session")
def other_gguf(tmp_path_factory):
    return write_chat_gguf(tmp_path_factory.mktemp("other") / "tiny.gguf", seed=1)


@pytest.fixture(scope="module")
def served(chat_gguf):
    """One server for all tests of a module that leave it as it is."""
    with running(FileSource(chat_gguf)) as made:
        yield made
