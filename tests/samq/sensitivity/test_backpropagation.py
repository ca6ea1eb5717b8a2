import math

import pytest
import torch

from samq.errors import SamqError
from samq.sensitivity.backpropagation import backpropagate
from samq.sensitivity.batches import batches
from samq.sensitivity.layout import weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.reduction import Reduced
from tests.tiny_models import names_of, random_tokens, tiny_llama


def run(model, tokens, reduce, *, labels="text", seed=0, first_sequence=0, **arguments):
    labelling = Labelling(labels, seed, first_sequence, "check")
    weights = weights_of(model, names_of(model))
    losses, sums = backpropagate(model, tokens, weights, reduce, labelling=labelling, **arguments)
    return losses, sums.numbers()


def nothing(index, gradients):
    return Reduced(gradients.zeros(1))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_numbers_of_all_rows_are_added_up_for_each_weight_and_sequence(batch_size, monkeypatch):
    monkeypatch.setattr(
        "samq.sensitivity.weight_gradients.BAND_WEIGHTS", 200
    )  # several bands even for these small weights
    model, tokens = tiny_llama(), random_tokens()
    weights = weights_of(model, names_of(model))

    def reduce(index, gradients):
        sums = gradients.zeros(2)
        for sample, _, values in gradients.bands():
            sums[sample] += torch.stack([values.sum(dtype=torch.float64), torch.tensor(len(values))])
        return Reduced(sums)

    losses, sums = run(model, tokens, reduce, batch_size=batch_size)
    for number, (ids, _, labels) in enumerate(batches(tokens, 1)):
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum")
        loss.backward()
        assert losses[number] == pytest.approx(loss.item(), rel=1e-6)
        assert sums[:, number, 0] == pytest.approx(
            [weight.parameter.grad.double().sum().item() for weight in weights], rel=1e-3, abs=1e-4
        )
        with_gradient = [len(ids.unique()), *(weight.shape[0] for weight in weights[1:])]  # the embedding is the first
        assert sums[:, number, 1].tolist() == with_gradient


def test_labels_come_from_the_sequences_own_stream():
    model, tokens = tiny_llama(), random_tokens()

    def losses(first=0, **arguments):
        return run(model, tokens.part(first, 5), nothing, labels="model", first_sequence=first, **arguments)[0]

    one, four = losses(), losses(batch_size=4)
    assert four == pytest.approx(one, rel=1e-5)
    assert losses(first=2) == pytest.approx(one[2:], rel=1e-5)
    assert (losses(seed=1) != one).all()
    others, _ = run(model, tokens, nothing, labels="model", first_sequence=1)
    assert (others != one).all()


def test_a_checks_streams_are_none_of_the_calibrations():
    draws = {
        Labelling("model", seed, purpose=purpose).stream(sequence).random()
        for seed in range(4)
        for sequence in range(4)
        for purpose in ("calibration", "check")
    }
    assert len(draws) == 32


@pytest.mark.parametrize("labels", ["text", "model"])
def test_a_damaged_weight_is_named_with_the_sequence(labels):
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 4] = math.nan
    tokens = random_tokens()
    first = next(number for number in range(len(tokens)) if 5 in tokens.sequence(number)[:-1])
    message = rf"loss of check sequence {first} is nan: token_embd\.weight holds NaN or Inf"
    with pytest.raises(SamqError, match=message):
        run(model, tokens, nothing, labels=labels)


def test_numbers_that_are_not_finite_are_named_with_the_tensor_and_the_sequence():
    calls = []

    def reduce(index, gradients):
        calls.append(index)
        numbers = gradients.zeros(1)
        if index == 2 and calls.count(2) == 2:
            numbers[1] = math.inf
        return Reduced(numbers)

    with pytest.raises(SamqError, match=r"gradient of blk\.0\.attn_k\.weight on check sequence 3 is NaN or Inf"):
        run(tiny_llama(), random_tokens(), reduce, batch_size=2)
