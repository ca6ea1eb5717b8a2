"""Stage: importance matrix."""

from pathlib import Path

from samq.files import GGUF_NAME
from samq.llamacpp.imatrix import measure_imatrix
from samq.progress import bar
from samq.records import TextSet
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.stage import stage


@stage("imatrix", version=1, run_name="imatrix on {texts.dataset}", keyed_by=("toolchain",))
def imatrix(at: Workspace, folder: Path, full: Artifact, texts: TextSet, context_tokens: int) -> None:
    """`imatrix.gguf`: mean squared activations on the calibration text, by llama-imatrix."""
    text = "\n".join(texts.texts)
    with bar("importance matrix"):
        measure_imatrix(
            full.path(GGUF_NAME), text, folder, at.toolchain, context_tokens=context_tokens, timeout_s=at.timeout_s
        )
