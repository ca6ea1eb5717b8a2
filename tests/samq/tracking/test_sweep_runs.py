import base64
import dataclasses
import json
import os
import shutil
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from samq.errors import SamqError
from samq.gguf.file import file_sha256
from samq.records import Plan, SensitivityMap
from samq.report.markdown_report import markdown_report
from samq.sweep.comparison import compare_sweep
from samq.sweep.selection import Failure, SelectionRule
from samq.tracking import mlflow_view
from samq.tracking.registry import connect
from samq.tracking.sweep_runs import track_sweep
from samq.tracking.tracked import TrackingSettings, latest_sweep
from tests.samq.sweeps import check_of, make_sweep

RULE = SelectionRule(max_size_ratio=1.6)
BEST = "budget-size-of-Q5_K_M"
ORDER = ["F16", "threshold-0.2", "threshold-0.4", "Q5_K_M", BEST, "Q4_K_M", "budget-size-of-Q4_K_M"]
FEW = ["F16", "threshold-0.4", BEST, "Q4_K_M"]  # one of each policy
AXES = {
    *("plan/budget_bytes", "plan/bits_per_weight", "plan/predicted_kl_nats", "memory/file_bytes"),
    *("comparison/kld_reduction_percent", "comparison/kld_reduction_low_percent"),
    *("fidelity/mean_kld_nats", "fidelity/mean_kld_nats_stderr", "json/valid_percent", "speed/latency_p99_ms"),
}


def settings(uri, **others):
    return TrackingSettings(
        tracking_uri=uri,
        experiment="sweeps",
        run_name="nightly",
        parameters={"calibration": {"sequence_tokens": 256}},
        tags={"prefect.flow_run": "calm-otter"},
        **others,
    )


@pytest.fixture
def sweep(sweep):
    """The sweep under a rule that lets its larger plans be the best."""
    return dataclasses.replace(sweep, rule=RULE)


def track(sweep, where):
    return track_sweep(where, sweep, markdown_report(sweep))


def of_results(sweep, results):
    """The sweep with these results only, compared with each other."""
    return dataclasses.replace(sweep, results=tuple(results), comparisons=tuple(compare_sweep(results)))


@pytest.fixture
def few(sweep):
    """A candidate of each policy, for tests that every candidate would tell the same."""
    return of_results(sweep, map(sweep.result, FEW))


@pytest.fixture(scope="module")
def tracked_sweep(tmp_path_factory, empty_database):
    """A client, a sweep and where it is tracked: once for all tests that only read it."""
    folder = tmp_path_factory.mktemp("tracked")
    uri = f"sqlite:///{shutil.copy(empty_database, folder)}"
    (folder / "sweep").mkdir()
    sweep = dataclasses.replace(make_sweep(folder / "sweep"), rule=RULE)
    return connect(uri), sweep, track(sweep, settings(uri))


def artifacts(client, run_id, folder=None):
    entries = client.list_artifacts(run_id, folder)
    return {path for item in entries for path in (artifacts(client, run_id, item.path) if item.is_dir else {item.path})}


def test_a_sweep_is_a_parent_run_with_a_child_for_each_candidate(sweep, mlflow_uri):
    tracked = track(
        dataclasses.replace(sweep, checks=(check_of(sweep, "budget-size-of-Q4_K_M"),)), settings(mlflow_uri)
    )
    client = connect(mlflow_uri)

    parent = client.get_run(tracked.parent_run_id)
    assert (parent.info.run_name, parent.info.status) == ("nightly", "FINISHED")
    assert (
        parent.data.params.items() >= {"model": "SmolLM2-135M-Instruct", "calibration.sequence_tokens": "256"}.items()
    )
    assert parent.data.tags.items() >= {"samq.best": BEST, "prefect.flow_run": "calm-otter"}.items()
    assert parent.data.tags["mlflow.note.content"].startswith(f"{BEST} has the lowest mean KLD")
    assert artifacts(client, tracked.parent_run_id) == {
        *("report.md", "candidates.json", "sensitivity-map.json", "prediction-checks.json"),
        *(f"figures/{name}.png" for name in ("pareto", "prediction", "sensitivity", "types", "budgets")),
    }
    contexts = {one.dataset.digest: one.tags[0].value for one in parent.inputs.dataset_inputs}
    assert contexts == {"e" * 12: "calibration", sweep.made_from.heldout.digest()[:12]: "heldout"}

    assert list(tracked.child_run_ids) == ORDER
    for name, run_id in tracked.child_run_ids.items():
        child, result = client.get_run(run_id), sweep.result(name)
        assert (child.info.run_name, child.info.status) == (name, "FINISHED")
        assert child.data.tags["mlflow.parentRunId"] == tracked.parent_run_id
        assert child.data.metrics.keys() >= AXES
        assert child.data.metrics["memory/file_bytes"] == result.bytes
        assert child.data.tags["samq.gguf_sha256"] == result.model.sha256
        assert child.data.params["dataset_digest"] == "e" * 64
        assert artifacts(client, run_id) == {
            *("plan.json", "types.png", "evaluation/evaluation.json", "evaluation/divergence.parquet")
        }
    tags = [client.get_run(run_id).data.tags for run_id in tracked.child_run_ids.values()]
    verdicts = ["baseline", "dominated", "dominated", "dominated", "★ best", "dominated", "◆ Pareto front"]
    assert [one["samq.verdict"] for one in tags] == verdicts
    assert [one["samq.rival"] for one in tags] == ["Q5_K_M"] * 5 + ["Q4_K_M"] * 2


