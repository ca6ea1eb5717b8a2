"""Stages of compensated rounding: Gram matrices, what the ladder's types cost with it, and what is rounded anew."""

from pathlib import Path

import numpy as np

from samq.gguf import audit
from samq.quantization import compensation
from samq.data.tokens import TokenBatch
from samq.gguf.file import read_metadata
from samq.sensitivity.gram import GramMatrices, measure_gram
from samq.sensitivity.hf_model import compute_device
from samq.progress import bar
from samq.llamacpp.programs import GGUF_NAME
from samq.records import ModelSource
from samq.store import Artifact
from tasks.calibrate import load_full
from tasks.plan import load_plan
from tasks.price import PRICES_NAME, load_prices
from tasks.quantize import COMPENSATED_NAME, MODEL_NAME
from tasks.stage import stage
from tasks.text import TOKENS_NAME

GRAM_NAME, COMPENSATION_NAME = "gram.safetensors", "compensation.json"


@stage("gram", version=1, run_name="gram {source.name}", packages=("torch", "transformers"), retries=1)
def gram(
    folder: Path,
    source: ModelSource,
    full: Artifact,
    tokens: Artifact,
    count: int,
    most_tokens: int,
    batch_size: int,
    dtype: str,
    device: str,
) -> None:
    """`gram.safetensors`: how the inputs of every linear layer vary together, on the first `count` sequences,
    or as many of them as `most_tokens` come from.
    """
    batch = TokenBatch.load(tokens.path(TOKENS_NAME))
    enough = int(np.searchsorted(np.cumsum(batch.lengths), most_tokens)) + 1
    model, names = load_full(source, full, dtype, device)
    with bar(f"gram {source.name}") as progress:
        measure_gram(
            model,
            batch.part(0, min(count, enough)),
            folder / GRAM_NAME,
            names=names,
            batch_size=batch_size,
            progress=progress,
        )


@stage("price", version=2, run_name="price compensated rounding", packages=("torch",))
def price_compensated(folder: Path, prices: Artifact, grams: Artifact, device: str) -> None:
    """`prices.json`: the price table as it is with compensated rounding."""
    with bar("price compensated rounding") as progress:
        table = compensation.compensated_prices(
            load_prices(prices),
            GramMatrices(grams.path(GRAM_NAME)),
            device=compute_device(device),
            progress=progress,
        )
    table.save(folder / PRICES_NAME)


@stage("compensate_rung", version=1, run_name="compensate ladder {name}", packages=("torch", "llama-cpp-python"))
def compensate_rung(
    folder: Path, name: str, full: Artifact, rung: Artifact, tensors: list[str], grams: Artifact, device: str
) -> None:
    """`compensated.gguf`: those of `tensors` that can be rounded anew, as the rung has them; and `compensation.json`.

    All plans that have a tensor in this type take it from here, so that one more candidate is one more copy.
    """
    with bar(f"compensate ladder {name}") as progress:
        done = compensation.compensate_rung(
            full.path(GGUF_NAME),
            rung.path(GGUF_NAME),
            tensors,
            GramMatrices(grams.path(GRAM_NAME)),
            folder / COMPENSATED_NAME,
            device=compute_device(device),
            progress=progress,
        )
    done.save(folder / COMPENSATION_NAME)


@stage("compensate", version=1, run_name="compensate {name}", packages=("torch", "llama-cpp-python"))
def compensate(
    folder: Path, name: str, full: Artifact, plan: Artifact, rounded: Artifact, grams: Artifact, device: str
) -> None:
    """The files of `quantize`, every tensor's errors made up for where that is possible, and `compensation.json`.

    For what llama-quantize itself wrote; what is assembled takes its tensors from `compensate_rung`.
    """
    wanted, nearest = load_plan(plan), rounded.path(GGUF_NAME)
    audit.require_space(folder, wanted, nearest.stat().st_size)
    partial = folder / f"{GGUF_NAME}.partial"
    with bar(f"compensate {name}") as progress:
        done = compensation.compensate(
            full.path(GGUF_NAME),
            nearest,
            GramMatrices(grams.path(GRAM_NAME)),
            partial,
            device=compute_device(device),
            progress=progress,
        )
    done.save(folder / COMPENSATION_NAME)
    with bar(f"check what {name} became"):
        metadata = {key: str(value) for key, value in read_metadata(nearest).items() if key.startswith("samq.")}
        audit.accept(partial, wanted, metadata).save(folder / MODEL_NAME)
