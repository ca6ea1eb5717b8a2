import copy
import math

import numpy as np
import pytest
import torch

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.sensitivity.batches import batches
from samq.sensitivity.layout import GgufLayout, read_layout, weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity, merge
from tests.tiny_models import names_of, random_tokens, tiny_gpt2, tiny_llama, tiny_mixtral, write_llama_gguf


def measure(model, tokens, architecture="llama", *, layout=None, labels="text", seed=0, first_sequence=0, **arguments):
    return measure_sensitivity(
        model,
        tokens,
        layout or GgufLayout(weights_of(model, names_of(model, architecture))),
        Origin("model", "text"),
        labelling=Labelling(labels, seed, first_sequence),
        **arguments,
    )


def by_autograd(model, tokens):
    """Weight's name -> gradients of each sequence's summed loss, (sequences, *shape), in float64."""
    model = copy.deepcopy(model).double()
    weights = weights_of(model, names_of(model))
    gradients = {weight.name: [] for weight in weights}
    for ids, mask, labels in batches(tokens, 1):
        model.zero_grad()
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").backward()
        for weight in weights:
            gradients[weight.name].append(weight.view(weight.parameter.grad).clone())
    return {name: torch.stack(every).numpy() for name, every in gradients.items()}


def same(one, other):
    return np.array_equal(one.rows, other.rows) and np.array_equal(one.columns, other.columns)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_norms_and_fisher_are_those_of_autograd(tied, batch_size):
    model, tokens = tiny_llama(tied=tied), random_tokens()
    sensitivity, fisher = measure(model, tokens, batch_size=batch_size)
    label_tokens = tokens.lengths - 1
    expected = by_autograd(model, tokens)
    assert sensitivity.tensors.keys() == fisher.keys() == expected.keys()
    for name, gradients in expected.items():
        norms = np.sqrt((gradients**2).sum(axis=(1, 2))) / label_tokens
        tensor = sensitivity.tensors[name]
        assert tensor.gradient_norm == pytest.approx(norms.mean(), rel=1e-5)
        assert tensor.gradient_norm_stderr == pytest.approx(norms.std(ddof=1) / math.sqrt(len(tokens)), rel=1e-4)
        squares = (gradients**2).sum(axis=0) / label_tokens.sum()
        np.testing.assert_allclose(fisher[name].rows, squares.mean(axis=1), rtol=2e-4, atol=1e-12)
        np.testing.assert_allclose(fisher[name].columns, squares.mean(axis=0), rtol=2e-4, atol=1e-12)
        assert tensor.fisher == pytest.approx(squares.mean(), rel=1e-4)
        assert tensor.shape == gradients.shape[1:]


def test_the_map_says_what_it_was_measured_on():
    model, tokens = tiny_llama(), random_tokens()
    sensitivity, _ = measure(model, tokens, seed=5)
    losses = [
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum").item()
        for ids, _, labels in batches(tokens, 1)
    ]
    assert sensitivity.tokens == sum(tokens.lengths - 1) == 35
    assert sensitivity.loss_nats == pytest.approx(sum(losses) / 35, rel=1e-6)
    assert (sensitivity.samples, sensitivity.seed, sensitivity.labels) == (5, 5, "text")
    assert (sensitivity.model_digest, sensitivity.calibration_digest, sensitivity.tied_embeddings) == (
        "model",
        "text",
        False,
    )
    assert max(tensor.score for tensor in sensitivity.tensors.values()) == 1


def test_tied_weights_are_scored_once():
    sensitivity, _ = measure(tiny_llama(tied=True), random_tokens())
    assert sensitivity.tied_embeddings and "output.weight" not in sensitivity.tensors


def test_padding_has_no_influence():
    model = tiny_llama()
    tokens = random_tokens()
    other = TokenBatch(np.pad(tokens.ids, ((0, 0), (0, 3))), tokens.lengths)
    other.ids[np.arange(other.ids.shape[1]) >= other.lengths[:, None]] = 7
    one, fisher = measure(model, tokens, batch_size=5)
    two, fisher_two = measure(model, other, batch_size=5)
    assert one == two
    assert all(same(fisher[name], fisher_two[name]) for name in fisher)


