"""Re-quantize a model: from full-precision weights and calibration text to measured, tracked, registered GGUFs.

model + text -> convert -> imatrix -> ladder -> calibrate -> price -> plan x N (budgets': compensate the rungs' tensors)
             -> assemble x N -> evaluate x N -> compare, choose, benchmark the finalists, check, report, track, register
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.parameters import CalibrationParameters, CandidateParameters, ModelParameters, RequantizeParameters
from samq import __version__
from samq.allocation.threshold import threshold_name
from samq.gguf.audit import as_is
from samq.sweep.benchmarking import Candidate, with_benchmarks
from samq.allocation.budget_notation import plan_name
from samq.data.datasets import require_disjoint
from samq.errors import SamqError
from samq.evaluation.settings import EVALUATION_NAME, benchmark_key
from samq.gguf.file import read_tensors
from samq.home import mlflow_uri, store_folder
from samq.allocation.ladder import rungs_of
from samq.allocation.prices import lengthened, plan_cost, predicted_cost, sequences_wanted
from samq.llamacpp.programs import GGUF_NAME
from samq.records import (
    CalibrationSet,
    Evaluation,
    ModelSource,
    PriceTable,
    QuantizedModel,
    Rounding,
    SensitivityMap,
    Toolchain,
)
from samq.sweep.selection import Failure, Result, choose, finalists
from samq.store import Artifact
from samq.llamacpp.toolchain import converter_build, find_toolchain
from samq.tracking.sweep_runs import TrackedSweep, TrackingSettings
from tasks.benchmark import benchmark, compare_items, find_benchmarks
from tasks.calibrate import MAP_NAME, calibrate
from tasks.check import check, load_check
from tasks.compare import compare
from tasks.compensate import compensate, compensate_rung, gram, price_compensated
from tasks.convert import convert
from tasks.evaluate import baseline, evaluate
from tasks.imatrix import imatrix
from tasks.ladder import choose_rungs, rung
from tasks.plan import choose_thresholds, load_plan, plan_budget, plan_stock, plan_threshold
from tasks.price import load_prices, price
from tasks.quantize import MODEL_NAME, assemble, quantize
from tasks.report import report
from tasks.source import find_model
from tasks.text import heldout, load_calibration_set, load_text, tokenize
from tasks.track import track

logging.getLogger("samq").setLevel(logging.INFO)  # in a worker nobody else does

FULL = "full"  # the baseline among the candidates


@dataclass(frozen=True)
class Sweep:
    """What one run of the flow made."""

    source: ModelSource
    results: list[Result]
    failures: list[Failure]
    best: Result | None
    tracked: TrackedSweep
    markdown: str


@flow(
    name="requantize",
    flow_run_name="{parameters.name}",
    # llama-quantize itself uses every core; a second worker fills its waits for the disk. Evaluations wait in turn.
    task_runner=ThreadPoolTaskRunner(max_workers=2),  # type: ignore[arg-type]
)
def requantize(parameters: RequantizeParameters) -> Sweep:
    """Build, measure and track every candidate; one that fails is reported and does not stop the others."""
    model, calibration, wanted, limit = (
        parameters.model,
        parameters.calibration,
        parameters.candidates,
        parameters.timeout_s,
    )
    require_disjoint(calibration.dataset, parameters.heldout)
    store, tools = store_folder(), find_toolchain()

    source = find_model(model.source, model.revision, model.hf_folder)
    text, heldout_text = load_text(calibration.dataset), load_text(parameters.heldout)
    full = convert(store, source, tools, converter_build(tools), model.precision, limit)
    tokens = tokenize(store, full, text, calibration.dataset.seed, calibration.sequence_tokens, calibration.packing)
    calibration_set = load_calibration_set(tokens, calibration.dataset)
    available = calibration.sequences_left(calibration_set.samples)
    matrix = imatrix(store, full, text, calibration.sequence_tokens, tools, limit) if calibration.imatrix else None
    chunks = heldout(store, full, heldout_text)
    base = baseline(store, full, chunks, parameters.evaluation, limit)

    asked, unavailable = find_benchmarks(parameters.benchmarks.settings) if parameters.benchmarks.tasks else ({}, {})

    failures: list[Failure] = []
    stock = {mixture: plan_stock.submit(store, full, matrix, mixture, tools) for mixture in (FULL, *wanted.mixtures)}
    plans = _finished("plan", stock, failures)
    types = wanted.ladder if wanted.budgets else ()
    policy = wanted.policy if wanted.thresholds or wanted.proposed_thresholds else None
    names = choose_rungs(full, matrix, types, list(plans.values()), tools, policy)
    rungs = _finished(
        "ladder", {name: rung.submit(store, name, full, matrix, tools, limit) for name in names}, failures
    )

    grams = (
        gram(
            store,
            source,
            full,
            tokens,
            available,
            calibration.gram_tokens,
            calibration.batch_size,
            model.dtype,
            model.device,
        )
        if wanted.compensated
        else None
    )
    sensitivities, prices, budget_prices = _calibrate(
        store, source, full, tokens, available, matrix, rungs, grams, model, calibration, wanted, tools
    )
    sensitivity = SensitivityMap.load(sensitivities.path(MAP_NAME))
    thresholds = [*wanted.thresholds]
    if wanted.proposed_thresholds:
        thresholds += choose_thresholds(full, matrix, sensitivity, wanted.policy, wanted.proposed_thresholds, tools)
    plans |= _finished(
        "plan",
        {
            threshold_name(cut): plan_threshold.submit(store, full, matrix, sensitivity, cut, wanted.policy, tools)
            for cut in thresholds
        }
        | {
            plan_name(budget): plan_budget.submit(
                store, full, matrix, budget_prices, budget, wanted.budget_policy, tools
            )
            for budget in wanted.budgets
        },
        failures,
    )
    ggufs = {FULL: full} if FULL in plans else {}
    ggufs |= _build(
        store,
        full,
        matrix,
        {name: plan for name, plan in plans.items() if name != FULL},
        rungs,
        grams,
        _provenance(source, calibration_set, tools),
        wanted.requantize,
        model.device,
        tools,
        limit,
        failures,
    )
    measured = _finished(
        "evaluate",
        {
            name: evaluate.submit(store, name, gguf, chunks, base, parameters.evaluation, limit)
            for name, gguf in ggufs.items()
        },
        failures,
    )
    if FULL not in measured or len(measured) == 1:
        reasons = "; ".join(f"{failure.name}: {failure.reason}" for failure in failures)
        raise SamqError(f"the baseline or every candidate failed ({reasons}); see the logs of this run")
    tables = {table.rounding: table for table in map(load_prices, (prices, budget_prices))}
    found = {name: _result(plans[name], ggufs[name], made, tables) for name, made in measured.items()}
    comparisons = compare(list(found.values()))
    best = choose(list(found.values()), parameters.selection, comparisons)
    found = _benchmark(store, found, best, ggufs, asked, unavailable, parameters)
    results = list(found.values())
    best = next((result for result in results if best and result.name == best.name), None)
    tracking = TrackingSettings(
        tracking_uri=parameters.tracking.uri or mlflow_uri(),
        experiment=parameters.tracking.experiment,
        run_name=parameters.name,
        registered_model=parameters.tracking.registered_model,
    )
    paired = compare_items(results, parameters.benchmarks.margin, tracking)
    budgets = [plan_name(budget) for budget in wanted.budgets if calibration.check_sequences]
    checked: dict[str, PrefectFuture[Artifact]] = {}
    for name in [name for name in budgets if name in ggufs]:
        checked[name] = check.submit(
            store,
            name,
            source,
            full,
            tokens,
            calibration.check_sequences,
            plans[name],
            budget_prices,
            ggufs[name],
            calibration.batch_size,
            model.dtype,
            model.device,
            calibration.seed,
        )
        checked[name].wait()  # each holds the whole model: memory may have room for one only
    checks = [load_check(made) for made in _finished("check", checked, failures).values()]

    rule = parameters.selection
    markdown = report(
        source,
        calibration_set,
        heldout_text,
        tools,
        results,
        failures,
        best,
        rule,
        comparisons,
        checks,
        paired,
        parameters.cost,
    )
    tracked = track(
        tracking,
        source,
        calibration_set,
        heldout_text,
        tools,
        sensitivity,
        results,
        failures,
        best,
        markdown,
        comparisons,
        checks,
        paired,
        parameters.cost,
        parameters.model_dump(mode="json"),
        {"prefect.flow_run": flow_run.get_id() or ""},
    )
    return Sweep(source, results, failures, best, tracked, markdown)


def _finished(stage: str, futures: dict[str, PrefectFuture[Artifact]], failures: list[Failure]) -> dict[str, Artifact]:
    """Name -> artifact of those that ended well; the others join `failures` and stop nobody."""
    wait(list(futures.values()))
    made = {name: future.result(raise_on_failure=False) for name, future in futures.items()}
    failures += [
        Failure(name=name, stage=stage, reason=str(result))
        for name, result in made.items()
        if not isinstance(result, Artifact)
    ]
    return {name: result for name, result in made.items() if isinstance(result, Artifact)}


def _build(
    store: Path,
    full: Artifact,
    matrix: Artifact | None,
    plans: dict[str, Artifact],
    rungs: dict[str, Artifact],
    grams: Artifact | None,
    provenance: dict[str, str],
    requantize: bool,
    device: str,
    tools: Toolchain,
    limit: float,
    failures: list[Failure],
) -> dict[str, Artifact]:
    """The plans' GGUFs: copied from the ladder where it has all of a plan's tensors, and else made by llama-quantize."""
    tensors = read_tensors(full.path(GGUF_NAME))
    loaded = {name: load_plan(plan) for name, plan in plans.items()}
    held = {name: {} if requantize else rungs_of(plan, tensors, rungs) or {} for name, plan in loaded.items()}
    anew = {name for name, plan in loaded.items() if grams and plan.rounding == "compensated"}
    compensated = _compensate_rungs(store, full, [held[name] for name in sorted(anew)], rungs, grams, device)
    asked = {}
    for name, plan in plans.items():
        copied = {step: rungs[step] for step in held[name]}
        rounded = {step: compensated[step] for step in held[name] if name in anew}
        lacking = [f"{step}: {reason}" for step, reason in rounded.items() if isinstance(reason, str)]
        if lacking:
            failures.append(Failure(name=name, stage="compensate", reason="; ".join(lacking)))
        elif copied:
            asked[name] = assemble.submit(store, name, full, plan, copied, rounded, provenance)
        else:
            asked[name] = quantize.submit(store, name, full, plan, matrix, provenance, tools, limit)
    made = _finished("quantize", asked, failures)
    again = {
        name: compensate.submit(store, name, full, plans[name], gguf, grams, device)
        for name, gguf in made.items()
        if name in anew and not held[name]
    }
    made = {name: gguf for name, gguf in made.items() if name not in again}
    return made | _finished("compensate", again, failures)


def _compensate_rungs(
    store: Path,
    full: Artifact,
    held: list[dict[str, list[str]]],
    rungs: dict[str, Artifact],
    grams: Artifact | None,
    device: str,
) -> dict[str, Artifact | str]:
    """Rung -> those of its tensors that some plan takes from it, rounded anew once for all plans; or why that failed."""
    wanted: dict[str, set[str]] = {}
    for steps in held:
        for step, taken in steps.items():
            wanted.setdefault(step, set()).update(taken)
    asked = {
        step: compensate_rung.submit(store, step, full, rungs[step], sorted(taken), grams, device)
        for step, taken in sorted(wanted.items())
    }
    failed: list[Failure] = []
    made = _finished("compensate", asked, failed)
    return {**made, **{failure.name: failure.reason for failure in failed}}


def _calibrate(
    store: Path,
    source: ModelSource,
    full: Artifact,
    tokens: Artifact,
    available: int,
    matrix: Artifact | None,
    rungs: dict[str, Artifact],
    grams: Artifact | None,
    model: ModelParameters,
    calibration: CalibrationParameters,
    wanted: CandidateParameters,
    tools: Toolchain,
) -> tuple[Artifact, Artifact, Artifact]:
    """Sensitivities, prices, and prices as the budgets' plans round, on as many sequences as it takes to know these plans."""
    count = min(calibration.first_sequences, available) if wanted.budgets else available
    sensitivities: Artifact | None = None
    while True:
        sensitivities = calibrate(
            store,
            source,
            full,
            tokens,
            count,
            sensitivities,
            calibration.batch_size,
            model.dtype,
            model.device,
            calibration.labels,
            calibration.seed,
        )
        prices = price(store, full, rungs, sensitivities, matrix, tools)
        budget_prices = price_compensated(store, prices, grams, model.device) if grams else prices
        plans = {
            budget: plan_budget.submit(store, full, matrix, budget_prices, budget, wanted.budget_policy, tools)
            for budget in wanted.budgets
        }
        table = load_prices(budget_prices)
        costs = [plan_cost(table, load_plan(plan).types) for plan in _finished("plan", plans, []).values()]
        wanted_count = sequences_wanted(costs, calibration.precision, measured=count, available=available)
        if wanted_count == count:
            return sensitivities, prices, budget_prices
        count = wanted_count


