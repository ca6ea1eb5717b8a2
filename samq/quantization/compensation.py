"""Compensated rounding: the same types and scales as llama-quantize's, with weights rounded so that errors cancel out.

llama-quantize rounds every weight to the nearest value of its block. What a layer's output suffers depends on how its
inputs vary together (samq.sensitivity.gram): here the columns of a weight matrix are rounded one after another, and what each
rounding did to the output is made up for by the columns still to come (GPTQ: Frantar et al. 2023, arXiv:2210.17323;
the columns with the largest inputs first). Only codes change (samq.gguf.codes): size, types and scales stay, and llama.cpp
reads the file as any other.
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
from samq.gguf.codes import TYPES_WITH_CODES, Grid, read_grid, write_codes
from samq.gguf.file import open_gguf, read_metadata, read_rows, read_tensors, to_float
from samq.progress import Progress, silent
from samq.records import Compensation, OutputError, PriceTable
from samq.sensitivity.gpu_memory import needs_gpu_memory
from samq.sensitivity.gram import GramMatrices

_DAMPING = 0.01  # of the diagonal's mean, added to it, as GPTQ does: other texts are not quite as this one
_BAND = 128  # columns rounded before the rest hear of it
_F16_ROUNDING = 2.0**-11  # the largest, relative
# Weights rounded at a time. A GPU takes a slab of many rows in the time of one of few: its columns follow one another.
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
    """Write `quantized` to `output` with its codes rounded anew, and say what that did to the layers' outputs.

    A row whose output would not come nearer keeps its codes. So do tensors whose type has no codes of single weights,
    whose input was not measured, or that hold the weights as F16 would.

    Args:
        full: the full-precision GGUF.
        quantized: what llama-quantize made of it.
        grams: of the same model's inputs.
        output: file to write.
        device: torch's, to compute on.
        progress: told of tensors done.

    Raises:
        SamqError: the files do not hold the same tensors, or the output cannot be written.
    """
    wanted = _compensable(full, quantized, grams)
    errors: dict[str, OutputError] = {}
    with _writing(output):
        shutil.copyfile(quantized, output)
        with open(output, "r+b") as file:
            for tensor, blocks, error in _compensated(wanted, grams, device, progress):
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
    """Write a GGUF of those of `tensors` alone that can be rounded anew in a rung of the ladder, as `compensate` leaves them.

    What becomes of a tensor depends on no other one, so plans that have it in this type can all take it from here
    (`samq.quantization.assembly`). Arguments and errors are those of `compensate`.
    """
    wanted = [pair for pair in _compensable(full, rung, grams) if pair[1].name in tensors]
    errors: dict[str, OutputError] = {}
    with _writing(output):
        writer = GGUFWriter(output, read_metadata(full)["general.architecture"])
        for _, tensor in wanted:
            data = tensor.data
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, blocks, error in _compensated(wanted, grams, device, progress):
            writer.write_tensor_data(blocks)
            if error:
                errors[tensor.name] = error
        writer.close()
    return Compensation(tensors=dict(sorted(errors.items())))


def _compensable(full: Path, quantized: Path, grams: GramMatrices) -> list[tuple[ReaderTensor, ReaderTensor]]:
    """The tensors whose codes can be rounded anew, in full precision and quantized; those of one input side by side."""
    originals = {tensor.name: tensor for tensor in open_gguf(full).tensors}
    shapes = [{tensor.name: tensor.shape for tensor in read_tensors(path).values()} for path in (full, quantized)]
    if shapes[0] != shapes[1]:
        raise SamqError(f"{quantized} and {full} do not hold the same tensors; give the GGUF that it was made from")
    wanted = [
        (originals[tensor.name], tensor)
        for tensor in open_gguf(quantized).tensors
        if tensor.tensor_type.name in TYPES_WITH_CODES
        and tensor.name in grams
        and originals[tensor.name].tensor_type != tensor.tensor_type
    ]
    return sorted(wanted, key=lambda pair: grams.source[pair[1].name])


def _compensated(
    wanted: Sequence[tuple[ReaderTensor, ReaderTensor]], grams: GramMatrices, device: str, progress: Progress
) -> Iterator[tuple[ReaderTensor, NDArray[np.uint8], OutputError | None]]:
    """Each quantized tensor, its blocks with the codes rounded anew, and its errors before and after.

    No errors: its weights are held as F16 would, and it stays.
    """
    source, compensator = "", None
    for done, (original, tensor) in enumerate(wanted):
        progress(done, len(wanted))
        if _is_exact(original, tensor):
            yield tensor, tensor.data, None
            continue
        with _on_device(tensor.name):
            if compensator is None or grams.source[tensor.name] != source:
                source, compensator = grams.source[tensor.name], Compensator(grams[tensor.name].to(device))
            blocks, error = _compensate_tensor(original, tensor, compensator)
        yield tensor, blocks, error
    progress(len(wanted), len(wanted))


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Say in one sentence why the output cannot be written."""
    try:
        yield
    except OSError as error:
        raise SamqError(f"cannot write {output}: {error.strerror}; choose a folder that can be written to") from error


