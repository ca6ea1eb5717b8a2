"""Stage: check of a plan's predicted KL on calibration sequences that did not choose it."""

from pathlib import Path

from samq.data.tokens import TokenBatch
from samq.allocation.check import check_prediction
from samq.allocation.prices import plan_cost
from samq.progress import bar
from samq.llamacpp.programs import GGUF_NAME
from samq.records import ModelSource, PredictionCheck
from samq.store import Artifact
from tasks.calibrate import open_model
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
    batch, wanted = TokenBatch.load(tokens.path(TOKENS_NAME)), load_plan(plan)
    model, names, orders = open_model(source, full, dtype, device)
    with bar(f"check {name}") as progress:
        found = check_prediction(
            model,
            batch.part(len(batch) - last, len(batch)),
            wanted,
            plan_cost(load_prices(prices), wanted.types),
            names=names,
            original=full.path(GGUF_NAME),
            rounded=gguf.path(GGUF_NAME),
            row_orders=orders,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    found.save(folder / CHECK_NAME)


def load_check(made: Artifact) -> PredictionCheck:
    """The record in an artifact of this stage."""
    return PredictionCheck.load(made.path(CHECK_NAME))
