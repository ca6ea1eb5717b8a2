import math

import pytest
import torch

from samq.errors import SamqError
from samq.sensitivity.batches import batches
from samq.sensitivity.gradients import Batch, SampleGradients
from samq.sensitivity.layout import Weight, weights_of
from samq.sensitivity.views import View
from tests.tiny_models import names_of, random_tokens, tiny_gpt2, tiny_llama, tiny_mixtral


def bypassing_llama(also_called=False, turned=False):
    """A Llama whose first block multiplies by up_proj's weight itself, as Mamba does by dt_proj's."""
    model = tiny_llama()
    mlp = model.model.layers[0].mlp

    def forward(states):
        weight = mlp.up_proj.weight
        up = states @ weight.t() if turned else torch.nn.functional.linear(states, weight.float())
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(states)) * (up + mlp.up_proj(states) if also_called else up))

    mlp.forward = forward
    return model


MODELS = {
    "untied llama": (tiny_llama, "llama"),
    "tied llama": (lambda: tiny_llama(tied=True), "llama"),
    "mixtral": (tiny_mixtral, "llama"),
    "gpt2": (tiny_gpt2, "gpt2"),
    "a weight used without its module": (bypassing_llama, "llama"),
    "a weight used with and without its module": (lambda: bypassing_llama(also_called=True), "llama"),
    "a weight that is turned before it is used": (lambda: bypassing_llama(turned=True), "llama"),
}


def summed_loss(logits, labels):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def by_autograd(model, weights, tokens):
    """(weight's name, sequence) -> gradient of the sequence's summed loss."""
    gradients = {}
    for number, (ids, mask, labels) in enumerate(batches(tokens, 1)):
        model.zero_grad()
        summed_loss(model(input_ids=ids, attention_mask=mask).logits, labels).backward()
        for weight in weights:
            gradients[weight.name, number] = weight.view(weight.parameter.grad).clone()
    model.zero_grad()
    return gradients


def by_hooks(model, weights, tokens, batch_size):
    """(weight's name, sequence) -> gradient, put together from its bands; and the sums of its squares, (rows, columns)."""
    received, squares = {}, {}

    def receive(index, first, gradients):
        weight = weights[index]
        for sample, (by_row, by_column) in enumerate(zip(*gradients.squares(), strict=True)):
            sums = squares.setdefault((weight.name, first + sample), [0, 0])
            sums[0], sums[1] = sums[0] + by_row, sums[1] + by_column
        for sample, rows, values in gradients.bands():
            assert values.dtype == torch.float32
            empty = torch.zeros(math.prod(weight.shape[:-1]), weight.shape[-1])
            whole = received.setdefault((weight.name, first + sample), empty)
            assert not whole[rows].any(), "a row comes once"
            whole[rows] = values

    first = 0
    with SampleGradients(model, weights, receive) as gradients:
        probe = torch.arange(8)[None]
        gradients.require_calls(lambda: model(input_ids=probe), model)
        for ids, mask, labels in batches(tokens, batch_size):
            with gradients.within(model, Batch(first, mask.sum(1).tolist())) as backward:
                logits = model(input_ids=ids, attention_mask=mask).logits
                leaf = logits.detach().requires_grad_(True)
                summed_loss(leaf, labels).backward()
                backward(logits, leaf.grad)
            first += len(ids)
    for key, (by_row, by_column) in squares.items():
        torch.testing.assert_close(by_row, received[key].square().sum(1), rtol=1e-4, atol=1e-6)
        by_expert = received[key].view(*by_column.shape[:-1], -1, by_column.shape[-1])
        torch.testing.assert_close(by_column, by_expert.square().sum(-2), rtol=1e-4, atol=1e-6)
    return received


