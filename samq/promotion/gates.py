"""The gates between a registered GGUF and its users: a policy says what must hold, and `judge` whether it does.

A gate passes only on evidence: what was not measured, or cannot be told from so few items, fails. Accuracy and JSON are
compared item by item with full precision and with what is in production, and must be non-inferior (`samq.sweep.significance`).
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from samq.errors import SamqError
from samq.gguf.audit import audit
from samq.gguf.file import file_sha256, read_metadata
from samq.promotion.evidence import Evidence, Measured, Reference
from samq.promotion.policy import AccuracyPolicy, JsonPolicy, PromotionPolicy
from samq.records import Evaluation
from samq.report.table import COLUMNS
from samq.sweep.selection import KLD, VRAM
from samq.sweep.significance import JSON_ITEMS, PairedComparison, compare_items

Verdict = Literal["pass", "fail", "not applicable"]
LATENCY = "speed/latency_p99_ms"
_TAGS = ("candidate", "gguf_uri", "sha256", "size_bytes", "plan_digest", "parent_run")  # what registration writes


class Gate(BaseModel):
    """One condition, and whether it holds. Its name is legal in MLflow's tags."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: str = Field(default="", description="what was found, with its unit")
    limit: str = Field(default="", description="what was asked for")
    verdict: Verdict
    reason: str = ""


def judge(evidence: Evidence, policy: PromotionPolicy) -> tuple[Gate, ...]:
    """Every gate, those that do not apply included. Reads the whole GGUF."""
    evaluation = evidence.candidate.evaluation
    return (
        _audit(evidence) if policy.audit else _not_asked("audit"),
        _provenance(evidence, policy.provenance) if policy.provenance is not None else _not_asked("provenance"),
        _at_most("mean KLD", evaluation, KLD, policy.max_mean_kld_nats),
        _at_most("predicted VRAM", evaluation, VRAM, policy.max_predicted_vram_bytes),
        _at_most("p99 latency", evaluation, LATENCY, policy.max_latency_p99_ms),
        *_accuracy(evidence, policy.accuracy),
        *_json(evidence, policy.json_answers),
    )


def failed(gates: Sequence[Gate]) -> list[Gate]:
    """The gates that do not hold."""
    return [gate for gate in gates if gate.verdict == "fail"]


def _not_asked(name: str) -> Gate:
    return Gate(name=name, verdict="not applicable", reason="the policy does not ask for it")


def _audit(evidence: Evidence) -> Gate:
    """The file is the one that was registered and measured, and every type and byte is the plan's."""
    version, plan = evidence.version, evidence.plan
    limit = f"sha256 {version.sha256[:12]}, tensors of plan {plan.name}"
    value = ""
    try:
        found = file_sha256(version.path)
        value = f"sha256 {found[:12]}"
        if found != version.sha256:
            raise SamqError(f"{version.path} is not the file that was registered; build it again")
        if found != evidence.candidate.evaluation.sha256:
            raise SamqError("another file was measured than was registered; run the sweep again")
        if plan.digest() != version.plan_digest:
            raise SamqError("the plan in the version's run is not the one it was registered with; run the sweep again")
        value += f", {len(audit(version.path, plan))} tensors as planned"
    except SamqError as error:
        return Gate(name="audit", value=value, limit=limit, verdict="fail", reason=str(error))
    return Gate(name="audit", value=value, limit=limit, verdict="pass")


def _provenance(evidence: Evidence, wanted: Sequence[str]) -> Gate:
    """The GGUF says what it was made from, and the version where it comes from."""
    limit = f"{len(wanted)} keys of the GGUF, {len(_TAGS)} tags of the version"
    try:
        metadata = read_metadata(evidence.version.path)
    except SamqError as error:
        return Gate(name="provenance", limit=limit, verdict="fail", reason=str(error))
    keys = [key for key in wanted if not metadata.get(f"samq.{key}")]
    tags = [tag for tag in _TAGS if not evidence.tags.get(tag)]
    value = f"{len(wanted) - len(keys)} keys, {len(_TAGS) - len(tags)} tags"
    if not keys and not tags:
        return Gate(name="provenance", value=value, limit=limit, verdict="pass")
    lacking = ", ".join([f"samq.{key} of the GGUF" for key in keys] + [f"tag {tag} of the version" for tag in tags])
    reason = f"missing: {lacking}; build and register it with this version of SAMQ"
    return Gate(name="provenance", value=value, limit=limit, verdict="fail", reason=reason)


