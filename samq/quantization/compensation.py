"""Compensated rounding (GPTQ): the types and scales of llama-quantize, with rounding errors that cancel out.

llama-quantize rounds each weight to the nearest value of its block. The error of the layer's output depends on how the
inputs vary together, which the Gram matrix measures (samq.sensitivity.gram). Compensated rounding rounds the columns of a
weight matrix one after another, those with the largest inputs first, and pushes each rounding error onto the columns that
follow (GPTQ: Frantar et al. 2023, arXiv:2210.17323). Only codes change (samq.gguf.codes). Size, types and scales stay, and
llama.cpp reads the file as any other.
"""

import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFWriter, ReaderTensor
from numpy.typing import NDArray

from samq.allocation.prices import rounding_error
from samq.errors import SamqError
from samq.gguf.codes import TYPES_WITH_CODES, CodeGrid, read_grid, write_codes
from samq.gguf.file import open_gguf, read_metadata, read_rows, read_tensors, to_float
from samq.progress import Progress, silent
from samq.records import Compensation, OutputError, PriceTable
from samq.sensitivity.gram import GramMatrices
from samq.sensitivity.memory import needs_gpu_memory

_DAMPING = 0.01  # times the diagonal's mean, added to the diagonal as in GPTQ, since other texts differ from this one
_BAND = 128  # columns that are rounded before their errors reach the columns after the band
_F16_ROUNDING = 2.0**-11  # the largest relative rounding error of F16
# Weights rounded at a time. The columns are sequential, so a GPU takes as long for a slab of few rows as for many.
_SLAB_WEIGHTS = 2**24
_GPU_SLAB_WEIGHTS = 2**28


