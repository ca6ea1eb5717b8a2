"""Every architecture from its folder to an evaluated GGUF, through the flow's stages, and what keeps its type on the way.

`make test-architectures` tries all of them and writes the table of docs/reference/architectures.md.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from samq.allocation.budget import BudgetPolicy
from samq.data.datasets import DatasetSpec
from samq.errors import SamqError
from samq.evaluation.agreement import Agreement
from samq.evaluation.metrics import KLD
from samq.evaluation.settings import EvaluationSettings
from samq.files import (
    AGREEMENT_NAME,
    CALIBRATION_SET_NAME,
    COMPENSATION_NAME,
    EVALUATION_NAME,
    GGUF_NAME,
    SHARES_NAME,
)
from samq.gguf.file import read_metadata, read_tensors
from samq.llamacpp.prediction_layers import count_in_gguf
from samq.llamacpp.toolchain import find_toolchain
from samq.records import CalibrationSet, Compensation, CompensationShares, Evaluation
from samq.sensitivity.checkpoint import describe_source
from samq.serving.source import FileSource
from samq.workspace import Workspace
from tasks.agreement import agreement
from tasks.calibrate import Passes, calibrate, load_map
from tasks.compensate import candidate, compensate
from tasks.convert import convert
from tasks.evaluate import baseline, evaluate
from tasks.layer_inputs import InputText, layer_inputs
from tasks.model import TorchModel
from tasks.plan import load_plan, plan_budget
from tasks.price import choose_types, price, price_compensated
from tasks.target import Target
from tasks.text import FirstSequences, heldout, load_text, tokenize
from tests.architectures.models import ARCHITECTURES, REFUSED, write_model
from tests.architectures.table import Row, table_row
from tests.samq.serving.conftest import running

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SETTINGS = EvaluationSettings(context_tokens=64, chunks=2, json_prompts=0, speed_requests=0)
NAMES = [
    pytest.param(name, marks=() if wanted.often else pytest.mark.architectures)
    for name, wanted in ARCHITECTURES.items()
    if name not in REFUSED
]


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    """A store of its own, and a converter that takes a tokenizer made on the spot for GPT-2's: it knows those published by
    a hash of what they give.
    """
    tree = tmp_path_factory.mktemp("llama.cpp")
    installed = find_toolchain()
    for name, folder in (("bin", installed.bin_folder), ("lib", installed.lib_folder)):
        (tree / name).symlink_to(folder)
    shutil.copytree(installed.converter.parent, tree / "share" / "llama.cpp")
    base = tree / "share" / "llama.cpp" / "conversion" / "base.py"
    refusal = 'raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")'
    script = base.read_text()
    assert script.count(refusal) == 1
    base.write_text(script.replace(refusal, 'res = "gpt-2"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMQ_LLAMA_CPP", str(tree))
        yield Workspace(tmp_path_factory.mktemp("store"), find_toolchain(), "cpu", timeout_s=300)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_becomes_an_evaluated_gguf(name, workspace, tmp_path):
    at, source = workspace, describe_source(write_model(name, tmp_path / "model"))
    text = load_text(DatasetSpec(name="humaneval", samples=24))
    full = convert(at, source, "F16")
    tokens = tokenize(at, full, text, 0, 64, True)
    available = CalibrationSet.load(tokens.path(CALIBRATION_SET_NAME)).samples
    model, sequences = TorchModel(source, full), FirstSequences(tokens, min(4, available))

    agreed = Agreement.load(agreement(at, model, tokens).path(AGREEMENT_NAME))
    sensitivities = calibrate(at, model, sequences, None, Passes())
    every = InputText(tokens, available, 65536, 1)
    inputs = layer_inputs(at, model, every, True)
    target = Target(full, inputs)
    opened = target.open(at.toolchain)
    prices = price(at, target, choose_types(at, target, ("Q4_0", "Q8_0")), sensitivities, "Q8_0")
    compensated_prices = price_compensated(at, prices, inputs)
    plan = plan_budget(at, target, compensated_prices, ARCHITECTURES[name].budget, BudgetPolicy())
    built = compensate(at, model, every, inputs, {"it": plan}, {})
    better = candidate(at, "it", full, plan, built, {})
    chunks = heldout(at, full, load_text(DatasetSpec(name="humaneval", start=100, samples=10)))
    evaluation = evaluate(at, "it", better, chunks, baseline(at, full, chunks, SETTINGS), SETTINGS)

    types, measured = load_plan(plan).types, load_map(sensitivities).tensors
    unmeasured = sorted(opened.quantizable.keys() - measured.keys())
    assert {types[tensor] for tensor in unmeasured} <= {"Q8_0"}
    assert len(set(types.values())) > 1
    assert {tensor: read_tensors(better.path(GGUF_NAME))[tensor].type for tensor in types} == types
    divergence = Evaluation.load(evaluation.path(EVALUATION_NAME)).metrics[KLD].value
    assert 0 < divergence < 1
    compensated = Compensation.load(better.path(COMPENSATION_NAME)).tensors
    assert compensated and all(error.compensated <= error.nearest for error in compensated.values())
    shares = CompensationShares.load(inputs.path(SHARES_NAME)).shares
    weights = {tensor: info.weights for tensor, info in opened.quantizable.items()}
    row = Row(
        name=name,
        architecture=read_metadata(full.path(GGUF_NAME))["general.architecture"],
        agreement_nats=agreed.median_kld_nats,
        measured=sum(weights[tensor] for tensor in weights if tensor in measured) / sum(weights.values()),
        compensated=sum(weights[tensor] for tensor in weights if tensor in shares) / sum(weights.values()),
        unmeasured=tuple(unmeasured),
    )
    assert row.agreement_nats <= ARCHITECTURES[name].agreement_nats
    if folder := os.environ.get("SAMQ_ARCHITECTURES"):
        (Path(folder) / f"{name}.json").write_text(json.dumps(asdict(row)))
    else:
        assert row.cells() == table_row(name)


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_convert_is_said(name, workspace, tmp_path):
    with pytest.raises(SamqError, match=f"llama.cpp's converter does not support {REFUSED[name]}"):
        convert(workspace, describe_source(write_model(name, tmp_path / "model")), "F16")


@pytest.mark.parametrize(
    ("name", "layers"),
    [("DeepSeek-V3", 1), ("GLM-4.5", 1), ("GLM-4.7-Flash", 1), ("MiMo-V2-Flash", 3), ("Qwen3-Next", 1), ("Qwen3.5", 1)],
)
def test_a_models_own_layers_propose_tokens_when_it_serves(name, layers, workspace, tmp_path, caplog):
    full = convert(workspace, describe_source(write_model(name, tmp_path / "model")), "F16")
    metadata = read_metadata(full.path(GGUF_NAME))
    assert metadata[f"{metadata['general.architecture']}.nextn_predict_layers"] == layers
    assert count_in_gguf(read_tensors(full.path(GGUF_NAME))) == layers
    assert "multi-token prediction" not in caplog.text
    answers, proposed = {}, {}
    for kind in ("none", "mtp"):
        with running(FileSource(full.path(GGUF_NAME)), context_tokens=64, speculation={"kind": kind}) as server:
            answers[kind] = server.complete(prompt="def f(x):", max_tokens=24).json()["choices"][0]["text"]
            proposed[kind] = server.scraped("llamacpp:spec_decode_num_draft_tokens_total")
    assert answers["mtp"] == answers["none"]
    assert proposed["mtp"] > proposed["none"] == 0
