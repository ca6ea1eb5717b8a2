"""The types that tensors may have: those that are priced, and plans of one type.

A tensor whose rows do not allow a type has llama-quantize's fallback, which adds Q4_0, Q5_0, Q5_1 and IQ4_NL to the types. A
tensor without an entry in the importance matrix, such as the embedding, has the nearest type that does not need one.
"""

from collections.abc import Iterable

from samq.allocation.target import OpenTarget, make_plan, stock_plan
from samq.allocation.threshold import ThresholdPolicy
from samq.errors import SamqError
from samq.gguf.formats import MIXTURES, NEEDS_IMATRIX, bits_per_weight, check_type, fallback
from samq.records import Plan
from samq.sensitivity.fisher import is_stacked

# Without IQ3_S, which lengthens weights by 2 to 3 % where the others shorten them. That costs more than prices without terms
# between weights predict (samq.allocation.prices.LENGTHENING_LIMIT), so plans with IQ3_S are worse. IQ3_XXS does not lengthen
# and gains under 1 % (benchmarks/low_bits.py).
DEFAULT_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


def types_to_price(target: OpenTarget, types: Iterable[str], plans: Iterable[Plan] = ()) -> list[str]:
    """The types to price all tensors in, fewest bits first: the `types`, and those that `plans` name.

    Without an importance matrix, types that need one are left out. If rows are too short for K types, Q4_1 is added, since no
    type falls back to it. Raises SamqError if no type is left.
    """
    wanted = {check_type(name) for name in types}
    if wanted and any(fallback("Q4_K", tensor.row_length) != "Q4_K" for tensor in target.quantizable.values()):
        wanted.add("Q4_1")
    wanted |= {kind for plan in plans for name, kind in plan.types.items() if kind != target.tensors[name].type}
    if target.imatrix is None:
        wanted -= set(NEEDS_IMATRIX)
    if not any(legal_types(target, wanted).values()):
        raise SamqError(f"none of {', '.join(sorted(wanted)) or 'no types'} can be priced; name quantized types")
    return _by_bits(wanted)


def legal_types(target: OpenTarget, types: Iterable[str]) -> dict[str, list[str]]:
    """Tensor -> what llama-quantize writes to it where the `types` are asked for, beside its own type; fewest bits first."""
    types = list(types)
    legal = {name: {target.legal_type(name, kind)[0] for kind in types} for name in target.quantizable}
    return {name: _by_bits(kinds - {target.tensors[name].type}) for name, kinds in legal.items()}


def _by_bits(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (bits_per_weight(name), name))


def threshold_types(target: OpenTarget, policy: ThresholdPolicy) -> set[str]:
    """The types that threshold plans of this policy use at any threshold: the type above it, the base's, the guards."""
    is_mixture = policy.base in MIXTURES
    base = stock_plan(target, policy.base).types if is_mixture else dict.fromkeys(target.quantizable, policy.base)
    guards = {guard for guard in (policy.output_guard, policy.embedding_guard) if guard}
    for name, guard in policy.guarded(list(filter(is_stacked, base))).items():
        if min(map(bits_per_weight, (base[name], policy.keep))) < bits_per_weight(guard):
            guards.add(guard)
    return {policy.keep, *base.values(), *guards}


def uniform_plan(target: OpenTarget, name: str) -> Plan:
    """Plan every quantizable tensor in one type, or in the type that replaces it (`OpenTarget.legal_type`).

    llama-quantize's fallback replaces a type that the rows do not allow. Where the importance matrix lacks an entry that
    the type needs, the nearest type without that need does.
    """
    name = check_type(name)
    types, substitutions = {}, {}
    for tensor in target.quantizable:
        types[tensor], swap = target.legal_type(tensor, name)
        if swap:
            substitutions[tensor] = swap
    return make_plan(target, f"uniform-{name}", "uniform", {"type": name}, types, substitutions)
