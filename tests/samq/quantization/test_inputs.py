"""What the layers' inputs tell: llama-imatrix's importance matrix, and what compensation can do."""

from functools import partial

import gguf
import numpy as np
import pytest
import torch

from samq.data.tokens import TokenBatch
from samq.gguf.file import open_gguf, read_tensors
from samq.gguf.imatrix import importances, usable_entries, write_imatrix
from samq.llamacpp.imatrix import measure_imatrix
from samq.llamacpp.runtime import Model
from samq.quantization import inputs
from samq.quantization.gptq import variances
from samq.quantization.inputs import measure_inputs
from samq.sensitivity.gram import input_moments
from samq.sensitivity.layout import weights_of
from samq.sensitivity.memory import Memory
from tests.samq.quantization.test_compensation import forgotten
from tests.tiny_models import byte_tokenizer, names_of, random_tokens, tiny_llama, tiny_mixtral, write_llama_gguf

TEXT = " ".join(f"the man ran {number} times and the {number * 7 % 13} others sang" for number in range(60))
CONTEXT = 64


def measure(model, tokens, **arguments):
    return measure_inputs(model, tokens, weights_of(model, names_of(model)), **{"shares": False} | arguments)


def test_it_is_the_importance_matrix_of_llama_imatrix_on_the_same_tokens(toolchain, tmp_path):
    model = tiny_llama(vocab_size=300, hidden_size=64, intermediate_size=96, max_position_embeddings=CONTEXT)
    full = write_llama_gguf(model, tmp_path / "full.gguf", tokenizer=byte_tokenizer())
    measure_imatrix(full, TEXT, tmp_path, toolchain, context_tokens=CONTEXT)
    with Model(full, allocate=False) as opened:
        ids = opened.tokenize(TEXT, add_special=True)
    chunks = [ids[first : first + CONTEXT].tolist() for first in range(0, len(ids) - CONTEXT + 1, CONTEXT)]
    statistics = measure(model, TokenBatch.of(chunks), batch_size=3)
    ours = tmp_path / "ours.gguf"
    write_imatrix(ours, statistics.importance, dataset="text", sequences=len(chunks), sequence_tokens=CONTEXT)
    theirs = tmp_path / "imatrix.gguf"
    stored, expected = ({t.name: t for t in open_gguf(path).tensors} for path in (ours, theirs))
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].shape.tolist() == tensor.shape.tolist()
        np.testing.assert_allclose(stored[name].data, tensor.data, rtol=5e-3, atol=1e-6 * np.abs(tensor.data).max())
    fields = [open_gguf(path).fields for path in (ours, theirs)]
    for key in ("general.type", "imatrix.chunk_count", "imatrix.chunk_size"):
        assert fields[0][key].contents() == fields[1][key].contents()


@pytest.mark.parametrize("shares", [False, True])
def test_experts_have_their_own_squares_and_tokens(shares, tmp_path):
    model, tokens = tiny_mixtral(), random_tokens(lengths=(40, 40))
    statistics = measure(model, tokens, shares=shares)
    entry = statistics.importance["blk.0.ffn_down_exps.weight"]
    assert entry.sums.shape == (4, 40) and entry.tokens.sum() == 2 * 80, "two experts a token"
    assert (entry.sums.any(axis=1) == (entry.tokens > 0)).all()
    names = {"blk.0.attn_q.weight", "blk.0.ffn_down_exps.weight", "blk.1.ffn_gate_exps.weight"}
    assert statistics.shares.keys() & names == (names if shares else set())


def test_the_share_of_experts_counts_each_by_its_tokens(monkeypatch):
    model, tokens = tiny_mixtral(), random_tokens(lengths=(40, 40))
    name = "blk.1.ffn_up_exps.weight"
    weights = weights_of(model, names_of(model))
    moments = [m for piece in input_moments(model, tokens, weights) for m in piece.moments if name in m.tensors]
    of_experts = [variances(of_expert.estimate) for of_expert in moments]
    errors = [of_expert.tokens * together for of_expert, (together, _) in zip(moments, of_experts, strict=True)]
    expected = np.average([unexplained / together for together, unexplained in of_experts], weights=errors)
    assert measure(model, tokens, shares=True).shares[name] == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(inputs, "input_moments", partial(input_moments, matrices_bytes=1))  # each matrix is a piece
    assert measure(model, tokens, shares=True).shares[name] == pytest.approx(expected, rel=1e-6)


def test_matrices_are_gone_before_those_of_the_next_block_come(monkeypatch):
    model, gone = tiny_llama(), []
    monkeypatch.setattr(inputs, "input_moments", lambda *some, **named: forgotten(input_moments(*some, **named), gone))
    measure(model, random_tokens(), shares=True)
    assert gone and all(gone)


def test_an_expert_without_a_token_has_ones(tmp_path):
    model, tokens = tiny_mixtral(), random_tokens(lengths=(40,))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # ties go to the first experts
    statistics = measure(model, tokens)
    entry = statistics.importance["blk.1.ffn_up_exps.weight"]
    unseen = np.flatnonzero(entry.tokens == 0)
    assert len(unseen) == 2 and not entry.sums[unseen].any()
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, statistics.importance, dataset="text", sequences=1, sequence_tokens=40)
    writer = gguf.GGUFWriter(tmp_path / "full.gguf", "llama")
    writer.add_tensor("blk.1.ffn_up_exps.weight", np.zeros((4, 40, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_tensors(tmp_path / "full.gguf")
    assert usable_entries(path, tensors) == {"blk.1.ffn_up_exps.weight"}
    assert (importances(path, tensors)["blk.1.ffn_up_exps.weight"][unseen] == 1).all()


def test_the_embedding_has_a_share_and_no_importance_where_it_is_the_output():
    tied, own = (measure(tiny_llama(tied=tied), random_tokens(), shares=True) for tied in (True, False))
    assert "token_embd.weight" in tied.shares and "token_embd.weight" not in tied.importance
    assert "output.weight" in own.shares and "output.weight" in own.importance


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("shares", [False, True])
def test_a_measurement_that_was_killed_goes_on_and_gives_the_same(make, shares, tmp_path):
    model, tokens = make(num_hidden_layers=5), random_tokens()
    whole = measure(model, tokens, shares=shares, batch_size=2)
    memory, told = Memory(folder=tmp_path / "kept"), []

    def stop(done, total):
        told.append(done)
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(model, tokens, shares=shares, batch_size=2, memory=memory, progress=stop)
    told.clear()
    again = measure(
        model, tokens, shares=shares, batch_size=2, memory=memory, progress=lambda done, total: told.append(done)
    )
    assert told[0] == 3 and again.shares == whole.shares
    assert again.importance.keys() == whole.importance.keys()
    for name, entry in whole.importance.items():
        assert (again.importance[name].sums == entry.sums).all()
        assert (again.importance[name].tokens == entry.tokens).all()
