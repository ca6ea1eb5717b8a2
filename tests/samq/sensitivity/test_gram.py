import weakref
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from samq.errors import SamqError
from samq.sensitivity.batches import batches
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.gram import input_moments, without_input
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import Weight, weights_of
from samq.sensitivity.memory import Memory
from samq.sensitivity.residence import Residence
from samq.sensitivity.views import View
from tests.tiny_models import names_of, random_tokens, save_folder, tiny_gpt2, tiny_llama, tiny_mixtral

MODELS = {
    "untied llama": (tiny_llama, "llama"),
    "tied llama": (lambda: tiny_llama(tied=True), "llama"),
    "mixtral": (tiny_mixtral, "llama"),
    "gpt2": (tiny_gpt2, "gpt2"),
}


def moments_of(model, tokens, architecture="llama", weights=None, **arguments):
    """(tensor, expert) -> what is known of its input."""
    weights = weights or weights_of(model, names_of(model, architecture))
    moments = {}
    for piece in input_moments(model, tokens, weights, **arguments):
        for of_input in piece.moments:
            for name in of_input.tensors:
                assert (name, of_input.expert) not in moments
                moments[name, of_input.expert] = of_input
    return moments


def inputs_of(model, tokens, names):
    """GGUF name -> the input of the linear layer, over all tokens, sequence by sequence."""
    by_parameter = {id(weight.parameter): weight.name for weight in weights_of(model, names)}
    inputs_by_name = {}

    def keep(module, inputs):
        inputs_by_name.setdefault(by_parameter[id(module.weight)], []).append(inputs[0].flatten(0, -2).double())

    layers = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and id(m.weight) in by_parameter]
    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        for ids, _, _ in batches(tokens, 1):
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts).numpy() for name, parts in inputs_by_name.items()}


