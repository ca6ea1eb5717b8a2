"""A SAMQ folder that was moved or copied: it reads and writes its own files, whether the old folder is still there or not."""

import json
import shutil
import socket
import sqlite3
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from samq.errors import UnreachableError
from samq.home import place_of, place_uri
from samq.promotion.evidence import gather
from samq.relocation import ARTIFACTS_TAG, relative_manifests, relocate
from samq.services import mlflow_page
from samq.store import MANIFEST, Store
from samq.tracking.registry import connect, find_version, resolve
from samq.tracking.sweep_runs import track_sweep
from samq.tracking.tracked import TrackingSettings
from tests.samq.registered import BEST, NAME, uri_of


@pytest.fixture
def sweep(home_and_sweep):
    return home_and_sweep[1]


@pytest.fixture
def old(home_and_sweep, tmp_path):
    """A folder whose URI has to be quoted."""
    home = shutil.copytree(home_and_sweep[0], tmp_path / "old ü place" / ".samq")
    connect(uri_of(home))
    return home


@pytest.fixture(params=["moved", "copied"])
def new(request, old, tmp_path):
    """Where the folder is now; what it was copied from is unusable."""
    home = tmp_path / "new"
    if request.param == "moved":
        shutil.move(old, home)
        return home
    shutil.copytree(old, home)
    for path in [*old.glob("store/*/*/model.gguf"), *old.glob("mlartifacts/*/artifacts/**/*.json")]:
        path.write_text("not yours")
    return home


def values(home):
    """Every text in the folder's database."""
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        rows = [row for table in tables for row in database.execute(f"SELECT * FROM {table}")]
    return [value for row in rows for value in row if isinstance(value, str)]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_before(home):
    """Make the folder one of a SAMQ that stored absolute paths."""
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:
        database.execute("DELETE FROM experiment_tags WHERE key = ?", (ARTIFACTS_TAG,))
        for table, key, prefix in (
            ("model_version_tags", "gguf_uri", f"{home.as_uri()}/"),
            ("tags", "samq.gguf", f"{home}/"),
        ):
            database.execute(f"UPDATE {table} SET value = ? || value WHERE key = ?", (prefix, key))
    for path in home.glob(f"store/*/*/{MANIFEST}"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"folder": str(path.parent)}))
    return home


def check_own(home, old, sweep):
    """The folder's version, evidence and new runs are all in the folder, and nothing names or touches the old one."""
    before = content(old) if old.exists() else {}
    client = connect(uri_of(home))
    version = resolve(client, NAME, "production")
    model = sweep.result(BEST).model
    assert version.path == home / "store" / "candidate" / model.sha256 / "model.gguf"
    assert version.path.read_bytes() == b"GGUF " + BEST.encode()
    evidence = gather(client, version)
    assert evidence.plan.digest() == model.plan_digest
    assert all(reference.measured for reference in evidence.references), evidence.references
    settings = TrackingSettings(tracking_uri=uri_of(home), experiment="nights", run_name="again")
    parent = track_sweep(settings, sweep, "# Report\n").parent_run_id
    assert (home / "mlartifacts" / parent / "artifacts" / "report.md").read_text() == "# Report\n"
    assert [value for value in values(home) if str(old) in value or old.as_uri() in value] == []
    assert (content(old) if old.exists() else {}) == before


def test_a_moved_or_copied_folder_uses_its_own_files(new, old, sweep):
    check_own(new, old, sweep)


def test_so_does_one_of_before_places_were_relative(old, tmp_path, sweep):
    new = shutil.copytree(as_before(old), tmp_path / "new")
    for path in old.glob("store/*/*/model.gguf"):
        path.write_text("not yours")
    check_own(new, old, sweep)


def test_a_folder_names_no_file_of_its_own_by_an_absolute_path_but_where_mlflow_knows_no_other(old):
    with closing(sqlite3.connect(old / "mlflow.db")) as database:
        tags = [value for table in ("tags", "model_version_tags", "experiment_tags")
                for (value,) in database.execute(f"SELECT value FROM {table}")]  # fmt: skip
    assert [tag for tag in tags if str(old) in tag or old.as_uri() in tag] == []
    assert "mlartifacts" in tags and sum(tag.startswith("store/candidate/") for tag in tags) == 3
    manifests = [json.loads(path.read_text()) for path in old.glob(f"store/*/*/{MANIFEST}")]
    assert {one["folder"] for one in manifests} == {f"candidate/{one['key']}" for one in manifests}


def test_relocating_says_what_it_changes_and_changes_nothing_twice(old, tmp_path):
    new = tmp_path / "new"
    shutil.move(as_before(old), new)
    before = content(new)
    planned = relocate(new / "mlflow.db", dry_run=True)
    assert relative_manifests(new / "store", dry_run=True) == 2
    assert content(new) == before, "a dry run"
    assert relocate(new / "mlflow.db") == planned
    kinds = {change.what for change in planned}
    assert kinds == {
        *("experiments.artifact_location", "runs.artifact_uri", "logged_models.artifact_location"),
        *("model_versions.source", "model_versions.storage_location", "gguf_uri", "samq.gguf"),
    }
    (uri,) = [change for change in planned if change.what == "gguf_uri"]
    assert uri.before.startswith(f"{old.as_uri()}/store/candidate/")
    assert uri.after == uri.before.removeprefix(f"{old.as_uri()}/")
    assert relocate(new / "mlflow.db") == []
    last_uses = [path.stat().st_mtime_ns for path in sorted(new.glob(f"store/*/*/{MANIFEST}"))]
    assert relative_manifests(new / "store") == 2 and relative_manifests(new / "store") == 0
    assert [path.stat().st_mtime_ns for path in sorted(new.glob(f"store/*/*/{MANIFEST}"))] == last_uses


