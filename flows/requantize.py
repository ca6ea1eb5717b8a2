"""Re-quantize a model: from full-precision weights and calibration text to measured, tracked, registered GGUFs.

    model + text -> convert -> calibrate -> imatrix -> plan x N -> quantize x N -> evaluate x N -> track, report, register
"""

from dataclasses import dataclass, field
from pathlib import Path

from prefect import flow
from prefect.futures import PrefectFuture, wait
from prefect.task_runners import ThreadPoolTaskRunner

from flows.parameters import RequantizeParameters
from samq import __version__
from samq.datasets import refuse_overlap
from samq.errors import SamqError
from samq.home import mlflow_uri, store_folder
from samq.records import CalibrationSet, ModelSource, QuantizedModel, SensitivityMap, TextSet, Toolchain
from samq.report import Failure, Result
from samq.store import Artifact
from samq.toolchain import find_toolchain
from samq.tracking import TrackedSweep
from tasks.calibrate import MAP_NAME, calibrate
from tasks.convert import convert
from tasks.evaluate import baseline, evaluate
from tasks.imatrix import imatrix
from tasks.plan import choose_thresholds, load_plan, plan_stock, plan_threshold
from tasks.quantize import quantize
from tasks.report import publish_report
from tasks.source import find_model
from tasks.text import SET_NAME, heldout, load_text, tokenize
from tasks.track import track


@dataclass(frozen=True)
class Sweep:
    """What one run of the flow made."""

    source: ModelSource
    results: list[Result]
    failures: list[Failure]
    best: Result | None
    tracked: TrackedSweep
    report: str


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
    task_runner=ThreadPoolTaskRunner(max_workers=2),
)
def requantize(parameters: RequantizeParameters) -> Sweep:
    """Build, measure and track every candidate; one that fails is reported and does not stop the others."""
    model, calibration, wanted, limit = (
        parameters.model,
        parameters.calibration,
        parameters.candidates,
        parameters.timeout_s,
    )
    refuse_overlap(calibration.dataset, parameters.heldout)
    store, tools = store_folder(), find_toolchain()

    source = find_model(model.source, model.revision, model.hf_folder)
    text, heldout_text = load_text(calibration.dataset), load_text(parameters.heldout)
    full = convert(store, source, tools, model.precision, limit)
    tokens = tokenize(store, source, text, calibration.sequence_tokens, calibration.packing, calibration.seed)
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
        thresholds += choose_thresholds(full, sensitivity, wanted.policy, wanted.proposed_thresholds, tools)
    plans = {mixture: plan_stock.submit(store, full, matrix, mixture, tools) for mixture in ("full", *wanted.stock)}
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
        },
    )
    measured = candidates.advance(
        "evaluate",
        {
            name: evaluate.submit(store, name, gguf, chunks, base, parameters.evaluation, limit)
            for name, gguf in built.items()
        },
    )
    results = [_result(planned[name], built[name], measured[name]) for name in measured]
    if "full" not in measured or len(measured) == 1:
        reasons = "; ".join(f"{failure.name}: {failure.reason}" for failure in candidates.failures)
        raise SamqError(f"the baseline or every candidate failed ({reasons}); see the logs of this run")
    best = choose(results, parameters.selection)
    ...
    return Sweep()
