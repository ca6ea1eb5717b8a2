"""Where the GGUF to serve is looked up: a file, or an alias in the model registry."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from samq.errors import SamqError, UnreachableError
from samq.gguf.file import file_sha256
from samq.home import mlflow_uri

logger = logging.getLogger(__name__)

_MODELS_URI = re.compile(r"models:/(?P<name>[^/@]+)@(?P<alias>[^/@]+)")


@dataclass(frozen=True)
class ServedGguf:
    """A GGUF that is, or is to be, served. What a plain file has no answer for is empty."""

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
    """The source that `models:/NAME@ALIAS` or a path names; raises SamqError if it is neither."""
    if match := _MODELS_URI.fullmatch(target):
        return registry_source(match["name"], match["alias"], mlflow_uri())
    if target.startswith("models:"):
        raise SamqError(f"{target} names no model by its alias; write models:/NAME@production")
    if not Path(target).is_file():
        raise SamqError(f"there is no file {target}; give a GGUF file, or models:/NAME@production")
    return FileSource(Path(target))


def registry_source(name: str, alias: str, tracking_uri: str) -> Source:
    """The version of a registered model that an alias points at."""

    def look_up() -> ServedGguf:
        # Here, as MLflow takes seconds to import, and a file needs none of it.
        from samq.tracking.registry import connect, resolve

        found = resolve(connect(tracking_uri), name, alias)
        return ServedGguf(
            name=name,
            path=found.path,
            sha256=found.sha256,
            version=found.version,
            alias=alias,
            plan_digest=found.plan_digest,
        )

    return look_up


class FileSource:
    """A file, which may be replaced by another: by renaming, as llama.cpp reads from the file while it serves.

    Unlike a registry's versions, the old content is gone then: where memory does not suffice for both models, nothing
    is left to go back to.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is read yet."""
        self._path = path

    def __call__(self) -> ServedGguf:
        """The file as it is now."""
        return ServedGguf(name=self._path.stem, path=self._path, sha256=content_sha256(self._path))


_Stamp = tuple[int, int, int, int, int]
_hashes: dict[Path, tuple[_Stamp, str]] = {}  # of this process: what is looked up is verified too, and gone back to


def content_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, which is only read again if it looks changed: 40 GB take tens of seconds.

    Writing to a file changes its `st_ctime_ns`, which unlike `st_mtime_ns` cannot be set back. Raises UnreachableError if
    the file does not exist, and SamqError if it cannot be read.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise UnreachableError(f"cannot read {path}: {error.strerror}; put the GGUF back") from error
    stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    known = _hashes.get(path)
    if known is None or known[0] != stamp:
        logger.info("reading all of %s for its SHA-256", path)
        _hashes[path] = known = (stamp, file_sha256(path))
    return known[1]
