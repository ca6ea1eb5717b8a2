"""The whole flow on the demo's model and text, small: real converter, gradients, llama-quantize, evaluation, MLflow."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from flows.parameters import RequantizeParameters
from flows.requantize import requantize
from samq.errors import SamqError
from samq.gguf_file import read_metadata
from samq.records import Compensation
from samq.selection import KLD
from samq.significance import ITEMS_NAME
from samq.store import Store
from tasks.compensate import COMPENSATION_NAME
from tests.end_to_end.conftest import SMALL, artifacts, rebuilt

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home")]


def test_the_baseline_is_itself_and_bytes_rise_as_divergence_falls(sweep):
    results = {result.plan.policy: result for result in sweep.results}
    assert sweep.failures == []
    assert abs(results["full"].evaluation.metrics[KLD].value) < 1e-6
    stock, kept = results["stock"], results["threshold"]
    assert stock.bytes < kept.bytes < results["full"].bytes
    assert stock.evaluation.metrics[KLD].value > 0
    assert sweep.best is not None


def test_the_budgets_plan_is_compensated_and_the_others_are_as_llama_quantize_writes_them(sweep):
    rounding = {result.name: result.plan.rounding for result in sweep.results}
    assert {name for name, kind in rounding.items() if kind == "compensated"} == {"samq-Q4_K_M"}
    (result,) = [result for result in sweep.results if result.plan.policy == "budget"]
    # The package has the embedding as Q8_0 and the rest as Q4_1; the plan finds that out, and next to nothing is lost.
    assert result.plan.types == {name: "Q4_1" for name in result.plan.types} | {"token_embd.weight": "Q8_0"}
    assert result.predicted.value < 1e-5
    compensated = Compensation.load(result.gguf.parent / COMPENSATION_NAME).tensors
    assert all(error.compensated <= error.nearest for error in compensated.values())


def test_ggufs_carry_where_they_come_from(sweep):
    for result in sweep.results:
        if result.plan.policy != "full":
            metadata = read_metadata(result.gguf)
            assert metadata["samq.plan"] == result.plan.digest()
            assert metadata["samq.model_sha256"] == sweep.source.weights_digest


def test_mlflow_has_a_parent_a_child_each_and_the_best_as_candidate(sweep, home):
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(sweep.tracked.parent_run_id).info.status == "FINISHED"
    children = [client.get_run(run) for run in sweep.tracked.child_run_ids.values()]
    assert len(children) == len(sweep.results)
    assert (
        len({frozenset(run.data.metrics) & {KLD, "memory/file_bytes", "plan/bits_per_weight"} for run in children}) == 1
    )
    version = client.get_model_version_by_alias("small", "candidate")
    assert version.tags["sha256"] == sweep.best.model.sha256


def test_the_flow_runs_page_has_the_report_the_table_and_readable_names(sweep, home):
    parent = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}").get_run(sweep.tracked.parent_run_id)
    flow_run_id = UUID(parent.data.tags["prefect.flow_run"])
    this = {"flow_run_filter": FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))}
    with get_client(sync_client=True) as prefect:
        assert prefect.read_flow_run(flow_run_id).name == "small"
        pages = {artifact.key: artifact for artifact in prefect.read_artifacts(**this)}
        names = {run.name for run in prefect.read_task_runs(**this)}
    assert pages["requantize-report"].data == sweep.markdown
    assert {row["candidate"] for row in json.loads(pages["requantize-candidates"].data)} == {
        result.name for result in sweep.results
    }
    assert names >= {"convert SmolLM2-135M-Instruct.Q4_1 to F16", "plan Q4_K_M", "ladder Q8_0", "evaluate Q4_K_M"}


def test_the_finalists_are_put_to_the_benchmarks_item_by_item(sweep, home):
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    asked = {result.name for result in sweep.results if "eval/samq_hellaswag/acc" in result.evaluation.metrics}
    assert {"F16", sweep.best.name} <= asked and len(asked) < len(sweep.results)
    run_id = sweep.tracked.child_run_ids[sweep.best.name]
    metrics = client.get_run(run_id).data.metrics
    assert metrics["eval/samq_hellaswag/acc"] == sweep.best.evaluation.metrics["eval/samq_hellaswag/acc"].value
    assert "eval/samq_hellaswag/acc_delta_vs_f16" in metrics
    names = [file.path for file in client.list_artifacts(run_id, "evaluation")]
    table = pd.read_parquet(client.download_artifacts(run_id, f"evaluation/{ITEMS_NAME}"))
    assert f"evaluation/{ITEMS_NAME}" in names
    assert set(table["benchmark"]) == {"samq_hellaswag"} and len(table) == 4  # two items, acc and acc_norm
    assert "## Benchmarks" in sweep.markdown


def test_an_unknown_benchmark_stops_before_the_work_and_one_without_data_is_missing(sweep, home):
    before = artifacts(home)
    unknown = {**SMALL, "benchmarks": {"tasks": ["samq_hellaswagg"]}}
    with pytest.raises(SamqError, match="there is no task 'samq_hellaswagg'; nearest are samq_hellaswag"):
        requantize(RequantizeParameters.model_validate(unknown))
    assert rebuilt(before, artifacts(home)) == []
    offline = {**SMALL, "benchmarks": {**SMALL["benchmarks"], "tasks": ["samq_hellaswag", "mmlu"]}}
    made = requantize(RequantizeParameters.model_validate(offline))
    assert rebuilt(before, artifacts(home)) == []
    assert "the data of mmlu cannot be had" in made.best.evaluation.missing["eval/mmlu"]


def test_nothing_new_rebuilds_nothing_and_registers_nothing(sweep, home):
    before = artifacts(home)
    again = requantize(RequantizeParameters.model_validate(SMALL))
    assert rebuilt(before, artifacts(home)) == []
    assert again.tracked.model_version == sweep.tracked.model_version


def test_other_calibration_text_recalibrates_and_does_not_reconvert(sweep, home):
    before = artifacts(home)
    other = {**SMALL, "calibration": {**SMALL["calibration"], "dataset": {"name": "humaneval", "samples": 6}}}
    requantize(RequantizeParameters.model_validate(other))
    stages = rebuilt(before, artifacts(home))
    assert {"tokenize", "calibrate", "imatrix", "rung", "price", "plan", "assemble", "evaluate"} <= set(stages)
    assert not {"convert", "heldout", "baseline"} & set(stages)


def test_a_failed_candidate_is_reported_and_the_others_go_on(sweep, home):
    # IQ1_S needs an importance matrix, and there is none.
    wrong = {**SMALL, "calibration": {**SMALL["calibration"], "imatrix": False}}
    wrong["candidates"] = {"stock": ["Q4_K_M", "IQ1_S"], "budgets": [], "proposed_thresholds": 0}
    made = requantize(RequantizeParameters.model_validate(wrong))
    assert [(failure.name, failure.stage) for failure in made.failures] == [("IQ1_S", "quantize")]
    assert "llama-quantize failed" in made.failures[0].reason
    assert [result.name for result in made.results] == ["F16", "Q4_K_M"]
    assert "IQ1_S" in made.markdown
    wrong["candidates"] = {**wrong["candidates"], "stock": ["IQ1_S"]}
    with pytest.raises(SamqError, match=r"the baseline or every candidate failed \(.*IQ1_S: llama-quantize failed"):
        requantize(RequantizeParameters.model_validate(wrong))


# Fewer bytes than the types that the model was made from take, so there are errors to be made up for.
COMPENSATED = {
    **SMALL,
    "candidates": {**SMALL["candidates"], "budgets": ["5.5bpw"], "proposed_thresholds": 0},
    "benchmarks": {"tasks": []},
    "tracking": {"experiment": "compensated"},
}
BUILDS = ["rung", "assemble", "compensate", "evaluate"]


@pytest.fixture(scope="module")
def compensated(home, prefect_home):
    """A sweep in which tensors are compensated."""
    sweep = requantize(RequantizeParameters.model_validate(COMPENSATED))
    (result,) = [result for result in sweep.results if result.plan.policy == "budget"]
    assert Compensation.load(result.gguf.parent / COMPENSATION_NAME).tensors
    return sweep


@pytest.mark.parametrize("stage", [stage for stage in BUILDS if stage != "assemble"])  # it only copies, for a second
def test_a_killed_flow_leaves_no_half_artifact_and_the_next_run_gives_the_same_ggufs(
    compensated, home, tmp_path, stage
):
    killed = tmp_path / "samq"
    shutil.copytree(home / "store", killed / "store", symlinks=True)
    store = Store(killed / "store")
    for artifact in list(store.artifacts()):
        if artifact.stage in BUILDS[BUILDS.index(stage) :]:
            shutil.rmtree(artifact.folder)
    config = tmp_path / "compensated.yaml"
    config.write_text(yaml.safe_dump(COMPENSATED))
    environment = {**os.environ, "SAMQ_HOME": str(killed), "PREFECT_HOME": str(tmp_path / "prefect")}
    environment.pop("PREFECT_API_URL", None)
    command = [sys.executable, "-m", "samq.cli", "requantize", "--config", str(config)]

    def start():
        log = (tmp_path / "log").open("ab")
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=root, start_new_session=True)

    flow = start()
    while not any((killed / "store" / ".tmp").glob(f"{stage}-*.lock")):
        assert flow.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.02)
    flow.send_signal(signal.SIGKILL)
    flow.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(flow.pid, signal.SIGKILL)  # Prefect's server, which lives on otherwise
    whole = {
        artifact.stage for artifact in store.artifacts() if store.find(artifact.stage, artifact.key, thorough=True)
    }
    assert "convert" in whole
    assert start().wait(timeout=600) == 0, (tmp_path / "log").read_text()
    made = {
        artifact.files["model.gguf"].sha256
        for artifact in Store(killed / "store").artifacts()
        if artifact.stage in ("assemble", "compensate")
    }
    assert made >= {result.model.sha256 for result in compensated.results if result.plan.policy != "full"}
    assert list((killed / "store" / ".tmp").glob("*.lock")) == []