def _at_most(name: str, evaluation: Evaluation, metric: str, most: float | None) -> Gate:
    """A figure that must not exceed its limit."""
    if most is None:
        return _not_asked(name)
    column = next(column for column in COLUMNS if column.metric == metric)
    unit = column.heading.rpartition("(")[2].rstrip(")")
    limit = f"at most {most * column.scale:g} {unit}"
    found = evaluation.metrics.get(metric)
    if found is None:
        reason = f"not measured: {_why_missing(evaluation, metric)}"
        return Gate(name=name, limit=limit, verdict="fail", reason=reason)
    value = f"{column.show(evaluation, spread=True)} {unit}"
    return Gate(name=name, value=value, limit=limit, verdict="pass" if found.value <= most else "fail")


def _accuracy(evidence: Evidence, policy: AccuracyPolicy | None) -> Iterator[Gate]:
    if policy is None:
        yield _not_asked("accuracy")
        return
    for benchmark, reference in product(policy.benchmarks, evidence.references):
        yield _non_inferior(benchmark, f"eval/{benchmark}", evidence.candidate, reference, policy.margin)


def _json(evidence: Evidence, policy: JsonPolicy | None) -> Iterator[Gate]:
    if policy is None:
        yield _not_asked(JSON_ITEMS)
        return
    for reference in evidence.references:
        yield _non_inferior(JSON_ITEMS, "json/valid_percent", evidence.candidate, reference, policy.margin)


def _non_inferior(items: str, metric: str, candidate: Measured, reference: Reference, margin: float) -> Gate:
    """No worse on the same items than a reference by more than a margin, relative to it, with 95 % confidence."""
    name = f"{items} against {reference.kind}"
    limit = f"worse by less than {100 * margin:g} % of {reference.name}"
    if reference.measured is None:
        verdict: Verdict = "fail" if reference.expected else "not applicable"
        return Gate(name=name, limit=limit, verdict=verdict, reason=reference.reason)
    for measured in (candidate, reference.measured):
        if measured.of(items).empty:
            reason = f"{measured.name} was not measured: {_why_missing(measured.evaluation, metric)}"
            return Gate(name=name, limit=limit, verdict="fail", reason=reason)
    ours, theirs = candidate.of(items), reference.measured.of(items)
    try:
        (found,) = compare_items(candidate.name, ours, reference.name, theirs, margin=margin)
    except SamqError as error:  # other items: nothing is known
        return Gate(name=name, limit=limit, verdict="fail", reason=str(error))
    return Gate(
        name=name,
        value=f"{found.value:.3f} against {found.reference_value:.3f}, {_at_worst(found.least)}",
        limit=f"worse by less than {found.margin:.4f}, {100 * margin:g} % of {reference.name}",
        verdict="pass" if found.verdict == "non-inferior" else "fail",
        reason=_why_not(found),
    )


def _at_worst(least: float | None) -> str:
    """The difference in its worst case, one-sided and with 95 % confidence."""
    if least is None:
        return "one item alone"
    return f"better by at least {least:.3f}" if least > 0 else f"worse by at most {-least:.3f}"


def _why_not(found: PairedComparison) -> str:
    """Why a comparison does not show that the candidate is no worse; empty if it does."""
    if found.verdict == "non-inferior":
        return ""
    if found.verdict == "inferior":
        return "worse by more than the margin, with 95 % confidence"
    needed = f"about {found.items_needed:,} would be needed" if found.items_needed else "no number of items could"
    return f"{found.items} items cannot show it; {needed}"


def _why_missing(evaluation: Evaluation, metric: str) -> str:
    return evaluation.why_missing(metric) or "its evaluation does not say why; run the sweep again"