def test_children_have_the_same_keys_wherever_they_have_a_meaning(tracked_sweep):
    client, _, tracked = tracked_sweep
    data = [client.get_run(run_id).data for run_id in tracked.child_run_ids.values()]
    assert len({frozenset(one.metrics) - {"plan/threshold", "plan/kept_tensors"} for one in data}) == 1
    assert len({frozenset(one.params) for one in data}) == 1


def test_a_sweep_without_predictions_has_no_figure_of_them(sweep, mlflow_uri):
    results = [dataclasses.replace(r, predicted=None) for r in sweep.results if r.plan.policy in ("full", "stock")]
    tracked = track(of_results(sweep, results), settings(mlflow_uri))
    figures = artifacts(connect(mlflow_uri), tracked.parent_run_id, "figures")
    assert figures == {f"figures/{name}.png" for name in ("pareto", "sensitivity", "types")}


def test_a_failed_candidate_is_a_failed_run_that_says_why(tracked_sweep):
    client, sweep, tracked = tracked_sweep
    (failed,) = client.search_runs([tracked.experiment_id], "attributes.status = 'FAILED'")
    assert failed.info.run_name == "threshold-0.9"
    assert failed.data.tags["mlflow.parentRunId"] == tracked.parent_run_id
    assert failed.data.tags["samq.failure"] == sweep.failures[0].reason
    assert "threshold-0.9 in quantize" in client.get_run(tracked.parent_run_id).data.tags["samq.failures"]


def test_a_rung_or_a_check_that_failed_is_said_and_is_no_candidate(few, mlflow_uri):
    others = [Failure("Q2_K", "ladder", "it hung"), Failure(BEST, "check", "out of memory")]
    tracked = track(dataclasses.replace(few, failures=(*few.failures, *others)), settings(mlflow_uri))
    client = connect(mlflow_uri)
    runs = client.search_runs([tracked.experiment_id], f"tags.mlflow.parentRunId = '{tracked.parent_run_id}'")
    assert sorted(run.info.run_name for run in runs) == sorted([*FEW, "threshold-0.9"])
    table = json.loads(Path(client.download_artifacts(tracked.parent_run_id, "candidates.json")).read_text())
    candidates = [row[table["columns"].index("candidate")] for row in table["data"]]
    assert candidates == [*FEW, "threshold-0.9"]
    said = client.get_run(tracked.parent_run_id).data.tags["samq.failures"]
    assert all(f"{one.name} in {one.stage}: {one.reason}" in said for one in others)


def test_plans_and_the_sensitivity_map_are_files_that_samqs_own_commands_read(tracked_sweep):
    client, sweep, tracked = tracked_sweep
    plan = client.download_artifacts(tracked.child_run_ids[BEST], "plan.json")
    assert Plan.load(Path(plan)) == sweep.result(BEST).plan
    sensitivity = client.download_artifacts(tracked.parent_run_id, "sensitivity-map.json")
    assert SensitivityMap.load(Path(sensitivity)) == sweep.sensitivity


