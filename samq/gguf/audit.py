"""The audit: a plan's GGUF is accepted only if its tensors read back as the plan says, whatever program wrote it."""

import os
import shutil
from pathlib import Path

from samq.errors import SamqError, ToolError
from samq.gguf.file import file_sha256, read_metadata, read_tensors
from samq.gguf.values import value_fault
from samq.records import Plan, QuantizedModel


def require_space(folder: Path, what: str, needed: int) -> None:
    """Raise SamqError if the folder's disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SamqError(f"{folder} has {free:,} bytes free and {what} needs {needed:,}; free some or move the store")


def provenance_metadata(plan: Plan, provenance: dict[str, str]) -> dict[str, str]:
    """The `samq.*` metadata of a plan's GGUF: the plan's digest and policy, and the items of `provenance`."""
    return {
        "samq.plan": plan.digest(),
        "samq.policy": plan.policy,
        **{f"samq.{key}": value for key, value in provenance.items()},
    }


def accept(partial: Path, plan: Plan, metadata: dict[str, str], full: Path) -> QuantizedModel:
    """Audit the file NAME.partial, rename it to NAME and describe it.

    `full` is the full-precision GGUF. Raises ToolError as `audit` does, or if values are further from full precision than
    the tensor's type explains.
    """
    actual = audit(partial, plan)
    if fault := value_fault(full, partial):
        raise ToolError(
            f"the file of plan {plan.name} is not the model: {fault}; check the importance matrix, and build it again"
        )
    target = partial.with_suffix("")
    os.replace(partial, target)
    return _described(target, file_sha256(target), plan, actual, metadata)


def as_is(gguf: Path, sha256: str, plan: Plan) -> QuantizedModel:
    """Describe the full-precision baseline: a file whose plan is to leave it as it is."""
    return _described(gguf, sha256, plan, audit(gguf, plan), {})


def audit(gguf: Path, plan: Plan) -> dict[str, str]:
    """Read a GGUF back and return tensor -> type.

    Raises ToolError if a tensor is missing or has another type than in the plan. Also if all tensors together have another
    size, or if the file's own metadata names another plan.
    """
    tensors = read_tensors(gguf)
    if missing := plan.types.keys() - tensors.keys():
        raise ToolError(
            f"{gguf.name} lacks {len(missing)} tensors of plan {plan.name}, {min(missing)} first; rebuild it"
        )
    drifted = {name: kind for name, kind in plan.types.items() if tensors[name].type != kind}
    if drifted:
        name = min(drifted)
        raise ToolError(
            f"{len(drifted)} tensors of {gguf.name} drifted from plan {plan.name}, {name} first: "
            f"{tensors[name].type} instead of {drifted[name]}; the plan must name only types that llama-quantize keeps"
        )
    size = sum(tensor.bytes for tensor in tensors.values())
    if size != plan.tensor_bytes:
        raise ToolError(
            f"{gguf.name} holds {size:,} tensor bytes and plan {plan.name} says {plan.tensor_bytes:,}; plan it again"
        )
    recorded = read_metadata(gguf).get("samq.plan", plan.digest())
    if recorded != plan.digest():
        raise ToolError(f"{gguf.name} was made from plan {recorded[:12]}, not from {plan.digest()[:12]}; rebuild it")
    return {name: tensor.type for name, tensor in tensors.items()}


def _described(gguf: Path, sha256: str, plan: Plan, types: dict[str, str], metadata: dict[str, str]) -> QuantizedModel:
    return QuantizedModel(
        name=plan.name,
        file=gguf.name,
        sha256=sha256,
        file_bytes=gguf.stat().st_size,
        tensor_bytes=plan.tensor_bytes,
        bits_per_weight=plan.bits_per_weight,
        plan_digest=plan.digest(),
        types=types,
        metadata=metadata,
    )
