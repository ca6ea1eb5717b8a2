"""What `samq prune` lets go: by age, by sweeps and by bytes, here and in a shared store, and never what others need."""

import os
import time

import pytest

from samq import shared_store as module
from samq.errors import SamqError
from samq.gguf.file import file_sha256
from samq.shared_store import shared_store
from samq.store import MANIFEST, Store, _agreed
from samq.store_cache import within_limit
from samq.tracking import pruning
from samq.tracking.pruning import DAY_S, PruneRules, Stored, choose, find_unneeded, remove_unneeded
from samq.tracking.registry import connect
from tests.conftest import BUCKET
from tests.samq.registered import NAME, age, uri_of

FOREVER = float("inf")


def stored(*days):
    """Artifacts of ten bytes each, with the ages of their last uses."""
    now = time.time()
    return [Stored("stage", str(day), 10, now - day * DAY_S, frozenset({f"content {day}"})) for day in days]


def keys(artifacts):
    return [artifact.key for artifact in artifacts]


def test_what_is_old_goes_and_then_what_was_used_least_recently():
    artifacts, now = stored(1, 5, 3, 9), time.time()
    assert keys(choose(artifacts, now - 4 * DAY_S, None, (), now)) == ["9", "5"]
    assert keys(choose(artifacts, -FOREVER, 25, (), now)) == ["9", "5"]
    assert keys(choose(artifacts, now - 4 * DAY_S, 15, (), now)) == ["9", "5", "3"]
    assert keys(choose(artifacts, -FOREVER, 40, (), now)) == []


def test_what_others_need_or_a_run_has_used_stays_and_does_not_count_as_gone():
    artifacts, now = stored(1, 5, 3, 9), time.time()
    assert keys(choose(artifacts, -FOREVER, 20, {"content 9"}, now)) == ["5", "3"]
    assert keys(choose(artifacts, now, 0, (), now - 4 * DAY_S)) == ["9", "5"]


@pytest.fixture
def home(registered_home):
    age(registered_home)
    return registered_home


def unneeded(home, shared=None, **rules):
    return find_unneeded(Store(home / "store"), shared, uri_of(home), PruneRules(**rules))


def test_a_version_that_no_alias_points_at_stays_as_long_as_it_is_registered(home):
    client = connect(uri_of(home))
    for alias in ("candidate", "production"):
        client.delete_registered_model_alias(NAME, alias)
    (gone,) = unneeded(home, older_than_days=1).artifacts
    assert gone.contents == {file_sha256(next(home.glob(f"store/candidate/{gone.key}/*.gguf")))}
    client.delete_model_version(NAME, "1")
    both = unneeded(home, older_than_days=1)
    assert len(both.artifacts) == 2 and both.bytes == both.bytes_of_all > gone.bytes
    assert both.by_stage() == {"candidate": (2, both.bytes)}
    assert unneeded(home, max_bytes=both.bytes - 1).bytes < both.bytes
    assert len(list(home.glob("store/candidate/*/*.gguf"))) == 2, "nothing is removed yet"
    remove_unneeded(Store(home / "store"), None, both)
    assert not list(home.glob("store/*/*/*"))


def test_what_the_newest_sweeps_have_used_stays(home):
    client = connect(uri_of(home))
    (experiment,) = [one for one in client.search_experiments() if one.name == "nights"]
    assert unneeded(home, keep_sweeps=1).artifacts == (), "there was one sweep"
    now = time.time()
    for night in (1, 2):
        tags = {"samq.candidates": "2"}
        client.create_run(experiment.experiment_id, start_time=int(1000 * (now + night * DAY_S)), tags=tags)
    manifest = next(path for path in home.glob(f"store/*/*/{MANIFEST}") if unregistered(home) in str(path))
    os.utime(manifest, (now + DAY_S / 2, now + DAY_S / 2))
    assert unneeded(home, keep_sweeps=2).artifacts == (), "the second night used it"
    os.utime(manifest, (0, 0))
    assert keys(unneeded(home, keep_sweeps=2).artifacts) == [unregistered(home)]
    assert keys(unneeded(home, keep_sweeps=0).artifacts) == [unregistered(home)]


def unregistered(home):
    """Key of the artifact that no version names."""
    return next(
        path.parent.name for path in home.glob("store/candidate/*/model.gguf") if path.read_bytes() == b"GGUF F16"
    )


def test_what_a_process_at_work_has_used_stays(home):
    store = Store(home / "store")
    with within_limit(store):
        store.find("candidate", unregistered(home))
    assert unneeded(home, max_bytes=0).artifacts == (), "this process works with the store"
    age(home)
    assert keys(unneeded(home, max_bytes=0).artifacts) == [unregistered(home)]


def test_without_a_rule_nothing_may_go():
    with pytest.raises(ValueError, match="no rule says what may go"):
        PruneRules()


@pytest.mark.parametrize("place", ["folder", pytest.param("s3", marks=pytest.mark.slow)])
def test_a_shared_store_is_pruned_with_its_cache(home, place, request, tmp_path, monkeypatch):
    uri = f"file://{tmp_path / 'shared'}"
    if place == "s3":
        request.getfixturevalue("s3")
        uri = f"s3://{BUCKET}/{tmp_path.name}"
    monkeypatch.setenv("SAMQ_STORE", uri)
    shared, store = shared_store(), Store(home / "store")
    for artifact in store.artifacts():
        store.find(artifact.stage, artifact.key)
    shared.write("candidate", "unfinished", "a" * 64 + "/model.gguf", b"half")
    shared.write("", "", "README.md", b"not of SAMQ")
    listed = {artifact.key: artifact for artifact in shared.artifacts()}
    assert len(listed) == 3 and listed["unfinished"].contents == {"a" * 64}
    assert unneeded(home, shared, max_bytes=0).artifacts == (), "another machine may be at work"
    monkeypatch.setattr(pruning, "RUN_S", -60)
    gone = unneeded(home, shared, max_bytes=0)
    assert {artifact.key for artifact in gone.artifacts} == {unregistered(home), "unfinished"}
    key = unregistered(home)
    for path in home.glob("store/candidate/*/model.gguf"):
        path.unlink()  # as where another machine has made them
    elsewhere = find_unneeded(Store(tmp_path / "another machine"), shared, uri_of(home), PruneRules(max_bytes=0))
    assert elsewhere.artifacts == gone.artifacts
    remove_unneeded(store, shared, gone)
    assert keys(shared.artifacts()) == [path.name for path in (home / "store" / "candidate").iterdir()]
    assert shared.read("", "", "README.md")
    assert not (home / "store" / "candidate" / key).exists() and store.find("candidate", key) is None


def test_a_use_is_noted_in_the_shared_store_once_a_day(home, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMQ_STORE", f"file://{tmp_path / 'shared'}")
    store, key = Store(home / "store"), unregistered(home)
    store.find("candidate", key)
    manifest = tmp_path / "shared" / "candidate" / key / MANIFEST
    for age_s, is_noted in ((0.5 * DAY_S, False), (1.5 * DAY_S, True)):
        used = time.time() - age_s
        os.utime(manifest, (used, used))
        _agreed.clear()
        store.find("candidate", key)
        assert (manifest.stat().st_mtime > used + 1) == is_noted


def test_a_shared_store_that_is_away_is_one_sentence(home, monkeypatch, s3):
    monkeypatch.setenv("SAMQ_STORE", "s3://no-such-bucket/x")
    module._at.cache_clear()
    with pytest.raises(SamqError, match="cannot use s3://no-such-bucket/x"):
        unneeded(home, shared_store(), max_bytes=0)
