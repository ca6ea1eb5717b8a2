"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

CALIBRATION_SAMPLES = 32  # default of `samq calibrate` and `samq imatrix`
HELDOUT_START = 2 * CALIBRATION_SAMPLES  # first sample of `samq evaluate`, past those that calibration may have used

Dtype = Literal["float32", "bfloat16", "float16"]
LabelsOption = Literal["model", "text"]
Grouping = Literal["block", "tensor"]

ModelArgument = Annotated[
    str,
    typer.Argument(help="Model: a hub id, a Hugging Face folder, a GGUF file, or package:MODULE/FILE."),
]
RegisteredModel = Annotated[str, typer.Argument(help="Name of the registered model.")]
FullGguf = Annotated[Path, typer.Option("--gguf", help="Full-precision GGUF.")]
GgufOut = Annotated[Path, typer.Option(help="GGUF to write.")]

HfFolder = Annotated[Path | None, typer.Option(help="Folder with the tokenizer and configuration that a GGUF lacks.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")]
Dataset = Annotated[
    str,
    typer.Option(
        help="Calibration text: humaneval, gsm8k, hellaswag, truthfulqa, a .jsonl, .json, .parquet or .txt file, "
        "or a data set on the hub."
    ),
]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--field", metavar="NAME", help="Field that holds the text. Repeat the option to join several, in order."
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of a data set on the hub. [default: train]")]
CalibrationSamples = Annotated[
    int | None,
    typer.Option(min=1, help=f"Number of samples. [default: {CALIBRATION_SAMPLES}, or all if there are fewer]"),
]
AllSamples = Annotated[int | None, typer.Option(min=1, help="Number of samples. [default: all]")]
UnmeasuredType = Annotated[
    str,
    typer.Option(
        help="Type of tensors that are not measured, such as layers for multi-token prediction.",
    ),
]
Packing = Annotated[
    bool | None,
    typer.Option(
        "--packing/--no-packing",
        help="Cut the text into sequences of equal length, or take one sequence per sample. "
        "If cut, --samples counts sequences. [default: cut only a text file without form feeds]",
    ),
]
SequenceTokens = Annotated[int, typer.Option(min=2, help="Longest sequence, in tokens.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences per batch.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Precision of the model in torch.")]
Device = Annotated[str, typer.Option(help="Torch device, such as cuda:0. auto: all GPUs, or else the CPU.")]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help="Memory of the device to count on, such as 20GiB. If it is less than twice the model, blocks stay on disk until "
        "they run. [default: what is free]"
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sample order and, in `samq calibrate`, of the labels.")]
Imatrix = Annotated[Path | None, typer.Option(help="Importance matrix written by `samq imatrix` or llama-imatrix.")]
NoImatrix = Annotated[bool, typer.Option("--no-imatrix", help="Work without an importance matrix, at lower quality.")]
MlflowPort = Annotated[int, typer.Option(help="Port of MLflow's pages.")]
PrefectPort = Annotated[int, typer.Option(help="Port of Prefect's pages.")]
