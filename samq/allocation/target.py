"""What plans are for: the full-precision GGUF, and the plans that follow from it alone."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from samq.gguf.file import HashedFile, TensorInfo, read_tensors
from samq.gguf.formats import OUTPUT, check_mixture, fallback, without_entry
from samq.gguf.imatrix import usable_entries
from samq.llamacpp.quantize import mixture_types, planned_bytes, quantizable_tensors
from samq.records import Plan, Substitution, Toolchain


@dataclass(frozen=True)
class OpenTarget:
    """The full-precision GGUF a plan is for, and what llama-quantize says of it."""

    full: HashedFile
    tensors: dict[str, TensorInfo]
    quantizable: dict[str, TensorInfo]
    toolchain: Toolchain
    imatrix: HashedFile | None = None

    @classmethod
    def open(
        cls, gguf: Path | HashedFile, toolchain: Toolchain, imatrix: Path | HashedFile | None = None
    ) -> "OpenTarget":
        """Read the file's tensors and ask llama-quantize which of them it quantizes.

        A file given as a path is hashed. Raises SamqError for an importance matrix that llama-quantize cannot use.
        """
        tensors = read_tensors(_path(gguf))  # before the file is hashed
        full = HashedFile.of(gguf)
        quantizable = quantizable_tensors(full.path, toolchain)
        if imatrix:
            usable_entries(_path(imatrix), quantizable)
        return cls(
            full=full,
            tensors=tensors,
            quantizable=quantizable,
            toolchain=toolchain,
            imatrix=HashedFile.of(imatrix) if imatrix else None,
        )

    def legal_type(self, name: str, requested: str) -> tuple[str, Substitution | None]:
        """What llama-quantize can write to a tensor for which `requested` is asked, and why, if that is another type."""
        tensor = self.quantizable[name]
        fitting = fallback(requested, tensor.row_length)
        reason = f"rows of {tensor.row_length} do not allow {requested}"
        used = fitting if name in self._imatrix_entries else fallback(without_entry(fitting, name), tensor.row_length)
        if used != fitting:
            reason = (
                "the importance matrix has no entry for it" if self.imatrix else f"{fitting} needs an importance matrix"
            )
        return used, None if used == requested else Substitution(requested=requested, used=used, reason=reason)

    @cached_property
    def _imatrix_entries(self) -> frozenset[str]:
        return usable_entries(self.imatrix.path, self.quantizable) if self.imatrix else frozenset()

    @property
    def tied(self) -> bool:
        """Whether the output projection shares the token embedding."""
        return OUTPUT not in self.tensors


def _path(file: Path | HashedFile) -> Path:
    return file.path if isinstance(file, HashedFile) else file


def full_plan(target: OpenTarget) -> Plan:
    """The baseline: every tensor as it is."""
    kinds = {tensor.type for tensor in target.quantizable.values()}
    kind = "F16" if "F16" in kinds else min(kinds)
    types = {name: tensor.type for name, tensor in target.quantizable.items()}
    return make_plan(target, kind, "full", {}, types, mixture=kind)


def stock_plan(target: OpenTarget, mixture: str) -> Plan:
    """What llama-quantize makes of `mixture` by itself, with the same importance matrix, named tensor by tensor."""
    mixture = check_mixture(mixture)
    types, substitutions = mixture_types(
        target.full.path, mixture, target.toolchain, imatrix=target.imatrix.path if target.imatrix else None
    )
    types = {name: types[name] for name in target.quantizable}
    return make_plan(target, mixture, "stock", {"mixture": mixture}, types, substitutions, mixture)


def make_plan(
    target: OpenTarget,
    name: str,
    policy: Literal["full", "stock", "uniform", "threshold", "budget"],
    parameters: dict[str, float | int | str | bool | None],
    types: dict[str, str],
    substitutions: dict[str, Substitution] | None = None,
    mixture: str = "Q4_K_M",
) -> Plan:
    """The record of a plan that gives the quantizable tensors these types; the others keep theirs."""
    return Plan(
        name=name,
        policy=policy,
        parameters=parameters,
        types=types,
        substitutions=substitutions or {},
        mixture=mixture,
        tensor_bytes=planned_bytes(target.tensors, types),
        weights=sum(tensor.weights for tensor in target.tensors.values()),
        gguf_sha256=target.full.sha256,
        imatrix_sha256=target.imatrix.sha256 if target.imatrix else None,
    )
