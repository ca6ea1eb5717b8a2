"""Sizes of candidates before there are sensitivities: exact for mixtures and budgets, at most so many bytes for thresholds."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from samq.allocation.budget import parse_budget
from samq.allocation.budget_notation import read_budget
from samq.allocation.target import OpenTarget, stock_plan
from samq.allocation.threshold import ThresholdPolicy
from samq.allocation.types import uniform_plan
from samq.errors import SamqError
from samq.gguf.formats import EMBEDDING, MIXTURES, OUTPUT, bits_per_weight, fallback, tensor_bytes
from samq.records import Plan
from samq.sensitivity.fisher import is_stacked


@dataclass(frozen=True)
class CandidateSize:
    """A candidate's bytes of tensors, and how many of its weights have each type, as far as that is known."""

    bytes: int
    weights: Mapping[str, int]


def of_mixture(target: OpenTarget, mixture: str) -> CandidateSize:
    """What llama-quantize's mixture has."""
    return _of_plan(target, stock_plan(target, mixture))


def of_budget(target: OpenTarget, budget: str, ladder: Collection[str]) -> CandidateSize:
    """The most that a budget's plan takes; its types are not known yet, so the type of the nearest bits stands for them."""
    largest = uniform_plan(target, max(ladder, key=bits_per_weight))
    written, size = read_budget(budget), largest.tensor_bytes
    if written.form == "vram":  # the KV cache takes some of it; an embedding of its own is in RAM
        size = written.bytes + (0 if target.tied else target.tensors[EMBEDDING].bytes)
    else:
        size = parse_budget(budget, target).tensor_bytes
    if size <= 0:
        raise SamqError(f"a budget of {budget} has no room for the model's metadata; raise it")
    size = min(size, largest.tensor_bytes)
    bits = 8 * size / largest.weights
    kind = min(ladder, key=lambda name: abs(bits_per_weight(name) - bits))
    return CandidateSize(size, _of_plan(target, uniform_plan(target, kind)).weights)


def of_threshold(target: OpenTarget, policy: ThresholdPolicy, kept: float) -> CandidateSize:
    """A threshold's plan if it keeps such a share of the blocks: between the base and all in the type that is kept."""
    is_mixture = policy.base in MIXTURES
    base = stock_plan(target, policy.base) if is_mixture else uniform_plan(target, policy.base)
    most = uniform_plan(target, policy.keep)
    output = target.tensors[EMBEDDING if target.tied else OUTPUT]
    guard = tensor_bytes(policy.output_guard, output.shape) if policy.output_guard else 0
    for name, kind in policy.guarded(list(filter(is_stacked, base.types))).items():  # all may have scarce experts
        shape = target.tensors[name].shape
        guard += max(0, tensor_bytes(fallback(kind, shape[-1]), shape) - tensor_bytes(base.types[name], shape))
    rise = max(0, most.tensor_bytes - base.tensor_bytes)
    return CandidateSize(base.tensor_bytes + guard + int(kept * rise), _of_plan(target, base).weights)


def thresholds_kept(thresholds: Collection[float | str], proposed: int) -> list[float]:
    """The share of blocks that each threshold keeps at most: a score may keep all; proposed ones rise in equal steps."""
    given = [1 - float(value[1:]) if isinstance(value, str) and value.startswith("q") else 1.0 for value in thresholds]
    return given + [step / (proposed + 1) for step in range(1, proposed + 1)]


def _of_plan(target: OpenTarget, plan: Plan) -> CandidateSize:
    weights: dict[str, int] = {}
    for name, kind in plan.types.items():
        weights[kind] = weights.get(kind, 0) + target.tensors[name].weights
    return CandidateSize(plan.tensor_bytes, weights)