@pytest.mark.parametrize(
    ("kind", "batch_size"),
    [
        *((kind, 1) for kind in MODELS),
        ("untied llama", 4),
        ("tied llama", 4),
        ("mixtral", 4),
        ("a weight used with and without its module", 4),
    ],
)
def test_every_sample_has_autograds_gradient(kind, batch_size, monkeypatch):
    monkeypatch.setattr(
        "samq.sensitivity.weight_gradients.BAND_WEIGHTS", 200
    )  # several bands even for these small weights
    make, architecture = MODELS[kind]
    model, tokens = make(), random_tokens()
    weights = weights_of(model, names_of(model, architecture))
    expected = by_autograd(model, weights, tokens)
    received = by_hooks(model, weights, tokens, batch_size)
    assert received.keys() == expected.keys()
    for key, gradient in expected.items():
        torch.testing.assert_close(received[key], gradient.flatten(0, -2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_parts_and_orders_of_a_weight_have_those_of_its_gradient(batch_size, monkeypatch):
    monkeypatch.setattr("samq.sensitivity.weight_gradients.BAND_WEIGHTS", 200)
    model, tokens = tiny_llama(), random_tokens()
    attention = model.model.layers[0].self_attn
    rows, columns = torch.randperm(32).numpy(), torch.randperm(32).numpy()
    weights = [
        Weight("first", attention.q_proj.weight, View(rows=rows[:20])),
        Weight("second", attention.q_proj.weight, View(rows=rows[20:])),
        Weight("columns", attention.o_proj.weight, View(columns=columns)),
    ]
    expected, received = by_autograd(model, weights, tokens), by_hooks(model, weights, tokens, batch_size)
    for key, gradient in expected.items():
        torch.testing.assert_close(received[key], gradient, rtol=1e-4, atol=1e-5)
    assert not SampleGradients(model, weights, print).one_sample_only


def test_weights_that_are_turned_have_autograds_gradient():
    model, tokens = tiny_llama(), random_tokens()
    weights = [Weight("keys", model.model.layers[0].self_attn.k_proj.weight, View(matrix=torch.t))]
    expected, received = by_autograd(model, weights, tokens), by_hooks(model, weights, tokens, 1)
    for key, gradient in expected.items():
        torch.testing.assert_close(received[key], gradient, rtol=1e-4, atol=1e-5)


def test_two_copies_of_a_tied_weight_share_its_gradient_by_their_use():
    model, tokens = tiny_llama(tied=True), random_tokens()
    tied = model.model.embed_tokens.weight
    users = {"token_embd.weight": model.model.embed_tokens, "output.weight": model.lm_head}
    apart = by_hooks(model, [Weight(name, tied, View(), user) for name, user in users.items()], tokens, 4)
    together = by_autograd(model, [Weight("both", tied, View())], tokens)
    untied = tiny_llama(tied=False)
    untied.model.load_state_dict(model.model.state_dict())
    untied.lm_head.weight.data.copy_(tied.data)
    expected = by_autograd(untied, weights_of(untied, names_of(untied)), tokens)
    for (name, number), gradient in apart.items():
        torch.testing.assert_close(gradient, expected[name, number], rtol=1e-4, atol=1e-5)
    for number in range(len(tokens)):
        total = apart["token_embd.weight", number] + apart["output.weight", number]
        torch.testing.assert_close(total, together["both", number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "one"),
    [
        ("untied llama", False),
        ("tied llama", False),
        ("mixtral", False),
        ("gpt2", True),
        ("a weight used without its module", False),
        ("a weight used with and without its module", False),
        ("a weight that is turned before it is used", True),
    ],
)
def test_models_whose_samples_cannot_be_told_apart_are_known(kind, one):
    make, architecture = MODELS[kind]
    model = make()
    gradients = SampleGradients(model, weights_of(model, names_of(model, architecture)), print)
    gradients.require_calls(lambda: model(input_ids=torch.arange(8)[None]), model)
    assert gradients.one_sample_only is one


def test_a_layer_that_sees_samples_mixed_is_refused():
    class Mixing(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            flat = states.flatten(0, 1)
            half = len(flat) // 2
            return torch.cat([self.inner(flat[:half]), flat[half:]]).view_as(states)

    model, tokens = tiny_llama(), random_tokens()
    weights = weights_of(model, names_of(model))
    model.model.layers[0].mlp = Mixing(torch.nn.Linear(32, 32, bias=False))
    weights = [weight for weight in weights if not weight.name.startswith("blk.0.ffn")]
    weights.append(Weight("mixed.weight", model.model.layers[0].mlp.inner.weight, View()))
    with pytest.raises(SamqError, match=r"mixed\.weight mixes the tokens of several samples.*batch size of 1"):
        by_hooks(model, weights, tokens, 4)
    assert ("mixed.weight", 4) in by_hooks(model, weights, tokens, 1)


def test_the_model_is_left_as_it_was():
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    by_hooks(model, weights_of(model, names_of(model)), random_tokens(), 2)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