@pytest.mark.parametrize("matrices_bytes", [1, 10_000, 2**30])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", MODELS)
def test_matrices_are_the_mean_products_of_what_enters(kind, batch_size, matrices_bytes):
    make, architecture = MODELS[kind]
    model, tokens = make(), random_tokens()
    moments = moments_of(model, tokens, architecture, batch_size=batch_size, matrices_bytes=matrices_bytes)
    inputs_by_name = inputs_of(model, tokens, names_of(model, architecture))
    assert {key for key in moments if key[1] is None} == {(name, None) for name in inputs_by_name}
    for name, inputs in inputs_by_name.items():
        of_input = moments[name, None]
        assert of_input.tokens == len(inputs) == tokens.lengths.sum()
        np.testing.assert_allclose(of_input.gram, inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(of_input.squares, (inputs**2).mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_squares_alone_are_the_diagonals(kind):
    make, architecture = MODELS[kind]
    model, tokens = make(), random_tokens()
    whole = moments_of(model, tokens, architecture)
    for key, of_input in moments_of(model, tokens, architecture, matrices=False, batch_size=2).items():
        assert of_input.gram.ndim == 1 and of_input.tokens == whole[key].tokens
        np.testing.assert_allclose(of_input.squares, whole[key].squares, rtol=1e-4, atol=1e-6)


def expert_inputs(model, tokens):
    """(block, expert) -> what enters its gate and up matrices, and its down matrix."""
    inputs, products = defaultdict(list), defaultdict(list)

    def keep(number, module, arguments):
        hidden, chosen, _ = arguments
        for expert in range(4):
            entering = hidden[(chosen == expert).any(dim=-1)].double()
            gate, up = nn.functional.linear(entering, module.gate_up_proj[expert].double()).chunk(2, dim=-1)
            inputs[number, expert].append(entering)
            products[number, expert].append(nn.functional.silu(gate) * up)

    layers = model.model.layers
    handles = [
        layer.mlp.experts.register_forward_pre_hook(lambda *a, n=n: keep(n, *a)) for n, layer in enumerate(layers)
    ]
    with torch.no_grad():
        for ids, _, _ in batches(tokens, 1):
            model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return tuple({key: torch.cat(vectors) for key, vectors in of_part.items()} for of_part in (inputs, products))


@pytest.mark.parametrize("matrices", [True, False])
def test_an_expert_has_the_squares_of_the_tokens_that_it_gets(matrices):
    model, tokens = tiny_mixtral(), random_tokens()
    inputs, products = expert_inputs(model, tokens)
    before = model.get_experts_implementation()
    moments = moments_of(model, tokens, matrices=matrices, batch_size=4)
    assert model.get_experts_implementation() == before
    for part, entering in {"gate": inputs, "up": inputs, "down": products}.items():
        for (number, expert), expected in entering.items():
            of_input = moments[f"blk.{number}.ffn_{part}_exps.weight", expert]
            assert of_input.tokens == len(expected) > 0
            np.testing.assert_allclose(of_input.squares, expected.square().mean(0), rtol=1e-4, atol=1e-6)
    assert {of_input.gram.ndim for of_input in moments.values()} == {1 + matrices}


@pytest.mark.parametrize("matrices_bytes", [1, 10_000, 2**30])
def test_an_expert_has_a_matrix_of_its_own_and_that_of_all(matrices_bytes):
    model, tokens = tiny_mixtral(), random_tokens()
    inputs, products = expert_inputs(model, tokens)
    moments = moments_of(model, tokens, matrices_bytes=matrices_bytes)
    for part, entering in {"gate": inputs, "up": inputs, "down": products}.items():
        for (number, expert), vectors in entering.items():
            of_input = moments[f"blk.{number}.ffn_{part}_exps.weight", expert]
            together = torch.cat([entering[number, other] for other in range(4)])
            own, pooled = (x.T @ x / len(x) for x in (vectors, together))
            assert of_input.share == len(vectors) / len(together)
            np.testing.assert_allclose(of_input.gram, own, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(of_input.pooled, pooled, rtol=1e-4, atol=1e-6)
            borrowed = len(own)
            expected = (own * len(vectors) + pooled * borrowed) / (len(vectors) + borrowed)
            np.testing.assert_allclose(of_input.estimate, expected, rtol=1e-4, atol=1e-6)
    gate, up = (moments[f"blk.0.ffn_{part}_exps.weight", 2] for part in ("gate", "up"))
    assert gate is up, "they share an input"


def test_an_expert_without_a_token_has_the_matrix_of_all():
    model, tokens = tiny_mixtral(), random_tokens()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()  # ties go to the first experts
    moments = moments_of(model, tokens)
    of_experts = [moments["blk.1.ffn_down_exps.weight", expert] for expert in range(4)]
    unseen = [of_input for of_input in of_experts if of_input.tokens == 0]
    assert len(unseen) == 2
    for of_input in unseen:
        assert of_input.share == 0 and not of_input.gram.any() and of_input.pooled.any()
        torch.testing.assert_close(of_input.estimate, of_input.pooled)
        key = "blk.1.ffn_down_exps.weight", of_input.expert
        assert key not in moments_of(model, tokens, matrices=False)


def test_a_tensor_of_another_order_of_columns_has_the_matrix_of_that_order():
    model, tokens = tiny_llama(), random_tokens()
    attention, order = model.model.layers[0].self_attn, torch.randperm(32).numpy()
    weights = [
        Weight("plain", attention.o_proj.weight, View()),
        Weight("some rows", attention.q_proj.weight, View(rows=order[:5])),
        Weight("all rows", attention.q_proj.weight, View()),
    ]
    plain = moments_of(model, tokens, weights=weights)
    assert plain["all rows", None] is plain["some rows", None]
    turned = [Weight("turned", attention.o_proj.weight, View(columns=order))]
    expected = plain["plain", None].gram[order][:, order]
    torch.testing.assert_close(moments_of(model, tokens, weights=turned)["turned", None].gram, expected)


def test_parts_of_a_parameter_have_its_input_if_their_columns_are_the_parameters():
    """As the two parts of what multi-head latent attention expands: values have its columns, and keys its rows."""
    model, tokens = tiny_llama(), random_tokens()
    up = model.model.layers[0].mlp.up_proj.weight
    weights = [
        Weight("plain", up, View()),
        Weight("values", up, View(matrix=lambda parameter: parameter.reshape(4, 10, 32)[:, 4:])),
        Weight("keys", up, View(matrix=lambda parameter: parameter.reshape(4, 10, 32)[:, :4].transpose(1, 2))),
    ]
    moments = moments_of(model, tokens, weights=weights)
    assert moments.keys() == {("plain", None), ("values", None)}
    assert moments["values", None] is moments["plain", None]
    assert without_input(model, weights) == ["keys"]


def test_layers_of_one_input_share_its_matrix():
    sharing = [
        set(piece_tensors) for piece_tensors in {m.tensors for m in moments_of(tiny_llama(), random_tokens()).values()}
    ]
    block = "blk.1."
    assert {block + "attn_q.weight", block + "attn_k.weight", block + "attn_v.weight"} in sharing
    assert {block + "ffn_up.weight", block + "ffn_gate.weight"} in sharing
    assert {block + "ffn_down.weight"} in sharing and {"output.weight"} in sharing


def test_blocks_come_in_turn_and_what_is_around_them_last():
    model, tokens = tiny_llama(), random_tokens()
    pieces = list(input_moments(model, tokens, weights_of(model, names_of(model))))
    parts = [(piece.part, {name.split(".")[1] for m in piece.moments for name in m.tensors}) for piece in pieces]
    assert parts == [(0, {"0"}), (1, {"1"}), (2, {"weight"})]


def test_a_block_of_the_disk_is_in_memory_only_while_it_runs(tmp_path, monkeypatch):
    """The matrices that follow need the room: neither it nor the next block is there when they come, nor what is around."""
    source = describe_source(save_folder(tiny_llama(num_hidden_layers=3), tmp_path / "model"))
    model, _ = load_model(source, device="cpu", memory_limit=1)
    copies, fetch = [], Residence._fetch

    def fetched(residence, number):
        wait = fetch(residence, number)

        def note():
            placed = wait()
            copies.extend(weakref.ref(copy) for of_device in placed._copies.values() for _, copy in of_device)
            return placed

        return note

    monkeypatch.setattr(Residence, "_fetch", fetched)
    weights, memory = weights_of(model, names_of(model)), Memory(folder=tmp_path / "states")
    counts = []
    for piece in input_moments(model, random_tokens(), weights, memory=memory):
        counts.append((piece.part, len(copies)))
        assert not any(copy() is not None for copy in copies), piece.part
    per_block, ends = len(list(model.model.layers[0].parameters())), 2
    before = 2 * ends  # to see how the model is used, and to enter
    assert counts == [
        *((block, before + (block + 1) * per_block) for block in range(3)),
        (3, before + 3 * per_block + ends),
    ]


def test_between_two_pieces_others_compute_as_always():
    model, tokens = tiny_llama(), random_tokens()
    pieces = input_moments(model, tokens, weights_of(model, names_of(model)))
    next(pieces)
    weight = torch.ones(2, requires_grad=True)
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [2, 2]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_torch_does_not_show_is_known_before():
    dense, mixture = tiny_llama(), tiny_mixtral()
    assert without_input(dense, weights_of(dense, names_of(dense))) == []
    weights = weights_of(mixture, names_of(mixture))
    assert without_input(mixture, weights) == [f"blk.{b}.ffn_gate_inp.weight" for b in range(2)]


def test_the_same_text_gives_the_same_bits():
    runs = [moments_of(tiny_llama(), random_tokens(), batch_size=2) for _ in range(3)]
    for key, of_input in runs[0].items():
        assert all(torch.equal(run[key].gram, of_input.gram) for run in runs[1:])


def test_an_input_that_is_always_zero_has_no_moments():
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    names = {name for name, _ in moments_of(model, random_tokens())}
    assert "blk.0.ffn_down.weight" not in names and "blk.1.ffn_down.weight" in names


def test_nan_names_the_layer():
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SamqError, match=r"the input of blk\.1\.ffn_down\.weight has NaN or Inf"):
        moments_of(model, random_tokens())


def test_progress_counts_the_parts():
    told = []
    moments_of(tiny_llama(), random_tokens(), progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_pass_that_stopped_goes_on_at_the_part_that_was_not_finished(tmp_path, stop_after):
    model, tokens = tiny_llama(), random_tokens()
    weights = weights_of(model, names_of(model))
    expected = moments_of(model, tokens, batch_size=2)
    pieces = input_moments(model, tokens, weights, batch_size=2, memory=Memory(folder=tmp_path / "kept"))
    for _ in range(stop_after):
        last = next(pieces)
    pieces.close()
    again = list(input_moments(model, tokens, weights, batch_size=2, memory=Memory(folder=tmp_path / "kept")))
    assert again[0].part == last.part, "nobody has said that its moments were used"
    for of_input in [moments for piece in again for moments in piece.moments]:
        assert torch.equal(of_input.gram, expected[of_input.tensors[0], None].gram)
