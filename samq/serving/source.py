"""Where the GGUF to serve is looked up: a file, or an alias in the model registry."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from samq.errors import SamqError
from samq.gguf_file import file_sha256
from samq.home import mlflow_uri

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


Source = Callable[[], ServedGguf]  # looks up what is to be served now; raises SamqError, the two below among them


class Unreachable(SamqError):
    """MLflow, or the file, cannot be read: what is to be served is not known."""


class NothingNamed(SamqError):
    """MLflow was asked, and has no such model, version or alias."""


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
        from samq.serving.registry import connect, resolve

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
        self._seen: tuple[tuple[int, int, int], ServedGguf] | None = None

    def __call__(self) -> ServedGguf:
        """The file as it is now; it is only hashed again if it looks changed."""
        try:
            stat = self._path.stat()
        except OSError as error:
            raise Unreachable(f"cannot read {self._path}: {error.strerror}; put the GGUF back") from error
        stamp = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if self._seen is None or self._seen[0] != stamp:
            gguf = ServedGguf(name=self._path.stem, path=self._path, sha256=file_sha256(self._path))
            self._seen = (stamp, gguf)
        return self._seen[1]
