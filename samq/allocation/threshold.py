"""The threshold policy: what scores above the threshold keeps more bits, the rest gets the base type."""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from samq.allocation.target import OpenTarget, make_plan
from samq.errors import SamqError
from samq.gguf.file import HashedFile, mostly_unknown, read_tensors
from samq.gguf.formats import (
    EMBEDDING,
    MIXTURES,
    OUTPUT,
    UNMEASURED,
    bits_per_weight,
    check_mixture,
    check_type,
    smaller,
)
from samq.llamacpp.quantize import mixture_types
from samq.records import Plan, SensitivityMap, Substitution, Toolchain
from samq.sensitivity.fisher import EXPERT_GUARD, EXPERT_GUARD_USE


class ThresholdPolicy(BaseModel):
    """Parameters of the threshold policy, the threshold itself apart."""

    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"expert_guard"})  # has no part in plans without scarce experts
    model_config = ConfigDict(frozen=True, extra="forbid")
    keep: str = Field(default="Q8_0", description="type of what scores above the threshold")
    base: str = Field(default="Q4_K_M", description="type or llama-quantize mixture of the rest")
    grouping: Literal["block", "tensor"] = Field(
        default="block",
        description="a transformer block is kept as a whole, scored by its highest tensor; or each tensor alone",
    )
    output_guard: str | None = Field(
        default="Q8_0",
        description="least type of output.weight, or of token_embd.weight when it is tied to it",
    )
    embedding_guard: str | None = Field(default=None, description="least type of an untied token_embd.weight")
    expert_guard: str | None = Field(default=EXPERT_GUARD, description=EXPERT_GUARD_USE)

    def guarded(self, scarce: Collection[str]) -> dict[str, str]:
        """Tensor -> its least type, for those with scarce experts (`samq.allocation.prices.scarce_experts`)."""
        return dict.fromkeys(scarce, self.expert_guard) if self.expert_guard else {}

    @field_validator("keep")
    @classmethod
    def _known_type(cls, name: str) -> str:
        return check_type(name)

    @field_validator("output_guard", "embedding_guard", "expert_guard")
    @classmethod
    def _known_guard(cls, name: str | None) -> str | None:
        return check_type(name) if name else None

    @field_validator("base")
    @classmethod
    def _known_base(cls, name: str) -> str:
        return check_mixture(name) if name.upper() in MIXTURES else check_type(name)


def threshold_plan(
    target: OpenTarget,
    sensitivity: SensitivityMap,
    threshold: float | str,
    policy: ThresholdPolicy,
    unmeasured: str = UNMEASURED,
    guarded: Mapping[str, str] = {},
) -> Plan:
    """Give `policy.keep` to every tensor whose group scores above `threshold`, `policy.base` to the rest.

    `threshold` is a score in 0..1, or a quantile of the groups' scores written `q0.75`. A tensor that was not measured gets the
    type `unmeasured`, and no tensor a larger type than it has. `guarded` is tensor -> its least type, from `policy.guarded`, for
    tensors with experts that saw too few tokens: they score low for want of data. Guards are applied after, and types that a
    row length does not allow, or that lack an importance matrix, are replaced, visibly.
    """
    measured = sensitivity.tensors.keys() & target.quantizable.keys()
    if reason := mostly_unknown(target.quantizable, measured):
        raise SamqError(f"{reason}; give the sensitivities that `samq calibrate` measured on it")
    scores = group_scores(sensitivity, target.quantizable, policy.grouping)
    cut = resolve_threshold(threshold, scores)
    types, substitutions = _base_types(target.full, policy.base, target.toolchain, target.imatrix)
    substitutions = dict(substitutions)
    kept = {name for name in measured if scores[group_of(name, policy.grouping)] > cut}
    guards = {EMBEDDING if target.tied else OUTPUT: policy.output_guard}
    if not target.tied:
        guards[EMBEDDING] = policy.embedding_guard
    guards |= guarded
    chosen: dict[str, str] = {}
    for name in target.quantizable:
        requested = policy.keep if name in kept else types[name] if name in measured else unmeasured
        guard = guards.get(name)
        if guard and bits_per_weight(requested) < bits_per_weight(guard):
            requested = guard
        requested = smaller(target.quantizable[name].type, requested)  # its own, if that is no larger
        if requested != types[name]:
            substitutions.pop(name, None)
        chosen[name], swap = target.legal_type(name, requested)
        if swap:
            substitutions[name] = swap
    parameters = {
        **policy.model_dump(exclude=None if guarded else set(policy.NOT_IDENTITY)),
        "threshold": cut,
        "quantile": float(threshold[1:]) if isinstance(threshold, str) else None,
        "kept_tensors": len(kept),
        "kept_groups": len({group_of(name, policy.grouping) for name in kept}),
    }
    mixture = policy.base if policy.base in MIXTURES else "Q4_K_M"
    plan = make_plan(target, threshold_name(threshold), "threshold", parameters, chosen, substitutions, mixture)
    return plan.model_copy(update={"map_digest": sensitivity.digest()})


