"""Calibration goes on until the plans' cost is known, through the real flow, on a tiny model made on the spot."""

import json

import numpy as np
import pytest

from samq.files import FISHER_NAME, MAP_NAME, PRICES_NAME
from samq.records import PriceTable, SensitivityMap
from samq.sensitivity.fisher import load_fisher
from samq.store import Store
from samq.workspace import Workspace
from tasks.calibrate import Passes, calibrate
from tasks.model import TorchModel
from tasks.text import FirstSequences
from tests.end_to_end.conftest import artifacts, measure, rebuilt
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home")]

AVAILABLE = 7  # sequences, besides two to check on


def write_text(path, rows, seed):
    """Rows of 30 to 60 random words each."""
    random = np.random.default_rng(seed)
    words = ("the", "an", "hat", "ant", "then", "that", "tan", "e", "at")
    texts = [" ".join(random.choice(words, random.integers(30, 60))) for _ in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    tokenizer = byte_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96)
    calibration = {
        "dataset": {"name": write_text(folder / "train.jsonl", AVAILABLE + 2, seed=0)},
        "sequence_tokens": 64,
        "check_sequences": 2,
        "first_sequences": 2,
        "precision": 1e-6,
    }
    return {
        "name": "sampling",
        "model": {"source": str(write_llama_gguf(model, folder / "tiny.gguf", tokenizer=tokenizer)), "device": "cpu"},
        "calibration": calibration,
        "heldout": {"name": write_text(folder / "valid.jsonl", 3, seed=1)},
        "candidates": {"stock": [], "budgets": ["6bpw"], "ladder": ["Q4_0", "Q8_0"], "rounding": "nearest"},
        "evaluation": {"context_tokens": 32, "chunks": 2, "json_prompts": 0, "speed_requests": 0},
        "tracking": {"experiment": "sampling"},
    }


@pytest.fixture(scope="module")
def sampled(home, parameters):
    """A sweep whose precision cannot be reached, and the artifacts of a stage that it made."""
    before = artifacts(home)
    sweep = measure(parameters)
    store, new_keys = Store(home / "store"), artifacts(home).keys() - before.keys()
    return sweep, lambda stage: [store.find(*key) for key in sorted(new_keys) if key[0] == stage]


def test_sequences_are_added_until_all_are_used_and_give_what_one_pass_over_all_gives(sampled, home):
    sweep, made_by = sampled
    assert sweep.failures == ()
    maps = {SensitivityMap.load(artifact.path(MAP_NAME)).samples: artifact for artifact in made_by("calibrate")}
    assert len(maps) >= 2 and (min(maps), max(maps)) == (2, AVAILABLE)
    last = maps[AVAILABLE]
    last_map = SensitivityMap.load(last.path(MAP_NAME))
    (plan,) = [result.plan for result in sweep.results if result.plan.policy == "budget"]
    assert plan.map_digest == last_map.digest()
    tables = [PriceTable.load(artifact.path(PRICES_NAME)) for artifact in made_by("price")]
    assert sorted(len(table.sequence_tokens) for table in tables) == sorted(maps)

    (full,), (tokens,) = made_by("convert"), made_by("tokenize")
    model, sequences = TorchModel(sweep.made_from.source, full), FirstSequences(tokens, AVAILABLE)
    once = calibrate(Workspace.here(device="cpu"), model, sequences, None, Passes())
    assert once.key != last.key
    whole = SensitivityMap.load(once.path(MAP_NAME))
    assert last_map.sequence_tokens == whole.sequence_tokens
    assert last_map.loss_nats == pytest.approx(whole.loss_nats, rel=1e-5)
    assert last_map.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        for figure in ("gradient_norm", "gradient_norm_stderr", "score", "fisher", "sequence_squares"):
            assert getattr(last_map.tensors[name], figure) == pytest.approx(getattr(tensor, figure), rel=1e-4), figure
    fishers = [load_fisher(artifact.path(FISHER_NAME)) for artifact in (last, once)]
    for name, fisher in fishers[1].items():
        np.testing.assert_allclose(fishers[0][name].rows, fisher.rows, rtol=1e-4)
        np.testing.assert_allclose(fishers[0][name].columns, fisher.columns, rtol=1e-4)


def test_other_types_without_the_importance_matrix_take_no_new_calibration(sampled, parameters, home):
    before = artifacts(home)
    other = {
        **parameters,
        "calibration": {**parameters["calibration"], "imatrix": False},
        "candidates": {**parameters["candidates"], "ladder": ["Q4_1", "Q5_1", "Q8_0"]},
    }
    sweep = measure(other)
    assert sweep.failures == ()
    stages = rebuilt(before, artifacts(home))
    assert (stages.count("calibrate"), stages.count("price"), stages.count("layer_inputs")) == (0, 2, 0)
