"""Stage: importance matrix."""

from pathlib import Path

from samq.progress import bar
from samq.llamacpp.programs import GGUF_NAME, measure_imatrix
from samq.records import TextSet, Toolchain
from samq.store import Artifact
from tasks.stage import stage


@stage("imatrix", version=1, run_name="imatrix on {texts.dataset}")
def imatrix(
    folder: Path, full: Artifact, texts: TextSet, context_tokens: int, toolchain: Toolchain, timeout_s: float
) -> None:
    """`imatrix.gguf`: mean squared activations on the calibration text, by llama-imatrix."""
    text = "\n".join(texts.texts)
    with bar("importance matrix"):
        measure_imatrix(
            full.path(GGUF_NAME), text, folder, toolchain, context_tokens=context_tokens, timeout_s=timeout_s
        )
