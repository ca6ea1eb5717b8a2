"""What is measured with torch: a GPU gives what the CPU gives, the same every time, and says when its memory is full."""

import numpy as np
import pytest
import torch

from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.gram import input_moments
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import GgufLayout, weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.memory import Memory
from tests.samq.allocation.test_prediction_check import MODELS, check, quantized
from tests.tiny_models import VOCABULARY, names_of, random_tokens, save_folder, tiny_llama

MIB = 2**20
WIDE = dict(hidden_size=512, intermediate_size=1000, max_position_embeddings=256, initializer_range=0.05)


def measure(model, tokens, architecture="llama", *, layout=None, labels="text", seed=0, first_sequence=0, **arguments):
    return measure_sensitivity(
        model,
        tokens,
        layout or GgufLayout(weights_of(model, names_of(model, architecture))),
        Origin("model", "text"),
        labelling=Labelling(labels, seed, first_sequence),
        **arguments,
    )


def text(sequences=6, length=256):
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (sequences, length))
    return TokenBatch.of(ids.tolist())


@pytest.fixture
def memory():
    """Bytes that torch may still take, for the length of a test."""

    def limit(more):
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / whole)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("labels", ["text", "model"])
@pytest.mark.parametrize("kind", MODELS)
def test_sensitivities_are_those_of_the_cpu(kind, labels):
    make, architecture = MODELS[kind]
    (one, fisher), (two, fisher_two) = (
        measure(make().to(device), random_tokens(), architecture, labels=labels) for device in ("cpu", "cuda")
    )
    assert two.loss_nats == pytest.approx(one.loss_nats, rel=1e-5)
    for name, tensor in one.tensors.items():
        assert two.tensors[name].gradient_norm == pytest.approx(tensor.gradient_norm, rel=1e-3)
        for part in ("rows", "columns"):
            wanted = getattr(fisher[name], part)
            np.testing.assert_allclose(getattr(fisher_two[name], part), wanted, rtol=1e-2, atol=1e-6 * wanted.max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_two_runs_are_identical(tied, batch_size, dtype):
    model = tiny_llama(tied, **WIDE).to("cuda", dtype)
    runs = [measure(model, text(), labels="model", batch_size=batch_size) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    for name, one in runs[0][1].items():
        other = runs[1][1][name]
        assert np.array_equal(one.rows, other.rows) and np.array_equal(one.columns, other.columns)


def test_bfloat16_is_near_float32():
    exact, rounded = (
        measure(tiny_llama(**WIDE).to("cuda", dtype), text())[0] for dtype in (torch.float32, torch.bfloat16)
    )
    assert rounded.loss_nats == pytest.approx(exact.loss_nats, rel=0.01)
    for name, tensor in exact.tensors.items():
        assert rounded.tensors[name].gradient_norm == pytest.approx(tensor.gradient_norm, rel=0.05)


@pytest.mark.parametrize("kind", MODELS)
def test_the_check_of_a_prediction_is_that_of_the_cpu(kind, tmp_path):
    make, architecture = MODELS[kind]
    model = make()
    arguments = quantized(model, tmp_path, ["Q4_0", "F16", "Q8_0"], architecture)
    one, two = (check(model.to(device), random_tokens(), **arguments) for device in ("cpu", "cuda"))
    for figure in ("additive", "by_tensor", "joint"):
        assert getattr(two, figure).value == pytest.approx(getattr(one, figure).value, rel=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_gram_matrices_are_those_of_the_cpu_and_the_same_every_time(kind):
    make, architecture = MODELS[kind]
    runs = []
    for device in ("cpu", "cuda", "cuda"):
        model = make().to(device)
        weights = weights_of(model, names_of(model, architecture))
        pieces = input_moments(model, random_tokens(), weights, batch_size=2)
        runs.append({(m.tensors, m.expert): m for piece in pieces for m in piece.moments})
    one, two, again = runs
    assert one.keys() == two.keys() == again.keys()
    for key in one:
        assert torch.equal(two[key].gram, again[key].gram) and two[key].tokens == one[key].tokens
        torch.testing.assert_close(two[key].gram.cpu(), one[key].gram, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_a_model_is_loaded_onto_the_gpu(device, dtype, tmp_path):
    source = describe_source(save_folder(tiny_llama(), tmp_path / "tiny"))
    model, _ = load_model(source, dtype, device)
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cuda:0")}
    one, _ = measure(model, random_tokens())
    two, _ = measure(load_model(source, dtype, "cpu")[0], random_tokens())
    assert one.loss_nats == pytest.approx(two.loss_nats, rel=1e-5 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_blocks_that_stay_on_disk_give_the_same(tied, dtype, tmp_path):
    source = describe_source(save_folder(tiny_llama(tied, **WIDE), tmp_path / "tiny"))
    resident, on_disk = (load_model(source, dtype, "cuda:0", memory_limit=limit)[0] for limit in (None, 1))
    assert any(parameter.is_meta for parameter in on_disk.parameters())
    memory = Memory(folder=tmp_path / "states")
    one, two = measure(resident, text()), measure(on_disk, text(), memory=memory)
    assert one[0] == two[0]
    for name, fisher in one[1].items():
        assert np.array_equal(fisher.rows, two[1][name].rows) and np.array_equal(fisher.columns, two[1][name].columns)


@pytest.mark.parametrize("device", ["auto", "cuda:0"])
def test_a_model_that_the_memory_does_not_hold_is_one_sentence(device, tmp_path, memory):
    source = describe_source(save_folder(tiny_llama(**WIDE), tmp_path / "tiny"))
    memory(MIB)
    with pytest.raises(SamqError, match=r"transformers cannot load tiny as float32 on \w+.*out of memory"):
        load_model(source, device=device)


def test_a_pass_that_the_memory_does_not_hold_is_one_sentence(memory):
    model, tokens = tiny_llama(**WIDE).cuda(), text(64)
    measure(model, tokens.part(0, 2))
    memory(64 * MIB)
    with pytest.raises(SamqError, match="the GPU's memory does not hold a pass over 64 sequences of up to 256 tokens"):
        measure(model, tokens, batch_size=64)
    assert measure(model, tokens.part(0, 2))[0].samples == 2, "what failed has left nothing behind"