@pytest.mark.slow
def test_the_saved_view_shows_this_sweep(few, mlflow_uri):
    client = connect(mlflow_uri)
    for _ in range(2):
        tracked = track(few, settings(mlflow_uri))
        tags = client.get_experiment(tracked.experiment_id).tags
        state = json.loads(tags[mlflow_view.TAG])["state"].removeprefix("deflate;")
        view = json.loads(zlib.decompress(base64.b64decode(state)))
        runs = client.search_runs(
            [tracked.experiment_id], view["searchFilter"], order_by=["metrics.`memory/file_bytes` DESC"]
        )
        assert [run.info.run_name for run in runs] == [*tracked.child_run_ids, "threshold-0.9"]
        columns = {column.split("`")[1] for column in view["selectedColumns"]}
        data = runs[0].data
        logged = data.metrics.keys() | data.tags.keys() | {"plan/threshold", "plan/kept_tensors"}
        assert columns <= logged, "every column of the view is logged"
        parallel, thresholds, size, prediction = view["compareRunCharts"]
        children = [run.data.metrics for run in runs if run.info.status == "FINISHED"]
        assert "plan/threshold" not in parallel["selectedMetrics"], "MLflow would leave out the budget plans"
        assert thresholds["selectedMetrics"][0] == "plan/threshold"
        axes = {"memory/file_bytes", "plan/predicted_kl_nats", "fidelity/mean_kld_nats", "speed/latency_p99_ms"}
        assert axes <= set(parallel["selectedMetrics"])
        for chart_axes in (
            parallel["selectedMetrics"],
            *([c["xaxis"]["key"], c["yaxis"]["key"]] for c in (size, prediction)),
        ):
            assert all(axis in metrics for axis in chart_axes for metrics in children)
        with_threshold = [metrics for metrics in children if "plan/threshold" in metrics]
        assert with_threshold
        assert all(axis in metrics for axis in thresholds["selectedMetrics"] for metrics in with_threshold)
    assert mlflow_view.KEY in tracked.links("")["charts"]


def test_thresholds_have_a_chart_of_their_own():
    common = {"memory/file_bytes", "fidelity/mean_kld_nats"}
    threshold = {"plan/threshold", "json/valid_percent"}
    view = json.loads(mlflow_view.view_of("parent", 0, [common, common | threshold]))
    state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
    by_bytes, by_threshold, size = state["compareRunCharts"]
    assert [by_bytes["displayName"], by_threshold["displayName"]] == ["Metrics by size", "Metrics by threshold"]
    assert size["displayName"] == "Size against fidelity"
    assert set(by_bytes["selectedMetrics"]) == common
    assert set(by_threshold["selectedMetrics"]) == common | threshold
    assert "metrics.`json/valid_percent`" in state["selectedColumns"]
    assert "metrics.`plan/predicted_kl_nats`" not in state["selectedColumns"]


def test_nothing_global_is_touched(few, mlflow_uri, tmp_path):
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    files, environment = set(tmp_path.iterdir()), dict(os.environ)
    track(few, settings(mlflow_uri, registered_model="model"))
    assert (mlflow.get_tracking_uri(), mlflow.get_registry_uri()) == before
    assert mlflow.active_run() is None
    assert set(tmp_path.iterdir()) == files, "all files are in the database's folder"
    assert {**os.environ, "PYTEST_CURRENT_TEST": ""} == {**environment, "PYTEST_CURRENT_TEST": ""}


def test_what_was_not_measured_is_left_out_and_said(tracked_sweep):
    client, _, tracked = tracked_sweep
    data = client.get_run(tracked.child_run_ids["F16"]).data
    assert json.loads(data.tags["samq.missing"]) == {"memory/measured_vram_bytes": "no NVIDIA GPU"}
    assert "memory/measured_vram_bytes" not in data.metrics


def test_a_sweep_that_breaks_off_looks_finished_nowhere(few, mlflow_uri):
    shutil.rmtree(few.result("threshold-0.4").folder)
    with pytest.raises(SamqError, match="cannot log the sweep"):
        track(few, settings(mlflow_uri, registered_model="model"))
    client = connect(mlflow_uri)
    experiment = client.get_experiment_by_name("sweeps")
    statuses = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert statuses["nightly"] == statuses["threshold-0.4"] == "FAILED"
    assert statuses["Q4_K_M"] == "FINISHED", "it was logged whole"
    assert "RUNNING" not in statuses.values()
    assert client.search_registered_models() == []


def test_a_deleted_experiment_comes_back(sweep, mlflow_uri):
    client = connect(mlflow_uri)
    client.delete_experiment(client.create_experiment("sweeps"))
    tracked = track(of_results(sweep, sweep.results[:1]), settings(mlflow_uri))
    assert client.get_experiment(tracked.experiment_id).lifecycle_stage == "active"


