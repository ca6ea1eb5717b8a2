"""The command line: `samq demo`, `samq requantize`, and each stage by itself on files."""

import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import typer
from rich.logging import RichHandler
from rich.table import Table

from samq import __version__
from samq.errors import SamqError
from samq.home import home, store_folder
from samq.output import check_file, export, export_file, make_folder, work_folder
from samq.progress import bar, console

if TYPE_CHECKING:
    from pydantic import BaseModel

    from flows.requantize import Sweep
    from samq.data.datasets import DatasetSpec
    from samq.records import Plan, TextSet
    from samq.store import Artifact

    Settings = TypeVar("Settings", bound=BaseModel)

app = typer.Typer(
    help="Sensitivity-aware mixed quantization: the best GGUF that fits a memory budget, measured and tracked.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelArgument = Annotated[
    str, typer.Argument(help="hub id, Hugging Face folder, GGUF file, or package:<module>/<file>")
]
HfFolder = Annotated[Path | None, typer.Option(help="tokenizer and configuration for a GGUF without them")]
Dataset = Annotated[str, typer.Option(help="humaneval, gsm8k, ..., a .jsonl/.parquet/.txt file, or a hub dataset's id")]
Packing = Annotated[
    bool | None,
    typer.Option(
        "--packing/--no-packing",
        help="cut long text into many sequences instead of one a sample; default: a text file without form feeds is cut, "
        "and its samples are the sequences",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="of the samples' order, and of labels drawn from the model")]
Fields = Annotated[list[str] | None, typer.Option("--field", help="field(s) that hold the text, joined in order")]
RegisteredModel = Annotated[str, typer.Argument(help="registered model")]
FullGguf = Annotated[Path, typer.Option("--gguf", help="the full-precision GGUF")]
Imatrix = Annotated[Path | None, typer.Option(help="importance matrix of `samq imatrix` or llama-imatrix")]
NoImatrix = Annotated[bool, typer.Option("--no-imatrix", help="without an importance matrix, at a loss of quality")]
TIMEOUT_S = 6 * 3600.0
CALIBRATION_SAMPLES = 32  # of a data set, for `samq calibrate`
CalibrationSamples = Annotated[
    int | None, typer.Option(min=1, help=f"how many samples; default: {CALIBRATION_SAMPLES}, or all there are")
]
HELDOUT_START = 2 * CALIBRATION_SAMPLES  # where `samq evaluate` starts in one that may have been calibrated on
PROJECT = Path(__file__).parents[2]  # the checkout: prefect.yaml and deployments/ lie there


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: an error that a person can act on is one sentence and exit code 2."""
    try:
        app(arguments)
    except SamqError as error:
        console.print(f"samq: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


def _settings(kind: "type[Settings]", **options: Any) -> "Settings":
    """A command's options as the settings they stand for; raises SamqError for a value that those refuse."""
    from pydantic import ValidationError

    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(map(str, first["loc"]))
        raise SamqError(f"{option} {first['input']!r} cannot be used: {first['msg']}; give another") from error


def lm_eval_main() -> None:
    """Entry point `lm_eval`: lm-eval's own, which finds no models of others, with `samq-gguf` registered."""
    main(["lm-eval", *sys.argv[1:]])


def _imports() -> AbstractContextManager[object]:
    """A sign of life while a command imports what it needs: torch, transformers, MLflow and lm-eval take seconds."""
    return bar("load Python packages")


