"""The whole flow on the demo's model and text, small: real converter, gradients, llama-quantize, evaluation, MLflow."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import UUID

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from mlflow import MlflowClient
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.settings import PREFECT_API_URL
from safetensors.torch import load_file, save_file

from flows.parameters import RequantizeParameters
from flows.requantize import requantize
from samq.errors import SamqError
from samq.evaluation.metrics import KLD
from samq.files import COMPENSATION_NAME, GGUF_NAME, ITEMS_NAME, MAP_NAME
from samq.gguf.file import file_sha256, read_metadata, read_tensors, read_weights
from samq.records import Compensation
from samq.sensitivity.hf_model import write_hf_folder
from samq.store import Store
from tests.command_line import forked_samq
from tests.end_to_end.conftest import BLOCKS, SMALL, artifacts, measure, rebuilt

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home")]

FIRST_BLOCKS = 3
STEPS = ("choose types", "propose thresholds")  # what works in a workspace and is not cached


def test_the_baseline_is_itself_and_bytes_rise_as_divergence_falls(sweep):
    results = {result.plan.policy: result for result in sweep.results}
    assert sweep.failures == ()
    assert abs(results["full"].evaluation.metrics[KLD].value) < 1e-6
    stock, kept = results["stock"], results["threshold"]
    assert stock.bytes < kept.bytes < results["full"].bytes
    assert stock.evaluation.metrics[KLD].value > 0
    assert sweep.best is not None


def test_the_budgets_plan_is_compensated_and_the_others_are_as_llama_quantize_writes_them(sweep, home, made_by_sweep):
    rounding = {result.name: result.plan.rounding for result in sweep.results}
    assert {name for name, kind in rounding.items() if kind == "compensated"} == {"samq-Q4_K_M"}
    (result,) = [result for result in sweep.results if result.plan.policy == "budget"]
    # The package has the embedding as Q8_0 and the rest as Q4_1; the plan finds that out, and next to nothing is lost.
    assert result.plan.types == {name: "Q4_1" for name in result.plan.types} | {"token_embd.weight": "Q8_0"}
    assert result.predicted.value < 1e-5
    (candidate,) = [Store(home / "store").find(*identity) for identity in made_by_sweep if identity[0] == "candidate"]
    errors = Compensation.load(candidate.path(COMPENSATION_NAME)).tensors.values()
    assert len(errors) < 5 < len(result.plan.types)  # what full precision was itself made from is not rounded anew
    assert all(error.compensated <= error.nearest for error in errors)


def test_ggufs_carry_where_they_come_from(sweep):
    for result in sweep.results:
        if result.plan.policy != "full":
            metadata = read_metadata(result.gguf)
            assert metadata["samq.plan"] == result.plan.digest()
            assert metadata["samq.model_sha256"] == sweep.made_from.source.weights_digest


def test_mlflow_has_a_parent_a_child_each_and_the_best_as_candidate(finished, sweep, home):
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    assert client.get_run(finished.tracked.parent_run_id).info.status == "FINISHED"
    children = [client.get_run(run) for run in finished.tracked.child_run_ids.values()]
    assert len(children) == len(sweep.results)
    assert (
        len({frozenset(run.data.metrics) & {KLD, "memory/file_bytes", "plan/bits_per_weight"} for run in children}) == 1
    )
    version = client.get_model_version_by_alias("small", "candidate")
    assert version.tags["sha256"] == sweep.best.model.sha256


def flow_run_of(finished, home):
    """The flow run's id, and the filter that Prefect finds what belongs to it by."""
    parent = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}").get_run(finished.tracked.parent_run_id)
    flow_run_id = UUID(parent.data.tags["prefect.flow_run"])
    return flow_run_id, {"flow_run_filter": FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))}


def test_the_flow_runs_page_has_the_report_the_table_and_readable_names(finished, sweep, home):
    flow_run_id, this = flow_run_of(finished, home)
    with get_client(sync_client=True) as prefect:
        assert re.fullmatch(r"small \d{4}-\d\d-\d\d \d\d:\d\d", prefect.read_flow_run(flow_run_id).name)
        pages = {artifact.key: artifact for artifact in prefect.read_artifacts(**this)}
        names = {run.name for run in prefect.read_task_runs(**this)}
    assert pages["requantize-report"].data == finished.report
    assert {row["candidate"] for row in json.loads(pages["requantize-candidates"].data)} == {
        result.name for result in sweep.results
    }
    assert names >= {"convert SmolLM2-135M-Instruct.Q4_1 to F16", "plan Q4_K_M", "price types", "evaluate Q4_K_M"}


