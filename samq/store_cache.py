"""The local store as a cache of the shared one, no larger than `SAMQ_CACHE_SIZE`.

What was used least recently loses its files first; its manifest stays, and the files are fetched again when they are read. No
file goes that was used since the oldest of the processes began that now work with this store, or that the shared store lacks.
"""

import atexit
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import ByteSize, TypeAdapter, ValidationError

from samq.errors import SamqError
from samq.shared_store import SharedStore, shared_store
from samq.store import MANIFEST, Artifact, Store

log = logging.getLogger("samq.store")

_PROCESSES = ".processes"  # folder in the store: a file for each process that works with it


def cache_limit() -> int | None:
    """Bytes of `SAMQ_CACHE_SIZE`, such as 200GB; None if it is not set. Raises SamqError for what is no size."""
    given = os.environ.get("SAMQ_CACHE_SIZE")
    if not given:
        return None
    try:
        return int(TypeAdapter(ByteSize).validate_python(given))
    except ValidationError as error:
        raise SamqError(f"SAMQ_CACHE_SIZE={given} is no size; write one such as 200GB") from error


def shrink(store: Store, shared: SharedStore, limit: int) -> int:
    """Remove files until the store has no more than `limit` bytes; return how many bytes were removed."""
    began = oldest_start(store)
    artifacts = sorted(store.artifacts(), key=last_use)
    sizes = {artifact.key: _bytes_here(artifact) for artifact in artifacts}
    excess, freed = sum(sizes.values()) - limit, 0
    for artifact in artifacts:
        if freed >= excess or last_use(artifact) >= began:
            break
        if sizes[artifact.key] and shared.read(artifact.stage, artifact.key, MANIFEST):
            for name in artifact.files:
                (artifact.folder / name).unlink(missing_ok=True)
            freed += sizes[artifact.key]
    if freed < excess:
        log.warning("%s is %.1f GB over SAMQ_CACHE_SIZE: all of it is in use", store.root, (excess - freed) / 1e9)
    return freed


@contextmanager
def within_limit(store: Store) -> Iterator[None]:
    """Note that this process works with the store; when the block has ended, make the store no larger than its limit.

    Only a cache of a shared store has one.
    """
    shared, limit = shared_store(), cache_limit()
    _hold(store.root / _PROCESSES)
    yield
    if shared is not None and limit is not None:
        shrink(store, shared, limit)


@lru_cache
def _hold(processes: Path) -> None:
    """Keep a lock for as long as this process lives, in a file whose name tells since when."""
    lock = FileLock(processes / f"{os.getpid()}-{time.time()}", fallback_to_soft=False)
    with suppress(OSError):  # a store that can only be read loses nothing either
        processes.mkdir(exist_ok=True)
        lock.acquire()
        atexit.register(_let_go, lock)


def _let_go(lock: FileLock) -> None:
    with suppress(OSError):
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def oldest_start(store: Store) -> float:
    """When the oldest living process began to work with the store, in seconds since 1970; now if none does.

    Those that have ended are forgotten.
    """
    starts = []
    for path in (store.root / _PROCESSES).glob("*"):
        try:
            with FileLock(path, blocking=False, fallback_to_soft=False):
                path.unlink(missing_ok=True)
        except Timeout:
            starts.append(float(path.name.partition("-")[2]))
    return min(starts, default=time.time())


def last_use(artifact: Artifact) -> float:
    """When a process last found the artifact, in seconds since 1970."""
    return (artifact.folder / MANIFEST).stat().st_mtime


def _bytes_here(artifact: Artifact) -> int:
    return sum(entry.bytes for name, entry in artifact.files.items() if (artifact.folder / name).exists())
