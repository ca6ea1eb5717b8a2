"""Turns a plan into a GGUF with llama-quantize, and asks that program which types it gives.

The program runs in its own process group with a time limit. It runs in the folder of its output, with file names
relative to that folder. llama.cpp writes the names of its inputs into the GGUF, and absolute ones would make the bytes
depend on the machine.
"""

import re
import shutil
import tempfile
from pathlib import Path

from samq.errors import SamqError
from samq.files import GGUF_NAME, IMATRIX_NAME
from samq.gguf.audit import accept, provenance_metadata, require_space
from samq.gguf.file import HashedFile, TensorInfo, read_tensors
from samq.gguf.formats import check_mixture, tensor_bytes
from samq.gguf.imatrix import usable_entries
from samq.llamacpp.process import PROGRAM_TIMEOUT_S, run
from samq.llamacpp.toolchain import environment, program
from samq.progress import Progress, silent
from samq.records import Plan, QuantizedModel, Substitution, Toolchain

_STEP = re.compile(r"^\[\s*(\d+)/\s*(\d+)\]\s+(\S+)\s+-")
_ARROW = re.compile(r"-> +[\d.]+ MiB \((\w+)\)")
_FALLBACK = re.compile(
    r"warning: (\S+)\s+- ncols\s+(\d+) not divisible by\s+(\d+) \(required for type\s+(\w+)\).*falling back to\s+(\w+)"
)


def mixture_types(
    gguf: Path,
    mixture: str,
    toolchain: Toolchain,
    *,
    imatrix: Path | None = None,
    pure: bool = False,
) -> tuple[dict[str, str], dict[str, Substitution]]:
    """Ask llama-quantize (`--dry-run`) which type it would give each tensor in this mixture.

    Returns (tensor -> type for every tensor of the file, tensor -> substitution where the row length rules a type out).
    """
    command: list[str | Path] = [program(toolchain, "llama-quantize"), "--dry-run", *(["--pure"] if pure else [])]
    command += ["--imatrix", imatrix.absolute()] if imatrix else []
    with tempfile.TemporaryDirectory() as scratch:
        output = run(
            [*command, gguf.absolute(), check_mixture(mixture)],
            log=Path(scratch) / "dry-run.log",
            timeout_s=600,
            env=environment(toolchain),
        )
    types = {name: tensor.type for name, tensor in read_tensors(gguf).items()}
    substitutions = {}
    for line in output.splitlines():
        if step := _STEP.match(line):
            if arrow := _ARROW.search(line):
                types[step[3]] = arrow[1].upper()
        elif warning := _FALLBACK.search(line):
            name, columns, block, requested, used = warning.groups()
            reason = f"rows of {columns} are not a multiple of {block}"
            substitutions[name] = Substitution(requested=requested.upper(), used=used.upper(), reason=reason)
    return types, substitutions


def quantizable_tensors(gguf: Path, toolchain: Toolchain) -> dict[str, TensorInfo]:
    """Ask llama-quantize which tensors of the file it quantizes; the others keep their type in every plan."""
    types, _ = mixture_types(gguf, "Q8_0", toolchain, pure=True)
    return {name: tensor for name, tensor in read_tensors(gguf).items() if types[name] != tensor.type}


def quantize(
    gguf: Path,
    plan: Plan,
    folder: Path,
    toolchain: Toolchain,
    *,
    provenance: dict[str, str],
    imatrix: HashedFile | None = None,
    timeout_s: float = PROGRAM_TIMEOUT_S,
    progress: Progress = silent,
) -> QuantizedModel:
    """Write the plan's GGUF into `folder` with llama-quantize, audit it and describe it.

    `provenance` is added to the metadata as `samq.<key>` (at most 127 bytes a value, llama.cpp's limit). llama-quantize
    rounds each weight to its nearest value, also for a plan of compensated rounding, which
    `samq.quantization.compensation` then applies. Raises SamqError if the disk is too full, or if the importance matrix is
    not the plan's or cannot be used (`samq.gguf.imatrix`). Raises ToolError if llama-quantize fails or its file is not the
    plan's.
    """
    check_imatrix(plan, imatrix)
    if imatrix:
        usable_entries(imatrix.path, {name: info for name, info in read_tensors(gguf).items() if name in plan.types})
    require_space(folder, plan.name, int(1.02 * plan.tensor_bytes) + 64 * 2**20)
    partial = folder / f"{GGUF_NAME}.partial"
    types_file = folder / "tensor-types.txt"
    types_file.write_text("".join(f"^{re.escape(name)}$={kind.lower()}\n" for name, kind in plan.types.items()))
    metadata = provenance_metadata(plan, provenance)
    command: list[str | Path] = [
        program(toolchain, "llama-quantize"),
        "--allow-requantize",
        "--tensor-type-file",
        types_file.name,
    ]
    if imatrix:
        shutil.copyfile(imatrix.path, folder / IMATRIX_NAME)
        command += ["--imatrix", IMATRIX_NAME]
    for key, value in metadata.items():
        if len(value.encode()) > 127:
            raise SamqError(f"provenance {key} is longer than 127 bytes; shorten {value!r}")
        command += ["--override-kv", f"{key}=str:{value}"]

    def on_line(line: str) -> None:
        if step := _STEP.match(line):
            progress(int(step[1]), int(step[2]))

    run(
        [*command, gguf.absolute(), partial.name, plan.mixture],
        log=folder / "quantize.log",
        timeout_s=timeout_s,
        cwd=folder,
        env=environment(toolchain),
        on_line=on_line,
    )
    (folder / IMATRIX_NAME).unlink(missing_ok=True)
    return accept(partial, plan, metadata, gguf)


def check_imatrix(plan: Plan, imatrix: HashedFile | None) -> None:
    """Raise SamqError unless the importance matrix, or its absence, is what the plan's types and costs are for."""
    given, planned = imatrix.sha256 if imatrix else None, plan.imatrix_sha256
    if given != planned:
        how = f"with importance matrix {planned[:12]}" if planned else "without importance matrix"
        other = given[:12] if given else "none"
        advice = "give that one" if planned else "leave it out"
        raise SamqError(f"plan {plan.name} was made {how} and {other} is given; {advice}, or plan again")


def planned_bytes(tensors: dict[str, TensorInfo], types: dict[str, str]) -> int:
    """Bytes of all tensors if those in `types` get the type given there and the others keep theirs."""
    return sum(tensor_bytes(types.get(name, tensor.type), tensor.shape) for name, tensor in tensors.items())