@pytest.mark.parametrize("labels", ["text", "model"])
def test_two_runs_are_identical(labels):
    runs = [measure(tiny_llama(), random_tokens(), batch_size=2, labels=labels) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert all(same(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


def test_labels_of_the_model_depend_on_the_seed_and_the_sequence_but_not_on_the_batch():
    model, tokens = tiny_llama(), random_tokens()
    one, _ = measure(model, tokens, labels="model")
    four, _ = measure(model, tokens, labels="model", batch_size=4)
    other, _ = measure(model, tokens, labels="model", seed=1)
    for name, tensor in one.tensors.items():
        assert four.tensors[name].gradient_norm == pytest.approx(tensor.gradient_norm, rel=1e-4)
    assert other.loss_nats != pytest.approx(one.loss_nats, rel=1e-3)


def test_labels_of_the_model_follow_its_distribution():
    model = tiny_llama()
    tokens = TokenBatch.of([[3, 1, 4, 1, 5, 9, 2, 6]] * 300)
    sensitivity, _ = measure(model, tokens, labels="model", batch_size=50)
    with torch.no_grad():
        logs = torch.log_softmax(model(input_ids=torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits[0, :-1], dim=-1)
    entropies = -(logs.exp() * logs).sum(-1)
    spread = (logs.exp() * (logs + entropies[:, None]) ** 2).sum(-1).mean().sqrt().item()
    assert sensitivity.loss_nats == pytest.approx(
        entropies.mean().item(), abs=5 * spread / math.sqrt(sensitivity.tokens)
    )


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output.weight"])
def test_the_fisher_predicts_the_divergence_of_a_small_change(name):
    model = tiny_llama()
    tokens = random_tokens(lengths=(24,) * 400)
    ids = torch.from_numpy(tokens.ids.astype(np.int64))
    _, fisher = measure(model, tokens, labels="model", batch_size=50)
    (weight,) = (weight for weight in weights_of(model, names_of(model)) if weight.name == name)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 2e-3
    predicted = (fisher[name].rows[:, None] * fisher[name].profile() * change.numpy() ** 2).sum() / 2
    with torch.no_grad():
        before = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
        weight.parameter.add_(change)
        after = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)
    measured = (before.exp() * (before - after)).sum(-1).mean().item()
    assert 0.75 < measured / predicted < 1.33


def test_the_fishers_rows_are_in_ggufs_order(tmp_path):
    model, tokens = tiny_llama(), random_tokens()
    path = write_llama_gguf(model, tmp_path / "model.gguf")
    layout = read_layout(model, names_of(model), path)
    _, in_torch = measure(model, tokens)
    _, in_gguf = measure(model, tokens, layout=layout)
    for weight in layout.weights:
        fisher, expected = in_gguf[weight.name], in_torch[weight.name]
        rows = slice(None) if weight.view.rows is None else weight.view.rows
        np.testing.assert_allclose(fisher.rows, expected.rows[rows], rtol=1e-5)
        np.testing.assert_allclose(fisher.columns, expected.columns, rtol=1e-5)
    assert not same(in_gguf["blk.0.attn_q.weight"], in_torch["blk.0.attn_q.weight"])


@pytest.mark.parametrize(("make", "architecture"), [(tiny_gpt2, "gpt2"), (tiny_mixtral, "llama")])
def test_models_with_other_modules_are_measured_in_batches_of_any_size(make, architecture):
    model, tokens = make(), random_tokens()
    one, fisher = measure(model, tokens, architecture)
    four, _ = measure(model, tokens, architecture, batch_size=4)
    assert (one == four) is (architecture == "gpt2")
    for name, tensor in one.tensors.items():
        assert four.tensors[name].gradient_norm == pytest.approx(tensor.gradient_norm, rel=1e-5)
    for name, tensor in one.tensors.items():
        assert fisher[name].shape == tensor.shape
        assert tensor.fisher == pytest.approx(fisher[name].rows.mean(), rel=1e-5) and tensor.fisher > 0
        experts = fisher[name].rows.mean(axis=-1)  # of one that is never chosen, zero
        np.testing.assert_allclose(fisher[name].columns.mean(axis=-1), experts, rtol=1e-5)


def test_half_precision_models_accumulate_in_float32():
    model, tokens = tiny_llama(), random_tokens()
    exact, _ = measure(model, tokens)
    rough, fisher = measure(copy.deepcopy(model).bfloat16(), tokens, batch_size=2)
    assert {part.dtype for one in fisher.values() for part in (one.rows, one.columns)} == {np.dtype(np.float32)}
    for name, tensor in exact.tensors.items():
        assert rough.tensors[name].gradient_norm == pytest.approx(tensor.gradient_norm, rel=0.1)


def test_progress_counts_batches():
    seen = []
    measure(tiny_llama(), random_tokens(), batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_damaged_weight_is_named_with_the_sequence():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(
        SamqError, match=r"loss of calibration sequence 0 is nan: blk\.1\.ffn_up\.weight holds NaN or Inf"
    ):
        measure(model, random_tokens())


def test_a_gradient_that_is_not_finite_is_named_with_the_sequence():
    model = tiny_llama().half()
    with torch.no_grad():  # the smaller a token's vector, the more its gradient grows in the norm that follows it
        model.model.embed_tokens.weight[5] = 1e-6
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0
    tokens = TokenBatch.of([[1, 2, 3], [3, 2, 1], [2, 1, 3], [1, 5, 2], [3, 1, 2]])
    with pytest.raises(SamqError, match=r"gradient of token_embd\.weight on calibration sequence 3 is NaN or Inf"):
        measure(model, tokens, batch_size=2)


def test_a_loss_without_gradients_is_refused():
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(SamqError, match="all gradients are zero"):
        measure(model, random_tokens())


@pytest.mark.parametrize("labels", ["text", "model"])
def test_two_measurements_merge_into_one_of_all_their_sequences(labels):
    model, tokens = tiny_llama(), random_tokens()
    whole, fisher = measure(model, tokens, labels=labels)
    parts = [
        measure(model, TokenBatch(tokens.ids[here], tokens.lengths[here]), labels=labels, first_sequence=here.start)
        for here in (slice(0, 2), slice(2, 5))
    ]
    merged, merged_fisher = merge(*parts)
    assert merged.sequence_tokens == whole.sequence_tokens
    assert merged.loss_nats == pytest.approx(whole.loss_nats)
    for name, tensor in whole.tensors.items():
        assert merged.tensors[name].sequence_squares == tensor.sequence_squares
        assert merged.tensors[name].score == pytest.approx(tensor.score)
        assert merged.tensors[name].fisher == pytest.approx(tensor.fisher)
        np.testing.assert_allclose(merged_fisher[name].rows, fisher[name].rows, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(merged_fisher[name].columns, fisher[name].columns, rtol=1e-5, atol=1e-12)


def test_one_sequence_is_too_few():
    with pytest.raises(SamqError, match="at least 2 calibration sequences, not 1"):
        measure(tiny_llama(), random_tokens(lengths=(5,)))
