"""`samq doctor`, `samq prune` and `samq ui`; tests/end_to_end has `samq up`."""

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest


def test_doctor_and_prune_show_progress(shown, mlflow_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    assert "check this machine" in shown("doctor")
    bars = shown("prune", "--older-than-days", 1)
    assert "load Python packages" in bars and "delete old files" in bars


@pytest.mark.e2e
def test_services_end_with_one_that_ends_by_itself(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {"SAMQ_HOME": str(tmp_path / "home"), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, "-m", "samq.cli", "ui", "--mlflow-port", port]
    with subprocess.Popen(command, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True) as ui:
        printed = ""
        while "Press Ctrl-C to stop both" not in printed:
            line = ui.stderr.readline()
            assert line, printed
            printed += line
        (mlflow,) = psutil.Process(ui.pid).children()
        mlflow.kill()
        assert ui.wait(60) == 1
        assert f"samq: MLflow was killed by signal 9; see {tmp_path / 'home' / 'mlflow.log'}" in ui.stderr.read()
    while in_use(int(port)):  # the killed need a moment to go
        time.sleep(0.1)


def in_use(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