@lru_cache(maxsize=8)  # a sweep asks for the same base once a threshold
def _base_types(
    full: HashedFile, base: str, toolchain: Toolchain, imatrix: HashedFile | None
) -> tuple[dict[str, str], dict[str, Substitution]]:
    if base in MIXTURES:
        return mixture_types(full.path, base, toolchain, imatrix=imatrix.path if imatrix else None)
    return dict.fromkeys(read_tensors(full.path), base), {}


def threshold_name(threshold: float | str) -> str:
    """What the plan of a threshold is called: `threshold-0.35`, `threshold-q0.75`; other thresholds, other names."""
    text = str(threshold)
    if not text.startswith("q"):
        value = float(text)
        text = next(digits for digits in (f"{value:.{count}g}" for count in range(4, 18)) if float(digits) == value)
    return f"threshold-{text}"


def resolve_threshold(threshold: float | str, scores: dict[str, float]) -> float:
    """The score that a threshold means; raises SamqError if it is outside 0..1 or is not a number or `q<number>`."""
    text = str(threshold)
    match = re.fullmatch(r"(q?)(\d*\.?\d+(?:e-?\d+)?)", text)
    value = float(match[2]) if match else -1.0
    if not 0 <= value <= 1:
        raise SamqError(f"threshold {text} is not in 0..1; give a score such as 0.35, or a quantile such as q0.75")
    assert match is not None
    return float(np.quantile(sorted(scores.values()), value)) if match[1] else value


def group_of(name: str, grouping: str) -> str:
    """The group that a tensor is kept or not with: its block (`blk.11`) or itself."""
    block = re.match(r"blk\.\d+", name)
    return block[0] if block and grouping == "block" else name


def group_scores(sensitivity: SensitivityMap, names: Iterable[str], grouping: str) -> dict[str, float]:
    """Each group's score: the highest of its tensors'; those that were not measured have none."""
    scores: dict[str, float] = {}
    for name in (name for name in names if name in sensitivity.tensors):
        group = group_of(name, grouping)
        scores[group] = max(scores.get(group, 0.0), sensitivity.tensors[name].score)
    return scores


def change_points(sensitivity: SensitivityMap, names: Iterable[str], grouping: str) -> list[tuple[float, int]]:
    """The thresholds at which the plan changes, highest first: (threshold, groups kept at it).

    Each lies between two neighbouring scores and is written with as few digits as that takes.
    """
    values = np.array(list(group_scores(sensitivity, names, grouping).values()))
    scores = sorted({*values.tolist(), 0.0}, reverse=True)
    cuts = [_between(low, high) for high, low in itertools.pairwise(scores)]
    return [(cut, int((values > cut).sum())) for cut in cuts]


def _between(low: float, high: float) -> float:
    """A number with few digits in the half-open interval from `low` to `high`, near its middle."""
    middle = (low + high) / 2
    for digits in range(1, 17):
        if low <= (rounded := round(middle, digits)) < high:
            return rounded
    return middle


def propose_thresholds(
    target: OpenTarget,
    sensitivity: SensitivityMap,
    policy: ThresholdPolicy,
    count: int,
    guarded: Mapping[str, str] = {},
) -> list[float]:
    """At most `count` thresholds, highest first, whose plans differ and whose sizes rise in about equal steps.

    Thresholds that cost no byte over the base (what they keep has those bits anyway) are left out. `guarded` is as for
    `threshold_plan`.
    """

    def size(threshold: float) -> int:
        return threshold_plan(target, sensitivity, threshold, policy, guarded=guarded).tensor_bytes

    smallest = size(1.0)
    free: dict[int, float] = {}  # bytes -> the highest threshold that takes them
    for cut, _ in change_points(sensitivity, target.quantizable, policy.grouping):
        free.setdefault(size(cut), cut)
    free.pop(smallest, None)
    largest = max(free, default=smallest)
    chosen: list[float] = []
    for step in range(1, min(count, len(free)) + 1):
        wanted = smallest + step / (count + 1) * (largest - smallest)
        chosen.append(free.pop(min(free, key=lambda taken: abs(taken - wanted))))
    return sorted(chosen, reverse=True)
