"""What was measured, as the results of a sweep."""

from collections.abc import Mapping, Sequence

from samq.allocation.prices import lengthened, predicted_cost
from samq.errors import SamqError
from samq.files import EVALUATION_NAME, GGUF_NAME, QUANTIZED_NAME
from samq.gguf.audit import as_is
from samq.records import Evaluation, PriceTable, QuantizedModel, Rounding
from samq.store import Artifact
from samq.sweep.selection import Failure, Result
from tasks.plan import FULL, load_plan


def load_results(
    plans: Mapping[str, Artifact],
    ggufs: Mapping[str, Artifact],
    evaluations: Mapping[str, Artifact],
    tables: Mapping[Rounding, PriceTable],
) -> tuple[Result, ...]:
    """A result for each candidate that was measured, in the order of the evaluations."""
    return tuple(_result(plans[name], ggufs[name], measured, tables) for name, measured in evaluations.items())


def require_candidates(evaluations: Mapping[str, Artifact], failures: Sequence[Failure]) -> None:
    """Raises SamqError if the baseline or every other candidate failed: then nothing can be compared."""
    if FULL not in evaluations or len(evaluations) == 1:
        reasons = "; ".join(f"{'baseline' if one.name == FULL else one.name}: {one.reason}" for one in failures)
        raise SamqError(f"the baseline or every candidate failed ({reasons}); see the logs of this run")


def _result(planned: Artifact, gguf: Artifact, evaluated: Artifact, tables: Mapping[Rounding, PriceTable]) -> Result:
    plan, path = load_plan(planned), gguf.folder / GGUF_NAME  # which may be on another machine
    if plan.policy == "full":
        model = as_is(gguf.path(GGUF_NAME), gguf.files[GGUF_NAME].sha256, plan)
    else:
        model = QuantizedModel.load(gguf.path(QUANTIZED_NAME))
    table = tables[plan.rounding]
    return Result(
        plan,
        model,
        Evaluation.load(evaluated.path(EVALUATION_NAME)),
        path,
        evaluated.whole(),
        predicted_cost(table, plan),
        lengthened=lengthened(table, plan),
    )
