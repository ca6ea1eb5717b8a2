"""Paths in a SAMQ folder that was moved or copied: they follow, so that the folder uses its own files and no others.

Tags name files by their place (`samq.home`), relative to the folder. MLflow however stores absolute paths of artifacts (it
makes relative ones absolute), and its API cannot change them. So `relocate` rewrites them in MLflow's database. The database
also tells where the folder was. An experiment's tag gives the place of its artifacts. Or runs have their artifacts in this
folder, though the database says elsewhere. The names of their folders are unique.
"""

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from samq.errors import SamqError, UnreachableError
from samq.home import path_of, relative_place

logger = logging.getLogger(__name__)

ARTIFACTS_TAG = "samq.artifacts"  # of an experiment: the place of its artifacts, if they are below the SAMQ folder
_PATIENCE_S = 30.0  # for another process that writes to the database
PATHS = (  # table and column
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
_PLACES = (("model_version_tags", ("gguf_uri", "mmproj_uri")), ("tags", ("samq.gguf",)))


@dataclass(frozen=True)
class Change:
    """One value that was rewritten."""

    table: str
    column: str
    row: int  # SQLite's rowid
    what: str  # for people: `runs.artifact_uri`, or a tag's key
    before: str
    after: str


def relocate(database: Path, *, dry_run: bool = False) -> list[Change]:
    """Let the paths in MLflow's SQLite file follow its folder, all or none, and return what changed (or would).

    Changes nothing where the folder was not moved since the last time. Raises UnreachableError if the file cannot be used.
    """
    if not database.is_file():
        return []
    try:
        return _relocate(database, dry_run)
    except sqlite3.Error as error:
        raise UnreachableError(
            f"cannot update the paths in {database}: {error}; stop programs that write to the file, and make it writable"
        ) from error


def _relocate(database: Path, dry_run: bool) -> list[Change]:
    folder = database.parent
    with closing(sqlite3.connect(database, timeout=_PATIENCE_S)) as connection:
        if not _has(connection, "experiments", "artifact_location"):
            return []
        old = _old_folders(connection, folder)
        changes = [*_moved_paths(connection, old, folder), *_relative_places(connection, old, folder)]
        if changes and not dry_run:
            with connection:  # commits, or rolls back
                for change in changes:
                    statement = f"UPDATE {change.table} SET {change.column} = ? WHERE rowid = ? AND {change.column} = ?"
                    connection.execute(statement, (change.after, change.row, change.before))
            was = f" has moved from {', '.join(map(str, old))}" if old else ""
            logger.info("%s%s: rewrote %d paths in %s", folder, was, len(changes), database.name)
    return changes


def relative_manifests(store: Path, *, dry_run: bool = False) -> int:
    """Rewrite the manifests of a store that name its absolute path; returns how many. Nothing reads that path."""
    from samq.store import MANIFEST, Artifact  # slow to import, and a rollback does not need it

    count = 0
    for path in sorted(store.glob(f"*/*/{MANIFEST}")):
        try:
            artifact = Artifact.load(path)
        except SamqError:  # it is damaged, and the stage makes it again
            continue
        if artifact.folder.is_absolute():
            count += 1
            if not dry_run:
                last_use = path.stat()
                artifact.model_copy(update={"folder": path.parent.relative_to(store)}).save(path)
                os.utime(path, ns=(last_use.st_atime_ns, last_use.st_mtime_ns))
    return count


def _has(connection: sqlite3.Connection, table: str, column: str) -> bool:
    """Whether this version of MLflow has the column."""
    return any(row[1] == column for row in connection.execute(f"PRAGMA table_info({table})"))


def _old_folders(connection: sqlite3.Connection, folder: Path) -> list[Path]:
    """Where the SAMQ folder was before, the longest path first."""
    query = (
        "SELECT e.experiment_id, e.artifact_location, t.value FROM experiments e LEFT JOIN experiment_tags t "
        "ON t.experiment_id = e.experiment_id AND t.key = ?"
    )
    old = set()
    for experiment, location, place in connection.execute(query, (ARTIFACTS_TAG,)).fetchall():
        path = _path(location)
        if path is None:
            continue
        was = _without(path, unquote(place)) if place else _by_runs(connection, experiment, path, folder)
        if was and not _same(was, folder):
            old.add(was)
    return sorted(old, key=lambda path: -len(path.parts))


def _without(path: Path, place: str) -> Path | None:
    """The folder in which `path` is the relative place; None if it is in none."""
    parts = Path(place).parts
    base = len(path.parts) - len(parts)
    return Path(*path.parts[:base]) if path.parts[base:] == parts else None


def _by_runs(connection: sqlite3.Connection, experiment: int, location: Path, folder: Path) -> Path | None:
    """Where the folder was, if it holds the artifacts of one of the experiment's runs; None if it holds none."""
    if location.is_relative_to(folder) and location.exists():
        return None
    tails = [Path(*location.parts[start:]) for start in range(1, len(location.parts) + 1)]
    for (uri,) in connection.execute("SELECT artifact_uri FROM runs WHERE experiment_id = ?", (experiment,)):
        artifacts = _path(uri)
        if artifacts is None or not artifacts.is_relative_to(location):
            continue
        of_run = artifacts.relative_to(location)
        for tail in tails:
            if len(of_run.parts) > 1 and (folder / tail / of_run).is_dir():
                return _without(location, str(tail))
    return None


def _moved_paths(connection: sqlite3.Connection, old: list[Path], folder: Path) -> Iterator[Change]:
    """Absolute paths below an old folder; they become those below the folder."""
    if not old:
        return
    for table, column in PATHS:
        if not _has(connection, table, column):
            continue
        for row, value in connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
            moved = _moved(_path(value), old, folder)
            if moved:
                after = moved.as_uri() if value.startswith("file:") else str(moved)
                yield Change(table, column, row, f"{table}.{column}", value, after)


def _relative_places(connection: sqlite3.Connection, old: list[Path], folder: Path) -> Iterator[Change]:
    """Absolute places of files that were or are below the folder; they become relative."""
    for table, keys in _PLACES:
        query = f"SELECT rowid, key, value FROM {table} WHERE key = ? AND (value LIKE 'file:%' OR value LIKE '/%')"
        for tag in keys:
            for row, key, value in connection.execute(query, (tag,)).fetchall():
                path = _path(value)
                place = path and relative_place(_moved(path, old, folder) or _stored(path, folder) or path, folder)
                if place:
                    yield Change(table, "value", row, key, value, place)


def _moved(path: Path | None, old: list[Path], folder: Path) -> Path | None:
    """The path in the folder of a path below an old folder; None for others."""
    for was in old:
        inside = folder.is_relative_to(was) and path is not None and path.is_relative_to(folder)
        if path is not None and path.is_relative_to(was) and not inside:
            return folder / path.relative_to(was)
    return None


def _stored(path: Path, folder: Path) -> Path | None:
    """The file of this folder's store that has the key of a file of another store; None if there is none."""
    parts = path.parts[-4:]  # store/STAGE/KEY/FILE
    own = folder.joinpath(*parts)
    return own if len(parts) == 4 and parts[0] == "store" and own.is_file() else None


def _path(value: str | None) -> Path | None:
    """The absolute path that a path or file URI names; None for another URI."""
    if not value:
        return None
    return path_of(value) if urlsplit(value).scheme else Path(value) if value.startswith("/") else None


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)
