"""What is around the blocks of a model on disk: embedding, output, and tables of positions."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from samq.allocation.target import OpenTarget
from samq.allocation.types import uniform_plan
from samq.data.tokens import TokenBatch
from samq.errors import SamqError
from samq.gguf.nearest import NearestRounding
from samq.quantization.compensated_file import PlannedFile
from samq.quantization.compensation import write_compensated
from samq.sensitivity import offloading
from samq.sensitivity.blocks import Blocks, logits_of, main_device
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.gram import input_moments
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import GgufLayout, Weight, read_layout
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.memory import Memory
from samq.sensitivity.offloading import StoredTensor, is_offloaded, stored_of, values_of
from samq.sensitivity.views import View
from tests.architectures.models import write_model
from tests.tiny_models import names_of, save_folder, tiny_llama, write_llama_gguf

# Embedding and output apart, one for both, experts, a scaled embedding, a table of positions, a norm behind the embedding
MODELS = ["Llama", "Qwen2.5, tied", "Mixtral", "Gemma 3", "GPT-2", "Bloom"]
TOKENS = TokenBatch.of([np.arange(length) * 7 % 200 for length in (24, 17, 24)])


def both(source):
    """The model in memory, and the same on disk."""
    return [load_model(source, device="cpu", memory_limit=limit)[0] for limit in (None, 1)]


def all_matrices(model):
    return [
        Weight(name, parameter, View())
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3) and parameter.shape[0] > 1
    ]


def measure(model, folder=None):
    return measure_sensitivity(
        model,
        TOKENS,
        GgufLayout(all_matrices(model)),
        Origin("model", "text"),
        labelling=Labelling("model", seed=1),
        batch_size=2,
        memory=Memory(folder=folder),
    )


def ends_of(model):
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_on_disk_gives_the_bits_of_one_in_memory(name, tmp_path, by_blocks):
    in_memory, on_disk = both(describe_source(write_model(name, tmp_path / "model")))
    assert all(map(is_offloaded, ends_of(on_disk))) and not any(map(is_offloaded, in_memory.parameters()))
    assert len(set(map(id, ends_of(on_disk)))) == len(set(map(id, ends_of(in_memory)))), "tied as in memory"
    (one, fisher), (other, other_fisher) = measure(in_memory), measure(on_disk, tmp_path / "kept")
    assert one == other
    for tensor, wanted in fisher.items():
        for part in ("rows", "columns"):
            assert np.array_equal(getattr(wanted, part), getattr(other_fisher[tensor], part)), tensor
    moments = [
        [
            of_one
            for piece in input_moments(model, TOKENS, all_matrices(model), batch_size=2)
            for of_one in piece.moments
        ]
        for model in (in_memory, on_disk)
    ]
    for wanted, measured in zip(*moments, strict=True):
        assert measured.tensors == wanted.tensors and measured.tokens == wanted.tokens
        assert torch.equal(measured.gram, wanted.gram)
    ids = torch.from_numpy(TOKENS.ids[:1].astype(np.int64))
    logits = [next(logits_of(model, [(ids, torch.ones_like(ids))])) for model in (in_memory, on_disk)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_compensated_files_are_the_same_byte_for_byte(tied, toolchain, tmp_path):
    network = tiny_llama(tied, hidden_size=256, intermediate_size=512, vocab_size=256)
    source = describe_source(save_folder(network, tmp_path / "model"))
    target = OpenTarget.open(write_llama_gguf(network, tmp_path / "full.gguf"), toolchain)
    rounding, files = NearestRounding(target.full.path), []
    for number, model in enumerate(both(source)):
        path, plan = tmp_path / f"{number}.gguf", uniform_plan(target, "Q4_K")
        weights = read_layout(model, names_of(model), target.full.path).weights
        file = PlannedFile.create(path, target.full.path, plan, {})
        pieces, log = input_moments(model, TOKENS, weights), tmp_path / f"log-{number}"
        errors = write_compensated({"it": file}, rounding, rounding, pieces, log, everything=True)["it"]
        assert ("output.weight" in errors.tensors) is not tied
        files.append(path.read_bytes())
    assert files[0] == files[1]


def has_values(weight):
    """Whether it is in memory: parameters on the meta device are not, nor are zeros in place of a matrix that is not needed."""
    return not weight.is_meta and weight.untyped_storage().nbytes() >= weight.nbytes


@pytest.mark.parametrize("name", ["Llama", "Qwen2.5, tied"])
def test_embedding_and_output_are_on_disk_while_blocks_run(name, tmp_path, monkeypatch):
    _, model = both(describe_source(write_model(name, tmp_path / "model")))
    blocks, parameters, seen = Blocks.of(model), list(model.parameters()), set()

    def noting(work, plain):
        def note(*arguments):
            seen.add((work, *map(has_values, ends_of(model))))
            return plain(*arguments)

        return note

    monkeypatch.setattr(Blocks, "of", classmethod(lambda *_: blocks))
    for work in ("enter", "run", "logits"):
        monkeypatch.setattr(Blocks, work, noting(work, getattr(Blocks, work)))
    measure(model)
    list(input_moments(model, TOKENS, all_matrices(model)))
    tied = name != "Llama"
    assert seen == {("enter", True, tied), ("run", False, False), ("logits", tied, True)}
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("name", ["Llama", "Qwen2.5, tied", "GPT-2"])
def test_what_is_around_the_blocks_is_read_once_for_all_batches(name, tmp_path, reads):
    _, model = both(describe_source(write_model(name, tmp_path / "model")))
    embedding, output = (stored_of(end).name for end in ends_of(model))
    Blocks.of(model)
    assert not reads, "how it comes apart is seen without"
    measure(model)
    assert reads[embedding] == (2 if output != embedding else 3), "before the blocks there and back"
    assert output == embedding or reads[output] == 1
    reads.clear()
    list(input_moments(model, TOKENS, all_matrices(model)))
    assert reads[embedding] == (1 if output != embedding else 2) and (output == embedding or reads[output] == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_some_rows_are_read_in_the_type_that_they_are_computed_with(stored, dtype, tmp_path):
    values = {name: torch.randn(size).to(stored) for name, size in (("a", (5,)), ("b", (7, 3)), ("c", (4, 2, 3)))}
    save_file(values, tmp_path / "some.safetensors")
    for name, wanted in values.items():
        tensor = StoredTensor(tmp_path / "some.safetensors", name, dtype, torch.device("cpu"))
        for rows in (..., slice(0, 2), slice(2, 4)):
            part = wanted[rows].to(dtype)
            assert torch.equal(tensor.read(torch.empty_like(part), rows), part)
    other = torch.empty(3, 7, dtype=dtype).t()  # not contiguous
    assert torch.equal(
        StoredTensor(tmp_path / "some.safetensors", "b", dtype, other.device).read(other), values["b"].to(dtype)
    )


def test_a_file_that_was_replaced_is_read_as_it_is_and_one_cut_short_is_named(tmp_path):
    path = tmp_path / "some.safetensors"
    tensor = StoredTensor(path, "b", torch.float32, torch.device("cpu"))
    for names in ("b", "ab"):
        save_file({name: torch.full((50, 3), float(ord(name))) for name in names}, path)
        assert (tensor.read(torch.empty(50, 3)) == ord("b")).all()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SamqError, match=r"some\.safetensors became shorter"):
        tensor.read(torch.empty(50, 3))


def test_a_large_tensor_is_read_in_parts(tmp_path, reads, monkeypatch):
    in_memory, on_disk = both(describe_source(write_model("Mixtral", tmp_path / "model")))
    monkeypatch.setattr(offloading, "READ_AT_ONCE", 100_000)
    for parameter, wanted in zip(on_disk.parameters(), in_memory.parameters(), strict=True):
        reads.clear()
        assert torch.equal(values_of(parameter), wanted) and (values_of(parameter).dtype == wanted.dtype)
        if is_offloaded(parameter):
            rows = max(1, 100_000 // wanted[0].nbytes)
            assert reads.total() == 2 * -(-len(wanted) // rows)


@pytest.mark.parametrize("alike", [True, False])
def test_an_output_that_the_file_has_beside_the_embedding_is_tied_if_it_is_the_same(alike, tmp_path, by_blocks):
    folder = write_model("Llama, tied and stored twice", tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    if not alike:
        save_file(weights | {"lm_head.weight": weights["lm_head.weight"] * 2}, path, metadata={"format": "pt"})
    for model in both(describe_source(folder)):
        embedding, output = ends_of(model)
        assert (embedding is output) is alike
        assert torch.equal(values_of(output), values_of(embedding) * (1 if alike else 2))


def test_a_file_may_have_the_output_instead_of_a_tied_embedding(tmp_path):
    folder = write_model("Qwen2.5, tied", tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, path, metadata={"format": "pt"})
    in_memory, on_disk = both(describe_source(folder))
    embedding, output = ends_of(on_disk)
    assert embedding is output and torch.equal(values_of(embedding), ends_of(in_memory)[0])


def test_an_embedding_that_logits_depend_on_is_there_for_them(tmp_path, by_blocks):
    """Also if it does so beside the hidden states."""
    models = both(describe_source(write_model("Llama", tmp_path / "model")))
    for model in models:

        def forward(*arguments, decoder=model.model, plain=model.model.forward, **more):
            output = plain(*arguments, **more)
            output.last_hidden_state = output.last_hidden_state + decoder.embed_tokens(more["input_ids"])
            return output

        model.model.forward = forward
    ids = torch.arange(24)[None]
    wanted, given = (next(logits_of(model, [(ids, torch.ones_like(ids))])) for model in models)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)


def test_the_device_of_a_model_on_disk_is_the_one_that_computes(tmp_path):
    _, model = both(describe_source(write_model("OLMo", tmp_path / "model")))
    assert all(parameter.is_meta for parameter in model.parameters()), "its norms have no weights"
    assert main_device(model) == torch.device("cpu")
