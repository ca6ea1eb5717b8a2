"""Compensated rounding: the types and scales of llama-quantize, with rounding errors that cancel out.

llama-quantize rounds each weight to the nearest value of its block. The error of the layer's output depends on how the
inputs vary together, which the Gram matrix measures (samq.sensitivity.gram). GPTQ (samq.quantization.gptq) lets the errors of
a row's weights cancel. Only codes change (samq.gguf.codes). Size, types and scales stay, and llama.cpp
reads the file as any other.

A block's Gram matrices are there while that block runs. So all files that are made get their tensors of this block then.
"""

import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from itertools import islice
from operator import add
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from samq.errors import SamqError
from samq.gguf.codes import TYPES_WITH_CODES
from samq.gguf.nearest import NearestRounding
from samq.quantization.compensated_file import PlannedFile
from samq.quantization.gptq import Compensator, variances
from samq.quantization.slabs import Place, Slab, groups_of_slabs, prepared, rows_in_slabs
from samq.records import Compensation, OutputError, PriceTable
from samq.sensitivity.memory import needs_gpu_memory
from samq.sensitivity.moments import Moments, Piece
from samq.sensitivity.shares import over_devices

# Weights rounded at a time. The columns are sequential, so a GPU takes as long for few rows as for many.
_WEIGHTS_AT_A_TIME = 2**24
_GPU_WEIGHTS_AT_A_TIME = 2**28  # they take 2 GiB there


def write_compensated(
    files: Mapping[str, PlannedFile],
    full: NearestRounding,
    rounded: NearestRounding,
    pieces: Iterable[Piece],
    log: Path,
    *,
    everything: bool,
    devices: Sequence[torch.device] = (),
) -> dict[str, Compensation]:
    """Write the tensors of several GGUFs, with compensated rounding where it is possible, while the pieces come.

    A row keeps its codes if compensation would not reduce the error of its output. A tensor keeps its codes if its type
    has no code for each weight, or is as exact as F16. So does a tensor whose input is not among the moments. A tensor that
    several files have in one type is rounded once. Each of stacked experts is compensated on its own.

    Args:
        files: name -> the file.
        full: the weights in full precision.
        rounded: source of the blocks that compensation starts with. Their scales stay. It is the same GGUF with an importance
            matrix, or the file that another program quantized.
        pieces: the moments of the layers' inputs, from `samq.sensitivity.gram.input_moments`.
        log: the errors that are known are noted there, so that a killed process goes on with those of the one before.
        everything: whether tensors that keep their codes are written as well.
        devices: that compensate the inputs of a piece, each another; none: where the moments are.

    Returns:
        Name -> the errors of the layers' outputs; of stacked experts a token that goes to one of them.

    Raises:
        SamqError: a Gram matrix cannot be inverted, a file cannot be written, or a GPU's memory does not suffice.
    """
    errors = _Errors(log)
    for piece in pieces:
        _compensate_piece(files, full, rounded, piece, errors, devices)
        del piece  # its matrices, before those of the next one come
    if everything:
        _write_others(files, full, rounded, errors)
    return {name: errors.of(file.types) for name, file in files.items()}