def _benchmark(
    store: Path,
    results: dict[str, Result],
    best: Result | None,
    ggufs: dict[str, Artifact],
    tasks: dict[str, str],
    unavailable: dict[str, str],
    parameters: RequantizeParameters,
) -> dict[str, Result]:
    """The results, those of the finalists with their benchmarks; a task that fails on one is missing there."""
    wanted, evaluation = parameters.benchmarks, parameters.evaluation
    chosen = finalists(list(results.values()), best, wanted.candidates) if wanted.tasks else []
    asked = {
        (name, task): benchmark.submit(
            store,
            Candidate(name=result.name, gguf=result.gguf, sha256=ggufs[name].files[GGUF_NAME].sha256),
            task,
            digest,
            wanted.settings,
            evaluation.kv_type,
            evaluation.threads,
            evaluation.gpu_layers,
            parameters.timeout_s,
        )
        for name, result in results.items()
        if result.name in chosen
        for task, digest in tasks.items()
    }
    wait(list(asked.values()))
    answers = {key: future.result(raise_on_failure=False) for key, future in asked.items()}
    joined = dict(results)
    for name, result in results.items():
        if result.name in chosen:
            mine = {task: answer for (other, task), answer in answers.items() if other == name}
            folders = [answer.folder for answer in mine.values() if isinstance(answer, Artifact)]
            failed = {task: str(answer) for task, answer in mine.items() if not isinstance(answer, Artifact)}
            missing = {benchmark_key(task): why for task, why in {**unavailable, **failed}.items()}
            joined[name] = with_benchmarks(result, folders, missing)
    return joined


def _provenance(source: ModelSource, calibration: CalibrationSet, toolchain: Toolchain) -> dict[str, str]:
    """What every GGUF says of itself, beside its plan."""
    return {
        "version": __version__,
        "model": source.name.encode()[-120:].decode(errors="ignore"),  # llama.cpp takes no more
        "model_sha256": source.weights_digest,
        "calibration": calibration.tokens_digest,
        "llama_cpp": f"{toolchain.version} {toolchain.build}",
    }


def _result(planned: Artifact, gguf: Artifact, measured: Artifact, prices: dict[Rounding, PriceTable]) -> Result:
    plan, path = load_plan(planned), gguf.path(GGUF_NAME)
    if plan.policy == "full":
        model = as_is(path, gguf.files[GGUF_NAME].sha256, plan)
    else:
        model = QuantizedModel.load(gguf.path(MODEL_NAME))
    evaluation = Evaluation.load(measured.path(EVALUATION_NAME))
    table = prices[plan.rounding]
    predicted, longer = predicted_cost(table, plan), lengthened(table, plan)
    return Result(plan, model, evaluation, path, measured.folder, predicted, lengthened=longer)