@app.callback(invoke_without_command=True)
def _start(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _prepare_prefect() -> None:
    """Keep Prefect's data in the SAMQ folder unless the user has a server or home of their own, and the terminal calm."""
    import logging

    make_folder(home(), advice="set SAMQ_HOME to a folder of your own")
    if not any(name in os.environ for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE")):
        os.environ["PREFECT_HOME"] = str(home() / "prefect")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    handler = RichHandler(console=console, show_path=False, show_level=False, log_time_format="%X")
    stages = logging.getLogger("samq")
    stages.addHandler(handler)
    stages.setLevel(logging.INFO)


@app.command()
def demo(
    config: Annotated[Path | None, typer.Option(help="other parameters than the demo's own")] = None,
) -> None:
    """Re-quantize SmolLM2-135M-Instruct on HumanEval: baseline, Q4_K_M and a sweep of thresholds, in minutes."""
    requantize(config or PROJECT / "deployments" / "parameters" / "demo.yaml")


@app.command()
def requantize(
    config: Annotated[Path, typer.Option(help="YAML file; see deployments/parameters/")], no_imatrix: NoImatrix = False
) -> None:
    """Convert, calibrate, plan, quantize, evaluate, track: the whole flow, as the file says."""
    _prepare_prefect()
    with _imports():
        from flows.parameters import load_parameters

    parameters = load_parameters(config)
    if no_imatrix:
        calibration = parameters.calibration.model_copy(update={"imatrix": False})
        parameters = parameters.model_copy(update={"calibration": calibration})
    with bar("start Prefect"):
        from flows.requantize import requantize as flow

        _require_prefect()
    _show(flow(parameters))


def _require_prefect() -> None:
    """Start Prefect's server, which takes it 10 s and more, or find that of the user; raises SamqError if it fails."""
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
    except RuntimeError as not_started:
        error = not_started
    if error:
        advice = "check PREFECT_API_URL, or unset it" if "PREFECT_API_URL" in os.environ else "try again"
        raise SamqError(f"Prefect's server does not answer ({type(error).__name__}: {error}); {advice}") from error


def _show(sweep: "Sweep") -> None:
    from samq.report.markdown_report import terminal_table

    typer.echo()
    console.print(terminal_table(sweep.results, sweep.failures, sweep.best))
    for failure in sweep.failures:
        console.print(f"failed in {failure.stage}: {failure.name}: {failure.reason}", style="red", markup=False)
    if sweep.best:
        console.print(f"best: {sweep.best.name}  {sweep.best.gguf}", markup=False, highlight=False, soft_wrap=True)
    for line in sweep.tracked.summary():
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def calibrate(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(help="the sensitivity map to write (JSON)")],
    dataset: Dataset = "humaneval",
    samples: CalibrationSamples = None,
    field: Fields = None,
    split: str | None = None,
    sequence_tokens: Annotated[int, typer.Option(min=2)] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    dtype: str = "float32",
    device: str = "auto",
    labels: Annotated[
        str, typer.Option(help="model: drawn from the model, to predict KL; text: those of the text")
    ] = "model",
    packing: Packing = None,
    seed: Seed = 0,
    revision: str | None = None,
    hf_folder: HfFolder = None,
) -> None:
    """Measure how much each weight tensor matters: gradient norms and Fisher information on calibration text."""
    _prepare_prefect()
    with _imports():
        from samq.data.datasets import DatasetSpec
        from samq.llamacpp.toolchain import converter_build, find_toolchain
        from samq.records import SensitivityMap
        from samq.sensitivity.hf_model import describe_source
        from tasks.calibrate import FISHER_NAME, MAP_NAME
        from tasks.calibrate import calibrate as calibrate_stage
        from tasks.convert import convert

    if labels not in ("model", "text"):
        raise SamqError(f"--labels {labels} is neither model nor text; choose one of them")
    check_file(out)
    spec = _settings(DatasetSpec, name=dataset, fields=tuple(field or ()), split=split, seed=seed)
    text = _read_calibration(spec, samples, CALIBRATION_SAMPLES, packing)
    with bar(f"find {model}"):
        source = describe_source(model, revision=revision, hf_folder=hf_folder)
    # A stage's function without Prefect: the same store, the same keys, no server.
    toolchain = find_toolchain()
    full = convert.fn(store_folder(), source, toolchain, converter_build(toolchain), "F16", TIMEOUT_S)
    tokens, count = _tokenize(full, text, sequence_tokens)
    made = calibrate_stage.fn(
        store_folder(), source, full, tokens, count, None, batch_size, dtype, device, labels, seed
    )
    sensitivity = SensitivityMap.load(made.path(MAP_NAME))
    export_file(made.path(FISHER_NAME), _fisher_beside(out))
    sensitivity.save(out)
    title = f"{len(sensitivity.tensors)} tensors on {sensitivity.samples} sequences, the ten highest scores"
    table = Table("tensor", "gradient norm", "score", title=title)
    for name, tensor in sorted(sensitivity.tensors.items(), key=lambda item: -item[1].score)[:10]:
        norm = f"{tensor.gradient_norm:.4g} ± {tensor.gradient_norm_stderr:.2g}"
        table.add_row(name, norm, f"{tensor.score:.4f}")
    console.print(table)
    console.print(f"{out}\nfull-precision GGUF: {full.path('model.gguf')}", highlight=False, soft_wrap=True)


class _CalibrationText(NamedTuple):
    """Text to calibrate on; `sequences` bounds how many of its sequences are used, and may have to be `exact`."""

    text: "TextSet"
    seed: int
    packing: bool
    sequences: int | None = None
    exact: bool = False


def _read_calibration(
    spec: "DatasetSpec", samples: int | None, default: int | None, packing: bool | None
) -> _CalibrationText:
    """The data set's first `samples`, by default at most `default`; those of one document are sequences cut from it."""
    from samq.data.datasets import is_one_document, load_texts
    from samq.records import TextSet

    with bar(f"read {spec.name}"):
        if packing is not False and is_one_document(spec.name):
            text = TextSet(dataset=spec.name, texts=tuple(load_texts(spec)))
            return _CalibrationText(text, spec.seed, True, samples or default, exact=samples is not None)
        spec = spec.model_copy(update={"samples": samples})
        texts = load_texts(spec)[: samples or default]
        return _CalibrationText(TextSet(dataset=spec.name, texts=tuple(texts)), spec.seed, bool(packing))


def _tokenize(full: "Artifact", text: _CalibrationText, sequence_tokens: int) -> "tuple[Artifact, int]":
    """The stage's artifact, and how many of its sequences to use."""
    from samq.records import CalibrationSet
    from tasks.text import SET_NAME, tokenize

    tokens = tokenize.fn(store_folder(), full, text.text, text.seed, sequence_tokens, text.packing)
    available = CalibrationSet.load(tokens.path(SET_NAME)).samples
    wanted = text.sequences or available
    if text.exact and available < wanted:
        raise SamqError(
            f"{text.text.dataset} has {available} sequences of {sequence_tokens} tokens, too few for {wanted}; ask for fewer "
            "or shorter ones"
        )
    return tokens, min(available, wanted)


@app.command()
def imatrix(
    gguf: FullGguf,
    out: Annotated[Path, typer.Option(help="the importance matrix to write (GGUF)")],
    dataset: Dataset = "humaneval",
    samples: CalibrationSamples = None,
    field: Fields = None,
    split: str | None = None,
    sequence_tokens: Annotated[int, typer.Option(min=2)] = 512,
    seed: Seed = 0,
) -> None:
    """Measure which inputs of each layer are large, for llama-quantize to spare (llama-imatrix)."""
    _prepare_prefect()
    with _imports():
        from samq.data.datasets import DatasetSpec
        from samq.llamacpp.programs import GGUF_NAME, IMATRIX_NAME
        from samq.llamacpp.toolchain import find_toolchain
        from tasks.imatrix import imatrix as imatrix_stage

    check_file(out)
    spec = _settings(DatasetSpec, name=dataset, fields=tuple(field or ()), split=split, seed=seed)
    text = _read_calibration(spec, samples, CALIBRATION_SAMPLES, None).text
    full, tools = _adopt({GGUF_NAME: gguf}), find_toolchain()
    made = imatrix_stage.fn(store_folder(), full, text, sequence_tokens, tools, TIMEOUT_S)
    export_file(made.path(IMATRIX_NAME), out)
    console.print(str(out), highlight=False, soft_wrap=True)


@app.command()
def plan(
    map: Annotated[Path, typer.Option(help="sensitivity map of `samq calibrate`")],
    gguf: FullGguf,
    out: Annotated[Path | None, typer.Option(help="the plan to write (JSON)")] = None,
    budget: Annotated[str | None, typer.Option(help="1500MiB, 4.5bpw, size-of:Q4_K_M or vram:24GiB@8192")] = None,
    ladder: Annotated[list[str] | None, typer.Option("--type", help="type that a budget may choose; repeat")] = None,
    threshold: Annotated[
        str | None, typer.Option(help="a score in 0..1, or a quantile such as q0.75; default: 0.85")
    ] = None,
    keep: str = "Q8_0",
    base: Annotated[str, typer.Option(help="type or llama-quantize mixture of the rest")] = "Q4_K_M",
    grouping: Annotated[str, typer.Option(help="block or tensor")] = "block",
    imatrix: Imatrix = None,
    no_imatrix: NoImatrix = False,
) -> None:
    """Give each tensor a type: the least predicted KL within a budget, or more bits to what scores above a threshold."""
    if budget and threshold:
        raise SamqError("a plan follows a budget or a threshold; give one of --budget and --threshold")
    if imatrix and no_imatrix:
        raise SamqError("--no-imatrix contradicts --imatrix; leave one of them out")
    if budget and not (imatrix or no_imatrix):
        raise SamqError(
            "a budget is spent best with an importance matrix; make one by `samq imatrix` and give it as --imatrix, or say "
            "--no-imatrix"
        )
    if out:
        check_file(out)
    made = _budget_plan(map, gguf, budget, ladder, imatrix) if budget else None
    made = made or _threshold_plan(map, gguf, threshold or "0.85", keep, base, grouping, imatrix)
    if made.substitutions:
        reasons = "; ".join(sorted({swap.reason for swap in made.substitutions.values()}))
        console.print(
            f"{len(made.substitutions)} tensors take another type than asked for ({reasons})", highlight=False
        )
    if out:
        made.save(out)
        console.print(str(out), highlight=False)


def _budget_plan(map: Path, gguf: Path, budget: str, types: list[str] | None, imatrix: Path | None) -> "Plan":
    """The plan of a budget, printed; the ladder and its prices are kept in the store."""
    import logging

    _prepare_prefect()
    with _imports():
        from samq.allocation.budget import BudgetPolicy, why_doubted
        from samq.allocation.budget_notation import read_budget
        from samq.allocation.ladder import DEFAULT_TYPES
        from samq.llamacpp.programs import GGUF_NAME, IMATRIX_NAME
        from samq.llamacpp.toolchain import find_toolchain
        from samq.report.description import describe_plan
        from tasks.calibrate import FISHER_NAME, MAP_NAME
        from tasks.ladder import choose_rungs, rung
        from tasks.plan import load_plan, plan_budget
        from tasks.price import load_prices, price

    read_budget(budget)  # refuses what is none, before the work
    logging.getLogger("samq.plan").disabled = True  # its doubt is printed below, of a plan made earlier too
    store, tools = store_folder(), find_toolchain()
    full = _adopt({GGUF_NAME: gguf})
    matrix = _adopt({IMATRIX_NAME: imatrix}) if imatrix else None
    sensitivities = _adopt({MAP_NAME: map, FISHER_NAME: _fisher_beside(map)})
    with bar(f"plan {gguf.name}"):
        names = choose_rungs.fn(full, matrix, types or DEFAULT_TYPES, [], tools)
    rungs = {name: rung.fn(store, name, full, matrix, tools, TIMEOUT_S) for name in names}
    prices = price.fn(store, full, rungs, sensitivities, matrix, tools)
    with bar(f"plan {budget}"):
        made = load_plan(plan_budget.fn(store, full, matrix, prices, budget, BudgetPolicy(), tools))
    console.print(f"{made.tensor_bytes / 1e6:.1f} MB. {describe_plan(made)}", highlight=False)
    if doubt := why_doubted(made, load_prices(prices)):
        console.print(f"Warning: {doubt}", highlight=False)
    return made


def _threshold_plan(
    map: Path, gguf: Path, threshold: str, keep: str, base: str, grouping: str, imatrix: Path | None
) -> "Plan":
    """The plan of a threshold, printed, with the thresholds at which it would change."""
    from samq.allocation.threshold import Target, ThresholdPolicy, change_points, propose_thresholds, threshold_plan
    from samq.llamacpp.toolchain import find_toolchain
    from samq.records import SensitivityMap

    if grouping not in ("block", "tensor"):
        raise SamqError(f"--grouping {grouping} is neither block nor tensor; choose one of them")
    policy = _settings(ThresholdPolicy, keep=keep, base=base, grouping=grouping)
    sensitivity = SensitivityMap.load(map)
    with bar(f"plan {gguf.name}"):
        target = Target.open(gguf, find_toolchain(), imatrix)
        made = threshold_plan(target, sensitivity, _number(threshold), policy)
        cuts = propose_thresholds(target, sensitivity, policy, 6)
    kept, groups = made.parameters["kept_tensors"], made.parameters["kept_groups"]
    console.print(
        f"threshold {made.parameters['threshold']:.4g} keeps {kept} of {len(made.types)} tensors "
        f"({groups} {'blocks or single tensors' if grouping == 'block' else 'tensors'}) at {keep}: "
        f"{made.tensor_bytes / 1e6:.1f} MB, {made.bits_per_weight:.2f} bits per weight",
        highlight=False,
    )
    points = change_points(sensitivity, target.quantizable, grouping)
    table = Table("threshold", "kept", "MB", "bits per weight", title=f"{len(points)} thresholds change the plan; e.g.")
    for cut in cuts:
        other = threshold_plan(target, sensitivity, cut, policy)
        size = f"{other.tensor_bytes / 1e6:.1f}"
        table.add_row(f"{cut:g}", str(other.parameters["kept_tensors"]), size, f"{other.bits_per_weight:.2f}")
    console.print(table)
    return made


@app.command()
def quantize(
    gguf: FullGguf,
    plan: Annotated[Path, typer.Option(help="plan of `samq plan`")],
    out: Annotated[Path, typer.Option(help="the GGUF to write")],
    imatrix: Imatrix = None,
) -> None:
    """Write a plan's GGUF by llama-quantize, and check every type and byte of it against the plan."""
    from samq.llamacpp import programs as quantizer
    from samq.llamacpp.toolchain import find_toolchain
    from samq.records import Plan

    check_file(out)
    wanted, toolchain = Plan.load(plan), find_toolchain()
    if wanted.rounding == "compensated":
        raise SamqError(
            f"{plan} is a plan of compensated rounding and llama-quantize rounds to the nearest values; let the flow build "
            "it, or quantize a plan of `samq plan` and round that file anew by `samq compensate`"
        )
    quantizer.check_imatrix(wanted, imatrix)
    if _sha256(gguf) != wanted.gguf_sha256:
        raise SamqError(f"{plan} is a plan for another file than {gguf}; make a plan for this one with `samq plan`")
    provenance = {"version": __version__, "llama_cpp": f"{toolchain.version} {toolchain.build}"}
    with work_folder(out.absolute().parent) as work, bar(f"quantize {wanted.name}") as progress:
        model = quantizer.quantize(
            gguf, wanted, work, toolchain, provenance=provenance, imatrix=imatrix, progress=progress
        )
        os.replace(work / model.file, out)
    console.print(
        f"{out}: {model.file_bytes / 1e6:.1f} MB, {model.bits_per_weight:.2f} bits per weight\nsha256 {model.sha256}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def compensate(
    quantized: Annotated[Path, typer.Argument(help="the quantized GGUF, of llama-quantize or anyone")],
    gguf: FullGguf,
    out: Annotated[Path, typer.Option(help="the GGUF to write")],
    dataset: Dataset = "humaneval",
    samples: Annotated[int | None, typer.Option(min=1, help="how many samples; default: all")] = None,
    field: Fields = None,
    split: str | None = None,
    sequence_tokens: Annotated[int, typer.Option(min=2)] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    dtype: str = "float32",
    device: str = "auto",
    packing: Packing = None,
    seed: Seed = 0,
    hf_folder: HfFolder = None,
) -> None:
    """Round a GGUF's weights anew so that errors make up for each other (GPTQ): the same size and types, nearer to F16."""
    _prepare_prefect()
    with _imports():
        from samq.data.datasets import DatasetSpec
        from samq.llamacpp.programs import GGUF_NAME
        from samq.quantization import compensation
        from samq.sensitivity.gram import GRAM_TOKENS, GramMatrices
        from samq.sensitivity.hf_model import compute_device, describe_source
        from tasks.compensate import GRAM_NAME, gram

    check_file(out)
    spec = _settings(DatasetSpec, name=dataset, fields=tuple(field or ()), split=split, seed=seed)
    text = _read_calibration(spec, samples, None, packing)
    with bar(f"find {gguf.name}"):
        source = describe_source(gguf, hf_folder=hf_folder)
    full = _adopt({GGUF_NAME: gguf})
    tokens, count = _tokenize(full, text, sequence_tokens)
    grams = gram.fn(store_folder(), source, full, tokens, count, GRAM_TOKENS, batch_size, dtype, device)
    with work_folder(out.absolute().parent) as work, bar(f"compensate {quantized.name}") as progress:
        done = compensation.compensate(
            gguf,
            quantized,
            GramMatrices(grams.path(GRAM_NAME)),
            work / GGUF_NAME,
            device=compute_device(device),
            progress=progress,
        )
        os.replace(work / GGUF_NAME, out)
    if not done.tensors:
        raise SamqError(f"{quantized} has no tensor whose rounding can be compensated; {out} is a copy of it")
    ratios = sorted(error.ratio for error in done.tensors.values())
    console.print(
        f"{len(ratios)} tensors: {100 * ratios[len(ratios) // 2]:.0f} % of their layers' output error is left (median; "
        f"{100 * ratios[0]:.0f} to {100 * ratios[-1]:.0f} %)\n{out}\nsha256 {_sha256(out)}",
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def evaluate(
    gguf: Annotated[Path, typer.Argument(help="the GGUF to measure")],
    baseline: Annotated[Path, typer.Option(help="the full-precision GGUF it is compared with")],
    out: Annotated[
        Path | None, typer.Option(help="folder for evaluation.json and the per-token and per-item tables")
    ] = None,
    dataset: Annotated[str, typer.Option(help="held-out text: humaneval, a file, a hub dataset's id")] = "humaneval",
    start: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"first sample of it; default: 0 of a file, which is not to be the one calibrated on, else {HELDOUT_START}",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="how many samples; default: all")] = None,
    field: Fields = None,
    split: str | None = None,
    context_tokens: Annotated[int, typer.Option(min=16)] = 512,
    chunks: Annotated[int, typer.Option(min=1)] = 16,
) -> None:
    """Measure fidelity to full precision, JSON compliance, speed and memory of one GGUF."""
    _prepare_prefect()
    with _imports():
        from samq.data.datasets import DatasetSpec, is_file, load_texts
        from samq.evaluation.settings import EVALUATION_NAME, EvaluationSettings
        from samq.llamacpp.programs import GGUF_NAME
        from samq.llamacpp.toolchain import converter_build, find_toolchain
        from samq.records import Evaluation, TextSet
        from samq.sensitivity.hf_model import describe_source
        from tasks.convert import convert
        from tasks.evaluate import baseline as baseline_stage
        from tasks.evaluate import evaluate as evaluate_stage
        from tasks.text import heldout

    if out:
        make_folder(out)
    if start is None:
        start = 0 if is_file(dataset) else HELDOUT_START
    spec = _settings(DatasetSpec, name=dataset, start=start, samples=samples, fields=tuple(field or ()), split=split)
    with bar(f"read {spec.name}"):
        text = TextSet(dataset=spec.name, texts=tuple(load_texts(spec)))
    settings = _settings(EvaluationSettings, context_tokens=context_tokens, chunks=chunks)
    store, toolchain = store_folder(), find_toolchain()
    with bar(f"find {baseline.name}"):
        source = describe_source(str(baseline))
    full = convert.fn(store, source, toolchain, converter_build(toolchain), "F16", TIMEOUT_S)
    candidate = _adopt({GGUF_NAME: gguf})
    tokens = heldout.fn(store, full, text)
    base = baseline_stage.fn(store, full, tokens, settings, TIMEOUT_S)
    made = evaluate_stage.fn(store, gguf.stem, candidate, tokens, base, settings, TIMEOUT_S)
    evaluation = Evaluation.load(made.path(EVALUATION_NAME))
    title = f"{gguf.name} on {dataset} from sample {start} on"
    table = Table("metric", "value", "standard error", "n", title=title)
    for name, metric in evaluation.metrics.items():
        error = "" if metric.stderr is None else f"{metric.stderr:.3g}"
        table.add_row(name, f"{metric.value:.6g}", error, str(metric.n or ""))
    console.print(table)
    for name, reason in evaluation.missing.items():
        console.print(f"not measured: {name}: {reason}", markup=False)
    if out:
        export(made, out)


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line on a GGUF: --model samq-gguf --model_args gguf=FILE --tasks hellaswag ..."""
    with _imports():
        from samq.evaluation.lm_eval.harness import run_command_line

    run_command_line(context.args)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="a GGUF file, or models:/NAME@production of the registry")],
    config: Annotated[Path | None, typer.Option(help="settings; see deployments/serving.yaml")] = None,
    host: Annotated[str | None, typer.Option(help="default: this machine only")] = None,
    port: Annotated[int | None, typer.Option(help="default: 8000")] = None,
    allow_without_key: Annotated[
        bool, typer.Option("--allow-without-key", help="let other machines in without SAMQ_API_KEY")
    ] = False,
) -> None:
    """Answer OpenAI's API with a model, and follow its alias; SAMQ_API_KEY is the key that clients must send."""
    import logging

    with _imports():
        from samq.serving.server import serve as run
        from samq.serving.settings import load_settings
        from samq.serving.source import find_source

    key = os.environ.get("SAMQ_API_KEY") or None
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("samq", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
    settings = load_settings(config, host=host, port=port, api_key=key, allow_without_key=allow_without_key or None)
    run(find_source(model), settings)


@app.command()
def inspect(gguf: Annotated[Path, typer.Argument(help="a GGUF file")]) -> None:
    """Types, sizes, bits per weight and provenance of a GGUF."""
    from samq.gguf.file import read_metadata, read_tensors

    with bar(f"open {gguf.name}"):
        tensors, metadata = read_tensors(gguf), read_metadata(gguf)
    table = Table("type", "tensors", "weights", "MB", "bits per weight", title=str(gguf))
    for kind in sorted({tensor.type for tensor in tensors.values()}):
        of_kind = [tensor for tensor in tensors.values() if tensor.type == kind]
        _add_row(table, kind, sum(t.weights for t in of_kind), sum(t.bytes for t in of_kind), len(of_kind))
    table.add_section()
    total_bytes = sum(tensor.bytes for tensor in tensors.values())
    _add_row(table, "all", sum(tensor.weights for tensor in tensors.values()), total_bytes, len(tensors))
    console.print(table)
    for key, value in metadata.items():
        if key.startswith(("samq.", "general.", "quantize.")):
            console.print(f"{key} = {value}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"sha256 = {_sha256(gguf)}", highlight=False, soft_wrap=True)


def _add_row(table: Table, kind: str, weights: int, size: int, count: int) -> None:
    bits = f"{8 * size / weights:.2f}" if weights else ""  # a file may hold a vocabulary alone
    table.add_row(kind, str(count), f"{weights:,}", f"{size / 1e6:.2f}", bits)


@app.command()
def promote(
    name: RegisteredModel,
    version: Annotated[str | None, typer.Option(help="default: the one with the alias candidate")] = None,
    policy: Annotated[Path, typer.Option(help="YAML file of the gates")] = PROJECT
    / "deployments/promotion/policy.yaml",
    force: Annotated[bool, typer.Option("--force", help="promote even if gates fail; needs --reason")] = False,
    reason: Annotated[str, typer.Option(help="recorded with what is done")] = "",
) -> None:
    """Let a registered version serve if it passes the gates; exit code 3 if it does not, and nothing has moved."""
    with _imports():
        from samq.promotion.history import check_reason
        from samq.promotion.policy import load_policy

    gates = load_policy(policy)
    reason = check_reason(reason, "--force") if force or reason else ""
    _prepare_prefect()
    with bar("start Prefect"):
        from flows.promote import PromoteParameters, RefusedError
        from flows.promote import promote as flow
        from samq.promotion.gate_report import describe, gates_table

        _require_prefect()
    try:
        promotion = flow(PromoteParameters(model=name, version=version, policy=gates, force=force, reason=reason))
    except RefusedError as refused:
        promotion = refused.promotion
    console.print(gates_table(promotion.judgement.gates))
    console.print(f"{name} {describe(promotion.event)}", markup=False, highlight=False, soft_wrap=True)
    if promotion.event.action == "refused":
        raise typer.Exit(3)


@app.command()
def rollback(
    name: RegisteredModel,
    reason: Annotated[str, typer.Option(help="recorded")],
) -> None:
    """Let the version serve that did before the one in production; again, and it is swapped back."""
    with _imports():
        from samq.home import mlflow_uri
        from samq.promotion.gate_report import describe
        from samq.promotion.move import rollback as swap
        from samq.tracking.registry import connect

    with bar(f"roll {name} back"):
        event = swap(connect(mlflow_uri()), name, reason)
    console.print(f"{name} {describe(event)}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def status(
    name: Annotated[str | None, typer.Argument(help="registered model; default: all")] = None,
    last: Annotated[int, typer.Option(min=1, help="how many versions and events")] = 10,
) -> None:
    """Which versions serve, and the last promotions, refusals and rollbacks."""
    with _imports():
        from samq.home import mlflow_uri
        from samq.promotion.gate_report import history_table, status_table
        from samq.promotion.history import history
        from samq.tracking.registry import aliases, connect, model_names, notable_versions

    with bar("ask MLflow"):
        client = connect(mlflow_uri())
        for model in [name] if name else model_names(client):
            console.print(status_table(model, aliases(client, model), notable_versions(client, model, last)))
            if events := history(client, model)[:last]:
                console.print(history_table(events))


@app.command()
def prune(
    older_than_days: Annotated[float, typer.Option(min=0, help="remove what no run used for so long")],
) -> None:
    """Free disk: remove what the store holds and no run used lately; GGUFs that an alias points at stay."""
    with _imports():
        from samq.home import mlflow_uri
        from samq.store import Store
        from samq.tracking.registry import aliased_files, connect

    with bar("free disk"):
        freed = Store(store_folder()).prune(older_than_days, keep=aliased_files(connect(mlflow_uri())))
    console.print(f"{freed / 1e6:,.1f} MB freed in {store_folder()}", highlight=False, soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what is installed, what is missing, and how to get it."""
    from samq.doctor import diagnose

    with bar("look at this machine"):  # a program's first start may take a minute
        findings = diagnose()
    table = Table("", "what", "found", "what to do")
    for finding in findings:
        table.add_row(finding.state, finding.name, finding.found, finding.advice)
    console.print(table)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def ui(mlflow_port: int = 5000, prefect_port: int = 4200) -> None:
    """Serve MLflow's and Prefect's pages on this machine until Ctrl-C."""
    from samq.services import mlflow_page, prefect_page

    _prepare_prefect()
    with console.status("starting MLflow and Prefect"), ExitStack() as stack:
        mlflow = stack.enter_context(mlflow_page(mlflow_port))
        prefect = stack.enter_context(prefect_page(prefect_port))
        services = stack.pop_all()
    with services:
        console.print(f"MLflow   {mlflow}\nPrefect  {prefect}\nCtrl-C ends both.", highlight=False)
        _wait_for_signal()


@app.command()
def up(mlflow_port: int = 5000, prefect_port: int = 4200) -> None:
    """Run MLflow, Prefect's server and a worker here, and deploy what prefect.yaml says, until Ctrl-C."""
    from samq.services import mlflow_page, prefect_page, worker

    _prepare_prefect()
    with console.status("starting MLflow, Prefect and a worker"), ExitStack() as stack:
        mlflow = stack.enter_context(mlflow_page(mlflow_port))
        os.environ["MLFLOW_TRACKING_URI"] = mlflow  # the worker's runs log to the server, not past it
        prefect = stack.enter_context(prefect_page(prefect_port))
        stack.enter_context(worker(prefect, PROJECT))
        services = stack.pop_all()
    with services:
        console.print(
            f"MLflow   {mlflow}\nPrefect  {prefect}\n"
            f"start the demo: PREFECT_API_URL={prefect}/api prefect deployment run requantize/on-demand\nCtrl-C ends all.",
            highlight=False,
            soft_wrap=True,
        )
        _wait_for_signal()


def _wait_for_signal() -> None:
    """Return at Ctrl-C or SIGTERM; exit with code 1 as soon as a service ends by itself."""
    from samq.services import first_ended

    asked = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: asked.set())
    while not asked.wait(1):
        if ended := first_ended():
            console.print(f"samq: {ended}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1)


def _adopt(files: dict[str, Path]) -> "Artifact":
    """Give files that were not made here a place in the store, under these names, as a stage's output."""
    from samq.gguf.file import read_tensors
    from samq.llamacpp.programs import GGUF_NAME, link_or_copy
    from samq.records import digest_of
    from samq.store import Store

    for name, path in files.items():
        if name == GGUF_NAME:
            with bar(f"open {path.name}"):
                read_tensors(path)  # refuses what is no GGUF
        elif not path.is_file():
            raise SamqError(f"there is no file {path}; check the path, or make it again")
    store, key = Store(store_folder()), digest_of({name: _sha256(path) for name, path in files.items()})
    if store.find("adopted", key) is None:
        with store.publish("adopted", key) as folder:
            for name, path in files.items():
                link_or_copy(path, folder / name)
    artifact = store.find("adopted", key)
    assert artifact is not None, "just published"
    return artifact


def _sha256(path: Path) -> str:
    """SHA-256 (hex) of a file, with a sign of life on the terminal: a large one takes minutes."""
    from samq.gguf.file import file_sha256

    with bar(f"read {path.name}"):
        return file_sha256(path)


def _fisher_beside(map: Path) -> Path:
    """Where `samq calibrate` puts the Fisher information of a map."""
    return map.with_suffix(".fisher.safetensors")


def _number(threshold: str) -> float | str:
    try:
        return float(threshold)
    except ValueError:
        return threshold


if __name__ == "__main__":
    main()
