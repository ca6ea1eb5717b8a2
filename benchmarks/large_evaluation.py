"""What needs llama.cpp in large_model.py: agreement with torch, the baseline's logits, and the candidates' KL divergence.

llama.cpp runs in a child process, as in the flow, with as many layers on a GPU as fit.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from large_stages import Stages, peak_rss

from samq.data.tokens import TokenBatch
from samq.evaluation.agreement import enough_tokens, measure_agreement, require_agreement, settings_for
from samq.evaluation.baseline import cut_chunks
from samq.evaluation.settings import BaselineRequest, EvaluationRequest, EvaluationSettings
from samq.gguf.file import read_metadata
from samq.records import Evaluation, ModelSource

SEED = 2  # not that of the calibration


def in_child(request: BaselineRequest | EvaluationRequest, work: Path, figures: dict[str, Any]) -> None:
    """Carry out a request in a process of its own; adds the peak of its resident memory, with mapped pages, to the figures."""
    log = work / "evaluation.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "samq.evaluation", str(request.save(work / "request.json"))]
        child, peak = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT), 0
        while child.poll() is None:  # a child's ru_maxrss would include this process's own peak
            peak = max(peak, peak_rss(child.pid))
            time.sleep(0.05)
    lines = log.read_text(errors="replace").splitlines()
    if child.returncode:
        raise SystemExit("\n".join([f"samq.evaluation ended with {child.returncode}", *lines[-20:]]))
    for line in lines:
        if not line.startswith("progress: "):
            print(line, file=sys.stderr)
    figures["peak_rss_of_llama_cpp_bytes"] = peak


def random_tokens(count: int, vocabulary: int, path: Path) -> Path:
    """Token ids for llama.cpp, as samq.data.tokens saves them."""
    ids = np.random.default_rng(SEED).integers(0, vocabulary, count)
    return TokenBatch.of([ids.tolist()]).save(path)


def compare_with_torch(
    model: Any, source: ModelSource, dtype: str, full: Path, limit: int | None, stages: Stages
) -> dict[str, Any]:
    """The stage `agreement` on random tokens; ends the run if the two compute different models."""
    work, vocabulary = full.parent, model.config.vocab_size
    settings = settings_for(read_metadata(full)["llama.context_length"])
    ids = enough_tokens(np.random.default_rng(SEED).integers(0, vocabulary, 4096).astype(np.int32), settings)
    tokens = TokenBatch.of([ids.tolist()]).save(work / "agreement.npz")
    with stages.of("agreement") as figures:
        request = BaselineRequest(gguf=full, sha256="full", tokens=tokens, output=work / "agreement", settings=settings)
        with stages.leaving(limit):
            in_child(request, work, figures)
        chunks = cut_chunks(ids, settings.context_tokens, None)
        agreement = measure_agreement(model, dtype, chunks, work / "agreement", settings, full)
    require_agreement(agreement, source)
    return agreement.model_dump(mode="json")


def evaluate(full: Path, files: dict[str, Path], chunks: int, limit: int | None, stages: Stages) -> dict[str, Any]:
    """The baseline's logits, and each file's evaluation; with `limit` no more bytes of a GPU than that are free."""
    work, vocabulary = full.parent, int(read_metadata(full)["llama.vocab_size"])
    settings = EvaluationSettings(chunks=chunks, json_prompts=0, speed_requests=2, speed_warmup=1)
    tokens = random_tokens(chunks * settings.context_tokens, vocabulary, work / "heldout.npz")
    folder = work / "baseline"
    with stages.of("baseline logits") as figures, stages.leaving(limit):
        request = BaselineRequest(gguf=full, sha256="full", tokens=tokens, output=folder, settings=settings)
        in_child(request, work, figures)
    evaluations = {}
    for name, path in files.items():
        with stages.of(f"evaluate {name}") as figures, stages.leaving(limit):
            request = EvaluationRequest(
                gguf=path,
                sha256=name,
                tokens=tokens,
                output=work / f"evaluation-{name}",
                settings=settings,
                name=name,
                baseline=folder,
            )
            in_child(request, work, figures)
        evaluation = Evaluation.load(request.output / "evaluation.json")
        evaluations[name] = evaluation.model_dump(mode="json", include={"metrics", "missing", "environment"})
        kld = evaluation.metrics["fidelity/mean_kld_nats"].value
        print(
            f"{name:26} mean KLD {kld:.5f} nats, layers on the GPU: {evaluation.environment['gpu_layers']}", flush=True
        )
    return evaluations
