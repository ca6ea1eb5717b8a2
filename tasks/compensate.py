"""Stages of compensated rounding (GPTQ): Gram matrices, a rung's tensors, and whole files of llama-quantize."""

import logging
from pathlib import Path

import numpy as np

from samq.data.tokens import TokenBatch
from samq.files import COMPENSATED_NAME, COMPENSATION_NAME, GGUF_NAME, GRAM_NAME, QUANTIZED_NAME, TOKENS_NAME
from samq.gguf import audit
from samq.gguf.file import read_metadata, read_tensors
from samq.progress import bar
from samq.quantization import compensation
from samq.sensitivity.gram import GramMatrices, measure_gram, without_layer
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.model import TorchModel
from tasks.plan import load_plan
from tasks.stage import stage
from tasks.text import FirstSequences

log = logging.getLogger("samq.compensate")


@stage(
    "gram",
    version=3,
    run_name="gram {model.source.name}",
    keyed_by=("device",),
    packages=("torch", "transformers"),
    retries=1,
)
def gram(
    at: Workspace, folder: Path, model: TorchModel, sequences: FirstSequences, most_tokens: int, batch_size: int
) -> None:
    """`gram.safetensors`: the Gram matrix of every linear layer's inputs, on the first sequences.

    Of the sequences it takes as many as `most_tokens` come from.
    """
    batch = TokenBatch.load(sequences.tokens.path(TOKENS_NAME))
    enough = int(np.searchsorted(np.cumsum(batch.lengths), most_tokens)) + 1
    torch_model, layout = model.load_with_layout(at)
    tensors = read_tensors(model.full.path(GGUF_NAME))
    quantizable = [weight for weight in layout.weights if tensors[weight.name].type != "F32"]
    if rounded := without_layer(torch_model, quantizable):
        more = f", and {len(rounded) - 8} more" if len(rounded) > 8 else ""
        names = ", ".join(rounded[:8])
        log.warning("%d tensors of no linear layer are rounded without compensation: %s%s", len(rounded), names, more)
    with bar(f"gram {model.source.name}") as progress:
        measure_gram(
            torch_model,
            batch.part(0, min(sequences.count, enough)),
            folder / GRAM_NAME,
            layout.weights,
            batch_size=batch_size,
            progress=progress,
        )


@stage(
    "compensate_rung",
    version=1,
    run_name="compensate ladder {name}",
    keyed_by=("device",),
    packages=("torch", "llama-cpp-python"),
)
def compensate_rung(
    at: Workspace, folder: Path, name: str, full: Artifact, rung: Artifact, tensors: list[str], grams: Artifact
) -> None:
    """`compensated.gguf`: those of `tensors` that can be compensated, in the rung's type; and `compensation.json`.

    All plans that have a tensor in this type take it from here, so that one more candidate is one more copy.
    """
    with bar(f"compensate ladder {name}") as progress:
        report = compensation.compensate_rung(
            full.path(GGUF_NAME),
            rung.path(GGUF_NAME),
            tensors,
            GramMatrices(grams.path(GRAM_NAME)),
            folder / COMPENSATED_NAME,
            device=at.compute_device,
            progress=progress,
        )
    report.save(folder / COMPENSATION_NAME)


@stage(
    "compensate",
    version=1,
    run_name="compensate {name}",
    keyed_by=("device",),
    packages=("torch", "llama-cpp-python"),
)
def compensate(
    at: Workspace, folder: Path, name: str, full: Artifact, plan: Artifact, rounded: Artifact, grams: Artifact
) -> None:
    """The files of `quantize`, with every tensor compensated that can be, and `compensation.json`.

    For what llama-quantize itself wrote; what is assembled takes its tensors from `compensate_rung`.
    """
    loaded, nearest = load_plan(plan), rounded.path(GGUF_NAME)
    audit.require_space(folder, loaded, nearest.stat().st_size)
    partial = folder / f"{GGUF_NAME}.partial"
    with bar(f"compensate {name}") as progress:
        report = compensation.compensate(
            full.path(GGUF_NAME),
            nearest,
            GramMatrices(grams.path(GRAM_NAME)),
            partial,
            device=at.compute_device,
            progress=progress,
        )
    report.save(folder / COMPENSATION_NAME)
    with bar(f"audit {name}"):
        metadata = {key: str(value) for key, value in read_metadata(nearest).items() if key.startswith("samq.")}
        audit.accept(partial, loaded, metadata, full.path(GGUF_NAME)).save(folder / QUANTIZED_NAME)
