"""Two promotions at once, on an SQLite file and on MLflow's server."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from samq.errors import SamqError
from samq.promotion.history import history
from samq.promotion.lock import CLAIM, STALE_S, alias_lock, others
from samq.promotion.rollback import rollback
from samq.relocation import relocate
from samq.services import mlflow_page
from samq.tracking.registry import connect, connect_registry
from tests.samq.promotion.moves import check_promotion, in_use
from tests.samq.versions import NAME


def test_a_claim_that_somebody_edited_holds_nobody_off(client):
    for number, value in enumerate(("", "hello", "nan", "inf", "-1e999", f"{time.time() + 10 * STALE_S}")):
        client.set_registered_model_tag(NAME, f"{CLAIM}{number}", value)
    assert others(client, NAME, "mine") == []
    client.set_registered_model_tag(NAME, f"{CLAIM}fresh", f"{time.time():.0f} 1")
    assert others(client, NAME, "mine") == [f"{CLAIM}fresh"]


PROMOTE = """
import os, sys, time
from samq.promotion.move import judge_version, promote
from samq.tracking.registry import connect, find_version
from tests.samq.versions import NAME, POLICY
os.environ["SAMQ_HOME"] = sys.argv[3]  # which the tests' own modules have set anew
client = connect(sys.argv[1])
judgement = judge_version(client, find_version(client, NAME, sys.argv[2]), POLICY)
print("judged", flush=True)
sys.stdin.readline()
promote(client, judgement)
"""


def race(uri):
    """Versions 1 and 2 are promoted at once, in a process each; returns what the one that lost was told."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, uri, version, os.environ["SAMQ_HOME"]],
            text=True,
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        )
        for version in ("1", "2")
    ]
    try:
        for child in children:
            assert child.stdout.readline() == "judged\n", child.communicate()[1]
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        told = [child.communicate(timeout=300)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    lost = dict(zip([child.returncode for child in children], told, strict=True))
    assert lost.keys() == {0, 1}, told
    (winner,) = [version for version, child in zip(("1", "2"), children, strict=True) if child.returncode == 0]
    client = connect(uri)
    assert in_use(client) == (winner, None)
    assert [event.version for event in history(client, NAME)] == [winner]
    return lost[1]


@pytest.mark.e2e
def test_of_two_promotions_at_once_in_sqlite_one_wins_and_the_other_is_told(client):
    told = race(client.tracking_uri)
    assert "samq.errors.SamqError: somebody else moved production of llama from nothing to version" in told


@pytest.fixture(scope="module")
def running_server(tmp_path_factory, empty_database):
    """(address, database) of MLflow's server."""
    home = tmp_path_factory.mktemp("server")
    path = Path(shutil.copy(empty_database, home / "mlflow.db"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMQ_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with mlflow_page(port) as address:
            yield address, path


@pytest.fixture
def server(running_server, database, monkeypatch):
    """MLflow's server over the three nights as they were, in the SAMQ folder that their files' places are relative to."""
    address, path = running_server
    monkeypatch.setenv("SAMQ_HOME", str(path.parent))
    with closing(sqlite3.connect(database)) as nights, closing(sqlite3.connect(path)) as served:
        nights.backup(served)
    shutil.copytree(database.parent, path.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("mlflow.db*"))
    relocate(path)
    return address


@pytest.mark.e2e
def test_promotions_and_rollbacks_on_a_server(server):
    check_promotion(connect(server))
    alone = connect_registry(server)
    assert rollback(alone, NAME, "through the registry alone").version == "2"
    assert in_use(alone) == in_use(connect(server)) == ("2", "3")


@pytest.mark.e2e
def test_of_two_promotions_at_once_on_a_server_one_wins_and_the_other_is_told(server):
    told = race(server)
    assert "samq.errors.SamqError: somebody else" in told


@pytest.mark.e2e
def test_a_claim_on_a_server_holds_others_off_until_it_is_stale(server):
    client = connect(server)
    first = f"{CLAIM}{'0' * 32}"
    client.set_registered_model_tag(NAME, first, f"{time.time():.0f} {os.getpid()}")
    with pytest.raises(SamqError, match=r"somebody else is moving the aliases of llama"), alias_lock(client, NAME):
        pass
    client.set_registered_model_tag(NAME, first, f"{time.time() - STALE_S - 1:.0f} {os.getpid()}")
    with alias_lock(client, NAME):
        pass
    assert list(client.get_registered_model(NAME).tags) == [first]
