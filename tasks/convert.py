"""Stage: full-precision GGUF."""

from pathlib import Path

from samq.llamacpp import programs
from samq.progress import bar
from samq.records import ModelSource
from samq.workspace import Workspace
from tasks.stage import stage


@stage(
    "convert",
    version=2,
    run_name="convert {source.name} to {precision}",
    keyed_by=("toolchain", "converter"),
    packages=("gguf", "transformers"),
)
def convert(at: Workspace, folder: Path, source: ModelSource, precision: str) -> None:
    """`model.gguf`: the model in F16 or BF16, by llama.cpp's converter."""
    with bar(f"convert {source.name}"):
        programs.convert(source, folder, at.toolchain, precision=precision, timeout_s=at.timeout_s)
