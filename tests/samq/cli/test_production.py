"""`samq promote`, `rollback` and `status` on a small registry; tests/flows and tests/end_to_end have the rest."""

import sqlite3
from contextlib import closing

import pytest

from samq.promotion.history import new_event, record
from samq.tracking import patience
from samq.tracking.registry import connect
from tests.command_line import refused


def test_rollback_and_status_show_that_they_query_mlflow(samq, shown, mlflow_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    for command, what in {
        ("status",): "query MLflow",
        ("rollback", "nothing", "--reason", "x"): "roll back nothing",
    }.items():
        bars = shown(*command)
        assert "load Python packages" in bars and what in bars
    assert refused(samq("status", "nothing"), "has no model nothing; register one first")


@pytest.fixture
def llama(mlflow_uri, monkeypatch):
    """Versions 1 to 3 of which SAMQ promoted 1, then 2; then somebody moved production to 3 in MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    client = connect(mlflow_uri)
    client.create_registered_model("llama")
    for number in "123":
        tags = {"gguf_uri": f"file:///{number}.gguf", "sha256": number * 64, "size_bytes": "1500000"}
        client.create_model_version("llama", "file:///anywhere", tags={**tags, "plan_digest": number * 64})
    record(client, "llama", new_event("promoted", "1", None))
    record(client, "llama", new_event("promoted", "2", "1"))
    client.set_registered_model_alias("llama", "previous", "1")
    client.set_registered_model_alias("llama", "production", "3")
    return client


def row(table, *words):
    """The only line of a table that has these words."""
    (line,) = [line for line in table.splitlines() if all(word in line.split() for word in words)]
    return " ".join(line.split())


def test_a_move_by_hand_is_shown_and_rolled_back(samq, llama):
    shown = samq("status", "llama").stderr
    moved = row(shown, "moved", "hand")
    assert moved.startswith("after 20") and "unknown 3 moved by hand in MLflow, or by an" in moved
    assert "the alias previous names version 1, but `samq rollback llama` goes to version 2, which served last" in shown
    done = samq("rollback", "llama", "--reason", "nobody asked for it")
    assert done.stderr.splitlines()[-1] == "llama version 2 is in production again in place of version 3"
    assert llama.get_registered_model("llama").aliases == {"production": 2, "previous": 3}
    shown = samq("status", "llama").stderr
    assert row(shown, "moved", "hand").startswith("before 20")
    assert "`samq rollback llama`" not in shown


def test_status_shows_versions_whose_tags_somebody_edited(samq, llama):
    for number, size in {"1": "large", "2": "", "3": "²"}.items():
        llama.set_model_version_tag("llama", number, "size_bytes", size)
    done = samq("status", "llama")
    assert done.returncode == 0
    assert row(done.stderr, "production", "333333333333") == "3 production – – 333333333333"


@pytest.mark.parametrize("version", ["", " ", "latest", "-1"])
def test_an_empty_version_is_refused_before_anything_starts(samq, llama, version):
    done = samq("promote", "llama", f"--version={version}")
    assert refused(done, f"{version!r} is not a version of llama; give a number such as 7, see `samq status llama`")
    assert llama.get_registered_model("llama").aliases["production"] == 3


@pytest.mark.parametrize(
    "command", [("status",), ("rollback", "llama", "--reason=x"), ("prune", "--older-than-days=1")]
)
def test_a_locked_database_is_one_sentence(samq, llama, command, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    with closing(sqlite3.connect(llama.tracking_uri.removeprefix("sqlite:///"))) as other:
        other.execute("BEGIN EXCLUSIVE")
        done = samq(*command)
    assert refused(done, "stays locked by another process; wait until that ends, then try again")
    assert "Traceback" not in done.stderr
