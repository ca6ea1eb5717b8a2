"""A sweep against the one before it, as MLflow has that: what the drift report says."""

from dataclasses import replace

import pandas as pd
import pytest

from samq.evaluation.metrics import KLD
from samq.files import DIVERGENCE_NAME, ITEMS_NAME, PLAN_NAME
from samq.promotion.last_sweep import last_sweep
from samq.records import Metric
from samq.report.drift_report import drift_report
from samq.sweep.drift import drift_of
from samq.tracking.mlflow_values import common_params
from samq.tracking.registry import connect
from samq.tracking.sweep_runs import track_sweep
from samq.tracking.tracked import SWEEP_NAME, TrackingSettings
from tests.samq.sweeps import items_of, make_sweep, with_results

FULL, STOCK, BUDGET = "F16", "Q4_K_M", "budget-size-of-Q4_K_M"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, empty_database):
    """(settings, sweep): tracked once, and read only."""
    folder = tmp_path_factory.mktemp("drift")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    (folder / "mlflow.db").write_bytes(empty_database.read_bytes())
    (folder / "sweep").mkdir()
    sweep = make_sweep(folder / "sweep", layers=1, thresholds=(), stock=(STOCK,), budgets=("size-of:Q4_K_M",))
    settings = TrackingSettings(
        tracking_uri=uri, experiment="nights", run_name="last night", tags={SWEEP_NAME: "nightly"}
    )
    track_sweep(settings, sweep, "# Report\n")
    return settings, sweep


def drift(tracked, sweep):
    settings, _ = tracked
    last = last_sweep(settings)
    inputs = common_params(sweep.made_from)
    return drift_of(sweep.by_size, inputs, last.run_name, last.parameters | {}, last.candidates, 0.01)


def worse(result, tmp_path, factor=2.0, *, other_tokens=False):
    """The candidate with this many times the KLD at every token."""
    tokens = pd.read_parquet(result.folder / DIVERGENCE_NAME)
    tokens["kld"] *= factor
    if other_tokens:
        tokens["token"] += 1
    tokens.to_parquet(tmp_path / DIVERGENCE_NAME)
    metrics = {**result.evaluation.metrics, KLD: Metric(value=factor * result.kld.value)}
    return replace(result, folder=tmp_path, evaluation=result.evaluation.model_copy(update={"metrics": metrics}))


def test_the_same_sweep_has_no_drift(tracked):
    _, sweep = tracked
    same = drift(tracked, sweep)
    assert same.last_run == "last night" and same.inputs == {} and same.gone == same.new == ()
    assert [candidate.name for candidate in same.candidates] == [result.name for result in sweep.by_size]
    for candidate in same.candidates:
        assert candidate.bytes == candidate.last_bytes and candidate.types == {} and candidate.kld == candidate.last_kld
        assert candidate.comparison is None if candidate.name == FULL else candidate.comparison.reduction == 0
    report = drift_report(same)
    assert "# Against last night" in report and "The inputs are the same" in report and "| none |" in report


def test_what_changed_is_named_with_its_size_and_interval(tracked, tmp_path):
    _, sweep = tracked
    result = sweep.result(BUDGET)
    name = next(iter(result.plan.types))
    types = {**result.plan.types, name: "Q2_K", "blk.9.attn_q.weight": "Q4_0"}
    changed = replace(worse(result, tmp_path), plan=result.plan.model_copy(update={"types": types}))
    source = sweep.made_from.source.model_copy(update={"weights_digest": "9" * 64})
    tonight = replace(
        with_results(sweep, [sweep.result(FULL), changed]), made_from=replace(sweep.made_from, source=source)
    )
    found = drift(tracked, tonight)
    assert found.inputs == {"weights_digest": ("c" * 64, "9" * 64)} and found.gone == (STOCK,)
    (candidate,) = [one for one in found.candidates if one.name == BUDGET]
    assert candidate.comparison.reduction == pytest.approx(-1)
    assert candidate.types == {name: (result.plan.types[name], "Q2_K"), "blk.9.attn_q.weight": (None, "Q4_0")}
    report = drift_report(found)
    assert "| +100.0 % (+100.0 % to +100.0 %) |" in report and f"Gone: {STOCK}." in report
    assert f"2 of {len(types)}: 1 {result.plan.types[name]} to Q2_K, 1 absent to Q4_0" in report
    assert f"| weights_digest | {'c' * 64} | {'9' * 64} |" in report


def test_benchmarks_are_compared_item_by_item(tracked, tmp_path):
    settings, sweep = tracked
    (tmp_path / "then").mkdir()
    (tmp_path / "now").mkdir()
    then, now = (
        benchmarked(sweep.result(STOCK), tmp_path / when, accuracy) for when, accuracy in (("then", 0.8), ("now", 0.75))
    )
    other = settings.model_copy(update={"tags": {SWEEP_NAME: "benchmarked"}})
    track_sweep(other, with_results(sweep, [sweep.result(FULL), then]), "# Report\n")
    found = drift((other, sweep), with_results(sweep, [now]))
    ((comparison,),) = [candidate.benchmarks for candidate in found.candidates]
    assert (comparison.reference_value, comparison.value, comparison.items) == (0.8, 0.75, 200)
    assert comparison.p < 0.05 and comparison.high < 0
    assert f"| {STOCK} | samq_gsm8k exact_match | 0.750 | 0.800 | -0.050 (" in drift_report(found)


def benchmarked(result, folder, accuracy):
    """The candidate with a benchmark of which a share is right: the same first items for everybody."""
    items_of(accuracy).to_parquet(folder / ITEMS_NAME)
    return replace(result, benchmark_folders=(folder,))


def test_other_held_out_tokens_are_not_compared_one_by_one(tracked, tmp_path):
    _, sweep = tracked
    tonight = with_results(sweep, [worse(sweep.result(BUDGET), tmp_path, other_tokens=True)])
    (candidate,) = drift(tracked, tonight).candidates
    assert candidate.comparison is None
    assert "+100.0 %, other tokens" in drift_report(drift(tracked, tonight))


def test_without_a_sweep_of_that_name_there_is_no_drift(tracked):
    settings, _ = tracked
    assert last_sweep(settings.model_copy(update={"tags": {SWEEP_NAME: "other"}})) is None
    assert last_sweep(settings.model_copy(update={"experiment": "other"})) is None


def test_a_candidate_that_mlflow_lost_is_left_out(tracked, caplog):
    settings, sweep = tracked
    client = connect(settings.tracking_uri)
    other = settings.model_copy(update={"tags": {SWEEP_NAME: "damaged"}})
    child = track_sweep(other, sweep, "# Report\n").child_run_ids[STOCK]
    client.log_text(child, "no plan", PLAN_NAME)
    assert STOCK not in [candidate.name for candidate in last_sweep(other).candidates]
    assert f"cannot read {STOCK} of the last sweep from MLflow" in caplog.text
