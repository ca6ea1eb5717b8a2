"""Re-quantize a model: from full-precision weights and calibration text to measured, tracked, registered GGUFs.

model + text -> convert -> calibrate -> imatrix -> plan x N -> quantize x N -> evaluate x N -> track, report, register
"""

import logging
from dataclasses import dataclass, field

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.runtime import flow_run
from prefect.task_runners import ThreadPoolTaskRunner

from flows.parameters import RequantizeParameters
from samq import __version__
from samq.datasets import require_disjoint
from samq.errors import SamqError
from samq.home import mlflow_uri, store_folder
from samq.quantizer import GGUF_NAME, as_is
from samq.records import CalibrationSet, Evaluation, ModelSource, QuantizedModel, SensitivityMap, Toolchain
from samq.selection import Failure, Result, choose
from samq.store import Artifact
from samq.toolchain import find_toolchain
from samq.tracking import TrackedSweep, TrackingSettings
from tasks.calibrate import MAP_NAME, calibrate
from tasks.convert import convert
from tasks.evaluate import EVALUATION_NAME, baseline, evaluate
from tasks.imatrix import imatrix
from tasks.plan import choose_thresholds, load_plan, plan_stock, plan_threshold
from tasks.quantize import MODEL_NAME, quantize
from tasks.report import report
from tasks.source import find_model
from tasks.text import SET_NAME, heldout, load_text, tokenize
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


@dataclass
class _Candidates:
    """Candidates on their way through the stages: a failed one leaves the way, and the others go on."""

    alive: dict[str, Artifact] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def advance(self, stage: str, futures: dict[str, PrefectFuture[Artifact]]) -> dict[str, Artifact]:
        wait(list(futures.values()))
        self.alive = {}
        for name, future in futures.items():
            result = future.result(raise_on_failure=False)
            if isinstance(result, Artifact):
                self.alive[name] = result
            else:
                self.failures.append(Failure(name=name, stage=stage, reason=str(result)))
        return self.alive


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
    full = convert(store, source, tools, model.precision, limit)
    tokens = tokenize(store, source, text, calibration.dataset, calibration.sequence_tokens, calibration.packing)
    sensitivities = calibrate(
        store, source, full, tokens, calibration.batch_size, model.dtype, model.device, calibration.seed
    )
    matrix = imatrix(store, full, text, calibration.sequence_tokens, tools, limit) if calibration.imatrix else None
    chunks = heldout(store, full, heldout_text)
    base = baseline(store, full, chunks, parameters.evaluation, limit)

    sensitivity = SensitivityMap.load(sensitivities.path(MAP_NAME))
    calibration_set = CalibrationSet.load(tokens.path(SET_NAME))
    thresholds = [*wanted.thresholds]
    if wanted.proposed_thresholds:
        thresholds += choose_thresholds(full, matrix, sensitivity, wanted.policy, wanted.proposed_thresholds, tools)
    plans = {mixture: plan_stock.submit(store, full, matrix, mixture, tools) for mixture in (FULL, *wanted.stock)}
    for cut in thresholds:
        plans[f"threshold-{cut}"] = plan_threshold.submit(store, full, matrix, sensitivity, cut, wanted.policy, tools)

    candidates = _Candidates()
    planned = candidates.advance("plan", plans)
    provenance = _provenance(source, calibration_set, tools)
    built = candidates.advance(
        "quantize",
        {
            name: quantize.submit(store, name, full, plan, matrix, provenance, tools, limit)
            for name, plan in planned.items()
            if name != FULL
        },
    )
    measured = candidates.advance(
        "evaluate",
        {
            name: evaluate.submit(store, name, gguf, chunks, base, parameters.evaluation, limit)
            for name, gguf in {FULL: full, **built}.items()
        },
    )
    if FULL not in measured or len(measured) == 1:
        reasons = "; ".join(f"{failure.name}: {failure.reason}" for failure in candidates.failures)
        raise SamqError(f"the baseline or every candidate failed ({reasons}); see the logs of this run")
    results = [_result(planned[name], {FULL: full, **built}[name], made) for name, made in measured.items()]
    best = choose(results, parameters.selection)

    markdown = report(
        source, calibration_set, heldout_text, tools, results, candidates.failures, best, parameters.selection
    )
    tracked = track(
        TrackingSettings(
            tracking_uri=parameters.tracking.uri or mlflow_uri(),
            experiment=parameters.tracking.experiment,
            run_name=parameters.name,
            registered_model=parameters.tracking.registered_model,
        ),
        source,
        calibration_set,
        heldout_text,
        tools,
        sensitivity,
        results,
        candidates.failures,
        best,
        markdown,
        parameters.model_dump(mode="json"),
        {"prefect.flow_run": flow_run.get_id() or ""},
    )
    return Sweep(source, results, candidates.failures, best, tracked, markdown)


def _provenance(source: ModelSource, calibration: CalibrationSet, toolchain: Toolchain) -> dict[str, str]:
    """What every GGUF says of itself, beside its plan."""
    return {
        "version": __version__,
        "model": source.name[-120:],
        "model_sha256": source.weights_digest,
        "calibration": calibration.tokens_digest,
        "llama_cpp": f"{toolchain.version} {toolchain.build}",
    }


def _result(planned: Artifact, gguf: Artifact, measured: Artifact) -> Result:
    plan, path = load_plan(planned), gguf.path(GGUF_NAME)
    if plan.policy == "full":
        model = as_is(path, gguf.files[GGUF_NAME].sha256, plan)
    else:
        model = QuantizedModel.load(gguf.path(MODEL_NAME))
    evaluation = Evaluation.load(measured.path(EVALUATION_NAME))
    return Result(plan=plan, model=model, evaluation=evaluation, gguf=path, folder=measured.folder)