def test_the_finalists_are_put_to_the_benchmarks_item_by_item(finished, sweep, home):
    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    benchmarked = {result.name for result in sweep.results if "eval/samq_hellaswag/acc" in result.evaluation.metrics}
    assert {"F16", sweep.best.name} <= benchmarked and len(benchmarked) < len(sweep.results)
    run_id = finished.tracked.child_run_ids[sweep.best.name]
    metrics = client.get_run(run_id).data.metrics
    assert metrics["eval/samq_hellaswag/acc"] == sweep.best.evaluation.metrics["eval/samq_hellaswag/acc"].value
    assert "eval/samq_hellaswag/acc_delta_vs_f16" in metrics
    names = [file.path for file in client.list_artifacts(run_id, "evaluation")]
    table = pd.read_parquet(client.download_artifacts(run_id, f"evaluation/{ITEMS_NAME}"))
    assert f"evaluation/{ITEMS_NAME}" in names
    assert set(table["benchmark"]) == {"samq_hellaswag"} and len(table) == 4  # two items, acc and acc_norm
    assert "## Benchmarks" in finished.report


def test_an_unknown_benchmark_stops_before_the_work_and_one_without_data_is_missing(sweep, home):
    before = artifacts(home)
    unknown = {**SMALL, "benchmarks": {"tasks": ["samq_hellaswagg"]}}
    with pytest.raises(SamqError, match="the task 'samq_hellaswagg' does not exist; similar names are samq_hellaswag"):
        requantize(RequantizeParameters.model_validate(unknown))
    assert rebuilt(before, artifacts(home)) == []
    offline = {**SMALL, "benchmarks": {**SMALL["benchmarks"], "tasks": ["samq_hellaswag", "mmlu"]}}
    measured = measure(offline)
    assert rebuilt(before, artifacts(home)) == []
    assert "cannot load the data of mmlu" in measured.best.evaluation.missing["eval/mmlu"]


def test_of_the_sweeps_own_map_a_threshold_of_85_percent_keeps_next_to_nothing(made_by_sweep, home, tmp_path):
    folders = {stage: home / "store" / stage / key for stage, key in made_by_sweep}
    sensitivity, gguf = folders["calibrate"] / MAP_NAME, folders["convert"] / GGUF_NAME
    planned = forked_samq("plan", "--map", sensitivity, "--gguf", gguf, "--threshold", "0.85", home=tmp_path)
    assert planned.returncode == 0, planned.stderr
    groups = re.search(
        rf"threshold 0\.85 keeps \d+ of {1 + 7 * BLOCKS} tensors \((\d+) blocks or single tensors\)", planned.stderr
    )
    assert groups and int(groups[1]) <= 1, planned.stderr
    rows = re.findall(r"│ ([\d.]+) +│ (\d+) +│ [\d.]+ +│ [\d.]+ +│", planned.stderr)
    cuts, kept = [float(cut) for cut, _ in rows], [int(count) for _, count in rows]
    assert len(rows) > 1 and max(cuts) < 0.85
    assert sorted(kept) == kept and len({*kept}) == len(kept), "each proposal is another plan"


def test_nothing_new_rebuilds_nothing_and_registers_nothing(finished, made_by_sweep, home):
    before = artifacts(home)
    again = requantize(RequantizeParameters.model_validate(SMALL))
    assert rebuilt(before, artifacts(home)) == []
    assert again.tracked.model_version == finished.tracked.model_version
    _, this = flow_run_of(again, home)
    with get_client(sync_client=True) as prefect:
        runs = prefect.read_task_runs(**this)
    stages = [run for run in runs if "at" in run.task_inputs and not run.name.startswith(STEPS)]
    assert len(stages) >= len(made_by_sweep)
    assert {run.name: run.state_name for run in stages if run.state_name != "Cached"} == {}


