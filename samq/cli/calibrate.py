"""Commands that measure on calibration text: `samq calibrate` and `samq imatrix`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from samq.cli import stages
from samq.cli.files import adopt, find_model, fisher_beside
from samq.cli.options import (
    CALIBRATION_SAMPLES,
    BatchSize,
    CalibrationSamples,
    Dataset,
    Device,
    DtypeOption,
    Fields,
    FullGguf,
    HfFolder,
    LabelsOption,
    MemoryLimit,
    ModelArgument,
    Packing,
    Revision,
    Seed,
    SequenceTokens,
    Split,
)
from samq.cli.start import loading_packages, prepare_prefect
from samq.cli.text import dataset_spec, read_calibration
from samq.files import FISHER_NAME, GGUF_NAME, IMATRIX_NAME
from samq.output import check_file, export_file
from samq.progress import console

if TYPE_CHECKING:
    from samq.records import SensitivityMap


def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="Sensitivity map to write (JSON), with its .fisher.safetensors beside it.")],
    dataset: Dataset = "humaneval",
    samples: CalibrationSamples = None,
    field: Fields = None,
    split: Split = None,
    sequence_tokens: SequenceTokens = 512,
    batch_size: BatchSize = 1,
    dtype: DtypeOption = "float32",
    device: Device = "auto",
    memory_limit: MemoryLimit = None,
    labels: Annotated[
        LabelsOption,
        typer.Option(help="Labels of the loss: drawn from the model (predicts KL divergence), or the text's own."),
    ] = "model",
    packing: Packing = None,
    seed: Seed = 0,
    revision: Revision = None,
    hf_folder: HfFolder = None,
) -> None:
    """Measure the sensitivity of the loss to each weight tensor.

    Writes gradient norms and Fisher information on calibration text.
    """
    prepare_prefect()
    check_file(out)
    spec = dataset_spec(dataset, field, split=split, seed=seed)
    text = read_calibration(spec, samples, CALIBRATION_SAMPLES, packing)
    source = find_model(model, revision, hf_folder)
    at = stages.workspace(device, memory_limit)
    full, mmproj = stages.convert(at, source), stages.convert_mmproj(at, source)
    sequences = stages.tokenize(at, full, text, sequence_tokens)
    with loading_packages():
        from tasks.calibrate import Passes, load_map
        from tasks.model import TorchModel

    passes = Passes(batch_size, labels, seed)
    calibration = stages.calibrate(at, TorchModel(source, full, dtype), sequences, passes)
    sensitivity = load_map(calibration)
    export_file(calibration.path(FISHER_NAME), fisher_beside(out))
    sensitivity.save(out)
    console.print(_highest_scores(sensitivity, 10))
    console.print(f"{out}\nfull-precision GGUF: {full.path(GGUF_NAME)}", highlight=False, soft_wrap=True)
    if mmproj:
        console.print(f"vision or audio part: {mmproj}", highlight=False, soft_wrap=True)


def _highest_scores(sensitivity: "SensitivityMap", count: int) -> Table:
    title = f"highest scores of {len(sensitivity.tensors)} tensors, from {sensitivity.samples} sequences"
    table = Table("tensor", "gradient norm", "score", title=title)
    for name, tensor in sorted(sensitivity.tensors.items(), key=lambda item: -item[1].score)[:count]:
        norm = f"{tensor.gradient_norm:.4g} ± {tensor.gradient_norm_stderr:.2g}"
        table.add_row(name, norm, f"{tensor.score:.4f}")
    return table


def imatrix(
    gguf: FullGguf,
    out: Annotated[Path, typer.Option(help="Importance matrix to write (GGUF).")],
    dataset: Dataset = "humaneval",
    samples: CalibrationSamples = None,
    field: Fields = None,
    split: Split = None,
    sequence_tokens: SequenceTokens = 512,
    seed: Seed = 0,
) -> None:
    """Measure an importance matrix with llama-imatrix.

    It tells llama-quantize which inputs of each layer are large.
    """
    prepare_prefect()
    check_file(out)
    spec = dataset_spec(dataset, field, split=split, seed=seed)
    text = read_calibration(spec, samples, CALIBRATION_SAMPLES, None).text
    matrix = stages.measure_imatrix(stages.workspace(), adopt({GGUF_NAME: gguf}), text, sequence_tokens)
    export_file(matrix.path(IMATRIX_NAME), out)
    console.print(str(out), highlight=False, soft_wrap=True)
