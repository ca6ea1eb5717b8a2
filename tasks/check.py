"""Stage: check of a plan's predicted KL on calibration sequences that did not choose it."""

from pathlib import Path

from samq.calibration import TokenBatch
from samq.gguf_file import gguf_names, read_metadata
from samq.layout import row_orders, weights_of
from samq.model import load_model
from samq.prediction_check import check_prediction
from samq.prices import plan_cost
from samq.progress import bar
from samq.quantizer import GGUF_NAME
from samq.records import ModelSource, PredictionCheck
from samq.store import Artifact
from tasks.calibrate import weights_in
from tasks.plan import load_plan
from tasks.price import load_prices
from tasks.stage import stage
from tasks.text import TOKENS_NAME

CHECK_NAME = "prediction-check.json"


@stage("check", version=1, run_name="check {name}", packages=("torch", "transformers"), retries=1)
def check(
    folder: Path,
    name: str,
    source: ModelSource,
    full: Artifact,
    tokens: Artifact,
    last: int,
    plan: Artifact,
    prices: Artifact,
    gguf: Artifact,
    batch_size: int,
    dtype: str,
    device: str,
    seed: int,
) -> None:
    """`prediction-check.json`: the plan's second-order cost on the `last` sequences of the calibration set."""
    original, batch = full.path(GGUF_NAME), TokenBatch.load(tokens.path(TOKENS_NAME))
    model, _ = load_model(weights_in(source, full), dtype=dtype, device=device)
    names, wanted = gguf_names(read_metadata(original)), load_plan(plan)
    with bar(f"check {name}") as progress:
        found = check_prediction(
            model,
            batch.part(len(batch) - last, len(batch)),
            wanted,
            plan_cost(load_prices(prices), wanted.types),
            names=names,
            original=original,
            rounded=gguf.path(GGUF_NAME),
            row_orders=row_orders(weights_of(model, names), original),
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    found.save(folder / CHECK_NAME)


def load_check(made: Artifact) -> PredictionCheck:
    """The record in an artifact of this stage."""
    return PredictionCheck.load(made.path(CHECK_NAME))
