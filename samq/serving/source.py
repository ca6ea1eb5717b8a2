"""Looks up the GGUF to serve: a file, or an alias in the model registry."""

import hashlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from samq.errors import SamqError, UnreachableError
from samq.gguf.file import open_gguf, require_regular
from samq.home import mlflow_uri

logger = logging.getLogger(__name__)

_MODELS_URI = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)")


@dataclass(frozen=True)
class ServedGguf:
    """A GGUF to serve. Fields that do not apply to a plain file are empty."""

    name: str
    path: Path
    sha256: str
    version: str = ""
    alias: str = ""
    plan_digest: str = ""
    mmproj: Path | None = None  # the vision or audio part
    mmproj_sha256: str = ""

    @property
    def files(self) -> list[tuple[Path, str]]:
        """Its files, with their SHA-256."""
        return [(self.path, self.sha256), *([(self.mmproj, self.mmproj_sha256)] if self.mmproj else [])]

    def __str__(self) -> str:
        """For logs: `llama-3.1 version 7 (sha256 0123456789ab)`."""
        version = f" version {self.version}" if self.version else ""
        return f"{self.name}{version} (sha256 {self.sha256[:12]})"


# Looks up the GGUF to serve. Raises UnreachableError if MLflow or the file cannot be read. Raises NotRegisteredError if MLflow
# has no such model, version or alias, and SamqError if the GGUF cannot be served here.
Source = Callable[[], ServedGguf]


def find_source(target: str, mmproj: Path | None = None) -> Source:
    """The source for `models:/NAME@ALIAS` or a path; raises SamqError if `target` is neither, or one part of a GGUF.

    `mmproj` is the vision or audio part of a file; a registered version names its own.
    """
    if match := _MODELS_URI.fullmatch(target):
        return registry_source(match["name"], match["alias"], mlflow_uri())
    if target.startswith("models:"):
        raise SamqError(f"{target} does not name a model by its alias; write models:/NAME@production")
    if not Path(target).exists():
        raise SamqError(f"the file {target} does not exist; give a GGUF file, or models:/NAME@production")
    for file in (Path(target), mmproj):
        if file:
            open_gguf(file)
    return FileSource(Path(target), mmproj)


def registry_source(name: str, alias: str, tracking_uri: str) -> Source:
    """The version of a registered model that an alias points at."""

    def look_up() -> ServedGguf:
        # Imported here, since MLflow takes seconds to import, and a file does not need it.
        from samq.tracking.registry import connect, resolve

        version = resolve(connect(tracking_uri), name, alias)
        return ServedGguf(
            name=name,
            path=version.path,
            sha256=version.sha256,
            version=version.version,
            alias=alias,
            plan_digest=version.plan_digest,
            mmproj=version.mmproj,
            mmproj_sha256=version.mmproj_sha256,
        )

    return look_up


class FileSource:
    """A file that another may replace, by renaming or in place: the engine has read all of it before it serves.

    Unlike a version in the registry, the old content is then gone. If memory does not hold both models, the server cannot
    go back to the old one, unless the file was replaced by renaming.
    """

    def __init__(self, path: Path, mmproj: Path | None = None) -> None:
        """Nothing is read yet."""
        self._path = path
        self._mmproj = mmproj

    def __call__(self) -> ServedGguf:
        """The file as it is now."""
        mmproj_sha256 = content_sha256(self._mmproj) if self._mmproj else ""
        return ServedGguf(
            name=self._path.stem,
            path=self._path,
            sha256=content_sha256(self._path),
            mmproj=self._mmproj,
            mmproj_sha256=mmproj_sha256,
        )


def altered(path: Path, sha256: str, expected: str) -> str:
    """What to say of a file with another SHA-256 than expected."""
    return f"{path} was altered: it has the SHA-256 {sha256}, not {expected}; put the file back"


class HeldFile:
    """A file that is held open. Programs that open `name` get this very file, whatever its path leads to by then."""

    def __init__(self, path: Path, sha256: str) -> None:
        """Open a file; raises UnreachableError if it does not exist, and SamqError if it has another SHA-256."""
        self.path = path
        self._sha256 = sha256
        self.descriptor = _open(path)
        try:
            self.verify()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """Its name for a child process that inherits the descriptor."""
        return f"/dev/fd/{self.descriptor}"

    def verify(self) -> None:
        """Raise SamqError unless the content is what it should be; reads it again only if the file looks changed."""
        if (sha256 := _hash(self.descriptor, self.path)) != self._sha256:
            raise SamqError(altered(self.path, sha256, self._sha256))

    def close(self) -> None:
        """Let go of the file."""
        os.close(self.descriptor)


def content_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file; reads it again only if it looks changed: 40 GB take tens of seconds.

    Raises UnreachableError if the file does not exist, and SamqError if it cannot be read: a device or a pipe could be
    read for ever.
    """
    descriptor = _open(path)
    try:
        return _hash(descriptor, path)
    finally:
        os.close(descriptor)


def looks_changed(path: Path) -> bool:
    """Whether `content_sha256` would read the file; raises UnreachableError as it does."""
    descriptor = _open(path)
    try:
        return _stamp(descriptor) not in _hashes
    finally:
        os.close(descriptor)


def _open(path: Path) -> int:
    try:
        require_regular(path, path.stat())
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UnreachableError(f"cannot read {path}: {error.strerror}; put the GGUF back") from error


_Stamp = tuple[int, int, int, int, int]
_hashes: dict[_Stamp, str] = {}  # a cache: lookup, verification and going back hash the same files
_MOST_HASHES = 64


def _stamp(descriptor: int) -> _Stamp:
    """How the file looks: writing changes `st_ctime_ns`, which cannot be set back."""
    stat = os.fstat(descriptor)
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _hash(descriptor: int, path: Path) -> str:
    """The cached hash while the file looks the same."""
    stamp = _stamp(descriptor)
    if stamp not in _hashes:
        logger.info("reading all of %s for its SHA-256", path)
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(0)
            _hashes[stamp] = hashlib.file_digest(file, "sha256").hexdigest()
        while len(_hashes) > _MOST_HASHES:
            del _hashes[next(iter(_hashes))]
    return _hashes[stamp]
