"""Stage: full-precision GGUF."""

from pathlib import Path

from samq.llamacpp import programs as quantizer
from samq.allocation.target import Target
from samq.progress import bar
from samq.llamacpp.programs import GGUF_NAME, IMATRIX_NAME
from samq.records import ModelSource, Toolchain
from samq.store import Artifact
from tasks.stage import stage


@stage("convert", version=1, run_name="convert {source.name} to {precision}", packages=("gguf", "transformers"))
def convert(
    folder: Path, source: ModelSource, toolchain: Toolchain, converter: str | None, precision: str, timeout_s: float
) -> None:
    """`model.gguf`: the model in F16 or BF16, by llama.cpp's converter.

    `converter` is for the key: the build of the scripts (`converter_build`), which the programs' build leaves out.
    """
    with bar(f"convert {source.name}"):
        quantizer.convert(source, folder, toolchain, precision=precision, timeout_s=timeout_s)


def open_target(full: Artifact, imatrix: Artifact | None, toolchain: Toolchain) -> Target:
    """The GGUF that is planned for."""
    matrix = imatrix.path(IMATRIX_NAME) if imatrix else None
    return Target.open(full.path(GGUF_NAME), toolchain, matrix, full.files[GGUF_NAME].sha256)
