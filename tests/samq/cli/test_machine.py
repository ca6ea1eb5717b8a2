"""`samq doctor`, `samq prune` and `samq ui`; tests/end_to_end has `samq up`."""

import os
import shutil
import socket
import subprocess
import sys
import time

import psutil
import pytest

from samq.cli.requirements import duration
from tests.command_line import refused
from tests.samq.registered import age


def test_doctor_and_prune_show_progress(shown, mlflow_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    assert "check this machine" in shown("doctor")
    bars = shown("prune", "--older-than-days", 1, "--delete")
    assert "load Python packages" in bars and "delete old files" in bars


@pytest.fixture
def home(registered_home):
    return registered_home


def ggufs(home):
    return {path.read_bytes() for path in home.glob("store/*/*/model.gguf")}


def test_prune_in_a_moved_folder_keeps_what_is_in_production(samq, home, tmp_path):
    moved = shutil.move(home, tmp_path / "moved")
    age(moved)
    done = samq("prune", "--delete", "--older-than-days", 1, SAMQ_HOME=str(moved))
    assert done.returncode == 0, done.stderr
    assert ggufs(moved) == {b"GGUF Q4_K_M"}


def test_prune_only_shows_what_would_go_until_told_to_delete(samq, home):
    age(home)
    done = samq("prune", "--older-than-days", 1)
    assert (
        done.returncode == 0 and "would free 0.0 MB of 0.0 MB in" in done.stderr and "--delete does it" in done.stderr
    )
    assert "candidate" in done.stderr and len(ggufs(home)) == 2
    assert refused(samq("prune"), "no rule says what may go; give one of older_than_days, keep_sweeps and max_bytes")
    assert refused(samq("prune", "--max-bytes", "much"), "invalid max_bytes 'much'")


def test_prune_heeds_the_folders_own_registry_whichever_mlflow_is_used(samq, home, mlflow_uri):
    age(home)
    assert samq("prune", "--delete", "--older-than-days", 1, MLFLOW_TRACKING_URI=mlflow_uri).returncode == 0
    assert ggufs(home) == {b"GGUF Q4_K_M"}


def test_prune_deletes_nothing_if_a_file_in_production_is_missing(samq, home):
    (lost,) = [path for path in home.glob("store/*/*/model.gguf") if path.read_bytes() == b"GGUF Q4_K_M"]
    lost.unlink()
    age(home)
    done = samq("prune", "--delete", "--older-than-days", 1)
    assert refused(done, f"version 1 of llama (candidate, production) needs {lost}, which is missing or altered")
    assert ggufs(home) == {b"GGUF F16"}
    assert samq("prune", "--delete", "--older-than-days", 1, "--even-if-missing").returncode == 0
    assert ggufs(home) == set()


def test_relocate_shows_the_changes_of_a_moved_folder_and_makes_them_once(samq, home, tmp_path):
    moved = shutil.move(home, tmp_path / "moved")
    for arguments, changes, said in (
        (["--dry-run"], 7, "nothing was changed"),
        ([], 7, "all paths are those of this folder"),
        ([], 0, "all paths are those of this folder"),
    ):
        done = samq("relocate", *arguments, SAMQ_HOME=str(moved))
        assert done.returncode == 0, done.stderr
        assert f"{changes} paths in {moved / 'mlflow.db'}\n0 manifests in {moved / 'store'}\n{said}\n" in done.stderr
        line = f"experiments.artifact_location: {home / 'mlartifacts'} -> {moved / 'mlartifacts'}\n"
        assert (line in done.stderr) == bool(changes)


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
    assert "Times are estimates from short tests" in done.stderr


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
