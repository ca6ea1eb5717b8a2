"""Content-addressed store of what the stages made: key -> folder, published whole or not at all.

A stage's key is a digest of everything its output depends on. Its files are made in a temporary folder beside the store.
`artifact.json` lists them with their hashes and is written last. One rename moves the folder into place. So a process killed at
any moment leaves no folder that could be taken for a whole one.

Where several machines share a store (`samq.shared_store`), this one is a cache of it. An artifact may then lack files, which
`Artifact.path` gets from there.
"""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, field_validator

from samq.errors import SamqError, UnreachableError
from samq.gguf.file import HashedFile, file_sha256
from samq.output import GONE, discard, remove_all_but_logs
from samq.records import Record, digest_of
from samq.shared_store import SharedStore, shared_store

MANIFEST = "artifact.json"
_GOING_ON = "going-on-"
_FETCHED = "fetched-"


class FileEntry(BaseModel):
    """One file of an artifact: its hash and size, and the modification time at which that hash was true."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    sha256: str
    bytes: int
    mtime_ns: int


class Artifact(Record):
    """A small reference to what a stage made. Two artifacts with the same files have the same digest."""

    SCHEMA: ClassVar[str] = "samq.artifact/1"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"key", "folder", "made_by"})

    stage: str
    key: str
    folder: Path = Field(description="absolute; in the manifest relative to the store, which may be moved")
    files: dict[str, FileEntry]
    made_by: dict[str, str] = Field(default={}, description="versions of what made it, for people to read")

    @field_validator("files")
    @classmethod
    def _names_stay_in_the_folder(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        """Another machine's manifest may be anybody's."""
        if wrong := [
            name for name in files if not name or name in (".", "..", MANIFEST) or "/" in name or "\0" in name
        ]:
            raise ValueError(f"{wrong[0]!r} is no name of a file")
        return files

    def digest(self) -> str:
        """SHA-256 over the stage and its files' names and contents, logs apart: what depends on it depends on no more."""
        contents = {name: entry.sha256 for name, entry in self.files.items() if not name.endswith(".log")}
        return digest_of({"stage": self.stage, "files": contents})

    def path(self, name: str) -> Path:
        """Path of one of the artifact's files, which is fetched first if only the shared store has it."""
        if name not in self.files:
            raise SamqError(
                f"the {self.stage} artifact {self.key[:12]} has no file {name}; it has {', '.join(self.files)}"
            )
        path = self.folder / name
        if not path.exists() and (shared := shared_store()):
            _fetch(shared, self, name)
        return path

    def whole(self) -> Path:
        """Its folder, with all its files there."""
        for name in self.files:
            self.path(name)
        return self.folder

    def file(self, name: str) -> HashedFile:
        """One of the artifact's files, with the hash it was published with."""
        return HashedFile(self.path(name), self.files[name].sha256)


