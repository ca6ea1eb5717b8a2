"""The keys of stages are what they were before: a store of an earlier version stays valid."""

import json
from pathlib import Path

import pytest

from samq.allocation.budget import BudgetPolicy
from samq.allocation.threshold import ThresholdPolicy
from samq.evaluation.settings import BenchmarkSettings, EvaluationSettings
from samq.records import ModelSource, SensitivityMap, TextSet, Toolchain
from samq.store import Artifact, FileEntry
from samq.sweep.benchmarking import Candidate
from samq.workspace import Workspace
from tasks.benchmark import EngineSettings, benchmark
from tasks.calibrate import Passes, calibrate
from tasks.check import BuiltPlan, check
from tasks.compensate import compensate
from tasks.convert import convert
from tasks.evaluate import baseline, evaluate
from tasks.imatrix import imatrix
from tasks.layer_inputs import InputText
from tasks.model import TorchModel
from tasks.plan import plan_budget, plan_stock, plan_threshold
from tasks.price import price, price_compensated
from tasks.quantize import quantize
from tasks.target import Target
from tasks.text import FirstSequences, LastSequences, heldout, tokenize

KEYS = json.loads(Path(__file__).with_name("stage_keys.json").read_text())  # of version 0.1.0, from the inputs below


def artifact(stage, *files):
    entries = {file: FileEntry(sha256=f"{stage}/{file}", bytes=1, mtime_ns=1) for file in files}
    return Artifact(stage=stage, key="k", folder=Path("/x"), files=entries)


SOURCE = ModelSource(name="m", weights_digest="w", tokenizer_digest="t", folder=Path("/m"))
TEXT = TextSet(dataset="d", texts=("a", "b"))
FULL = artifact("convert", "model.gguf")
TARGET, WITHOUT_IMATRIX = Target(FULL, artifact("imatrix", "imatrix.gguf")), Target(FULL, None)
TOKENS = artifact("tokenize", "tokens.npz", "calibration-set.json")
MODEL, FIRST = TorchModel(SOURCE, FULL), FirstSequences(TOKENS, 32)
MAPS = artifact("calibrate", "sensitivity-map.json", "fisher.safetensors")
OF_LAYERS = artifact("layer_inputs", "imatrix.gguf", "compensation-shares.json")
PRICES, PLAN = artifact("price", "prices.json"), artifact("plan", "plan.json")
GGUF = artifact("assemble", "model.gguf", "quantized-model.json")
HELDOUT, BASELINE = artifact("heldout", "heldout.npz"), artifact("baseline", "logits.npy")
SENSITIVITY = SensitivityMap(
    model_digest="m", calibration_digest="c", labels="model", seed=0, sequence_tokens=(1, 2), loss_nats=1.0,
    tied_embeddings=True, tensors={},
)  # fmt: skip
PROVENANCE, SETTINGS = {"version": "1"}, EvaluationSettings()
CANDIDATE = Candidate(name="p", gguf=Path("/x/model.gguf"), sha256="abc")

INPUTS = {
    "convert": (convert, (SOURCE, "F16")),
    "tokenize": (tokenize, (FULL, TEXT, 1, 512, True)),
    "heldout": (heldout, (FULL, TEXT)),
    "imatrix": (imatrix, (FULL, TEXT, 512)),
    "calibrate": (calibrate, (MODEL, FIRST, None, Passes(2, "model", 1))),
    "plan_stock": (plan_stock, (TARGET, "Q4_K_M")),
    "plan_threshold": (plan_threshold, (WITHOUT_IMATRIX, SENSITIVITY, "q0.75", ThresholdPolicy(), "Q8_0", {})),
    "plan_budget": (plan_budget, (TARGET, PRICES, "5bpw", BudgetPolicy())),
    "quantize": (quantize, ("p", TARGET, PLAN, PROVENANCE)),
    "baseline": (baseline, (FULL, HELDOUT, SETTINGS)),
    "evaluate": (evaluate, ("p", GGUF, HELDOUT, BASELINE, SETTINGS)),
    "check": (check, (MODEL, LastSequences(TOKENS, 8), BuiltPlan("p", PLAN, PRICES, GGUF), 2, 1)),
    "benchmark": (benchmark, (CANDIDATE, "samq_json", "d", BenchmarkSettings(), EngineSettings.of(SETTINGS))),
}


