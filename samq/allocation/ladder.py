"""The ladder: every quantizable tensor once at every type of a list, each rung a GGUF that llama-quantize wrote.

A rung is named by the type it asks for; tensors whose rows do not allow it hold llama-quantize's own fallback, so the
legal neighbours (Q4_0, Q5_0, Q5_1, IQ4_NL) join by themselves, and tensors that the importance matrix has no entry for
(an embedding, above all) hold the nearest type that needs none. What a tensor becomes depends on nothing but its
weights, its type and the importance matrix, so any plan's tensors can be taken from the rungs
(samq.quantization.assembly), and any plan's rounding errors can be read from them (samq.allocation.prices).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samq.allocation.target import Target, make_plan, stock_plan
from samq.allocation.threshold import ThresholdPolicy
from samq.errors import SamqError
from samq.gguf.file import TensorInfo, read_tensors, require_alignment
from samq.gguf.formats import MIXTURES, NEEDS_IMATRIX, bits_per_weight, check_type, fallback
from samq.llamacpp.programs import quantize
from samq.progress import Progress, silent
from samq.records import Plan, QuantizedModel

# IQ3_S is left out: it lengthens weights by 2 to 3 %, and the other types shorten them. Prices have no terms between weights
# and miss that cost (samq.allocation.prices.LENGTHENING_LIMIT), so plans that mix it in come out worse. IQ3_XXS does not
# lengthen weights and brings under 1 % (benchmarks/low_bits.py).
DEFAULT_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Ladder:
    """The full-precision GGUF and its rungs; `rungs` maps the type asked for to the file.

    `compensated` are files of single tensors of the rungs, rounded anew (`samq.quantization.compensation.compensate_rung`).
    """

    gguf: Path
    rungs: Mapping[str, Path]
    compensated: Sequence[Path] = ()

    def sources(self) -> dict[str, dict[str, Path]]:
        """Tensor -> type -> a file that holds the tensor in that type, the full-precision one included."""
        found: dict[str, dict[str, Path]] = {}
        for path in (self.gguf, *self.rungs.values()):
            for name, tensor in read_tensors(path).items():
                found.setdefault(name, {}).setdefault(tensor.type, path)
        return found


def rung_names(
    tensors: Iterable[TensorInfo], types: Iterable[str], *, imatrix: bool, plans: Iterable[Plan] = ()
) -> list[str]:
    """The rungs that are worth making, fewest bits first: those of `types` that give some tensor a type of its own.

    `plans` join the types that they name and that no such rung gives. Without an importance matrix the types that
    llama-quantize refuses are left out. Where rows are too short for K types, Q4_1 joins: nothing falls back to it.
    """
    tensors = list(tensors)
    refused = set() if imatrix else set(NEEDS_IMATRIX)
    wanted = {check_type(name) for name in types}
    if wanted and any(fallback("Q4_K", tensor.row_length) != "Q4_K" for tensor in tensors):
        wanted.add("Q4_1")
    wanted -= refused
    names, seen = [], {(tensor.name, tensor.type) for tensor in tensors}
    for name in _by_bits(wanted):
        given = {(tensor.name, fallback(name, tensor.row_length)) for tensor in tensors}
        if given - seen:
            names.append(name)
            seen |= given
    names += {kind for plan in plans for name, kind in plan.types.items() if (name, kind) not in seen} - refused
    if not names:
        raise SamqError(f"a ladder of {', '.join(sorted(wanted)) or 'no types'} has no rung; name quantized types")
    return _by_bits(names)


def _by_bits(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (bits_per_weight(name), name))


def rungs_of(plan: Plan, tensors: Mapping[str, TensorInfo], rungs: Iterable[str]) -> dict[str, list[str]] | None:
    """The rungs that together hold every tensor in the plan's type, full precision apart, each with the tensors it is for.

    None if no rung holds some tensor so.
    """
    needed: dict[str, list[str]] = {}
    rungs = list(rungs)
    for name, kind in plan.types.items():
        if kind != tensors[name].type:
            holder = next((rung for rung in rungs if fallback(rung, tensors[name].row_length) == kind), None)
            if holder is None:
                return None
            needed.setdefault(holder, []).append(name)
    return {rung: needed[rung] for rung in _by_bits(needed)}


def threshold_types(target: Target, policy: ThresholdPolicy) -> set[str]:
    """The types that threshold plans of this policy name, whatever their threshold: kept, base and guards."""
    base = set(stock_plan(target, policy.base).types.values()) if policy.base in MIXTURES else {policy.base}
    guards = {guard for guard in (policy.output_guard, policy.embedding_guard) if guard}
    return {policy.keep} | base | guards


def uniform_plan(target: Target, name: str) -> Plan:
    """Every quantizable tensor at one type, or at what takes its place (`Target.legal_type`): llama-quantize's fallback where
    rows do not allow it, the nearest that needs no importance matrix where the type does and there is no entry.
    """
    name = check_type(name)
    types, substitutions = {}, {}
    for tensor in target.quantizable:
        types[tensor], swap = target.legal_type(tensor, name)
        if swap:
            substitutions[tensor] = swap
    return make_plan(target, f"uniform-{name}", "uniform", {"type": name}, types, substitutions)


def make_rung(
    target: Target,
    name: str,
    folder: Path,
    *,
    provenance: dict[str, str],
    timeout_s: float = 6 * 3600,
    progress: Progress = silent,
) -> QuantizedModel:
    """Write the rung of one type into `folder` by llama-quantize, audited; see `samq.llamacpp.programs.quantize`."""
    require_alignment(target.gguf)
    return quantize(
        target.gguf,
        uniform_plan(target, name),
        folder,
        target.toolchain,
        provenance=provenance,
        imatrix=target.imatrix,
        timeout_s=timeout_s,
        progress=progress,
    )