@pytest.fixture
def hf_folder(sweep, tmp_path):
    """The sweep's model as a folder in Hugging Face's layout, without all but its first blocks: a tenth of the work."""
    (full,) = [result.gguf for result in sweep.results if result.plan.policy == "full"]
    folder = write_hf_folder(full, tmp_path / "SmolLM2-first-blocks")
    weights, config = folder / "model.safetensors", folder / "config.json"
    kept = {
        name: weight
        for name, weight in load_file(weights).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < FIRST_BLOCKS
    }
    save_file(kept, weights, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": FIRST_BLOCKS}))
    return folder


def test_a_folder_from_hugging_face_is_requantized_in_the_precision_asked_for(sweep, hf_folder):
    parameters = {
        **SMALL,
        "model": {"source": str(hf_folder), "precision": "BF16"},
        # Few rungs.
        "candidates": {"stock": ["Q4_0"], "budgets": [], "proposed_thresholds": 1, "policy": {"base": "Q4_0"}},
        "evaluation": {"context_tokens": 64, "chunks": 1, "json_prompts": 0, "speed_requests": 0},
        "benchmarks": {"tasks": []},
        "tracking": {"experiment": "hf-folder"},
    }
    measured = measure(parameters)
    assert measured.failures == ()
    results = {result.plan.policy: result for result in measured.results}
    assert results.keys() == {"full", "stock", "threshold"}
    assert abs(results["full"].evaluation.metrics[KLD].value) < 1e-6
    assert results["stock"].bytes < results["threshold"].bytes < results["full"].bytes
    (whole,) = [result.gguf for result in sweep.results if result.plan.policy == "full"]
    tensors = read_tensors(results["full"].gguf)
    assert len(tensors) == 2 + 9 * FIRST_BLOCKS
    for name, tensor in tensors.items():
        weights = torch.tensor(read_weights(whole, name))
        assert tensor.type == ("BF16" if weights.ndim == 2 else "F32")
        wanted = weights.bfloat16().float() if weights.ndim == 2 else weights
        assert np.array_equal(read_weights(results["full"].gguf, name), wanted.numpy()), name


def test_a_failed_candidate_is_reported_and_the_others_go_on(sweep, home):
    # IQ1_S needs an importance matrix, and there is none.
    wrong = {**SMALL, "calibration": {**SMALL["calibration"], "imatrix": False}, "benchmarks": {}}
    few = {"budgets": [], "proposed_thresholds": 0, "ladder": ["Q8_0"]}
    wrong["candidates"] = {"stock": ["Q4_K_M", "IQ1_S"], **few}
    other = requantize(RequantizeParameters.model_validate(wrong))
    (failure,) = other.sweep.failures
    assert (failure.name, failure.stage) == ("IQ1_S", "quantize")
    assert "llama-quantize failed" in failure.reason
    assert [result.name for result in other.sweep.results] == ["F16", "Q4_K_M"]
    assert "IQ1_S" in other.report
    wrong["candidates"] = {**wrong["candidates"], "stock": ["IQ1_S"]}
    with pytest.raises(SamqError, match=r"the baseline or every candidate failed \(.*IQ1_S: llama-quantize failed"):
        requantize(RequantizeParameters.model_validate(wrong))


def test_a_tensor_that_cannot_be_compensated_costs_the_plans_that_are_and_no_other(sweep, monkeypatch):
    def fail(*_, **__):
        raise SamqError("the Gram matrix of blk.0.attn_q.weight cannot be inverted; measure it on more text")

    monkeypatch.setattr("tasks.compensate.write_compensated", fail)
    candidates = {**SMALL["candidates"], "budgets": ["5.2bpw"], "proposed_thresholds": 0}
    measured = measure({**SMALL, "candidates": candidates, "benchmarks": {}})
    (failure,) = measured.failures
    assert (failure.name, failure.stage) == ("samq-5.2bpw", "compensate")
    assert failure.reason.endswith("blk.0.attn_q.weight cannot be inverted; measure it on more text")
    assert [result.name for result in measured.results] == ["F16", "Q4_K_M"]


# Fewer bytes than the types that the model was made from take, so there are errors to be made up for.
COMPENSATED = {
    **SMALL,
    "candidates": {**SMALL["candidates"], "budgets": ["5.5bpw"], "proposed_thresholds": 0},
    "benchmarks": {"tasks": []},
    "tracking": {"experiment": "compensated"},
}


@pytest.fixture(scope="module")
def compensated(home, prefect_home):
    """A sweep in which tensors are compensated."""
    sweep = measure(COMPENSATED)
    (result,) = [result for result in sweep.results if result.plan.policy == "budget"]
    assert result.plan.rounding == "compensated"
    candidates = [artifact for artifact in Store(home / "store").artifacts() if artifact.stage == "candidate"]
    assert any(Compensation.load(artifact.path(COMPENSATION_NAME)).tensors for artifact in candidates)
    return sweep


def is_half_done(store, stage):
    """Whether an artifact of the stage is being made: a part of its file is written, or of the text is scored."""
    try:
        if stage == "evaluate":
            logs = (store.root / ".tmp").glob("evaluate-*/evaluate.log")
            return any("progress: fidelity" in log.read_text() for log in logs)
        started = {"compensate": "errors.jsonl", "layer_inputs": "measured-*.safetensors"}
        parts = (store.root / ".tmp").glob(f"*{stage}-*/{started.get(stage, f'{GGUF_NAME}.partial')}")
        return any(part.stat().st_size for part in parts)
    except FileNotFoundError:  # whole in this moment
        return False


def built(home):
    """SHA-256 of every candidate's GGUF in the store of a SAMQ folder."""
    stages = ("quantize", "candidate")
    stored = Store(home / "store").artifacts()
    return {artifact.files[GGUF_NAME].sha256 for artifact in stored if artifact.stage in stages}


def check_whole(store):
    """What the store has is whole, and what was half done lies apart."""
    left = list(store.artifacts())
    assert "convert" in {artifact.stage for artifact in left}
    for artifact in left:
        for name, entry in artifact.files.items():
            assert file_sha256(artifact.folder / name) == entry.sha256, artifact.folder / name
    assert {path.relative_to(store.root).parts[0] for path in store.root.rglob("*.partial")} <= {".tmp"}


@pytest.fixture
def killed_and_finished(home, tmp_path):
    """Run the flow in a copy of the store that lacks some stages, killed in the midst of one after another, to its end.

    Each run goes on where the one before was killed. Returns the copy's SAMQ folder. With `own_server`, each starts its own
    Prefect server, as a person's does, which is killed with it; otherwise all use that of the tests.
    """
    folder, log = tmp_path / "samq", tmp_path / "log"
    environment = {**os.environ, "SAMQ_HOME": str(folder), "PREFECT_HOME": str(tmp_path / "prefect")}

    def run(lost, stages, own_server):
        environment.pop("PREFECT_API_URL", None)
        if not own_server:
            environment["PREFECT_API_URL"] = PREFECT_API_URL.value()
        shutil.copytree(home / "store", folder / "store", symlinks=True, ignore=shutil.ignore_patterns(*lost))
        store, config = Store(folder / "store"), tmp_path / "compensated.yaml"
        config.write_text(yaml.safe_dump(COMPENSATED))
        command = [sys.executable, "-m", "samq.cli", "requantize", "--config", str(config)]

        def start():
            root = Path(__file__).parents[2]
            with log.open("ab") as output:
                return subprocess.Popen(
                    command, env=environment, stdout=output, stderr=output, cwd=root, start_new_session=True
                )

        for stage in stages:
            flow = start()
            while not is_half_done(store, stage):
                assert flow.poll() is None, log.read_text()
                time.sleep(0.02)
            flow.send_signal(signal.SIGKILL)
            flow.wait()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(flow.pid, signal.SIGKILL)  # Prefect's server, which lives on otherwise
            assert is_half_done(store, stage), "killed in the midst of it"
            check_whole(store)
        assert start().wait(timeout=600) == 0, log.read_text()
        assert list((store.root / ".tmp").glob("*.lock")) == []
        return folder

    return run


def compensated_ggufs(sweep):
    return {result.model.sha256 for result in sweep.results if result.plan.policy != "full"}


def test_a_flow_killed_in_one_stage_after_another_leaves_no_half_artifact_and_ends_with_the_same_ggufs(
    compensated, home, killed_and_finished
):
    stages = ("layer_inputs", "compensate", "evaluate")
    finished = killed_and_finished(lost=(*stages, "candidate"), stages=stages, own_server=False)
    assert compensated_ggufs(compensated) <= built(finished)
    assert built(finished) <= built(home)


def test_a_flow_killed_while_llama_quantize_works_ends_with_the_same_ggufs(compensated, home, killed_and_finished):
    finished = killed_and_finished(lost=("quantize",), stages=("quantize",), own_server=True)
    assert compensated_ggufs(compensated) <= built(finished)
    assert built(finished) <= built(home)
