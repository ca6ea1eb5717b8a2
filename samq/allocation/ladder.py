"""The ladder: every quantizable tensor in every type of a list. Each rung is a GGUF that llama-quantize wrote in one type.

A rung has the name of its type. A tensor whose rows do not allow that type has llama-quantize's fallback, which adds Q4_0,
Q5_0, Q5_1 and IQ4_NL to the ladder. A tensor without an entry in the importance matrix, such as the embedding, has the
nearest type that does not need one. A tensor's bytes depend on its weights, its type and the importance matrix only. So the
tensors of any plan can be copied from the rungs (samq.quantization.assembly), and the rungs give the rounding errors of any
plan (samq.allocation.prices).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from samq.allocation.target import OpenTarget, make_plan, stock_plan
from samq.allocation.threshold import ThresholdPolicy
from samq.errors import SamqError
from samq.gguf.file import TensorInfo, read_tensors, require_alignment
from samq.gguf.formats import MIXTURES, NEEDS_IMATRIX, bits_per_weight, check_type, fallback
from samq.llamacpp.process import PROGRAM_TIMEOUT_S
from samq.llamacpp.programs import quantize
from samq.progress import Progress, silent
from samq.records import Plan, QuantizedModel

# Without IQ3_S, which lengthens weights by 2 to 3 % where the others shorten them. That costs more than prices without terms
# between weights predict (samq.allocation.prices.LENGTHENING_LIMIT), so plans with IQ3_S are worse. IQ3_XXS does not lengthen
# and gains under 1 % (benchmarks/low_bits.py).
DEFAULT_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Ladder:
    """The full-precision GGUF and its rungs, type -> file.

    `compensated` are files with some tensors of a rung in compensated rounding
    (`samq.quantization.compensation.compensate_rung`).
    """

    gguf: Path
    rungs: Mapping[str, Path]
    compensated: Sequence[Path] = ()

    def sources(self) -> dict[str, dict[str, Path]]:
        """Tensor -> type -> a file with the tensor in that type, full precision included."""
        files: dict[str, dict[str, Path]] = {}
        for path in (self.gguf, *self.rungs.values()):
            for name, tensor in read_tensors(path).items():
                files.setdefault(name, {}).setdefault(tensor.type, path)
        return files


def rung_names(
    tensors: Iterable[TensorInfo], types: Iterable[str], *, imatrix: bool, plans: Iterable[Plan] = ()
) -> list[str]:
    """The names of the rungs to make, fewest bits first.

    These are the `types` in which some tensor gets a type that no rung before gives it, and the types of `plans` that these
    rungs lack. Without an importance matrix they do not include the types that llama-quantize refuses then. If rows are too
    short for K types, Q4_1 is added, since no type falls back to it. Raises SamqError if no rung is left.
    """
    tensors = list(tensors)
    refused = set() if imatrix else set(NEEDS_IMATRIX)
    candidates = {check_type(name) for name in types}
    if candidates and any(fallback("Q4_K", tensor.row_length) != "Q4_K" for tensor in tensors):
        candidates.add("Q4_1")
    candidates -= refused
    names, covered = [], {(tensor.name, tensor.type) for tensor in tensors}  # (tensor, type) that some rung has
    for name in _by_bits(candidates):
        in_rung = {(tensor.name, fallback(name, tensor.row_length)) for tensor in tensors}
        if in_rung - covered:
            names.append(name)
            covered |= in_rung
    names += {kind for plan in plans for name, kind in plan.types.items() if (name, kind) not in covered} - refused
    if not names:
        raise SamqError(f"a ladder of {', '.join(sorted(candidates)) or 'no types'} has no rung; name quantized types")
    return _by_bits(names)


def _by_bits(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (bits_per_weight(name), name))


def rungs_of(plan: Plan, tensors: Mapping[str, TensorInfo], rungs: Iterable[str]) -> dict[str, list[str]] | None:
    """Rung -> the tensors that it has in the plan's type, so that together they have every tensor that is quantized.

    None if some tensor is in no rung in its type.
    """
    tensors_by_rung: dict[str, list[str]] = {}
    rungs = list(rungs)
    for name, kind in plan.types.items():
        if kind != tensors[name].type:
            source = next((rung for rung in rungs if fallback(rung, tensors[name].row_length) == kind), None)
            if source is None:
                return None
            tensors_by_rung.setdefault(source, []).append(name)
    return {rung: tensors_by_rung[rung] for rung in _by_bits(tensors_by_rung)}


def threshold_types(target: OpenTarget, policy: ThresholdPolicy) -> set[str]:
    """The types that threshold plans of this policy use at any threshold: the type above it, the base's, the guards."""
    base = set(stock_plan(target, policy.base).types.values()) if policy.base in MIXTURES else {policy.base}
    guards = {guard for guard in (policy.output_guard, policy.embedding_guard) if guard}
    return {policy.keep} | base | guards


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


def make_rung(
    target: OpenTarget,
    name: str,
    folder: Path,
    *,
    provenance: dict[str, str],
    timeout_s: float = PROGRAM_TIMEOUT_S,
    progress: Progress = silent,
) -> QuantizedModel:
    """Write the rung of one type into `folder` with llama-quantize, and audit it; see `samq.llamacpp.programs.quantize`."""
    require_alignment(target.full.path)
    return quantize(
        target.full.path,
        uniform_plan(target, name),
        folder,
        target.toolchain,
        provenance=provenance,
        imatrix=target.imatrix,
        timeout_s=timeout_s,
        progress=progress,
    )
