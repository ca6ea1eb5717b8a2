"""Prefect drops unknown keys of prefect.yaml without a word, so they are refused here."""

import re
from pathlib import Path

import pytest
import yaml
from prefect.cli.deploy._models import (
    ConcurrencyLimitSpec,
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.utilities.importtools import import_object
from prefect.utilities.templating import apply_values

from flows.parameters import CandidateParameters, RequantizeParameters, load_parameters, read_parameters
from samq.errors import SamqError

ROOT = Path(__file__).parent.parent
PREFECT_YAML = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS = PREFECT_YAML["deployments"]
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


def test_a_deployment_asks_for_the_disk_that_its_parameters_reckon():
    asked = {deployment["name"]: re.findall(r"\d+ GB of disk", deployment["description"]) for deployment in DEPLOYMENTS}
    reckoned = {path.stem: re.findall(r"\d+ GB of disk", path.read_text()) for path in PARAMETER_FILES}
    assert asked["llama-70b-80gb"] == reckoned["llama-70b-80gb"] != []


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
