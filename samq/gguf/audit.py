"""A plan's GGUF is accepted only when it reads back as the plan says, whoever wrote it."""

import os
import shutil
from pathlib import Path

from samq.errors import SamqError, ToolError
from samq.gguf.file import file_sha256, read_metadata, read_tensors
from samq.records import Plan, QuantizedModel


def require_space(folder: Path, plan: Plan, needed: int) -> None:
    """Raises SamqError if the folder's disk has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SamqError(
            f"{folder} has {free:,} bytes free and {plan.name} needs {needed:,}; free some or move the store"
        )


def provenance_metadata(plan: Plan, provenance: dict[str, str]) -> dict[str, str]:
    """The `samq.*` values that a plan's GGUF carries: the plan's digest and policy, and whatever else is to be known."""
    return {
        "samq.plan": plan.digest(),
        "samq.policy": plan.policy,
        **{f"samq.{key}": value for key, value in provenance.items()},
    }


def accept(partial: Path, plan: Plan, metadata: dict[str, str]) -> QuantizedModel:
    """Audit what was written as NAME.partial, give it its name, and describe it; raises ToolError if it is not the plan."""
    actual = audit(partial, plan)
    target = partial.with_suffix("")
    os.replace(partial, target)
    return _described(target, file_sha256(target), plan, actual, metadata)


def as_is(gguf: Path, sha256: str, plan: Plan) -> QuantizedModel:
    """Describe a file that is its own plan: the full-precision baseline."""
    return _described(gguf, sha256, plan, audit(gguf, plan), {})


def audit(gguf: Path, plan: Plan) -> dict[str, str]:
    """Read a GGUF back: every tensor's type and the bytes of all must be the plan's, or ToolError says what drifted."""
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