def compensate(
    full: Path,
    quantized: Path,
    grams: GramMatrices,
    output: Path,
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> Compensation:
    """Write `quantized` to `output` with compensated rounding, and return the errors of the layers' outputs.

    A row keeps its codes if compensation would not reduce the error of its output. A tensor keeps its codes if its type
    does not have a code for each weight, if its input was not measured, or if it is as exact as F16.

    Args:
        full: the full-precision GGUF.
        quantized: the GGUF that llama-quantize made of it.
        grams: the Gram matrices of the same model.
        output: the file to write.
        device: the torch device to compute on.
        progress: told of the tensors that are done.

    Raises:
        SamqError: the files do not hold the same tensors, or the output cannot be written.
    """
    pairs = _compensable(full, quantized, grams)
    errors: dict[str, OutputError] = {}
    with _writing(output):
        shutil.copyfile(quantized, output)
        with open(output, "r+b") as file:
            for tensor, blocks, error in _compensated(pairs, grams, device, progress):
                if error:
                    file.seek(int(tensor.data_offset))
                    file.write(blocks.tobytes())
                    errors[tensor.name] = error
    return Compensation(tensors=dict(sorted(errors.items())))


def compensate_rung(
    full: Path,
    rung: Path,
    tensors: Collection[str],
    grams: GramMatrices,
    output: Path,
    *,
    device: str = "cpu",
    progress: Progress = silent,
) -> Compensation:
    """Write a GGUF of those of `tensors` that compensation can round in a rung of the ladder, with their new codes.

    The codes of a tensor do not depend on the other tensors, so all plans with the tensor in this type can copy it from
    this file (`samq.quantization.assembly`). Arguments and errors are those of `compensate`.
    """
    pairs = [pair for pair in _compensable(full, rung, grams) if pair[1].name in tensors]
    errors: dict[str, OutputError] = {}
    with _writing(output):
        writer = GGUFWriter(output, read_metadata(full)["general.architecture"])
        for _, tensor in pairs:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, blocks, error in _compensated(pairs, grams, device, progress):
            writer.write_tensor_data(blocks)
            if error:
                errors[tensor.name] = error
        writer.close()
    return Compensation(tensors=dict(sorted(errors.items())))


def _compensable(full: Path, quantized: Path, grams: GramMatrices) -> list[tuple[ReaderTensor, ReaderTensor]]:
    """The tensors that compensation can round, each in full precision and quantized; those of one input side by side."""
    originals = {tensor.name: tensor for tensor in open_gguf(full).tensors}
    shapes = [{tensor.name: tensor.extents for tensor in read_tensors(path).values()} for path in (full, quantized)]
    if shapes[0] != shapes[1]:
        raise SamqError(f"{quantized} and {full} do not hold the same tensors; give the GGUF that it was made from")
    pairs = [
        (originals[tensor.name], tensor)
        for tensor in open_gguf(quantized).tensors
        if tensor.tensor_type.name in TYPES_WITH_CODES
        and tensor.name in grams
        and originals[tensor.name].tensor_type != tensor.tensor_type
    ]
    return sorted(pairs, key=lambda pair: grams.source[pair[1].name])


def _compensated(
    pairs: Sequence[tuple[ReaderTensor, ReaderTensor]], grams: GramMatrices, device: str, progress: Progress
) -> Iterator[tuple[ReaderTensor, NDArray[np.uint8], OutputError | None]]:
    """Yield each quantized tensor, its blocks with the new codes, and its errors before and after.

    The errors are None for a tensor that is as exact as F16, which keeps its codes.
    """
    source, compensator = "", None
    for done, (original, tensor) in enumerate(pairs):
        progress(done, len(pairs))
        if _is_exact(original, tensor):
            yield tensor, tensor.data, None
            continue
        with _on_device(tensor.name):
            if compensator is None or grams.source[tensor.name] != source:
                source, compensator = grams.source[tensor.name], Compensator(grams[tensor.name].to(device))
            blocks, error = _compensate_tensor(original, tensor, compensator)
        yield tensor, blocks, error
    progress(len(pairs), len(pairs))


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Raise SamqError if the output cannot be written."""
    try:
        yield
    except OSError as error:
        raise SamqError(f"cannot write {output}: {error.strerror}; choose a folder that can be written to") from error


def _compensate_tensor(
    original: ReaderTensor, quantized: ReaderTensor, compensator: "Compensator"
) -> tuple[NDArray[np.uint8], OutputError]:
    """The tensor's blocks with the new codes, in the shape of its data, and its errors before and after."""
    kind, row_length = quantized.tensor_type, int(quantized.shape[0])
    blocks = np.array(quantized.data)
    stored = blocks.reshape(-1, blocks.shape[-1])
    before = after = 0.0
    for rows in _slabs(quantized, _SLAB_WEIGHTS if compensator.device.type == "cpu" else _GPU_SLAB_WEIGHTS):
        nearest, weights = stored[rows], read_rows(original, rows)
        rounded = write_codes(kind.name, nearest, compensator.codes(weights, read_grid(kind.name, nearest)))
        errors = [compensator.output_error(to_float(kind, data, row_length) - weights) for data in (nearest, rounded)]
        is_better = errors[1] < errors[0]
        before += float(errors[0].sum())
        after += float(np.minimum(*errors).sum())
        stored[rows][is_better] = rounded[is_better]
    return blocks, OutputError(nearest=before, compensated=after)


def _is_exact(original: ReaderTensor, quantized: ReaderTensor) -> bool:
    """Whether the error is within F16's own rounding, as if the full-precision GGUF was itself made from this type."""
    error_squares = weight_squares = 0.0
    for rows in _slabs(quantized, _SLAB_WEIGHTS):
        error_squares += float(np.square(rounding_error(original, quantized, rows)).sum(dtype=np.float64))
        weight_squares += float(np.square(read_rows(original, rows)).sum(dtype=np.float64))
    return error_squares <= _F16_ROUNDING**2 * weight_squares


def _slabs(tensor: ReaderTensor, slab_weights: int) -> Iterator[slice]:
    """The rows of a tensor in slabs; the rows of stacked experts are numbered through."""
    row_length, weights = int(tensor.shape[0]), int(tensor.n_elements)
    step = max(1, slab_weights // row_length)
    for first in range(0, weights // row_length, step):
        yield slice(first, first + step)


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


def compensated_prices(
    prices: PriceTable, grams: GramMatrices, *, device: str = "cpu", progress: Progress = silent
) -> PriceTable:
    """Predict the prices with compensated rounding, without rounding anything.

    If the errors of all columns are equally large, compensation leaves this share of a layer's output error: the variance
    of each input that the inputs after it do not explain, relative to its whole variance. The share is the same for every
    type. Raises SamqError if a Gram matrix cannot be inverted.
    """
    shares: dict[str, float] = {}
    tensors = {}
    for done, (name, tensor) in enumerate(prices.tensors.items()):
        progress(done, len(prices.tensors))
        if name in grams:
            source = grams.source[name]
            if source not in shares:
                with _on_device(name):
                    shares[source] = Compensator(grams[name].to(device)).share_left
            kinds = {
                kind: price.model_copy(update={"kl_nats": price.kl_nats * shares[source]})
                if kind in TYPES_WITH_CODES
                else price
                for kind, price in tensor.types.items()
            }
            tensors[name] = tensor.model_copy(update={"types": kinds})
        else:
            tensors[name] = tensor
    progress(len(prices.tensors), len(prices.tensors))
    return prices.model_copy(update={"tensors": tensors, "rounding": "compensated"})


class Compensator:
    """GPTQ for the rows of one input: the order of their columns, and the share of an error that each column passes on.

    With H the damped Gram matrix and U the upper Cholesky factor of its inverse, the best compensation of an error e of
    column j subtracts e U[j, k] / U[j, j] from each column k after it (Frantar et al., section 3).
    """

    def __init__(self, gram: torch.Tensor) -> None:
        self.device = gram.device
        self._gram = gram
        damped = gram.double()
        damped.diagonal().add_(_DAMPING * damped.diagonal().mean())
        self._order = torch.argsort(damped.diagonal(), descending=True, stable=True)
        damped = damped[self._order][:, self._order]
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        factor = torch.linalg.cholesky(inverse, upper=True)
        self._factor = factor.float()
        # 1 / U[j, j]^2 is the variance of input j that the inputs after it do not explain.
        self.share_left = float((factor.diagonal() ** -2).sum() / damped.diagonal().sum())

    def codes(self, weights: NDArray[np.float32], grid: CodeGrid) -> NDArray[np.uint8]:
        """The codes, uint8, for weights (rows, row length) on the grid of their blocks."""
        # transposed, so that a column is contiguous
        remaining, scale, offset = (
            torch.from_numpy(part).to(self._gram.device).t()[self._order] for part in (weights, grid.scale, grid.offset)
        )
        scale[scale == 0] = 1  # a block with one value, which every code stands for
        levels = torch.from_numpy(grid.levels).to(self._gram.device)
        boundaries = (levels[1:] + levels[:-1]) / 2
        ordered_codes = torch.empty(remaining.shape, dtype=torch.uint8, device=remaining.device)
        columns = len(remaining)
        for first in range(0, columns, _BAND):
            band = range(first, min(first + _BAND, columns))
            errors = torch.empty(len(band), remaining.shape[1], device=remaining.device)
            for index, column in enumerate(band):
                exact = remaining[column]
                code = torch.bucketize((exact - offset[column]) / scale[column], boundaries)
                rounded = levels[code].mul_(scale[column]).add_(offset[column])
                errors[index] = (exact - rounded).div_(self._factor[column, column])
                remaining[column + 1 : band.stop].addr_(
                    self._factor[column, column + 1 : band.stop], errors[index], alpha=-1
                )
                ordered_codes[column] = code
            remaining[band.stop :].addmm_(self._factor[first : band.stop, band.stop :].t(), errors, alpha=-1)
        codes = torch.empty_like(ordered_codes)
        codes[self._order] = ordered_codes
        return (codes.t() + grid.first).contiguous().cpu().numpy()

    def output_error(self, error: NDArray[np.float32]) -> NDArray[np.float64]:
        """The mean square over tokens of each row's output error, (rows,), from the weights' errors (rows, row length)."""
        change = torch.from_numpy(error).to(self._gram.device)
        return ((change @ self._gram) * change).sum(1, dtype=torch.float64).cpu().numpy()
