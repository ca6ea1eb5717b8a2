"""Stages: the baseline's logits once, and everything measured on each candidate.

Both run as a child process: a crash or a hang inside llama.cpp fails that candidate, not the flow.
"""

import logging
import re
import sys
from pathlib import Path

from filelock import FileLock

from samq.evaluation.settings import BaselineRequest, BenchmarkRequest, EvaluationRequest, EvaluationSettings
from samq.evaluation.vram import vram_warning
from samq.files import EVALUATION_NAME, GGUF_NAME, HELDOUT_NAME
from samq.llamacpp.gpu import release_torch_cache
from samq.llamacpp.process import run
from samq.progress import bar
from samq.records import Evaluation
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.gpu import in_turn, llama_cpp_has_gpu
from tasks.stage import stage

log = logging.getLogger("samq.evaluate")


@stage("baseline", version=1, run_name="baseline logits", packages=("llama-cpp-python",))
@in_turn(llama_cpp_has_gpu)
def baseline(at: Workspace, folder: Path, full: Artifact, heldout: Artifact, settings: EvaluationSettings) -> None:
    """`logits.npy`: the full-precision model's logits on the held-out text, and `baseline.json`."""
    request = BaselineRequest(
        gguf=full.path(GGUF_NAME),
        sha256=full.files[GGUF_NAME].sha256,
        tokens=heldout.path(HELDOUT_NAME),
        output=folder,
        settings=settings,
    )
    measure_alone(request, folder, "baseline logits", at.timeout_s)


@stage(
    "evaluate",
    version=5,
    run_name="evaluate {name}",
    packages=("llama-cpp-python", "jsonschema"),
)
@in_turn(llama_cpp_has_gpu)
def evaluate(
    at: Workspace,
    folder: Path,
    name: str,
    model: Artifact,
    heldout: Artifact,
    baseline: Artifact,
    settings: EvaluationSettings,
) -> None:
    """`evaluation.json` and, beside it, what was measured token by token and item by item, in parquet."""
    request = EvaluationRequest(
        name=name,
        gguf=model.path(GGUF_NAME),
        sha256=model.files[GGUF_NAME].sha256,
        tokens=heldout.path(HELDOUT_NAME),
        baseline=baseline.whole(),
        output=folder,
        settings=settings,
    )
    measure_alone(request, folder, f"evaluate {name}", at.timeout_s)
    if warning := vram_warning(Evaluation.load(folder / EVALUATION_NAME)):
        log.warning("%s", warning)


def measure_alone(
    request: BaselineRequest | EvaluationRequest | BenchmarkRequest, folder: Path, what: str, timeout_s: float
) -> None:
    """Run samq.evaluation on the request, alone among all measurements of this store: latencies are compared."""
    path = request.save(folder / "request.log")  # it names this machine's paths, so it is no part of the content
    with bar(what) as progress:

        def on_line(line: str) -> None:
            if step := re.match(r"progress: .* (\d+)/(\d+)$", line):
                progress(int(step[1]), int(step[2]))

        command: list[str | Path] = [sys.executable, "-m", "samq.evaluation", path]
        with FileLock(folder.parent / "measuring"):
            release_torch_cache()
            run(command, log=folder / "evaluate.log", timeout_s=timeout_s, on_line=on_line)
