"""Stage: sensitivity map."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from samq.data.tokens import TokenBatch
from samq.sensitivity.fisher import load_fisher, save_fisher
from samq.gguf.file import gguf_names, read_metadata
from samq.sensitivity.layout import row_orders, weights_of
from samq.sensitivity.hf_model import load_model
from samq.progress import bar
from samq.llamacpp.programs import GGUF_NAME
from samq.records import CalibrationSet, ModelSource, SensitivityMap
from samq.sensitivity.measure import Labels, measure_sensitivity, merge
from samq.store import Artifact
from tasks.stage import stage
from tasks.text import SET_NAME, TOKENS_NAME

MAP_NAME, FISHER_NAME = "sensitivity-map.json", "fisher.safetensors"


@stage(
    "calibrate", version=3, run_name="calibrate {source.name} on {count}", packages=("torch", "transformers"), retries=1
)
def calibrate(
    folder: Path,
    source: ModelSource,
    full: Artifact,
    tokens: Artifact,
    count: int,
    before: Artifact | None,
    batch_size: int,
    dtype: str,
    device: str,
    labels: Labels,
    seed: int,
) -> None:
    """`sensitivity-map.json` and `fisher.safetensors` of the first `count` sequences, going on from those of `before`."""
    model, names, orders = open_model(source, full, dtype, device)
    known = (SensitivityMap.load(before.path(MAP_NAME)), load_fisher(before.path(FISHER_NAME))) if before else None
    first = known[0].samples if known else 0
    with bar(f"calibrate {source.name}") as progress:
        found, fisher = measure_sensitivity(
            model,
            TokenBatch.load(tokens.path(TOKENS_NAME)).part(first, count),
            names=names,
            row_orders=orders,
            batch_size=batch_size,
            labels=labels,
            seed=seed,
            first_sequence=first,
            progress=progress,
            model_digest=source.digest(),
            calibration_digest=CalibrationSet.load(tokens.path(SET_NAME)).digest(),
        )
    assert fisher is not None, "asked for"
    found, fisher = merge(known, (found, fisher)) if known else (found, fisher)
    found.save(folder / MAP_NAME)
    save_fisher(folder / FISHER_NAME, fisher)


def open_model(
    source: ModelSource, full: Artifact, dtype: str, device: str
) -> tuple[PreTrainedModel, Callable[[str], str | None], dict[str, np.ndarray]]:
    """The model in torch, its GGUF names, and the row orders of `full`."""
    model, names = load_full(source, full, dtype, device)
    with bar(f"compare {source.name} with its GGUF") as progress:
        return model, names, row_orders(weights_of(model, names), full.path(GGUF_NAME), progress)


def load_full(
    source: ModelSource, full: Artifact, dtype: str, device: str
) -> tuple[PreTrainedModel, Callable[[str], str | None]]:
    """The model in torch, and its GGUF names; a GGUF source's weights come from the full-precision GGUF made of it."""
    gguf = full.path(GGUF_NAME)
    weights = source.model_copy(update={"gguf": gguf}) if source.gguf else source
    with bar(f"load {source.name}") as progress:
        model, _ = load_model(weights, dtype=dtype, device=device, progress=progress)
        return model, gguf_names(read_metadata(gguf))
