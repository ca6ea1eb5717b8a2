"""Looks up the GGUF to serve: a file, or an alias in the model registry."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from samq.errors import SamqError, UnreachableError
from samq.gguf.file import file_sha256, open_gguf, require_regular
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

    def __str__(self) -> str:
        """For logs: `llama-3.1 version 7 (sha256 0123456789ab)`."""
        version = f" version {self.version}" if self.version else ""
        return f"{self.name}{version} (sha256 {self.sha256[:12]})"


# Looks up the GGUF to serve. Raises UnreachableError if MLflow or the file cannot be read, NotRegisteredError if MLflow has
# no such model, version or alias, and SamqError if the GGUF cannot be served here.
Source = Callable[[], ServedGguf]


def find_source(target: str) -> Source:
    """The source for `models:/NAME@ALIAS` or a path; raises SamqError if `target` is neither, or one part of a GGUF."""
    if match := _MODELS_URI.fullmatch(target):
        return registry_source(match["name"], match["alias"], mlflow_uri())
    if target.startswith("models:"):
        raise SamqError(f"{target} does not name a model by its alias; write models:/NAME@production")
    if not Path(target).exists():
        raise SamqError(f"the file {target} does not exist; give a GGUF file, or models:/NAME@production")
    open_gguf(Path(target))
    return FileSource(Path(target))


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
        )

    return look_up


class FileSource:
    """A file that another may replace. Replace it by renaming, since llama.cpp reads from the file while it serves.

    Unlike a version in the registry, the old content is then gone. If memory does not hold both models, the server cannot
    go back to the old one.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self._path = path

    def __call__(self) -> ServedGguf:
        """The file as it is now."""
        return ServedGguf(name=self._path.stem, path=self._path, sha256=content_sha256(self._path))


_Stamp = tuple[int, int, int, int, int]
_hashes: dict[Path, tuple[_Stamp, str]] = {}  # a cache: lookup, verification and going back hash the same files


def content_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file. Reads the file again only if it looks changed: 40 GB take tens of seconds.

    Writing to a file changes its `st_ctime_ns`, which unlike `st_mtime_ns` cannot be set back. Raises UnreachableError if
    the file does not exist, and SamqError if it cannot be read: a device or a pipe could be read for ever.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UnreachableError(f"cannot read {path}: {error.strerror}; put the GGUF back") from error
    require_regular(path, stat)
    stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    known = _hashes.get(path)
    if known is None or known[0] != stamp:
        logger.info("reading all of %s for its SHA-256", path)
        _hashes[path] = known = (stamp, file_sha256(path))
    return known[1]
