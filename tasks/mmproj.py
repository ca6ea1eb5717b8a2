"""Stage: vision or audio part of a multimodal model."""

import logging
from pathlib import Path

from samq.errors import SamqError
from samq.files import MMPROJ_NAME
from samq.llamacpp.convert import convert_mmproj as run_converter
from samq.progress import bar
from samq.records import ModelSource
from samq.sensitivity.checkpoint import is_multimodal
from samq.workspace import Workspace
from tasks.stage import stage

log = logging.getLogger("samq.mmproj")


@stage(
    "mmproj",
    version=1,
    run_name="convert vision or audio part of {source.name} to {precision}",
    keyed_by=("toolchain", "converter"),
    packages=("gguf", "transformers"),
)
def mmproj(at: Workspace, folder: Path, source: ModelSource, precision: str) -> None:
    """`mmproj.gguf`: what images or sound pass through before the text model, in F16 or Q8_0, by llama.cpp's converter."""
    with bar(f"convert vision or audio part of {source.name}"):
        run_converter(source, folder, at.toolchain, precision=precision, timeout_s=at.timeout_s)


def convert_mmproj(at: Workspace, source: ModelSource, precision: str) -> Path | None:
    """The path of `mmproj.gguf`; None if the model has only text, or if the converter fails, which the log says."""
    if not is_multimodal(source):
        return None
    try:
        path = mmproj(at, source, precision).path(MMPROJ_NAME)
    except SamqError as error:
        log.warning("only the text part of %s is converted: %s", source.name, error)
        return None
    log.info("vision or audio part: %s (for llama-server --mmproj)", path)
    return path
