"""The gates between a registered GGUF and its users: a policy says what must hold, `judge` says whether it does.

A gate passes only on evidence. It fails if a figure was not measured, or if there are too few items to decide. Accuracy
and JSON must be non-inferior, item by item, to full precision and to production (`samq.sweep.significance`).
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from samq.errors import SamqError
from samq.evaluation.metrics import COLUMNS, KLD, VRAM
from samq.gguf.audit import audit
from samq.gguf.file import file_sha256, read_metadata
from samq.promotion.evidence import Evidence, Measured, Reference
from samq.promotion.policy import AccuracyPolicy, JsonPolicy, PromotionPolicy
from samq.records import Evaluation
from samq.sweep.significance import JSON_ITEMS, PairedComparison, compare_items
from samq.tracking.registry import RegisteredGguf

GateVerdict = Literal["pass", "fail", "not applicable"]
LATENCY = "speed/latency_p99_ms"
_TAGS = ("candidate", "gguf_uri", "sha256", "size_bytes", "plan_digest", "parent_run")  # what registration writes


class Gate(BaseModel):
    """One condition, and whether it holds. Its name is legal in MLflow's tags."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: str = Field(default="", description="the measured value, with its unit")
    limit: str = Field(default="", description="what the policy requires")
    verdict: GateVerdict
    reason: str = ""


def judge(evidence: Evidence, policy: PromotionPolicy) -> tuple[Gate, ...]:
    """The verdict of every gate, including those that do not apply. Reads the whole GGUF."""
    evaluation = evidence.candidate.evaluation
    return (
        _audit(evidence) if policy.audit else _not_required("audit"),
        _provenance(evidence, policy.provenance) if policy.provenance is not None else _not_required("provenance"),
        _at_most("mean KLD", evaluation, KLD, policy.max_mean_kld_nats),
        _at_most("predicted VRAM", evaluation, VRAM, policy.max_predicted_vram_bytes),
        _at_most("p99 latency", evaluation, LATENCY, policy.max_latency_p99_ms),
        *_accuracy(evidence, policy.accuracy),
        *_json(evidence, policy.json_answers),
    )


def judge_without_evidence(version: RegisteredGguf, policy: PromotionPolicy, reason: str) -> tuple[Gate, ...]:
    """The gates for a version whose plan or measurements are lost, for the `reason` given. Reads the whole GGUF."""
    lost = Gate(name="evidence", limit="its plan and measurements in MLflow", verdict="fail", reason=reason)
    return lost, _content(version) if policy.audit else _not_required("content")


def failed(gates: Sequence[Gate]) -> list[Gate]:
    """The gates that failed."""
    return [gate for gate in gates if gate.verdict == "fail"]


def _not_required(name: str) -> Gate:
    return Gate(name=name, verdict="not applicable", reason="the policy does not require it")


def _audit(evidence: Evidence) -> Gate:
    """The file is the one that was registered and measured, and every type and byte is the plan's."""
    version, plan = evidence.version, evidence.plan
    limit = f"sha256 {version.sha256[:12]}, tensors of plan {plan.name}"
    value = ""
    try:
        sha256 = file_sha256(version.path)
        value = f"sha256 {sha256[:12]}"
        if sha256 != version.sha256:
            raise SamqError(f"{version.path} is not the registered file; build it again")
        if sha256 != evidence.candidate.evaluation.sha256:
            raise SamqError("the evaluation measured another file than the registered one; run the sweep again")
        if plan.digest() != version.plan_digest:
            raise SamqError("the plan in the version's run is not the registered one; run the sweep again")
        value += f", {len(audit(version.path, plan))} tensors as planned"
    except SamqError as error:
        return Gate(name="audit", value=value, limit=limit, verdict="fail", reason=str(error))
    return Gate(name="audit", value=value, limit=limit, verdict="pass")


def _content(version: RegisteredGguf) -> Gate:
    """The file is the registered one: all of the audit that needs no plan."""
    limit = f"sha256 {version.sha256[:12]}"
    try:
        sha256 = file_sha256(version.path)
    except SamqError as error:
        return Gate(name="content", limit=limit, verdict="fail", reason=str(error))
    value = f"sha256 {sha256[:12]}"
    if sha256 != version.sha256:
        reason = f"{version.path} is not the registered file; build it again"
        return Gate(name="content", value=value, limit=limit, verdict="fail", reason=reason)
    return Gate(name="content", value=value, limit=limit, verdict="pass")


