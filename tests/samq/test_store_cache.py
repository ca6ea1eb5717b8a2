"""The local store as a cache: what was used least recently goes first, and nothing that is in use or not shared."""

import os
import time

import pytest

from samq import store_cache
from samq.errors import SamqError
from samq.shared_store import shared_store
from samq.store import MANIFEST, Store
from samq.store_cache import cache_limit, shrink, within_limit


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMQ_STORE", f"file://{tmp_path / 'shared'}")
    return Store(tmp_path / "store")


def made(store, key, size, used_before_s=0.0, shared=True):
    with store.publish("stage", key) as folder:
        (folder / "file").write_bytes(b"x" * size)
    if shared:
        store.find("stage", key)
    path = store.root / "stage" / key
    used = time.time() - used_before_s
    os.utime(path / MANIFEST, (used, used))
    return path / "file"


def test_what_was_used_least_recently_goes_first_and_is_fetched_again(store):
    old, older, newest = (made(store, key, 100, days * 86400) for key, days in (("b", 2), ("a", 3), ("c", 1)))
    assert shrink(store, shared_store(), 250) == 100
    assert [path.exists() for path in (older, old, newest)] == [False, True, True]
    assert store.find("stage", "a").path("file").read_bytes() == b"x" * 100


def test_what_is_in_use_or_not_shared_stays(store, monkeypatch):
    unshared = made(store, "a", 100, 3 * 86400, shared=False)
    monkeypatch.setattr(store_cache, "oldest_start", lambda _: time.time() - 3600)
    in_use = made(store, "b", 100, 60)
    assert shrink(store, shared_store(), 0) == 0
    assert unshared.exists() and in_use.exists()


def test_a_process_at_work_is_known_by_its_lock(store, monkeypatch):
    monkeypatch.setenv("SAMQ_CACHE_SIZE", "1KB")
    (store.root / ".processes").mkdir()
    (store.root / ".processes" / f"1-{time.time() - 9999}").touch()  # it was killed
    before = made(store, "a", 2000, 60)
    with within_limit(store):
        at_work = made(store, "b", 2000)
    assert (before.exists(), at_work.exists()) == (False, True)


@pytest.mark.parametrize("given, limit", [("200GB", 200 * 10**9), ("1GiB", 2**30), ("", None)])
def test_the_limit_is_a_size(given, limit, monkeypatch):
    monkeypatch.setenv("SAMQ_CACHE_SIZE", given)
    assert cache_limit() == limit


def test_what_is_no_size_is_one_sentence(monkeypatch):
    monkeypatch.setenv("SAMQ_CACHE_SIZE", "much")
    with pytest.raises(SamqError, match="SAMQ_CACHE_SIZE=much is no size"):
        cache_limit()
