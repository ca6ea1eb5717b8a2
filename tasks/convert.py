"""Stage: full-precision GGUF."""

from pathlib import Path

from samq import quantizer
from samq.records import ModelSource, Toolchain
from tasks.stage import stage


@stage("convert", version=1, run_name="convert {source.name} to {precision}", packages=("gguf", "transformers"))
def convert(folder: Path, source: ModelSource, toolchain: Toolchain, precision: str, timeout_s: float) -> None:
    """`model.gguf`: the model in F16 or BF16, by llama.cpp's converter."""
    quantizer.convert(source, folder, toolchain, precision=precision, timeout_s=timeout_s)