class _Errors:
    """What became of the matrices of tensors in types; noted in a file, a line each.

    (tensor, type) -> the matrix, of stacked experts by its number -> its errors, or None if it is as exact as F16.
    """

    def __init__(self, log: Path) -> None:
        self._log, self._lock = log, threading.Lock()
        self._known: dict[tuple[str, str], dict[int | None, OutputError | None]] = defaultdict(dict)
        for line in log.read_text().splitlines() if log.exists() else ():
            try:
                tensor, kind, expert, error = json.loads(line)
            except ValueError:  # the process was killed while it wrote
                continue
            self._known[tensor, kind][expert] = error and OutputError(**error)

    def matrices(self, tensor: str, kind: str) -> set[int | None]:
        """The matrices that are known: numbers of experts, or None for all of a tensor together."""
        return set(self._known.get((tensor, kind), ()))

    def add(self, tensor: str, kind: str, expert: int | None, error: OutputError | None) -> None:
        """Note what became of a matrix in a type."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._lock, open(self._log, "a") as file:
            self._known[tensor, kind][expert] = error
            file.write(json.dumps([tensor, kind, expert, error and error.model_dump()]) + "\n")

    def of(self, types: Mapping[str, str]) -> Compensation:
        """The errors of a file with these types."""
        errors = {
            name: [error for _, error in sorted(self._known[name, kind].items()) if error]
            for name, kind in sorted(types.items())
            if (name, kind) in self._known
        }
        return Compensation(tensors={name: reduce(add, of_one) for name, of_one in errors.items() if of_one})


@dataclass(frozen=True)
class _SharedInput:
    """What several tensors have as input, and their rows in the types that files have them in."""

    moments: Moments
    tensors: list[tuple[str, str]]
    groups: list[list[Place]]  # of slabs that are rounded at a time


def _inputs(files: Mapping[str, PlannedFile], full: NearestRounding, piece: Piece) -> list[_SharedInput]:
    """The inputs of tensors that can be compensated."""
    inputs = []
    for moments in piece.moments:
        tensors = [
            (name, kind)
            for name in moments.tensors
            for kind in _by_type(files, name)
            if kind in TYPES_WITH_CODES and kind != full.kind(name)
        ]
        if moments.gram.ndim > 1 and tensors:
            limit = _WEIGHTS_AT_A_TIME if moments.gram.device.type == "cpu" else _GPU_WEIGHTS_AT_A_TIME
            inputs.append(_SharedInput(moments, tensors, groups_of_slabs(full, tensors, moments.expert, limit)))
    return inputs


def _compensate_piece(
    files: Mapping[str, PlannedFile],
    full: NearestRounding,
    rounded: NearestRounding,
    piece: Piece,
    errors: _Errors,
    devices: Sequence[torch.device],
) -> None:
    """Round the tensors of a part of the model, in each type that a file has them in."""
    inputs = _inputs(files, full, piece)
    of_all = prepared([group for of_one in inputs for group in of_one.groups], full, rounded)

    def compensate(of_one: _SharedInput, device: torch.device | None) -> None:
        # devices that share the inputs take them in an order of their own
        slabs = of_all if device is None else prepared(of_one.groups, full, rounded)
        _compensate_input(files, replace(of_one, moments=of_one.moments.on(device)), slabs, errors)

    over_devices(compensate, inputs, devices)


def _compensate_input(
    files: Mapping[str, PlannedFile], of_one: _SharedInput, slabs: Iterator[list[Slab]], errors: _Errors
) -> None:
    """Round the tensors that have an input; `slabs` begin with its groups."""
    moments = of_one.moments
    output_errors: dict[tuple[str, str], OutputError | None] = dict.fromkeys(of_one.tensors)
    with _on_device(moments.tensors[0]):
        compensator = Compensator(moments.estimate)
        for some in islice(slabs, len(of_one.groups)):
            for slab, blocks, error in _compensate_slabs(some, compensator):
                for file in _by_type(files, slab.name)[slab.kind]:
                    file.write(slab.name, slab.rows.start, blocks)
                before = output_errors[slab.tensor]
                output_errors[slab.tensor] = before + error if before and error else before or error
    for (name, kind), error in output_errors.items():
        errors.add(name, kind, moments.expert, error and error * moments.share)


def _compensate_slabs(
    slabs: list[Slab], compensator: Compensator
) -> Iterator[tuple[Slab, NDArray[np.uint8], OutputError | None]]:
    """Yield each slab with its new blocks, and its errors before and after, or None if it is as exact as F16."""
    inexact = [slab for slab in slabs if not slab.is_exact]
    codes = compensator.codes([(slab.weights, slab.grid) for slab in inexact])
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="pack") as threads:
        compensated = dict(zip(map(id, inexact), threads.map(Slab.with_codes, inexact, codes), strict=True))
    for slab in slabs:
        if slab.is_exact:
            yield slab, slab.blocks, None
            continue
        other = compensated.pop(id(slab))
        before, after = compensator.output_error(slab.change), compensator.output_error(other.change)
        slab.without_change()
        blocks = np.where((after < before)[:, None], other.blocks, slab.blocks)
        yield slab, blocks, OutputError(nearest=float(before.sum()), compensated=float(np.minimum(before, after).sum()))


def _by_type(files: Mapping[str, PlannedFile], name: str) -> dict[str, list[PlannedFile]]:
    """Type -> the files that have the tensor in it."""
    having: dict[str, list[PlannedFile]] = defaultdict(list)
    for file in files.values():
        if name in file.types:
            having[file.types[name]].append(file)
    return having


def _write_others(
    files: Mapping[str, PlannedFile], full: NearestRounding, rounded: NearestRounding, errors: _Errors
) -> None:
    """Write the matrices that no input came for, or whose types have no codes."""
    for name in full.names:
        for kind, having in _by_type(files, name).items():
            written = errors.matrices(name, kind)
            if None in written:
                continue
            for expert in {*range(full.matrices(name))} - written if written else {None}:
                for rows in rows_in_slabs(full, name, expert):
                    blocks = rounded.blocks(name, kind, rows)
                    for file in having:
                        file.write(name, rows.start, blocks)


@contextmanager
def _on_device(tensor: str) -> Iterator[None]:
    """Raise SamqError if a tensor's compensation fails for lack of GPU memory, or since its Gram matrix is singular."""
    with needs_gpu_memory(f"the compensation of {tensor}", "use another GPU or the CPU (model.device)"):
        try:
            yield
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise SamqError(
                f"the Gram matrix of {tensor} cannot be inverted ({str(error).splitlines()[0]}); measure it on more text"
            ) from error


def expected_errors(moments: Moments) -> tuple[float, float]:
    """The layers' output error a row and token of the tensor, and what compensation leaves of it, for errors of size 1.

    That is the variance of all inputs, and of each input that which the inputs after it do not explain, the same for every type.
    An expert's are times its share of the tokens. Raises SamqError if the Gram matrix cannot be inverted.
    """
    with _on_device(moments.tensors[0]):
        together, unexplained = variances(moments.estimate)
    return together * moments.share, unexplained * moments.share


def compensated_prices(prices: PriceTable, shares: Mapping[str, float]) -> PriceTable:
    """The prices with compensated rounding, which leaves such a share of a tensor's cost (`expected_errors`)."""
    tensors = {}
    for name, tensor in prices.tensors.items():
        share = shares.get(name, 1.0)
        kinds = {
            kind: price.model_copy(update={"kl_nats": price.kl_nats * share}) if kind in TYPES_WITH_CODES else price
            for kind, price in tensor.types.items()
        }
        tensors[name] = tensor.model_copy(update={"types": kinds})
    return prices.model_copy(update={"tensors": tensors, "rounding": "compensated"})