@pytest.fixture(autouse=True)
def fixed_versions(monkeypatch):
    """Packages and llama.cpp as they were called when the list was made: their versions are in every key."""
    monkeypatch.setattr("tasks.stage.package_version", lambda name: f"{name}-1")
    monkeypatch.setattr("tasks.stage.python_library_build", lambda: "library")
    monkeypatch.setattr("samq.workspace.converter_build", lambda toolchain: "scripts")


def key_of(stage, inputs, device="cpu", without=frozenset()):
    at = Workspace(Path("/s"), Toolchain(version="1", build="build", bin_folder=Path("/bin")), device, timeout_s=1.0)
    names = list(stage.fn.__signature__.parameters)[1:]
    by_name = dict(zip(names, inputs, strict=True))
    return stage.cache_policy.artifact_key(at, {name: by_name[name] for name in names if name not in without})


# An invalid JSON answer ends at its first syntax error; the torch model of a GGUF has what transformers leaves out; the text
# of an end token is in no benchmark's answer.
OLD_VERSIONS = {
    "evaluate": 3, "calibrate": 3, "check": 1, "benchmark": 3, "plan_threshold": 3, "convert": 1, "plan_budget": 4,
}  # fmt: skip
NEW_INPUTS = {"unmeasured"}  # of the type for tensors that are not measured
NEW_GUARD = {"expert_guard"}  # of experts that saw few tokens


@pytest.mark.parametrize("name", [name for name in INPUTS if name not in OLD_VERSIONS])
def test_a_stages_key_is_that_of_version_0_1_0(name):
    assert key_of(*INPUTS[name]) == KEYS[name]


@pytest.mark.parametrize("name", OLD_VERSIONS)
def test_of_these_stages_only_the_version_and_a_new_input_are_another(monkeypatch, name):
    stage, inputs = INPUTS[name]
    assert stage.cache_policy.version > OLD_VERSIONS[name] and key_of(stage, inputs) != KEYS[name]
    monkeypatch.setattr(stage.cache_policy, "version", OLD_VERSIONS[name])
    inputs = [value.model_dump(exclude=NEW_GUARD) if isinstance(value, BudgetPolicy) else value for value in inputs]
    assert key_of(stage, inputs, without=NEW_INPUTS) == KEYS[name]


# There are no files of a ladder and of Gram matrices any more; prices and compensation are made from what replaced them.
GONE = {"rung", "gram", "compensate_rung", "assemble"}
FROM_OTHER_INPUTS = {
    "price": (price, (TARGET, ["Q4_K"], MAPS, "Q8_0")),
    "price_compensated": (price_compensated, (PRICES, OF_LAYERS)),
    "compensate": (compensate, (MODEL, InputText(TOKENS, 32, 1000, 2), OF_LAYERS, {"p": PLAN}, PROVENANCE)),
}


def test_the_list_is_of_all_stages_but_those_that_are_gone_or_made_from_other_inputs():
    assert KEYS.keys() - INPUTS.keys() == GONE | FROM_OTHER_INPUTS.keys()
    for name, (stage, inputs) in FROM_OTHER_INPUTS.items():
        assert key_of(stage, inputs) != KEYS[name]


def test_only_scarce_experts_give_a_threshold_plan_another_key():
    stage, inputs = INPUTS["plan_threshold"]
    others = [(*inputs[:-1], {"blk.0.ffn_up_exps.weight": kind}) for kind in ("Q3_K", "Q4_K")]
    assert key_of(stage, inputs) == key_of(stage, inputs, without={"guarded"})
    assert len({key_of(stage, other) for other in (inputs, *others)}) == 3


def test_auto_and_the_device_that_it_stands_for_are_one_calibration(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    stage, inputs = INPUTS["calibrate"]
    assert key_of(stage, inputs, "auto") == key_of(stage, inputs, "cpu") != key_of(stage, inputs, "cuda:0")
    assert key_of(stage, inputs, "cuda:0") == key_of(stage, inputs, "cuda:1")