def _compensate_tensor(
    original: ReaderTensor, quantized: ReaderTensor, compensator: "Compensator"
) -> tuple[NDArray[np.uint8], OutputError]:
    """The tensor's blocks with the codes rounded anew, in the shape of its data, and its errors before and after."""
    kind, row_length = quantized.tensor_type, int(quantized.shape[0])
    blocks = np.array(quantized.data)
    stored = blocks.reshape(-1, blocks.shape[-1])
    before = after = 0.0
    for rows in _slabs(quantized, _SLAB_WEIGHTS if compensator.device.type == "cpu" else _GPU_SLAB_WEIGHTS):
        nearest, weights = stored[rows], read_rows(original, rows)
        rounded = write_codes(kind.name, nearest, compensator.codes(weights, read_grid(kind.name, nearest)))
        errors = [compensator.output_error(to_float(kind, data, row_length) - weights) for data in (nearest, rounded)]
        better = errors[1] < errors[0]
        before += float(errors[0].sum())
        after += float(np.minimum(*errors).sum())
        stored[rows][better] = rounded[better]
    return blocks, OutputError(nearest=before, compensated=after)


def _is_exact(original: ReaderTensor, quantized: ReaderTensor) -> bool:
    """Whether no more is lost than F16's own rounding, as where full precision was itself made from this type."""
    lost = whole = 0.0
    for rows in _slabs(quantized, _SLAB_WEIGHTS):
        lost += float(np.square(rounding_error(original, quantized, rows)).sum(dtype=np.float64))
        whole += float(np.square(read_rows(original, rows)).sum(dtype=np.float64))
    return lost <= _F16_ROUNDING**2 * whole


def _slabs(tensor: ReaderTensor, slab_weights: int) -> Iterator[slice]:
    """The rows of a tensor, some at a time; stacked experts' rows follow one another."""
    row_length, weights = int(tensor.shape[0]), int(tensor.n_elements)
    step = max(1, slab_weights // row_length)
    for first in range(0, weights // row_length, step):
        yield slice(first, first + step)


@contextmanager
def _on_device(tensor: str) -> Iterator[None]:
    """Say in one sentence what of a tensor's compensation fails on a device."""
    with needs_gpu_memory(f"the compensation of {tensor}", "use another GPU or the CPU (model.device)"):
        try:
            yield
        except torch.linalg.LinAlgError as error:
            raise SamqError(
                f"the Gram matrix of {tensor} cannot be inverted ({str(error).splitlines()[0]}); measure it on more text"
            ) from error


def compensated_prices(
    prices: PriceTable, grams: GramMatrices, *, device: str = "cpu", progress: Progress = silent
) -> PriceTable:
    """The prices with compensated rounding, before anything has been rounded.

    What is left of a layer's output error when errors of equal size are made up for column by column is the variance of
    each input that the inputs after it do not tell, against all of its variance: the same for every type.
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
    """How rows that take one input are rounded: the order of their columns, and what an error passes on to the others.

    With H the damped Gram matrix and U the upper Cholesky factor of its inverse, an error e of column j is best made up
    for by taking e U[j, k] / U[j, j] from the columns k after it (Frantar et al., section 3).
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
        # 1 / U[j, j]^2 is the variance of input j that those after it do not tell.
        self.share_left = float((factor.diagonal() ** -2).sum() / damped.diagonal().sum())

    def codes(self, weights: NDArray[np.float32], grid: Grid) -> NDArray[np.uint8]:
        """The codes for weights (rows, row length) on the grid of their blocks."""
        # Turned, so that a column lies in one piece.
        left, scale, offset = (
            torch.from_numpy(part).to(self._gram.device).t()[self._order] for part in (weights, grid.scale, grid.offset)
        )
        scale[scale == 0] = 1  # a block of one value: any code says it
        levels = torch.from_numpy(grid.levels).to(self._gram.device)
        between = (levels[1:] + levels[:-1]) / 2
        chosen = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
        columns = len(left)
        for first in range(0, columns, _BAND):
            band = range(first, min(first + _BAND, columns))
            errors = torch.empty(len(band), left.shape[1], device=left.device)
            for index, column in enumerate(band):
                wanted = left[column]
                code = torch.bucketize((wanted - offset[column]) / scale[column], between)
                rounded = levels[code].mul_(scale[column]).add_(offset[column])
                errors[index] = (wanted - rounded).div_(self._factor[column, column])
                left[column + 1 : band.stop].addr_(
                    self._factor[column, column + 1 : band.stop], errors[index], alpha=-1
                )
                chosen[column] = code
            left[band.stop :].addmm_(self._factor[first : band.stop, band.stop :].t(), errors, alpha=-1)
        codes = torch.empty_like(chosen)
        codes[self._order] = chosen
        return (codes.t() + grid.first).contiguous().cpu().numpy()

    def output_error(self, error: NDArray[np.float32]) -> NDArray[np.float64]:
        """Mean square over tokens of what an error of the weights (rows, row length) does to each row's output."""
        change = torch.from_numpy(error).to(self._gram.device)
        return ((change @ self._gram) * change).sum(1, dtype=torch.float64).cpu().numpy()