def _provenance(evidence: Evidence, required: Sequence[str]) -> Gate:
    """The GGUF's metadata say what it was made from, and the version's tags where it comes from."""
    limit = f"{len(required)} keys of the GGUF, {len(_TAGS)} tags of the version"
    try:
        metadata = read_metadata(evidence.version.path)
    except SamqError as error:
        return Gate(name="provenance", limit=limit, verdict="fail", reason=str(error))
    missing_keys = [f"samq.{key} of the GGUF" for key in required if not metadata.get(f"samq.{key}")]
    missing_tags = [f"tag {tag} of the version" for tag in _TAGS if not evidence.tags.get(tag)]
    value = f"{len(required) - len(missing_keys)} keys, {len(_TAGS) - len(missing_tags)} tags"
    if not missing_keys and not missing_tags:
        return Gate(name="provenance", value=value, limit=limit, verdict="pass")
    missing = ", ".join(missing_keys + missing_tags)
    reason = f"missing: {missing}; build and register it with this version of SAMQ"
    return Gate(name="provenance", value=value, limit=limit, verdict="fail", reason=reason)


def _at_most(name: str, evaluation: Evaluation, metric: str, most: float | None) -> Gate:
    """A metric must not exceed its limit."""
    if most is None:
        return _not_required(name)
    column = next(column for column in COLUMNS if column.metric == metric)
    unit = column.heading.rpartition("(")[2].rstrip(")")
    limit = f"at most {most * column.scale:g} {unit}"
    measured = evaluation.metrics.get(metric)
    if measured is None:
        reason = f"not measured: {_why_missing(evaluation, metric)}"
        return Gate(name=name, limit=limit, verdict="fail", reason=reason)
    value = f"{column.show(evaluation, spread=True)} {unit}"
    return Gate(name=name, value=value, limit=limit, verdict="pass" if measured.value <= most else "fail")


def _accuracy(evidence: Evidence, policy: AccuracyPolicy | None) -> Iterator[Gate]:
    if policy is None:
        yield _not_required("accuracy")
        return
    for benchmark, reference in product(policy.benchmarks, evidence.references):
        yield _non_inferior(benchmark, f"eval/{benchmark}", evidence.candidate, reference, policy.margin)


def _json(evidence: Evidence, policy: JsonPolicy | None) -> Iterator[Gate]:
    if policy is None:
        yield _not_required(JSON_ITEMS)
        return
    for reference in evidence.references:
        yield _non_inferior(JSON_ITEMS, "json/valid_percent", evidence.candidate, reference, policy.margin)


def _non_inferior(items: str, metric: str, candidate: Measured, reference: Reference, margin: float) -> Gate:
    """Non-inferior to a reference on the same items, at 95 % confidence; the margin is a share of its value."""
    name = f"{items} against {reference.kind}"
    limit = f"worse by less than {100 * margin:g} % of {reference.name}"
    if reference.measured is None:
        verdict: GateVerdict = "fail" if reference.expected else "not applicable"
        return Gate(name=name, limit=limit, verdict=verdict, reason=reference.reason)
    for measured in (candidate, reference.measured):
        if measured.of(items).empty:
            reason = f"{measured.name} was not measured: {_why_missing(measured.evaluation, metric)}"
            return Gate(name=name, limit=limit, verdict="fail", reason=reason)
    ours, theirs = candidate.of(items), reference.measured.of(items)
    try:
        (comparison,) = compare_items(candidate.name, ours, reference.name, theirs, margin=margin)
    except SamqError as error:  # the two were asked different items
        return Gate(name=name, limit=limit, verdict="fail", reason=str(error))
    return Gate(
        name=name,
        value=f"{comparison.value:.3f} against {comparison.reference_value:.3f}, {_at_worst(comparison.least)}",
        limit=f"worse by less than {comparison.margin:.4f}, {100 * margin:g} % of {reference.name}",
        verdict="pass" if comparison.verdict == "non-inferior" else "fail",
        reason=_why_not(comparison),
    )


def _at_worst(least: float | None) -> str:
    """The end of the one-sided 95 % interval: the worst difference that the items allow."""
    if least is None:
        return "no interval from a single item"
    return f"better by at least {least:.3f}" if least > 0 else f"worse by at most {-least:.3f}"


def _why_not(comparison: PairedComparison) -> str:
    """Why a comparison does not show non-inferiority; empty if it does."""
    if comparison.verdict == "non-inferior":
        return ""
    if comparison.verdict == "inferior":
        return "worse by more than the margin, at 95 % confidence"
    needed = comparison.items_needed
    advice = f"about {needed:,} would be enough" if needed else "no number of items would be enough"
    return f"{comparison.items} items are too few to decide; {advice}"


def _why_missing(evaluation: Evaluation, metric: str) -> str:
    return evaluation.why_missing(metric) or "the evaluation gives no reason; run the sweep again"
