"""Files and models that commands are given."""

from pathlib import Path
from typing import TYPE_CHECKING

from samq.cli.start import loading_packages
from samq.errors import SamqError
from samq.home import store_folder
from samq.progress import bar

if TYPE_CHECKING:
    from samq.records import ModelSource
    from samq.store import Artifact


def find_model(model: str | Path, revision: str | None = None, hf_folder: Path | None = None) -> "ModelSource":
    """The model as the stages take it; see `describe_source`."""
    with loading_packages():
        from samq.sensitivity.checkpoint import describe_source

    with bar(f"find {Path(model).name}"):
        return describe_source(model, revision=revision, hf_folder=hf_folder)


def adopt(files: dict[str, Path]) -> "Artifact":
    """Put the user's files into the store, under these names, as if a stage had made them."""
    from samq.files import GGUF_NAME
    from samq.gguf.file import read_tensors
    from samq.llamacpp.convert import link_or_copy
    from samq.records import digest_of
    from samq.store import Store

    for name, path in files.items():
        if name == GGUF_NAME:
            with bar(f"open {path.name}"):
                read_tensors(path)  # raises SamqError for anything but a whole GGUF
        elif not path.is_file():
            raise SamqError(f"{path} does not exist; check the path or create the file again")
    store, key = Store(store_folder()), digest_of({name: sha256(path) for name, path in files.items()})
    if store.find("adopted", key) is None:
        with store.publish("adopted", key) as folder:
            for name, path in files.items():
                link_or_copy(path, folder / name)
    artifact = store.find("adopted", key)
    assert artifact is not None, "just published"
    return artifact


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, with a progress bar: a large file takes minutes."""
    from samq.gguf.file import file_sha256

    with bar(f"read {path.name}"):
        return file_sha256(path)


def fisher_beside(sensitivity: Path) -> Path:
    """Where `samq calibrate` writes the Fisher information that belongs to a sensitivity map."""
    return sensitivity.with_suffix(".fisher.safetensors")