def test_artifacts_go_where_they_are_told(sweep, mlflow_uri, tmp_path):
    track(of_results(sweep, sweep.results[:1]), settings(mlflow_uri, artifact_location=str(tmp_path / "elsewhere")))
    assert list((tmp_path / "elsewhere").rglob("report.md"))


@pytest.mark.slow  # two sweeps, with all figures
def test_sweeps_are_tracked_from_several_threads(sweep, mlflow_uri):
    tracked = {}

    def work(name):
        tracked[name] = track(of_results(sweep, sweep.results[:2]), settings(mlflow_uri, registered_model="model"))

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client = connect(mlflow_uri)
    assert tracked["a"].experiment_id == tracked["b"].experiment_id
    for one in tracked.values():
        assert client.get_run(one.parent_run_id).info.status == "FINISHED"
        children = client.search_runs([one.experiment_id], f"tags.mlflow.parentRunId = '{one.parent_run_id}'")
        assert sorted(run.info.run_name for run in children) == ["F16", "threshold-0.4", "threshold-0.9"]


@pytest.mark.slow
def test_the_best_is_registered_once_however_many_nights_bring_it(few, mlflow_uri):
    first = track(few, settings(mlflow_uri, registered_model="model"))
    second = track(few, settings(mlflow_uri, registered_model="model"))
    assert first.model_version == second.model_version == "1"
    assert "model version 1" in connect(mlflow_uri).get_run(second.parent_run_id).data.tags["samq.registered"]
    assert second.summary()[-1] == "registered: model version 1, alias candidate"
    assert second.links("http://host")["registered model"].startswith("http://host/#/models/model/versions/1")


def test_the_registered_version_of_a_multimodal_model_names_its_vision_part(few, mlflow_uri, tmp_path):
    (tmp_path / "mmproj.gguf").write_bytes(b"of images")
    made_from = replace(few.made_from, mmproj=tmp_path / "mmproj.gguf")
    track(replace(few, made_from=made_from), settings(mlflow_uri, registered_model="model"))
    version = connect(mlflow_uri).get_model_version("model", "1")
    assert version.tags["mmproj_uri"] == (tmp_path / "mmproj.gguf").as_uri()
    assert version.tags["mmproj_sha256"] == file_sha256(tmp_path / "mmproj.gguf")


def test_where_the_bits_went_links_to_a_figure_that_exists(tracked_sweep, few, mlflow_uri):
    client, _, tracked = tracked_sweep
    assert tracked.types_figure == "budgets.png"
    without = replace(few, results=tuple(result for result in few.results if result.plan.policy != "budget"))
    tracked = track(without, settings(mlflow_uri))
    client = connect(mlflow_uri)
    latest = latest_sweep(client, mlflow_uri)
    assert latest and latest.types_figure == tracked.types_figure == "types.png"
    figure = latest.links("")["where the bits went"].rpartition("/artifacts/")[2].partition("?")[0]
    assert figure in artifacts(client, latest.parent_run_id)
    assert "where the bits went" not in replace(tracked, types_figure=None).links("")


def test_a_registration_that_fails_costs_nothing_else(few, mlflow_uri):
    tracked = track(few, settings(mlflow_uri, registered_model="org/model"))
    client = connect(mlflow_uri)
    parent = client.get_run(tracked.parent_run_id)
    assert parent.info.status == "FINISHED"
    statuses = [client.get_run(run_id).info.status for run_id in tracked.child_run_ids.values()]
    assert statuses == ["FINISHED"] * len(FEW)
    assert parent.data.tags["samq.registered"] == f"failed: {tracked.not_registered}"
    assert tracked.summary()[-1].startswith("not registered: cannot register")
    assert "org/model" in tracked.summary()[-1] and "registered model" not in tracked.links("")
    client.set_tag(tracked.parent_run_id, "samq.registered", "failed: the server wants version 7")
    latest = latest_sweep(client, mlflow_uri)
    assert latest and latest.registered_model is None
    assert mlflow_view.TAG in client.get_experiment(tracked.experiment_id).tags


def test_a_long_report_still_fits_a_tag(sweep, mlflow_uri):
    failure = Failure("x", stage="evaluate", reason="why " * 5000)
    alone = of_results(sweep, sweep.results[:1])
    tracked = track(dataclasses.replace(alone, failures=(*sweep.failures, failure)), settings(mlflow_uri))
    client = connect(mlflow_uri)
    tags = client.get_run(tracked.parent_run_id).data.tags
    assert len(tags["mlflow.note.content"]) == len(tags["samq.failures"]) == 8000
