"""The budget policy: one type for each tensor, so that predicted KL is least within a budget of bytes."""

import math
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, field_validator

from samq.allocation.budget_notation import bits_budget, plan_name, read_budget
from samq.allocation.knapsack import solve
from samq.allocation.prices import SECOND_ORDER_LIMIT_NATS, lengthened, lengthening, plan_cost
from samq.allocation.target import OpenTarget, make_plan, stock_plan
from samq.errors import SamqError
from samq.gguf.formats import EMBEDDING, MIXTURES, OUTPUT, bits_per_weight, check_type
from samq.llamacpp.memory import predict_memory
from samq.records import Plan, Price, PriceTable
from samq.sensitivity.fisher import EXPERT_GUARD, EXPERT_GUARD_USE

_NOTHING_NATS = 1e-7  # bytes spent on less in a tensor are wasted: llama.cpp's own rounding of activations costs 1e-4
_METADATA_BYTES = 16 * 1024  # provenance, importance matrix's values and padding, beside the source's own metadata


class BudgetPolicy(BaseModel):
    """Parameters of the budget policy, the budget itself apart."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    output_guard: str | None = Field(
        default=None, description="least type of output.weight, or of token_embd.weight when it is tied to it"
    )
    embedding_guard: str | None = Field(default=None, description="least type of an untied token_embd.weight")
    least_type: str | None = Field(
        default=None, description="least type of every tensor, where second order is not to be trusted with fewer bits"
    )
    expert_guard: str | None = Field(default=EXPERT_GUARD, description=EXPERT_GUARD_USE)

    @field_validator("output_guard", "embedding_guard", "least_type", "expert_guard")
    @classmethod
    def _known_type(cls, name: str | None) -> str | None:
        return check_type(name) if name else None


@dataclass(frozen=True)
class Budget:
    """Most bytes of the tensors that count: all, but those in `free` (a VRAM budget's tensors in host memory)."""

    text: str
    tensor_bytes: int
    free: frozenset[str] = frozenset()


def parse_budget(text: str, target: OpenTarget) -> Budget:
    """A written budget in bytes of tensors.

    A size bounds the whole file. `4.5bpw` is bits per weight over all tensors. `size-of:Q4_K_M` is the bytes that
    llama-quantize's mixture has on this model. `vram:24GiB@8192` leaves room for KV cache and compute buffers at that
    context length. Raises SamqError for anything else.
    """
    written = read_budget(text)
    match written.form:
        case "size":
            overhead = target.full.path.stat().st_size - sum(tensor.bytes for tensor in target.tensors.values())
            return Budget(text, written.bytes - overhead - _METADATA_BYTES)
        case "bits":
            weights = sum(tensor.weights for tensor in target.tensors.values())
            return Budget(text, math.floor(written.bits_per_weight * weights / 8))
        case "mixture":
            return Budget(text, stock_plan(target, written.mixture).tensor_bytes)
        case "vram":
            memory = predict_memory(target.full.path, written.context_tokens, kv_type=written.kv_type)
            rest = memory["memory/kv_cache_bytes"].value + memory["memory/compute_buffer_bytes"].value
            free = frozenset() if target.tied else frozenset({EMBEDDING})
            return Budget(text, written.bytes - math.ceil(rest), free)


def budget_plan(target: OpenTarget, prices: PriceTable, budget: Budget, policy: BudgetPolicy) -> Plan:
    """The plan of least predicted KL within the budget; bytes that would save nothing worth counting are left unspent.

    Where second order is not to be trusted with that KL, `why_doubted` says so.
    Raises SamqError if even the smallest plan is larger, and says which budget would be large enough.
    """
    options = {name: _allowed(name, prices, target, policy) for name in target.quantizable}
    counted = {
        name: {kind: price.model_copy(update={"bytes": 0}) for kind, price in types.items()}
        if name in budget.free
        else types
        for name, types in options.items()
    }
    fixed = sum(tensor.bytes for name, tensor in target.tensors.items() if name not in options)
    smallest = fixed + sum(min(price.bytes for price in types.values()) for types in counted.values())
    if smallest > budget.tensor_bytes:
        raise SamqError(
            f"a budget of {budget.text} is too small for this model: in these types the smallest possible is "
            f"{_smallest(target, budget, smallest)}; give that, or add smaller types (`candidates.ladder`, --type)"
            f"{_of_experts(prices, policy)}"
        )
    solution = solve(counted, budget.tensor_bytes - fixed)
    predicted = plan_cost(prices, solution.types)
    parameters = {"budget": budget.text, "budget_bytes": budget.tensor_bytes, **policy.model_dump()}
    if not prices.scarce_experts:
        parameters["expert_guard"] = None  # it had no part
    plan = make_plan(
        target,
        plan_name(budget.text),
        "budget",
        parameters,
        solution.types,
        mixture=read_budget(budget.text).mixture or "Q4_K_M",
    )
    return plan.model_copy(
        update={
            "map_digest": prices.map_digest,
            "rounding": prices.rounding,
            "predicted_kl_nats": predicted.value,
            "predicted_kl_stderr": predicted.stderr,
            "solver_gap": solution.gap,
        }
    )


def _of_experts(prices: PriceTable, policy: BudgetPolicy) -> str:
    """What else helps where scarce experts keep tensors from small types."""
    if not (policy.expert_guard and prices.scarce_experts):
        return ""
    return (
        f", or calibrate on more text, since {len(prices.scarce_experts)} tensors have experts that saw few tokens and get at "
        f"least {policy.expert_guard} (expert_guard)"
    )


def _smallest(target: OpenTarget, budget: Budget, tensor_bytes: int) -> str:
    """The smallest budget, in the form that this one was written in, that has room for so many bytes of tensors."""
    written = read_budget(budget.text)
    if written.form in ("size", "vram"):
        return written.of_bytes(tensor_bytes + written.bytes - budget.tensor_bytes)  # the rest is the same
    bits = bits_budget(tensor_bytes, sum(tensor.weights for tensor in target.tensors.values()))
    if written.form == "bits":
        return bits
    sizes = {mixture: stock_plan(target, mixture).tensor_bytes for mixture in MIXTURES}
    enough = [mixture for mixture, size in sizes.items() if size >= tensor_bytes]
    return f"size-of:{min(enough, key=sizes.__getitem__)}, or {bits}" if enough else bits


def why_doubted(plan: Plan, prices: PriceTable) -> str | None:
    """Why a plan's prediction is not to be relied on, and what to do, in a sentence; None if it may be."""
    doubts = []
    if plan.predicted_kl_nats is not None and plan.predicted_kl_nats > SECOND_ORDER_LIMIT_NATS:
        doubts.append(
            f"a predicted KL of {plan.predicted_kl_nats:.2f} nats is over {SECOND_ORDER_LIMIT_NATS:g}, where rounding is no "
            "small change and second order fails; raise the budget, or set least_type, and rely on what is measured only"
        )
    if changes := lengthened(prices, plan):
        types = " and ".join(changes)
        doubts.append(
            f"predictions of plans with {types} are too low against other plans': {lengthening(changes)}; leave {types} out of "
            "the ladder, or rely on what is measured only"
        )
    return "; and ".join(doubts) or None


def _allowed(name: str, prices: PriceTable, target: OpenTarget, policy: BudgetPolicy) -> dict[str, Price]:
    """The types that the guards leave to a tensor; if they leave none, the one with most bits. Its own type is exact.

    Types larger than the smallest that costs next to nothing are left out, not priced at zero. So a plan's KL is exactly
    what was minimised, and falls as the budget rises.
    """
    if name not in prices.tensors:
        raise SamqError(f"there is no price for {name}; price this model's ladder again")
    types = prices.tensors[name].types
    is_output = name == (EMBEDDING if target.tied else OUTPUT)
    guard = policy.output_guard if is_output else policy.embedding_guard if name == EMBEDDING else None
    of_experts = policy.expert_guard if name in prices.scarce_experts else None
    least = max((bits_per_weight(kind) for kind in (guard, policy.least_type, of_experts) if kind), default=0.0)
    own = target.quantizable[name].type
    allowed = {kind: price for kind, price in types.items() if kind == own or bits_per_weight(kind) >= least}
    allowed = allowed or dict([max(types.items(), key=lambda item: item[1].bytes)])
    enough = min((price.bytes for price in allowed.values() if price.kl_nats <= _NOTHING_NATS), default=math.inf)
    return {kind: price for kind, price in allowed.items() if price.bytes <= enough}
