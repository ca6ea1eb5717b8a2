"""What happens around a server at work: its disk is full, or MLflow goes away."""

import os
import signal
import socket
import tempfile
from contextlib import ExitStack

import pytest

from samq.services import mlflow_page
from samq.serving.source import FileSource, registry_source
from tests.samq.serving.conftest import asking, running, serves


def test_a_full_disk_stops_neither_answers_nor_the_next_engine(chat_gguf, engine, disk, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(disk.folder))
    with running(FileSource(chat_gguf), **engine) as server:
        disk.fill()
        pid = server.child.pid
        with asking(server) as statuses:
            server.wait(lambda: 200 in statuses)
            os.kill(pid, signal.SIGKILL)
            server.wait(lambda: server.child is not None and server.child.pid != pid)
        assert server.complete().status_code == 200
        assert set(statuses) <= {200, 503}
        assert statuses.count(503) <= server.server.settings.parallel, "only those that the killed engine had"


@pytest.mark.slow  # MLflow's server starts twice
def test_while_mlflow_is_away_clients_are_answered_and_ready_says_so(
    registered, mlflow_uri, other_gguf, tmp_path, monkeypatch
):
    monkeypatch.setenv("SAMQ_HOME", str(tmp_path / "mlflow"))  # where the database is
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # as `samq serve` has it
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with ExitStack() as stack:
        with mlflow_page(port) as address:
            server = stack.enter_context(running(registry_source("tiny-llama", "production", address)))
        with asking(server, clients=2) as statuses:
            server.wait(lambda: address in (server.ready()["problem"] or ""))
            assert server.client.get("/ready").status_code == 200 and server.complete().status_code == 200
            with mlflow_page(port):
                server.wait(lambda: server.ready()["problem"] is None)
                registered.set_registered_model_alias("tiny-llama", "production", "2")
                server.wait(serves(server, other_gguf))
        assert set(statuses) == {200}
