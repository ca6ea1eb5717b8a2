"""Stage: full-precision GGUF."""

from pathlib import Path

from samq.errors import SamqError
from samq.llamacpp.convert import convert as run_converter
from samq.llamacpp.runtime import LoadError, Model
from samq.progress import bar
from samq.records import ModelSource
from samq.workspace import Workspace
from tasks.stage import stage


@stage(
    "convert",
    version=3,
    run_name="convert {source.name} to {precision}",
    keyed_by=("toolchain", "converter"),
    packages=("gguf", "transformers"),
)
def convert(at: Workspace, folder: Path, source: ModelSource, precision: str) -> None:
    """`model.gguf`: the model in F16 or BF16, by llama.cpp's converter; SamqError if llama.cpp then cannot load it."""
    with bar(f"convert {source.name}"):
        gguf = run_converter(source, folder, at.toolchain, precision=precision, timeout_s=at.timeout_s)
    try:
        Model(gguf, allocate=False).close()
    except LoadError as error:
        if source.gguf is not None:
            raise
        raise SamqError(
            f"llama.cpp cannot load what its converter made of {source.name}: {error.reason}; compare config.json with the "
            "published model's, or choose another model"
        ) from error
