"""How a sweep differs from the one before: inputs, sizes, fidelity, plans and benchmarks of candidates of the same name."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from samq.errors import SamqError
from samq.evaluation.metrics import KLD
from samq.records import Evaluation, Metric, Plan
from samq.sweep.benchmarking import compared_items
from samq.sweep.comparison import compare, read_tokens
from samq.sweep.selection import Comparison, Result
from samq.sweep.significance import PairedComparison, compare_items

logger = logging.getLogger(__name__)

LAST = "last sweep"  # as the reference of comparisons


@dataclass(frozen=True)
class LastCandidate:
    """A candidate of the sweep before, as it was tracked."""

    name: str
    plan: Plan
    evaluation: Evaluation
    bytes: int
    items: pd.DataFrame  # of its benchmarks and JSON prompts
    tokens: pd.DataFrame | None  # the scored tokens; None if they were not kept


@dataclass(frozen=True)
class CandidateDrift:
    """One candidate, then and now."""

    name: str
    bytes: int
    last_bytes: int
    kld: Metric | None
    last_kld: Metric | None
    comparison: Comparison | None  # of mean KLD, token by token; None if the held-out tokens are others
    types: dict[str, tuple[str | None, str | None]]  # tensors with another type: then and now; None: no such tensor
    tensors: int  # in either
    benchmarks: tuple[PairedComparison, ...]


@dataclass(frozen=True)
class Drift:
    """A sweep against the one before it."""

    last_run: str  # its name in MLflow
    inputs: dict[str, tuple[str, str]]  # what differs of the inputs: then and now
    candidates: tuple[CandidateDrift, ...]  # those of both, in the order of the sweep
    gone: tuple[str, ...]
    new: tuple[str, ...]


def drift_of(
    results: Sequence[Result],
    inputs: Mapping[str, str],
    last_run: str,
    last_inputs: Mapping[str, str],
    last: Iterable[LastCandidate],
    margin: float,
) -> Drift:
    """Compare candidates by their names; `margin` is of benchmarks, as for `compare_benchmarks`."""
    before = {candidate.name: candidate for candidate in last}
    now = [result.name for result in results]
    return Drift(
        last_run=last_run,
        inputs={
            name: (last_inputs.get(name, ""), inputs.get(name, ""))
            for name in dict.fromkeys((*inputs, *last_inputs))
            if last_inputs.get(name, "") != inputs.get(name, "")
        },
        candidates=tuple(
            _candidate(result, before[result.name], margin) for result in results if result.name in before
        ),
        gone=tuple(name for name in before if name not in now),
        new=tuple(name for name in now if name not in before),
    )


def _candidate(result: Result, last: LastCandidate, margin: float) -> CandidateDrift:
    types, last_types = result.plan.types, last.plan.types
    tensors = dict.fromkeys((*last_types, *types))
    return CandidateDrift(
        name=result.name,
        bytes=result.bytes,
        last_bytes=last.bytes,
        kld=result.kld,
        last_kld=last.evaluation.metrics.get(KLD),
        comparison=_compared(result, last),
        types={
            name: (last_types.get(name), types.get(name)) for name in tensors if last_types.get(name) != types.get(name)
        },
        tensors=len(tensors),
        benchmarks=tuple(_benchmarks(result, last, margin)),
    )


def _compared(result: Result, last: LastCandidate) -> Comparison | None:
    if result.plan.policy == "full" or last.tokens is None or not result.kld:
        return None
    try:
        return compare(result.name, read_tokens(result), LAST, last.tokens)
    except SamqError:  # the held-out text or the tokenizer is another
        return None


def _benchmarks(result: Result, last: LastCandidate, margin: float) -> Iterable[PairedComparison]:
    ours = compared_items(result)
    for benchmark, mine in ours.groupby("benchmark", sort=False):
        theirs = last.items[last.items["benchmark"] == benchmark]
        try:
            yield from compare_items(result.name, mine, LAST, theirs, margin=margin)
        except SamqError as error:  # tonight's settings are others
            logger.warning("%s is not compared with the last sweep on %s: %s", result.name, benchmark, error)
