"""Layers whose outputs gradients do not depend on: found by value, and gradients without them are the same."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from samq.data.tokens import TokenBatch
from samq.sensitivity import block_pass
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import GgufLayout, Weight
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.unneeded_outputs import unneeded, without_outputs
from samq.sensitivity.views import View
from tests.architectures.models import write_model

# The layers of a block that may be left out: nothing but the hidden states gets what they give.
OUTPUTS = {
    "Llama": {"mlp.down_proj"},
    "Qwen2.5, tied": {"mlp.down_proj"},
    "Gemma 3": set(),  # a norm follows
    "GPT-NeoX": {"attention.dense", "mlp.dense_4h_to_h"},  # attention and feed-forward side by side
    "Mamba": {"mixer.out_proj"},
}


def linear(*size):
    return nn.Linear(*size, bias=False)


class Block(nn.Module):
    """Layers, and a use that is made of each one's output."""

    def __init__(self):
        super().__init__()
        self.into_square, self.into_linear, self.after, self.added, self.scaled, self.uncalled = (
            linear(4, 4) for _ in range(6)
        )

    def forward(self, hidden):
        squared = self.into_square(hidden) ** 2
        return (
            hidden
            + squared
            + self.after(self.into_linear(hidden))
            + self.added(hidden)
            + 3 * self.scaled(hidden).relu_()
        )


def test_a_layer_is_unneeded_if_its_output_is_in_nothing_that_is_kept():
    block = Block().requires_grad_(False)
    hidden = torch.randn(2, 3, 4).requires_grad_()
    layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
    not_needed = unneeded(layers, lambda: block(hidden))
    assert set(not_needed) == {block.after, block.added}, (
        "not where the output is squared, a layer's input, or compared with 0"
    )
    assert unneeded(layers, lambda: block(hidden), [block.added]) == [block.added], "no search where these are enough"
    assert set(unneeded(layers, lambda: block(hidden), [block.scaled])) == {block.after, block.added}
    assert unneeded(layers, lambda: block(hidden), []) == []
    assert set(unneeded(layers, lambda: block(hidden), [block.uncalled])) == {block.after, block.added}
    (gradient,) = torch.autograd.grad(block(hidden).sum(), hidden)
    with without_outputs(not_needed):
        output = block(hidden)
        assert output.isnan().all()
        (without,) = torch.autograd.grad(output, hidden, torch.ones_like(output))
    assert torch.equal(without, gradient)
    assert block(hidden).isfinite().all() and not any("forward" in layer.__dict__ for layer in layers)


def test_nothing_of_the_trials_is_kept():
    """A block's weights would be, which are on the device for as long as it runs."""
    layer, kept = linear(4, 4).requires_grad_(False), []

    def run():
        output = layer(torch.randn(2, 3, 4).requires_grad_()).sigmoid()  # which keeps its output
        kept.append(weakref.ref(output))

    gc.disable()
    try:
        assert unneeded([layer], run) == [] and len(kept) == 2
        assert all(output() is None for output in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize(("name", "limit"), [*((name, None) for name in OUTPUTS), ("Llama", 1)])  # the last one on disk
def test_the_gradients_of_a_model_are_the_same_without_them(name, limit, tmp_path, by_blocks, monkeypatch):
    source = describe_source(write_model(name, tmp_path / "model"))
    tokens, left_out = TokenBatch.of([np.arange(length) * 7 % 200 for length in (24, 17, 24)]), set()

    def measured(find):
        model, _ = load_model(source, device="cpu", memory_limit=limit)
        names = {module: name for name, module in model.named_modules()}

        def noted(*arguments):
            not_needed = find(*arguments)
            left_out.update(names[one].split(".", 3)[-1] for one in not_needed)
            return not_needed

        monkeypatch.setattr(block_pass, "unneeded", noted)
        matrices = [(one, matrix) for one, matrix in model.named_parameters() if matrix.ndim in (2, 3)]
        layout = GgufLayout([Weight(one, matrix, View()) for one, matrix in matrices])
        return measure_sensitivity(
            model, tokens, layout, Origin("model", "text"), labelling=Labelling("model"), batch_size=2
        )

    (scores, fisher), (wanted, wanted_fisher) = measured(unneeded), measured(lambda *_: [])
    assert left_out == OUTPUTS[name]
    assert scores == wanted
    assert fisher and all(np.array_equal(fisher[one].rows, wanted_fisher[one].rows) for one in wanted_fisher)
