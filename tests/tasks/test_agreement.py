"""Torch and llama.cpp are compared before anything is measured."""

import json
from dataclasses import replace

import pytest

from samq.errors import SamqError
from samq.files import AGREEMENT_NAME, GGUF_NAME, TOKENS_NAME
from samq.sensitivity.checkpoint import describe_source
from samq.store import Store
from tasks.agreement import agreement
from tasks.model import TorchModel
from tests.tiny_models import byte_tokenizer, random_tokens, save_folder, tiny_llama, write_llama_gguf

UNSTABLE = dict(initializer_range=1.0, num_hidden_layers=4)
SHAPE = dict(vocab_size=300, hidden_size=64, max_position_embeddings=64)


def published(store, name, write):
    with store.publish(name, "key") as folder:
        write(folder)
    return store.find(name, "key")


@pytest.fixture
def tokens(at):
    return published(Store(at.store), "tokenize", lambda folder: random_tokens().save(folder / TOKENS_NAME))


def inputs(at, tmp_path, **shape):
    path = write_llama_gguf(tiny_llama(**SHAPE | shape), tmp_path / "tiny.gguf", tokenizer=byte_tokenizer())
    full = published(Store(at.store), "convert", lambda folder: (folder / GGUF_NAME).hardlink_to(path))
    return TorchModel(describe_source(path), full)


def test_one_model_agrees_with_itself(at, tmp_path, tokens):
    measured = agreement(at, inputs(at, tmp_path), tokens)
    record = json.loads(measured.path(AGREEMENT_NAME).read_text())
    assert 0 < record["median_kld_nats"] < 1e-5 and record["tokens"] == 2 * 63
    assert {name for name in measured.files if not name.endswith(".log")} == {AGREEMENT_NAME}


def test_a_model_that_amplifies_roundings_is_measured_against_them(at, tmp_path, tokens):
    measured = agreement(at, inputs(at, tmp_path, **UNSTABLE), tokens)
    record = json.loads(measured.path(AGREEMENT_NAME).read_text())
    assert 1e-4 < record["median_kld_nats"] < record["limit_nats"] == 10 * record["rounding_kld_nats"]


@pytest.mark.parametrize(("dtype", "theta"), [("bfloat16", 8400.0), ("float16", 8200.0)])
def test_a_model_that_is_a_little_wrong_is_refused_in_two_bytes_too(at, tmp_path, tokens, dtype, theta):
    """As far from the right one as a Llama 3 whose rotary frequencies are not scaled: 0.006 nats."""
    model = inputs(at, tmp_path)
    right = json.loads(agreement(at, replace(model, dtype=dtype), tokens).path(AGREEMENT_NAME).read_text())
    assert right["median_kld_nats"] < right["limit_nats"] / 5 and right["rounding_kld_nats"] is None

    rope = {"rope_type": "default", "rope_theta": theta}
    folder = save_folder(tiny_llama(**SHAPE, rope_parameters=rope), tmp_path / "folder")
    byte_tokenizer().save_pretrained(folder)
    wrong = TorchModel(describe_source(model.source.gguf, hf_folder=folder), model.full, dtype)
    with pytest.raises(
        SamqError, match=rf"lie 0\.00[56]\d* nats apart \(median of 126 tokens in {dtype}; at most 0\.00\d+\)"
    ):
        agreement(at, wrong, tokens)


@pytest.mark.parametrize("shape", [{}, UNSTABLE], ids=["stable", "unstable"])
def test_two_models_are_refused_with_the_way_out(at, tmp_path, tokens, shape):
    """The folder's configuration is of another model: its rotary embeddings turn faster."""
    rope = {"rope_type": "default", "rope_theta": 100.0}
    folder = save_folder(tiny_llama(**SHAPE | shape, rope_parameters=rope), tmp_path / "folder")
    byte_tokenizer().save_pretrained(folder)
    model = inputs(at, tmp_path, **shape)
    other = TorchModel(describe_source(model.source.gguf, hf_folder=folder), model.full)
    with pytest.raises(
        SamqError,
        match=r"torch and llama.cpp compute different models of tiny: .* as the model \(`samq compensate`: --model\)$",
    ):
        agreement(at, other, tokens)
    assert not list((at.store / "agreement").glob("*/artifact.json"))
