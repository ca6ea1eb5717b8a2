"""A laptop's MLflow database becomes one of a PostgreSQL server: all of it, or nothing."""

import sqlite3
from contextlib import closing

import pytest

from samq.errors import SamqError, UnreachableError
from samq.home import without_password
from samq.promotion.evidence import gather
from samq.tracking import migration
from samq.tracking.migration import migrate
from samq.tracking.registry import PRODUCTION_ALIAS, aliases, connect, resolve
from tests.samq.registered import NAME, uri_of
from tests.samq.tracking.mlflow_server import mlflow_server

pytestmark = pytest.mark.slow


def quietly(database, uri, artifacts=None):
    return migrate(database, uri, artifacts, lambda *_: None)


def contents(client):
    """What people see of an MLflow."""
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    versions = client.search_model_versions(f"name = '{NAME}'")
    histories = [client.get_metric_history(run.info.run_id, name) for run in runs for name in run.data.metrics]
    return (
        {run.info.run_id: run.to_dictionary() for run in runs},
        sorted((version.version, version.tags, version.run_id) for version in versions),
        [[(metric.step, metric.timestamp, metric.value) for metric in history] for history in histories],
        aliases(client, NAME),
    )


def test_runs_versions_and_aliases_are_those_of_before_and_new_ones_get_new_numbers(registered_home, postgres):
    here, there = connect(uri_of(registered_home)), None
    before, served = contents(here), resolve(here, NAME, PRODUCTION_ALIAS)
    steps = []
    rows = migrate(registered_home / "mlflow.db", postgres, None, lambda done, total: steps.append((done, total)))
    assert rows["runs"] == len(before[0]) and steps[-1] == (sum(rows.values()), sum(rows.values()))
    there = connect(postgres)
    assert contents(there) == before == contents(here)
    assert resolve(there, NAME, PRODUCTION_ALIAS).path == served.path  # places are those of the SAMQ folder
    taken = {experiment.experiment_id for experiment in there.search_experiments()}
    assert there.create_experiment("the next") not in taken
    new = there.create_run("0").info.run_id
    there.log_metric(new, "kld", 1.0)
    assert there.get_run(new).data.metrics == {"kld": 1.0}


def test_a_server_has_the_artifacts_too_and_takes_those_of_new_runs(registered_home, postgres, tmp_path):
    destination = tmp_path / "artifacts"
    quietly(registered_home / "mlflow.db", postgres, destination.as_uri())
    (registered_home / "mlartifacts").rename(tmp_path / "away")  # as on another machine
    options = ("--backend-store-uri", postgres, "--artifacts-destination", str(destination))
    with mlflow_server(tmp_path / "server", *options) as uri:
        client = connect(uri)
        serves = resolve(client, NAME, PRODUCTION_ALIAS)
        evidence = gather(client, serves)
        assert evidence.candidate.evaluation.metrics and evidence.plan.types
        new = client.create_run(client.get_run(serves.run_id).info.experiment_id).info.run_id
        client.log_text(new, "a report", "new.md")
        (written,) = destination.rglob("new.md")
        assert new in written.parts and written.read_text() == "a report"


def test_a_database_in_use_is_refused_and_left_alone(registered_home, postgres):
    quietly(registered_home / "mlflow.db", postgres)
    client = connect(postgres)
    client.set_registered_model_alias(NAME, "mine", "1")
    before = contents(client)
    with pytest.raises(SamqError, match=r"is in use: it has .*; name an empty database"):
        quietly(registered_home / "mlflow.db", postgres)
    assert contents(client) == before


def test_a_copy_that_breaks_off_leaves_nothing(registered_home, postgres, monkeypatch):
    def broken(target, table):
        if table.name == "runs":
            raise SamqError("broken off")

    with monkeypatch.context() as patch:
        patch.setattr(migration, "_go_on_counting", broken)
        with pytest.raises(SamqError, match="broken off"):
            quietly(registered_home / "mlflow.db", postgres)
    assert connect(postgres).search_registered_models() == []
    quietly(registered_home / "mlflow.db", postgres)


def test_rows_that_would_be_left_behind_are_an_error(registered_home, postgres):
    with closing(sqlite3.connect(registered_home / "mlflow.db")) as database:
        database.executescript("CREATE TABLE plugin (x INTEGER); INSERT INTO plugin VALUES (1)")
    with pytest.raises(SamqError, match="a table plugin, which would not be copied"):
        quietly(registered_home / "mlflow.db", postgres)


def test_what_cannot_be_is_said_without_the_password(registered_home, tmp_path):
    with pytest.raises(SamqError, match=r"there is no .*mlflow\.db to copy"):
        quietly(tmp_path / "mlflow.db", "postgresql://a@b/c")
    for uri, kind in (("mysql://me:hush@db/x", SamqError), ("postgresql://me:hush@127.0.0.1:1/x", UnreachableError)):
        with pytest.raises(kind) as refused:
            quietly(registered_home / "mlflow.db", uri)
        assert without_password(uri) in str(refused.value) and "hush" not in str(refused.value)
