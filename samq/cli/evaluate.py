"""Commands that measure a GGUF: `samq evaluate` and `samq lm-eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from samq.cli import stages
from samq.cli.files import adopt, find_model
from samq.cli.options import HELDOUT_START, AllSamples, Fields, Split
from samq.cli.start import loading_packages, prepare_prefect, validated
from samq.cli.text import dataset_spec, read_text
from samq.files import EVALUATION_NAME, GGUF_NAME
from samq.output import export, make_folder
from samq.progress import console

if TYPE_CHECKING:
    from samq.records import Evaluation


def evaluate(
    gguf: Annotated[Path, typer.Argument(help="GGUF to measure.")],
    baseline: Annotated[Path, typer.Option(help="Full-precision GGUF to compare with.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and the tables per token and per item.")
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(help="Held-out text, in a format of `samq calibrate`. Use text that you did not calibrate on."),
    ] = "humaneval",
    start: Annotated[
        int | None,
        typer.Option(min=0, help=f"First sample, counted from 0. [default: 0 for a file, otherwise {HELDOUT_START}]"),
    ] = None,
    samples: AllSamples = None,
    field: Fields = None,
    split: Split = None,
    context_tokens: Annotated[int, typer.Option(min=16, help="Length of a chunk of text, in tokens.")] = 512,
    chunks: Annotated[int, typer.Option(min=1, help="Number of chunks to score.")] = 16,
) -> None:
    """Compare a GGUF with its full-precision model.

    Measures KL divergence and perplexity on held-out text, JSON compliance, speed and memory.
    """
    prepare_prefect()
    if out:
        make_folder(out)
    with loading_packages():
        from samq.data.datasets import is_file
        from samq.evaluation.settings import EvaluationSettings
        from samq.records import Evaluation

    if start is None:
        start = 0 if is_file(dataset) else HELDOUT_START
    text = read_text(dataset_spec(dataset, field, start=start, samples=samples, split=split))
    settings = validated(EvaluationSettings, context_tokens=context_tokens, chunks=chunks)
    at = stages.workspace()
    full = stages.convert(at, find_model(baseline))
    artifact = stages.evaluate(at, gguf.stem, adopt({GGUF_NAME: gguf}), full, text, settings)
    evaluation = Evaluation.load(artifact.path(EVALUATION_NAME))
    console.print(_metrics(evaluation, f"{gguf.name} on {dataset}, from sample {start}"))
    for name, reason in evaluation.missing.items():
        console.print(f"not measured: {name}: {reason}")
    if out:
        export(map(artifact.path, artifact.files), out)


def _metrics(evaluation: "Evaluation", title: str) -> Table:
    table = Table("metric", "value", "standard error", "n", title=title)
    for name, metric in evaluation.metrics.items():
        error = "" if metric.stderr is None else f"{metric.stderr:.3g}"
        table.add_row(name, f"{metric.value:.6g}", error, str(metric.n or ""))
    return table


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval on a GGUF, with lm-eval's own options.

    For example: samq lm-eval --model samq-gguf --model_args gguf=MODEL.gguf --tasks hellaswag
    """
    with loading_packages():
        from samq.evaluation.lm_eval.harness import run_command_line

    run_command_line(context.args)
