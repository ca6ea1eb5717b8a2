"""Stage: sensitivity map."""

from pathlib import Path

from samq.calibration import TokenBatch
from samq.gguf_file import gguf_names, read_metadata
from samq.model import load_model
from samq.progress import bar
from samq.quantizer import GGUF_NAME
from samq.records import CalibrationSet, ModelSource
from samq.sensitivity import measure_sensitivity
from samq.store import Artifact
from tasks.stage import stage
from tasks.text import SET_NAME, TOKENS_NAME

MAP_NAME = "sensitivity-map.json"


@stage("calibrate", version=1, run_name="calibrate {source.name}", packages=("torch", "transformers"), retries=1)
def calibrate(
    folder: Path,
    source: ModelSource,
    full: Artifact,
    tokens: Artifact,
    batch_size: int,
    dtype: str,
    device: str,
    seed: int,
) -> None:
    """`sensitivity-map.json`: gradient norms of every weight tensor, in GGUF names."""
    gguf = full.path(GGUF_NAME)
    weights = source.model_copy(update={"gguf": gguf}) if source.gguf else source
    model, _ = load_model(weights, dtype=dtype, device=device)
    with bar(f"calibrate {source.name}") as progress:
        sensitivity, _ = measure_sensitivity(
            model,
            TokenBatch.load(tokens.path(TOKENS_NAME)),
            names=gguf_names(read_metadata(gguf)),
            batch_size=batch_size,
            labels="text",
            second_moment=False,
            seed=seed,
            progress=progress,
            model_digest=source.digest(),
            calibration_digest=CalibrationSet.load(tokens.path(SET_NAME)).digest(),
        )
    sensitivity.save(folder / MAP_NAME)
