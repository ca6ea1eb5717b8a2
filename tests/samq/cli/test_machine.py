"""`samq doctor`, `samq prune` and `samq ui`; tests/end_to_end has `samq up`."""

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from samq.cli.requirements import duration


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


CONFIG = """
model: {{source: {model}, device: cpu}}
calibration: {{dataset: {{name: humaneval, samples: 12}}, sequence_tokens: 32}}
heldout: {{name: humaneval, start: 12}}
candidates: {{stock: [Q4_K_M], ladder: [Q4_K, Q6_K]}}
"""


def test_doctor_says_what_a_run_needs_and_that_it_is_there(samq, tiny_gguf, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.format(model=tiny_gguf))
    done = samq("doctor", "--config", config)
    assert done.returncode == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stderr.splitlines() if "│" in line]
    stages = {row[0]: row[1:] for row in rows if len(row) == 5 and row[0] not in ("ok", "TOO LITTLE")}
    assert stages["compensate"][0] == "1 GGUFs together"
    assert stages["calibrate"][0] == "gradients of 4 sequences at most"
    peaks = {row[1]: row for row in rows if row[0] == "ok"}
    assert peaks.keys() == {"RAM", "disk"}
    assert peaks["RAM"][2].endswith(" GiB") and peaks["disk"][3].endswith(" GB")
    assert "in all\n" in done.stderr
    assert "Times are estimates by multiplication" in done.stderr


def test_doctor_says_what_to_do_about_a_disk_that_is_too_small(samq, tiny_gguf, tmp_path, disk):
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.format(model=tiny_gguf))
    done = samq("doctor", "--config", config, SAMQ_HOME=str(disk.folder))
    assert done.returncode == 1
    assert "TOO LITTLE │ disk" in done.stderr
    (advice,) = [line for line in done.stderr.splitlines() if line.startswith("samq: ")]
    assert f"free some of {disk.folder}, set SAMQ_HOME to a folder on a larger disk" in advice
    assert list(disk.folder.iterdir()) == []


def test_doctor_refuses_a_wrong_file_and_a_missing_model_in_one_sentence(samq, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(CONFIG.format(model=tmp_path / "nothing.gguf"))
    done = samq("doctor", "--config", config)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"there is no GGUF file at {tmp_path / 'nothing.gguf'}" in done.stderr
    assert samq("doctor", "--config", tmp_path / "no.yaml").returncode == 2


@pytest.mark.parametrize(
    "seconds, words",
    [(None, "not estimated"), (0.2, "under 1 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (9000, "2.5 h")],
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words
