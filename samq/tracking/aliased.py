"""The files that aliases point at: what serves, is a candidate, or is needed for a rollback. They are never deleted."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from samq.errors import SamqError
from samq.gguf.file import file_sha256
from samq.home import path_of, place_uri, registry_uris
from samq.store import Store
from samq.tracking.registry import connect, mlflow_errors, registered_models

_TAGS = {"gguf_uri": "sha256", "mmproj_uri": "mmproj_sha256"}  # tag of the place -> tag of the content


@dataclass(frozen=True)
class AliasedFile:
    """A file of a version that an alias points at: a GGUF, or the vision or audio part of a multimodal model."""

    model: str
    version: str
    aliases: tuple[str, ...]
    uri: str  # absolute
    sha256: str | None  # None: of a part that was registered before SAMQ noted its content

    @property
    def path(self) -> Path | None:
        """Where it is to be on this machine; None if it is elsewhere."""
        return path_of(self.uri)

    def content(self) -> str | None:
        """Its SHA-256, as registered or (which reads the file) as it is; None if neither is known."""
        return self.sha256 or (file_sha256(self.path) if self.path and self.path.is_file() else None)

    def is_in_place(self) -> bool:
        """Whether the file is where it is to be, with the content that was registered. Reads the whole file."""
        path = self.path
        return path is not None and path.is_file() and self.sha256 in (None, file_sha256(path))


def aliased_files(clients: Iterable[MlflowClient]) -> list[AliasedFile]:
    """The files of all versions that an alias points at, and that SAMQ registered."""
    files: list[AliasedFile] = []
    for client in clients:
        with mlflow_errors(client, "no such model"):
            for model in registered_models(client):
                for number in sorted(set(model.aliases.values())):
                    names = tuple(sorted(alias for alias, version in model.aliases.items() if version == number))
                    files += _files_of(client, client.get_model_version(model.name, number), names)
    return files


def registries(tracking_uri: str) -> list[MlflowClient]:
    """Clients of all registries that may name files of the store."""
    return [connect(uri) for uri in registry_uris(tracking_uri)]


def aliased_content(files: Collection[AliasedFile]) -> set[str]:
    """SHA-256 of the files, wherever they are."""
    return {content for file in files if (content := file.content())}


def registered_content(clients: Iterable[MlflowClient]) -> set[str]:
    """SHA-256 of the files of every version that SAMQ registered."""
    contents = set()
    for client in clients:
        with mlflow_errors(client, "no such model"):
            for model in registered_models(client):
                for version in client.search_model_versions(f"name = '{model.name}'"):
                    contents |= {version.tags[tag] for tag in _TAGS.values() if tag in version.tags}
    return contents


def check_none_is_missing(files: Collection[AliasedFile], store: Store, shared: Collection[str] = ()) -> None:
    """Raise SamqError if a file of this machine is neither in its place nor, under whatever name, in the store.

    `shared` are the SHA-256 hashes of what a shared store has.
    """
    here = [file for file in files if file.path is not None]
    stored = store.having({file.sha256 for file in here if file.sha256}).union(shared)
    missing = [file for file in here if file.sha256 not in stored and not file.is_in_place()]
    if missing:
        file, others = missing[0], len(missing) - 1
        raise SamqError(
            f"version {file.version} of {file.model} ({', '.join(file.aliases)}) needs {file.path}, which is missing or "
            f"altered{f' ({others} other files are, too)' if others else ''}; put the file back or move the alias, or delete "
            "anyway with --even-if-missing"
        )


def _files_of(client: MlflowClient, version: ModelVersion, names: tuple[str, ...]) -> Iterator[AliasedFile]:
    tags = version.tags
    for place, content in _TAGS.items():
        if place in tags:
            uri = place_uri(tags[place], client.tracking_uri)
            yield AliasedFile(version.name, str(version.version), names, uri, tags.get(content))