class Store:
    """Artifacts below one root folder: `<root>/<stage>/<key>/`."""

    def __init__(self, root: Path) -> None:
        """Use (and create) the store at `root`; leftovers of processes that died are removed."""
        self.root = Path(root).absolute()
        self._temporary = self.root / ".tmp"
        try:
            self._temporary.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SamqError(f"cannot use the store at {self.root}: {error.strerror}; choose another folder") from error
        self._remove_leftovers()

    def find(self, stage: str, key: str, *, thorough: bool = False) -> Artifact | None:
        """The artifact of this key, or None if it is absent or a file of it is missing or altered.

        A file whose size and modification time are as published is taken as unaltered; otherwise (always, when
        `thorough`) its hash decides. A damaged artifact is removed, so that the stage makes it again.

        With a shared store, what either of the two has is found. The shared one has it afterwards, and counts if they differ.
        """
        shared = shared_store()
        local = self._find_here(stage, key, thorough, may_lack_files=shared is not None)
        if shared is None or (local is not None and (self.root, stage, key) in _agreed):
            return local
        manifest = shared.read(stage, key, MANIFEST)
        if manifest is not None:
            theirs = Artifact.parse(manifest, place := f"{shared.uri}/{stage}/{key}/{MANIFEST}")
            if (theirs.stage, theirs.key) != (stage, key):
                raise SamqError(f"{place} is of {theirs.stage}/{theirs.key}; remove it, so that it is made again")
            local = self._adopt(theirs, local)
            shared.note_use(stage, key, MANIFEST, manifest)
        elif local is not None and all((local.folder / name).exists() for name in local.files):
            _share(shared, local)
        else:
            shutil.rmtree(self.root / stage / key, ignore_errors=True)
            return None
        _agreed.add((self.root, stage, key))
        return local

    def _adopt(self, theirs: Artifact, local: Artifact | None) -> Artifact:
        """The shared store's artifact, with those of its files that are here."""
        if local is not None and local.digest() == theirs.digest():
            return local
        folder = self.root / theirs.stage / theirs.key
        folder.mkdir(parents=True, exist_ok=True)
        for name in local.files if local else ():  # files of the same content are fetched again, for their times
            (folder / name).unlink(missing_ok=True)
        work = self._temporary / f"{theirs.key}-{uuid.uuid4().hex}.json"
        theirs.save(work)
        os.replace(work, folder / MANIFEST)
        return theirs.model_copy(update={"folder": folder})

    def _find_here(self, stage: str, key: str, thorough: bool, may_lack_files: bool) -> Artifact | None:
        folder = self.root / stage / key
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder, ignore_errors=True)
            return None
        try:
            artifact = Artifact.load(folder / MANIFEST).model_copy(update={"folder": folder})
        except SamqError:
            artifact = None
        damaged = [n for n, e in artifact.files.items() if not _intact(folder / n, e, thorough)] if artifact else []
        if may_lack_files:
            for name in damaged:
                (folder / name).unlink(missing_ok=True)
        elif artifact is None or damaged:
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):  # a store that can only be read is of use, too
            os.utime(folder / MANIFEST)  # the time of last use, for prune
        return artifact

    def incarnation(self, stage: str, key: str) -> str:
        """A token that stays the same as long as the artifact is whole, and is another once it has to be made again.

        A result cache elsewhere (Prefect's) that has the token in its key forgets exactly what this store lost.
        """
        token = self.root / stage / f"{key}.incarnation"
        if self.find(stage, key) is None or not token.is_file():
            token.parent.mkdir(parents=True, exist_ok=True)
            token.write_text(uuid.uuid4().hex)
        return token.read_text()

    @contextmanager
    def publish(self, stage: str, key: str, made_by: Mapping[str, str] | None = None) -> Iterator[Path]:
        """Yield an empty temporary folder; when the block ends well, its files become the artifact `stage`/`key`.

        When it does not, only its logs stay, as the error names them. Raises SamqError if the store cannot be written to.
        """
        target = self.root / stage / key
        work = self._temporary / f"{stage}-{uuid.uuid4().hex}"
        lock = FileLock(work.with_suffix(".lock"), fallback_to_soft=False)
        try:
            locked = lock.acquire()  # held while this process lives: what tells leftovers from live work
        except OSError as error:
            raise self._unwritable(error) from error
        with locked:
            try:
                work.mkdir()
                yield work
                self._move_into_place(work, target, dict(made_by or {}))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise
                raise self._unwritable(error) from error
            finally:
                remove_all_but_logs(work)
                Path(lock.lock_file).unlink(missing_ok=True)

    @contextmanager
    def scratch(self, stage: str, key: str) -> Iterator[Path | None]:
        """Yield a folder, which need not exist, in which a process that is killed leaves what the next one goes on from.

        It is gone when the block ends well, or by a SamqError. None if another process works on the same artifact just now.
        """
        folder = self._temporary / f"{_GOING_ON}{stage}-{key}"
        lock = FileLock(folder.with_suffix(".held"), blocking=False, fallback_to_soft=False)
        try:
            lock.acquire()
        except (OSError, Timeout):
            yield None
            return
        try:
            yield folder
            discard(folder)
        except SamqError:  # the next process would fail in the same way
            discard(folder)
            raise
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _unwritable(self, error: OSError) -> SamqError:
        return SamqError(
            f"cannot write to the store at {self.root}: {error.strerror}; free some space, or set SAMQ_HOME to another folder"
        )

    def _move_into_place(self, work: Path, target: Path, made_by: dict[str, str]) -> None:
        files = {path.name: _entry(path) for path in sorted(work.iterdir())}
        relative = target.relative_to(self.root)
        artifact = Artifact(stage=target.parent.name, key=target.name, folder=relative, files=files, made_by=made_by)
        artifact.save(work / MANIFEST)
        _fsync(work)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        try:
            os.replace(work, target)
        except OSError:
            if self.find(target.parent.name, target.name) is None:  # else another process published it just now
                raise
            shutil.rmtree(work)

    def artifacts(self) -> Iterator[Artifact]:
        """Every artifact in the store, unverified."""
        for manifest in sorted(self.root.glob(f"*/*/{MANIFEST}")):
            yield Artifact.load(manifest).model_copy(update={"folder": manifest.parent})

    def having(self, contents: Collection[str]) -> set[str]:
        """Those of the SHA-256 hashes that a whole file in the store has, or in the shared store."""
        shared = shared_store() is not None
        return {
            entry.sha256
            for artifact in self.artifacts()
            for name, entry in artifact.files.items()
            if entry.sha256 in contents
            and (_intact(path := artifact.folder / name, entry, thorough=False) or (shared and not path.exists()))
        }

    def remove(self, stage: str, key: str, shared: SharedStore | None = None) -> None:
        """Remove an artifact, first from the shared store, if one is given. What is needed again is made again."""
        if shared:
            shared.remove(stage, key)
        _agreed.discard((self.root, stage, key))
        shutil.rmtree(self.root / stage / key, ignore_errors=True)

    def remove_logs(self, before: float) -> None:
        """Remove the logs of failures that were last written before that time (seconds since 1970)."""
        for folder in self._temporary.iterdir():
            if folder.is_dir() and not folder.with_suffix(".lock").exists() and folder.stat().st_mtime < before:
                shutil.rmtree(folder)

    def forget(self, files: Collection[Path]) -> int:
        """Remove the artifacts that have one of the files, or another name of it; return the files' bytes.

        They are removed from the shared store as well. What is needed again is made again.
        """
        gone, freed, shared = set(files), {}, shared_store()
        inodes = {path.stat().st_ino for path in files if path.exists()}
        for artifact in list(self.artifacts()):
            for name, entry in artifact.files.items():
                path = artifact.folder / name
                if path in gone or (path.exists() and path.stat().st_ino in inodes):
                    freed[entry.sha256] = entry.bytes
                    self.remove(artifact.stage, artifact.key, shared)
                    break
        return sum(freed.values())

    def _remove_leftovers(self) -> None:
        for lock_path in self._temporary.glob("*.lock"):
            try:
                with FileLock(lock_path, blocking=False, fallback_to_soft=False):
                    shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
                    lock_path.unlink(missing_ok=True)
            except OSError:
                continue  # its owner is alive, or has just finished, or the store can only be read
        for folder in self._temporary.glob(f"*{GONE}*"):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._temporary.glob(f"{_GOING_ON}*"):
            stage, _, key = folder.name.removeprefix(_GOING_ON).rpartition("-")
            if (self.root / stage / key / MANIFEST).is_file():  # the process was killed after it had published that
                with self.scratch(stage, key):
                    pass  # it is gone at the end, unless another process still works there


