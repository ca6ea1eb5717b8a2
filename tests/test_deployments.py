"""Prefect drops unknown keys of prefect.yaml without a word, so they are refused here."""

import math
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from prefect.cli.deploy._models import (
    ConcurrencyLimitSpec,
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.utilities.importtools import import_object
from prefect.utilities.templating import apply_values
from transformers import LlamaConfig

from flows.parameters import CandidateParameters, RequantizeParameters, load_parameters, read_parameters
from flows.requirements import estimate
from samq.errors import SamqError
from samq.requirements.memory import TorchRun, compensation
from samq.requirements.outline import read_outline

ROOT = Path(__file__).parent.parent
PREFECT_YAML = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = PREFECT_YAML["deployments"]
LARGE = ["llama-70b-24gb", "llama-70b-80gb"]
LLAMA_70B = dict(
    hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80,
    vocab_size=128256,
)  # fmt: skip
PARAMETER_FILES = sorted((ROOT / "deployments" / "parameters").glob("*.yaml"))


def known(model):
    return {field.alias or name for name, field in model.model_fields.items()}


def unknown_keys(document):
    """Keys of a prefect.yaml that Prefect would drop."""
    keys = {f"top: {key}" for key in document.keys() - known(PrefectYamlModel) - {"definitions"}}
    for deployment in document["deployments"]:
        limit = deployment.get("concurrency_limit", {})
        parts = [
            ("", DeploymentConfig, deployment),
            (" work_pool", WorkPoolConfig, deployment.get("work_pool", {})),
            (" concurrency_limit", ConcurrencyLimitSpec, limit if isinstance(limit, dict) else {}),
            *((" schedule", RawScheduleConfig, schedule) for schedule in deployment.get("schedules", [])),
        ]
        for where, model, part in parts:
            keys |= {f"{deployment['name']}{where}: {key}" for key in part.keys() - known(model)}
    return keys


def test_prefect_knows_every_key():
    assert unknown_keys(PREFECT_YAML) == set()


def test_a_key_that_prefect_would_drop_is_found():
    wrong = {
        "deployments": [
            {"name": "x", "entry_point": "a", "schedules": [{"crom": "* * * * *"}]},
            {"name": "y", "work_pool": {"name": "p", "work_queue": "q"}, "concurrency_limit": 1},
            {"name": "z", "concurrency_limit": {"limit": 1, "colision_strategy": "ENQUEUE"}},
        ],
        "flows": [],
    }
    assert unknown_keys(wrong) == {
        "top: flows",
        "x: entry_point",
        "x schedule: crom",
        "y work_pool: work_queue",
        "z concurrency_limit: colision_strategy",
    }


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_every_entry_point_is_a_flow_that_takes_the_deployments_parameters(deployment, monkeypatch):
    monkeypatch.chdir(ROOT)
    flow = import_object(deployment["entrypoint"])
    assert flow.name == Path(deployment["entrypoint"].partition(":")[0]).stem
    (step,) = deployment["build"]
    ((function, arguments),) = step.items()
    outputs = import_object(function)(**{key: value for key, value in arguments.items() if key != "id"})
    flow.validate_parameters(apply_values(deployment["parameters"], {arguments["id"]: outputs}))


def test_nightly_runs_once_a_night_in_a_time_zone_and_one_at_a_time():
    nightly = next(deployment for deployment in DEPLOYMENTS if deployment["name"] == "nightly")
    (schedule,) = nightly["schedules"]
    assert (schedule["cron"], schedule["timezone"]) == ("30 2 * * *", "Europe/Berlin")
    assert nightly["concurrency_limit"]["limit"] == 1
    assert nightly["work_pool"]["name"] == "samq"


@pytest.mark.parametrize("name", LARGE)
def test_a_deployment_asks_for_the_disk_that_its_parameters_reckon(name):
    (description,) = [deployment["description"] for deployment in DEPLOYMENTS if deployment["name"] == name]
    reckoned = (ROOT / "deployments" / "parameters" / f"{name}.yaml").read_text()
    assert re.findall(r"\d+ GB of disk", description) == re.findall(r"\d+ GB of disk", reckoned) != []


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_parameter_file_reckons_with_what_doctor_says(name, tmp_path, monkeypatch, samq_home):
    path = ROOT / "deployments" / "parameters" / f"{name}.yaml"
    parameters = load_parameters(path)
    organisation, model = parameters.model.source.split("/")
    cache = tmp_path / "hub" / f"models--{organisation}--{model}"
    LlamaConfig(**LLAMA_70B, architectures=["LlamaForCausalLM"]).save_pretrained(cache / "snapshots" / "0")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    on_cpu = parameters.model.model_copy(update={"memory_limit": "20GiB", "device": "cpu"})
    needed = estimate(parameters.model_copy(update={"model": on_cpu}))
    stages, text = {stage.name: stage.taken for stage in needed.stages}, path.read_text()
    (disk,) = [resource for resource in needed.resources if resource.name == "disk"]
    hub = stages["convert"].kept  # as large as the files that are still to come
    assert re.findall(r"(\d+) GB of disk", text) == [str(math.ceil((disk.needed - hub) / 1e9))]
    candidates = stages["quantize"].kept + stages["compensate"].kept
    assert re.findall(r"(\d+) for the \d+ candidates", text) == [str(round(candidates / 1e9))]
    assert f"{round(hub / 1e9)} for the BF16 GGUF" in text
    outline = read_outline(parameters.model.source, "main", "BF16", tmp_path)
    calibration = parameters.calibration
    run = TorchRun(outline, 2, True, (20 * 2**30,), calibration.batch_size, calibration.sequence_tokens)
    gpu = compensation(run, calibration.gram_tokens).gpu
    assert f"{gpu / 2**30:.1f} GiB of" in text


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.stem)
def test_every_parameter_file_survives_the_way_through_prefect(path):
    parameters = load_parameters(path)
    assert RequantizeParameters.model_validate(read_parameters(str(path))["parameters"]) == parameters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "is not YAML"),
        ("name: x", "model: Field required"),
        ("nmae: x", "model: Field required"),
        ("{name: x, model: {source: m, precison: F16}}", "precison: Extra inputs are not permitted"),
        ("{name: x, candidates: {budgets: [4.5bits]}}", "'4.5bits' is not a budget"),
        ("{name: x, candidates: {budgets: ['size-of:Q4_K_X']}}", "unknown llama-quantize mixture 'Q4_K_X'"),
        ("{name: x, candidates: {ladder: [Q4_K, Q9_K]}}", "unknown ggml type 'Q9_K'"),
    ],
)
def test_a_wrong_parameter_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "parameters.yaml"
    path.write_text(text)
    with pytest.raises(SamqError, match=message):
        load_parameters(path)
    with pytest.raises(SamqError, match="cannot read"):
        load_parameters(tmp_path / "nothing.yaml")


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda path: path.stem)
def test_every_mixture_of_a_parameter_file_meets_a_plan_of_its_size(path):
    wanted = load_parameters(path).candidates
    assert {f"size-of:{mixture}" for mixture in wanted.mixtures} <= set(wanted.budgets)


def test_a_mixture_whose_size_is_a_budget_is_a_candidate_too():
    wanted = CandidateParameters(stock=("Q5_K_M",), budgets=("size-of:q4_k_m", "4.5bpw", "size-of:Q5_K_M"))
    assert wanted.mixtures == ("Q5_K_M", "Q4_K_M")