def test_a_folder_that_is_reached_over_a_link_was_not_moved(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    assert relocate(link / "mlflow.db") == []
    as_before(old)
    assert {change.what for change in relocate(link / "mlflow.db")} == {"gguf_uri", "samq.gguf"}


@pytest.mark.parametrize("inside", [True, False])
def test_a_folder_may_move_into_or_out_of_its_old_place(old, tmp_path, sweep, inside):
    deep = old / "deep" / ".samq"
    shutil.move(old, tmp_path / "meanwhile")
    deep.parent.mkdir(parents=True)
    shutil.move(tmp_path / "meanwhile", deep)
    if not inside:
        connect(uri_of(deep))
        shutil.move(deep, tmp_path / "meanwhile")
        shutil.rmtree(old)
        shutil.move(tmp_path / "meanwhile", old)
    home = deep if inside else old
    assert resolve(connect(uri_of(home)), NAME).path.is_relative_to(home / "store")
    assert gather(connect(uri_of(home)), resolve(connect(uri_of(home)), NAME)).plan.digest()
    assert relocate(home / "mlflow.db") == []


@pytest.mark.e2e
def test_the_pages_of_a_moved_folder_show_its_own_files(new, samq_home, monkeypatch, sweep, tmp_path):
    monkeypatch.setenv("SAMQ_HOME", str(new))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with mlflow_page(port) as address:
        client = connect(address)
        version = resolve(client, NAME)
        assert version.path == new / "store" / "candidate" / sweep.result(BEST).model.sha256 / "model.gguf"
        plan = f"{address}/get-artifact?path=plan.json&run_uuid={version.run_id}"
        with urllib.request.urlopen(plan, timeout=60) as answer:
            assert json.load(answer)["name"] == BEST
        run_id = client.create_run(client.create_experiment("over the server")).info.run_id
        client.log_text(run_id, "over the server", "note.txt")
    further = tmp_path / "further"
    shutil.move(new, further)
    client = connect(uri_of(further))
    assert client.get_run(run_id).info.artifact_uri.startswith(f"{further}/mlartifacts/")
    assert Path(client.download_artifacts(run_id, "note.txt", str(tmp_path))).read_text() == "over the server"


def test_an_experiment_without_runs_moves_too(old, tmp_path):
    with closing(sqlite3.connect(old / "mlflow.db")) as database, database:
        database.execute("PRAGMA foreign_keys = OFF")
        database.execute("DELETE FROM runs")
    new = shutil.copytree(old, tmp_path / "new")
    assert connect(uri_of(new)).get_experiment_by_name("nights").artifact_location == str(new / "mlartifacts")


def test_what_is_elsewhere_stays_there(old, tmp_path, sweep):
    elsewhere = tmp_path / "elsewhere"
    settings = {"tracking_uri": uri_of(old), "run_name": "one", "artifact_location": str(elsewhere / "mlartifacts")}
    parent = track_sweep(TrackingSettings(experiment="apart", **settings), sweep, "# Report\n").parent_run_id
    gguf = elsewhere / "store" / "candidate" / "a-key-of-no-other-store" / "model.gguf"
    connect(uri_of(old)).set_model_version_tag(NAME, "1", "gguf_uri", gguf.as_uri())
    new = tmp_path / "new"
    shutil.move(old, new)
    client = connect(uri_of(new))
    assert client.get_run(parent).info.artifact_uri == f"{elsewhere}/mlartifacts/{parent}/artifacts"
    assert client.get_experiment_by_name("apart").artifact_location == str(elsewhere / "mlartifacts")
    assert find_version(client, NAME, "1").path == gguf


def test_a_store_reads_manifests_wherever_it_is(old, new):
    store = Store(new / "store")
    for artifact in store.artifacts():
        assert artifact.folder == new / "store" / "candidate" / artifact.key
        assert store.find("candidate", artifact.key) == artifact


def test_a_database_that_cannot_be_rewritten_is_one_sentence(old, tmp_path, monkeypatch):
    new = tmp_path / "new"
    shutil.move(old, new)
    monkeypatch.setattr("samq.relocation._PATIENCE_S", 0.05)
    with closing(sqlite3.connect(new / "mlflow.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnreachableError, match=r"cannot update the paths in .*: database is locked; stop programs"):
            relocate(new / "mlflow.db")
    assert len(relocate(new / "mlflow.db")) > 5


def test_places_on_a_server_are_relative_to_the_samq_folder(samq_home, tmp_path):
    server, gguf = "http://127.0.0.1:5000", samq_home / "store" / "a b" / "model:1.gguf"
    assert place_of(gguf, server) == "store/a%20b/model%3A1.gguf"
    assert place_uri("store/a%20b/model%3A1.gguf", server) == gguf.as_uri()
    assert place_of(tmp_path / "else.gguf", server) == (tmp_path / "else.gguf").as_uri()
    assert place_uri("s3://bucket/model.gguf", server) == "s3://bucket/model.gguf"
