"""Stage: check of a plan's predicted KL on calibration sequences that did not choose it."""

from dataclasses import dataclass
from pathlib import Path

from samq.allocation.prediction_check import RoundedPlan, check_prediction
from samq.allocation.prices import plan_cost
from samq.data.tokens import TokenBatch
from samq.files import CHECK_NAME, GGUF_NAME, TOKENS_NAME
from samq.progress import bar
from samq.records import PredictionCheck
from samq.sensitivity.memory import Memory
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.gpu import in_turn, torch_has_gpu
from tasks.model import TorchModel
from tasks.plan import load_plan
from tasks.price import load_prices
from tasks.stage import stage
from tasks.text import LastSequences


@dataclass(frozen=True)
class BuiltPlan:
    """A plan, the prices that chose it, and its GGUF."""

    name: str
    plan: Artifact
    prices: Artifact
    gguf: Artifact


@stage(
    "check",
    version=4,
    run_name="check {candidate.name}",
    keyed_by=("device",),
    packages=("torch", "transformers"),
    retries=1,
    goes_on=True,
)
@in_turn(torch_has_gpu)
def check(
    at: Workspace,
    folder: Path,
    model: TorchModel,
    sequences: LastSequences,
    candidate: BuiltPlan,
    batch_size: int,
    seed: int,
) -> None:
    """`prediction-check.json`: the plan's second-order cost on the last sequences of the calibration set."""
    batch, plan = TokenBatch.load(sequences.tokens.path(TOKENS_NAME)), load_plan(candidate.plan)
    predicted = plan_cost(load_prices(candidate.prices), plan.types)
    torch_model, layout = model.load_with_layout(at)
    with bar(f"check {candidate.name}") as progress:
        prediction = check_prediction(
            torch_model,
            batch.part(len(batch) - sequences.last, len(batch)),
            RoundedPlan(plan, predicted, model.full.path(GGUF_NAME), candidate.gguf.path(GGUF_NAME)),
            layout,
            batch_size=batch_size,
            seed=seed,
            memory=Memory(at.memory_limit, at.scratch),  # one device, since rounding errors are read for one
            progress=progress,
        )
    prediction.save(folder / CHECK_NAME)


def load_check(check: Artifact) -> PredictionCheck:
    """The record in an artifact of this stage."""
    return PredictionCheck.load(check.path(CHECK_NAME))
