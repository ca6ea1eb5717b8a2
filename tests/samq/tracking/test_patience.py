"""MLflow's SQLite file locked by another process, as a backup or a database browser does: a wait, then one sentence."""

import os
import sqlite3
import threading
from contextlib import closing

import pytest
import sqlalchemy

from samq.errors import SamqError, UnreachableError
from samq.promotion.history import history, new_event, record
from samq.promotion.lock import alias_lock
from samq.promotion.rollback import rollback
from samq.tracking import patience
from samq.tracking.registry import aliases, connect, connect_registry, find_version, model_names

STAYS_LOCKED = "MLflow's database at sqlite:///.* stays locked by another process; wait until that ends, then try again"


@pytest.fixture
def lock(mlflow_uri):
    """A connection of somebody else that holds the database until it is closed."""
    with closing(sqlite3.connect(mlflow_uri.removeprefix("sqlite:///"), check_same_thread=False)) as other:
        yield other


@pytest.fixture
def short_waits(monkeypatch):
    """Waits as SAMQ and MLflow have them, in milliseconds instead of seconds."""
    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    monkeypatch.setattr(patience, "_PAUSE_S", 0.05)

    def shorten(connection, cursor, statement, parameters, context, executemany):
        return statement.replace("busy_timeout = 20000", "busy_timeout = 20"), parameters

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", shorten, retval=True)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", shorten)


@pytest.fixture(params=[connect, connect_registry])
def client(request, mlflow_uri):
    client = request.param(mlflow_uri)
    client.create_registered_model("llama")
    return client


@pytest.mark.parametrize("opens", [connect, connect_registry])
def test_a_database_that_stays_locked_is_not_opened(opens, mlflow_uri, lock, short_waits):
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UnreachableError, match=STAYS_LOCKED):
        opens(mlflow_uri)


def test_a_database_is_opened_when_the_lock_is_released(mlflow_uri, lock):
    lock.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(0.3, lock.rollback)
    release.start()
    assert model_names(connect(mlflow_uri)) == []
    release.join()


@pytest.mark.parametrize(
    "call",
    [
        lambda client: aliases(client, "llama"),
        lambda client: history(client, "llama"),
        lambda client: find_version(client, "llama", "1"),
        lambda client: record(client, "llama", new_event("promoted", "1", None)),
        lambda client: rollback(client, "llama", "a test"),
    ],
)
def test_a_call_on_a_locked_database_is_one_sentence_without_a_traceback(client, lock, short_waits, call, capfd):
    lock.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UnreachableError, match=STAYS_LOCKED):
        call(client)
    assert capfd.readouterr().err == ""
    lock.rollback()
    assert history(client, "llama") == []


def test_a_call_that_meets_a_lock_is_tried_again(client, lock, short_waits, monkeypatch):
    lock.execute("BEGIN EXCLUSIVE")
    pauses = []

    def release(seconds):
        pauses.append(seconds)
        lock.rollback()

    monkeypatch.setattr(patience.time, "sleep", release)
    event = record(client, "llama", new_event("promoted", "1", None))
    assert len(pauses) == 1
    assert history(client, "llama") == [event]


def test_somebody_who_keeps_the_lock_on_aliases_is_named(client, monkeypatch):
    monkeypatch.setattr("samq.promotion.lock._PATIENCE_S", 0.05)
    with (
        alias_lock(client, "llama"),
        pytest.raises(SamqError, match=r"another process has held .*\.promotion\.lock for"),
        alias_lock(client, "llama"),
    ):
        pass


def test_a_database_that_is_none_is_one_sentence_at_once(tmp_path):
    (tmp_path / "text.db").write_bytes(b"hello " * 1000)
    (tmp_path / "folder.db").mkdir()
    os.mkfifo(tmp_path / "pipe.db")
    for name, reason in {
        "text.db": "file is not a database; check the file",
        "folder.db": r".*folder\.db is not a file; name another",
        "pipe.db": r".*pipe\.db is not a file; name another",
    }.items():
        with pytest.raises(UnreachableError, match=f"cannot use MLflow at sqlite:///.*{name}: {reason}"):
            connect(f"sqlite:///{tmp_path / name}")
