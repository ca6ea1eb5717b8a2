"""Stacked experts computed one after the other: transformers' logits, autograd's gradients, and matrices that stay elsewhere."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from samq.data.tokens import TokenBatch
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.expert_gradients import Batch, GradientsOfExperts
from samq.sensitivity.experts import modules_of_experts, one_by_one, stacks
from samq.sensitivity.gradients import SampleGradients
from samq.sensitivity.gram import input_moments
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import GgufLayout, Weight
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.memory import Memory
from samq.sensitivity.offloading import stored_of
from samq.sensitivity.residence import Residence, bytes_brought
from samq.sensitivity.views import View
from tests.architectures.models import write_model
from tests.tiny_models import tiny_mixtral

SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=200, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# Gate and up in halves; interleaved, turned and with biases; turned; no gate
KINDS = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "aria_text": dict(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "nemotron_h": dict(
        layers_block_type=["attention", "moe"], n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48, head_dim=8,
    ),
}  # fmt: skip
TOKENS = TokenBatch.of([np.arange(length) * 7 % 200 for length in (24, 17, 24, 9)])


def model_of(kind):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | KINDS[kind])).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    assert modules_of_experts(model)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_slopes_are_those_of_transformers(kind):
    model, ids = model_of(kind), torch.arange(40).view(2, 20)
    theirs = model(input_ids=ids, use_cache=False).logits
    wanted = torch.autograd.grad(theirs.square().sum(), model.get_input_embeddings().weight)
    products = []
    before = [module.config._experts_implementation for module in modules_of_experts(model)]
    with one_by_one(model, lambda product, _: products.append(product)):
        ours = model(input_ids=ids, use_cache=False).logits
    slopes = torch.autograd.grad(ours.square().sum(), model.get_input_embeddings().weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slopes, wanted, rtol=1e-4, atol=1e-4)
    routed = [product for product in products if product.name == "down_proj"]
    assert sum(len(product.tokens) for product in routed) == 2 * 40 * len(modules_of_experts(model))
    assert before == [module.config._experts_implementation for module in modules_of_experts(model)]


def all_matrices(model):
    return [
        Weight(name, parameter, View())
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3) and "conv" not in name and not name.endswith("bias")
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_several_sequences_has_the_gradients_of_each(kind):
    model = model_of(kind)
    weights = [weight for weight in all_matrices(model) if weight.parameter.ndim == 3]
    if modules_of_experts(model)[0].is_transposed:
        weights = [Weight(one.name, one.parameter, View(matrix=lambda stack: stack.mT)) for one in weights]
    received = {}

    def receive(index, first, gradients):
        for sample, rows, values in gradients.bands():
            size = torch.zeros(weights[index].shape).flatten(0, 1)
            received.setdefault((index, first + sample), size)[rows] += values

    gradients = SampleGradients(model, weights, receive)
    ids, lengths = torch.from_numpy(TOKENS.ids.astype(np.int64)), TOKENS.lengths.tolist()
    gradients.require_calls(lambda: model(input_ids=ids[:1], use_cache=False), model)
    assert not gradients.one_sample_only
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    with gradients, gradients.within(model, Batch(0, lengths)) as backward:
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        backward(logits, torch.sin(torch.arange(logits.numel())).view(logits.shape) * mask[..., None])
    for number, length in enumerate(lengths):
        logits = model(input_ids=ids[number : number + 1, :length], use_cache=False).logits[0]
        slope = torch.sin(torch.arange(len(ids) * ids.shape[1] * logits.shape[1])).view(*ids.shape, -1)[number, :length]
        wanted = torch.autograd.grad(logits, [weight.parameter for weight in weights], slope)
        for index, (weight, gradient) in enumerate(zip(weights, wanted, strict=True)):
            expected = weight.view(gradient).flatten(0, 1)
            torch.testing.assert_close(received[index, number], expected, rtol=1e-3, atol=1e-4, msg=weight.name)


def measured(model, folder, room):
    """Sensitivities, and moments of inputs, with so much memory for a block and the next one."""
    weights, memory = all_matrices(model), Memory(limit_bytes=room, folder=folder)
    sensitivity = measure_sensitivity(
        model, TOKENS, GgufLayout(weights), Origin("model", "text"),
        labelling=Labelling("model", seed=1), batch_size=2, memory=memory,
    )  # fmt: skip
    moments = [
        of_one
        for piece in input_moments(model, TOKENS, weights, batch_size=2, memory=memory)
        for of_one in piece.moments
    ]
    return sensitivity, moments


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss", "Qwen2 MoE"])
def test_experts_that_come_one_by_one_give_the_bits_of_a_whole_block(name, tmp_path, monkeypatch):
    source = describe_source(write_model(name, tmp_path / "model"))
    model, _ = load_model(source, device="cpu", memory_limit=1)
    assert all(stored_of(stack) for stack in stacks(model))
    fetched, fetch = [], Residence.fetch

    def note(residence, original, rows, device):
        fetched.append(rows.stop - rows.start)
        return fetch(residence, original, rows, device)

    monkeypatch.setattr(Residence, "fetch", note)
    (one, fisher), moments = measured(model, tmp_path / "whole", 2**40)
    assert not fetched
    (other, other_fisher), other_moments = measured(model, tmp_path / "apart", 2**16)
    assert set(fetched) == {1}, "a matrix at a time"
    assert one == other
    for tensor, wanted in fisher.items():
        for part in ("rows", "columns"):
            assert np.array_equal(getattr(wanted, part), getattr(other_fisher[tensor], part)), tensor
    assert [one.tensors for one in moments] == [one.tensors for one in other_moments]
    assert all(torch.equal(one.gram, other.gram) for one, other in zip(moments, other_moments, strict=True))


def test_a_block_takes_of_the_device_what_is_brought_there():
    block = tiny_mixtral().model.layers[0]
    whole = sum(parameter.nbytes for parameter in block.parameters())
    of_experts = sum(stack.nbytes for stack in stacks(block))
    assert bytes_brought(block, 4 * whole) == whole
    assert bytes_brought(block, 4 * whole - 1) == whole - of_experts + of_experts // 4


def test_experts_that_a_pass_calls_twice_are_left_to_autograd():
    model = tiny_mixtral()
    experts = model.model.layers[0].mlp.experts
    weights = [Weight(name, parameter, View()) for name, parameter in experts.named_parameters()]
    of_experts = GradientsOfExperts(model, weights, print)
    assert of_experts.indices == {0, 1}
    hidden, chosen, shares = torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1)
    with of_experts.require_one_call(model):
        experts(experts(hidden, chosen, shares), chosen, shares)
    assert not of_experts.indices