def stored_file(path: Path) -> Path:
    """The path; a file of a store is fetched first if only the shared store has it."""
    if path.exists() or shared_store() is None or len(path.parts) < 4:
        return path
    artifact = Store(path.parents[2]).find(path.parts[-3], path.parts[-2])
    return artifact.path(path.name) if artifact and path.name in artifact.files else path


_agreed: set[tuple[Path, str, str]] = set()  # artifacts of which this process knows that the shared store has the same


def _share(shared: SharedStore, artifact: Artifact) -> None:
    for name, entry in artifact.files.items():
        shared.upload(artifact.folder / name, artifact.stage, artifact.key, entry.sha256)
    shared.write(artifact.stage, artifact.key, MANIFEST, (artifact.folder / MANIFEST).read_bytes())


def _fetch(shared: SharedStore, artifact: Artifact, name: str) -> None:
    """Get a file from the shared store, verified; a process that was killed goes on where it was."""
    target, entry = artifact.folder / name, artifact.files[name]
    partial = artifact.folder.parent.parent / ".tmp" / f"{_FETCHED}{entry.sha256}"
    partial.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(partial.with_suffix(".fetching"), fallback_to_soft=False):
        if target.exists():  # another process or thread has got it meanwhile
            return
        shared.download(artifact.stage, artifact.key, entry.sha256, name, partial)
        if file_sha256(partial) != entry.sha256:
            partial.unlink()
            raise UnreachableError(
                f"{name} from {shared.uri} has other bytes than it was published with; fetch it again"
            )
        os.utime(partial, ns=(entry.mtime_ns, entry.mtime_ns))
        os.replace(partial, target)


def _entry(path: Path) -> FileEntry:
    status = path.stat()
    return FileEntry(sha256=file_sha256(path), bytes=status.st_size, mtime_ns=status.st_mtime_ns)


def _intact(path: Path, entry: FileEntry, thorough: bool) -> bool:
    try:
        status = path.stat()
    except OSError:
        return False
    if status.st_size != entry.bytes:
        return False
    return (not thorough and status.st_mtime_ns == entry.mtime_ns) or file_sha256(path) == entry.sha256


def _fsync(folder: Path) -> None:
    """Force the files and then their folder to disk, so that the rename cannot become visible before them."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
