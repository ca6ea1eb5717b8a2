"""The torch model of a GGUF is the file's, also where transformers leaves out what the file holds."""

import gguf
import numpy as np
import pytest
import torch

from samq.errors import SamqError
from samq.evaluation.divergence import compare_logits
from samq.llamacpp.runtime import Model
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf

SHAPE = dict(vocab_size=300, hidden_size=64, max_position_embeddings=256)
IDS = np.random.default_rng(0).integers(0, 260, 200).astype(np.int32)


def biases(writer):
    random = np.random.default_rng(1)
    for block in range(2):
        for name, width in (("q", 64), ("k", 32), ("v", 32), ("output", 64)):
            values = random.normal(0, 0.3, width).astype(np.float32)
            writer.add_tensor(f"blk.{block}.attn_{name}.bias", values)


def rope_freqs(writer):
    writer.add_tensor("rope_freqs.weight", np.array([1, 1, 2, 4, 8, 16, 32, 32], np.float32))


def scaled(kind, **more):
    def add(writer):
        writer.add_rope_scaling_factor(4.0)
        if kind is not None:
            writer.add_rope_scaling_type(kind)
        if kind is gguf.RopeScalingType.YARN:
            writer.add_rope_scaling_orig_ctx_len(64)
        for key, value in more.items():
            writer.add_float32(f"llama.rope.scaling.{key}", value)

    return add


def divergence(path):
    """Median KL of llama.cpp's predictions on the file from its torch model's, in nats."""
    with Model(path) as model, model.context(len(IDS), kv_type="F32") as context:
        logits = context.decode(IDS, np.arange(len(IDS)), 0, np.ones(len(IDS), bool)).copy()
    model, _ = load_model(describe_source(path), device="cpu")
    with torch.no_grad():
        ours = model(torch.tensor(IDS[None].astype(np.int64))).logits[0].numpy()
    return compare_logits(logits, ours, IDS)["kld"].median()


@pytest.mark.parametrize(
    "more",
    [
        lambda writer: None,
        biases,
        rope_freqs,
        scaled(gguf.RopeScalingType.LINEAR),
        scaled(None),  # llama.cpp takes a factor alone as linear
        scaled(gguf.RopeScalingType.YARN),
        scaled(gguf.RopeScalingType.YARN, attn_factor=1.5),
        scaled(gguf.RopeScalingType.NONE),
    ],
    ids=["plain", "biases", "rope_freqs", "linear", "factor alone", "yarn", "yarn's attention factor", "none"],
)
def test_the_torch_model_of_a_gguf_is_llama_cpps(tmp_path, more):
    path = write_llama_gguf(tiny_llama(**SHAPE), tmp_path / "tiny.gguf", tokenizer=byte_tokenizer(), more=more)
    assert divergence(path) < 1e-5


def test_frequencies_that_the_model_does_not_have_are_refused(tmp_path):
    def more(writer):
        writer.add_tensor("rope_freqs.weight", np.ones(5, np.float32))

    path = write_llama_gguf(tiny_llama(**SHAPE), tmp_path / "tiny.gguf", tokenizer=byte_tokenizer(), more=more)
    with pytest.raises(
        SamqError, match=r"scales 5 rotary frequencies, and LlamaForCausalLM has no embedding of so many"
    ):
        load_model(describe_source(path), device="cpu")
