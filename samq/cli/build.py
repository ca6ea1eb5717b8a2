"""Commands that write or read a GGUF: `samq quantize`, `samq compensate` and `samq inspect`."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from samq import __version__
from samq.cli import stages
from samq.cli.files import adopt, find_model, sha256
from samq.cli.options import (
    AllSamples,
    BatchSize,
    Dataset,
    Device,
    DtypeOption,
    Fields,
    FullGguf,
    GgufOut,
    HfFolder,
    Imatrix,
    MemoryLimit,
    Packing,
    Revision,
    Seed,
    SequenceTokens,
    Split,
)
from samq.cli.start import loading_packages, prepare_prefect
from samq.cli.text import dataset_spec, read_calibration
from samq.errors import SamqError
from samq.files import COMPENSATION_NAME, GGUF_NAME
from samq.output import check_file, work_folder
from samq.progress import bar, console


def quantize(
    gguf: FullGguf,
    plan: Annotated[Path, typer.Option(help="Plan written by `samq plan`.")],
    out: GgufOut,
    imatrix: Imatrix = None,
) -> None:
    """Write the GGUF of a plan with llama-quantize, and verify it.

    Fails unless every tensor has the planned type and size.
    """
    from samq.gguf.file import HashedFile, open_gguf
    from samq.llamacpp.quantize import check_imatrix
    from samq.llamacpp.quantize import quantize as llama_quantize
    from samq.llamacpp.toolchain import find_toolchain
    from samq.records import Plan

    check_file(out)
    tensor_plan, toolchain = Plan.load(plan), find_toolchain()
    if tensor_plan.rounding == "compensated":
        raise SamqError(
            f"{plan} is a plan of compensated rounding, which llama-quantize does not know; use `samq requantize`, or "
            "quantize a plan of `samq plan` and run `samq compensate` on that file"
        )
    matrix = HashedFile.of(imatrix) if imatrix else None
    check_imatrix(tensor_plan, matrix)
    open_gguf(gguf)  # raises SamqError for anything but a whole GGUF
    if sha256(gguf) != tensor_plan.gguf_sha256:
        raise SamqError(f"{plan} is a plan for another file than {gguf}; make a plan for this one with `samq plan`")
    provenance = {"version": __version__, "llama_cpp": f"{toolchain.version} {toolchain.build}"}
    with work_folder(out.absolute().parent) as work, bar(f"quantize {tensor_plan.name}") as progress:
        model = llama_quantize(
            gguf, tensor_plan, work, toolchain, provenance=provenance, imatrix=matrix, progress=progress
        )
        os.replace(work / model.file, out)
    size = f"{model.file_bytes / 1e6:.1f} MB, {model.bits_per_weight:.2f} bits per weight"
    console.print(f"{out}: {size}\nsha256 {model.sha256}", highlight=False, soft_wrap=True)


def compensate(
    quantized: Annotated[Path, typer.Argument(help="Quantized GGUF, from llama-quantize or any other tool.")],
    gguf: FullGguf,
    out: GgufOut,
    dataset: Dataset = "humaneval",
    samples: AllSamples = None,
    field: Fields = None,
    split: Split = None,
    sequence_tokens: SequenceTokens = 512,
    batch_size: BatchSize = 1,
    dtype: DtypeOption = "float32",
    device: Device = "auto",
    memory_limit: MemoryLimit = None,
    packing: Packing = None,
    seed: Seed = 0,
    model: Annotated[
        str | None, typer.Option(help="Hub id or Hugging Face folder that the GGUF was made from. Default: the GGUF.")
    ] = None,
    revision: Revision = None,
    hf_folder: HfFolder = None,
) -> None:
    """Round a quantized GGUF again with GPTQ, at the same size.

    Pushes each rounding error onto the columns that follow. Types and scales stay as they are. Give `--model` for an
    architecture that transformers does not read from a GGUF.
    """
    prepare_prefect()
    check_file(out)
    with bar(f"check {quantized.name}"):
        _check_pair(gguf, quantized)
    text = read_calibration(dataset_spec(dataset, field, split=split, seed=seed), samples, None, packing)
    source = find_model(model or gguf, revision, hf_folder)
    at, full = stages.workspace(device, memory_limit), adopt({GGUF_NAME: gguf})
    sequences = stages.tokenize(at, full, text, sequence_tokens)
    with loading_packages():
        from samq.llamacpp.convert import link_or_copy
        from samq.records import Compensation
        from tasks.model import TorchModel

    compensated = stages.compensate(
        at, TorchModel(source, full, dtype), sequences, batch_size, adopt({GGUF_NAME: quantized})
    )
    with work_folder(out.absolute().parent) as work:
        link_or_copy(compensated.path(GGUF_NAME), work / out.name)
        os.replace(work / out.name, out)
    errors = Compensation.load(compensated.path(COMPENSATION_NAME)).tensors
    ratios = sorted(error.ratio for error in errors.values())
    if not ratios:
        raise SamqError(f"{quantized} has no tensor whose rounding can be compensated; {out} is a copy of it")
    median, least, most = (f"{100 * ratio:.0f} %" for ratio in (ratios[len(ratios) // 2], ratios[0], ratios[-1]))
    console.print(
        f"compensated {len(ratios)} tensors; their layers keep {median} of the output error (median; {least} to {most})\n"
        f"{out}\nsha256 {sha256(out)}",
        highlight=False,
        soft_wrap=True,
    )


def _check_pair(gguf: Path, quantized: Path) -> None:
    """Raise SamqError if the quantized GGUF was not made from the other."""
    from samq.gguf.values import value_fault

    if fault := value_fault(gguf, quantized):
        raise SamqError(f"{quantized} was not made from {gguf}: {fault}; give the GGUF that it was made from")


def inspect(gguf: Annotated[Path, typer.Argument(help="GGUF file.")]) -> None:
    """Show types, sizes and provenance of a GGUF.

    Shows all parts of a split GGUF together.
    """
    from samq.gguf.file import gguf_files, read_metadata, read_tensors

    with bar(f"open {gguf.name}"):
        files, metadata = gguf_files(gguf), read_metadata(gguf, is_part=True)
        tensors = [tensor for file in files for tensor in read_tensors(file, is_part=True).values()]
    table = Table("type", "tensors", "weights", "MB", "bits per weight", title=str(gguf))
    for kind in sorted({tensor.type for tensor in tensors}):
        of_kind = [tensor for tensor in tensors if tensor.type == kind]
        table.add_row(kind, *_totals([tensor.weights for tensor in of_kind], [tensor.bytes for tensor in of_kind]))
    table.add_section()
    table.add_row("all", *_totals([tensor.weights for tensor in tensors], [tensor.bytes for tensor in tensors]))
    console.print(table)
    for key, value in metadata.items():
        if key.startswith(("samq.", "general.", "quantize.")):
            console.print(f"{key} = {value}", highlight=False, soft_wrap=True)
    for file in files:
        of_part = f"  {file}" if len(files) > 1 else ""
        console.print(f"sha256 = {sha256(file)}{of_part}", highlight=False, soft_wrap=True)


def _totals(weights: list[int], sizes: list[int]) -> tuple[str, str, str, str]:
    """Cells of a row: tensors, weights, MB, bits per weight."""
    bits = f"{8 * sum(sizes) / sum(weights):.2f}" if sum(weights) else ""  # a GGUF may hold only a vocabulary
    return str(len(weights)), f"{sum(weights):,}", f"{sum(sizes) / 1e6:.2f}", bits
