from contextlib import suppress

import numpy as np
import pytest

from samq.allocation import price_rows
from samq.data.tokens import TokenBatch
from samq.quantization import compensation
from samq.quantization.inputs import measure_inputs
from samq.requirements import memory
from samq.requirements.memory import Taken, TorchRun, gradients, layer_inputs
from samq.requirements.outline import read_outline
from samq.sensitivity import memory as placing
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.hidden_states import HiddenStates, Writer
from samq.sensitivity.layout import GgufLayout, weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.memory import Memory
from samq.sensitivity.offloading import has_offloaded
from tests.samq.requirements.conftest import LLAMA_8B, LLAMA_70B
from tests.tiny_models import VOCABULARY, names_of, save_folder, tiny_llama, tiny_mixtral

GIB = 2**30
SEQUENCES, TOKENS = 12, 48


def run_of(outline, *, room=GIB, **settings):
    rooms = room if isinstance(room, tuple) else (room,)
    return TorchRun(
        outline, **dict(itemsize=4, on_gpu=False, rooms=rooms, batch_size=2, sequence_tokens=TOKENS) | settings
    )


@pytest.fixture
def folder(tmp_path):
    return save_folder(tiny_llama(num_hidden_layers=4), tmp_path / "model")


def on_disk(folder):
    model, _ = load_model(describe_source(folder), device="cpu", memory_limit=1)
    random = np.random.default_rng(0).integers(0, VOCABULARY, (SEQUENCES, TOKENS), dtype=np.int32)
    return model, TokenBatch(random, np.full(SEQUENCES, TOKENS, dtype=np.int32))


@pytest.fixture
def written_at_once(monkeypatch):
    """Files are there as soon as the pass asks for them."""
    submit = Writer.submit

    def wait(writer, change, size=0):
        future = submit(writer, change, size)
        future.result()
        return future

    monkeypatch.setattr(Writer, "submit", wait)


def bytes_in(folder):
    """Of the tensors in a folder's safetensors, without their headers; a thread may drop files meanwhile."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size - 8 - header_of(path)
    return total


def header_of(path):
    with path.open("rb") as file:
        return int.from_bytes(file.read(8), "little")


@pytest.mark.usefixtures("written_at_once")
def test_states_on_disk_are_what_a_backward_pass_writes(folder, tmp_path):
    model, tokens = on_disk(folder)
    largest = 0

    def look(*_):
        nonlocal largest
        largest = max(largest, bytes_in(tmp_path / "scratch"))

    measure_sensitivity(
        model,
        tokens,
        GgufLayout(weights_of(model, names_of(model))),
        Origin("", ""),
        labelling=Labelling("model"),
        batch_size=2,
        memory=Memory(None, tmp_path / "scratch"),
        progress=look,
    )
    taken = gradients(run_of(read_outline(str(folder), None, "F16", tmp_path), room=1), SEQUENCES)
    states = SEQUENCES * TOKENS * 32 * 4
    assert taken.scratch == (4 + 1 + 2) * states
    assert 0.7 * taken.scratch < largest < 1.1 * taken.scratch  # beside the states there are sums of each weight


@pytest.mark.usefixtures("written_at_once")
def test_states_on_disk_are_what_a_pass_over_inputs_writes(folder, tmp_path, monkeypatch):
    model, tokens = on_disk(folder)
    largest, drop = 0, HiddenStates.drop

    def look(states, block):
        nonlocal largest
        scratch = tmp_path / "scratch"
        largest = max(largest, sum(path.stat().st_size for path in scratch.glob("inputs-*.safetensors")))
        drop(states, block)

    monkeypatch.setattr(HiddenStates, "drop", look)
    weights = weights_of(model, names_of(model))
    measure_inputs(model, tokens, weights, shares=True, memory=Memory(None, tmp_path / "scratch"))
    taken = layer_inputs(run_of(read_outline(str(folder), None, "F16", tmp_path)), SEQUENCES * TOKENS, matrices=True)
    assert taken.scratch == 3 * SEQUENCES * TOKENS * 32 * 4
    assert 0.5 * taken.scratch < largest < 1.1 * taken.scratch


@pytest.mark.parametrize("share, whole", [(1.0, False), (1.99, False), (2.01, True)])
def test_a_model_is_whole_where_it_is_loaded_whole(folder, tmp_path, share, whole):
    outline = read_outline(str(folder), None, "F16", tmp_path)
    room = int(share * 4 * outline.weights)
    model, _ = load_model(describe_source(folder), device="cpu", memory_limit=room)
    run = run_of(outline, room=room)
    assert run.is_whole is not has_offloaded(model)
    assert run.is_whole is whole
    block = max(sum(p.numel() for p in layer.parameters()) for layer in model.model.layers)
    norm, embedding, output = (
        module.weight.numel() for module in (model.model.norm, model.model.embed_tokens, model.lm_head)
    )
    assert run.resident == 4 * (outline.weights if whole else norm + 3 * block)  # pages of a file as well
    on_gpu = run_of(outline, room=room, on_gpu=True)
    assert on_gpu.resident == 4 * (outline.weights if whole else norm + 2 * block)
    assert on_gpu.before_blocks == 4 * (outline.weights if whole else norm + embedding)
    assert on_gpu.after_blocks == 4 * (outline.weights if whole else norm + output)


def test_a_tied_embedding_comes_before_the_blocks_and_after_them(tmp_path):
    outline = read_outline(str(save_folder(tiny_llama(tied=True), tmp_path / "tied")), None, "F16", tmp_path)
    run = run_of(outline, room=1, on_gpu=True)
    assert run.before_blocks == run.after_blocks == 4 * (outline.weights - outline.weights_in_blocks)


def test_around_the_blocks_of_a_gguf_all_stays_on_the_gpu(tiny_gguf, tmp_path):
    outline = read_outline(str(tiny_gguf), None, "F16", tmp_path)
    run = run_of(outline, room=1, on_gpu=True)
    around = 4 * (outline.weights - outline.weights_in_blocks)
    assert run.staying == run.before_blocks == run.after_blocks == around
    assert run.resident == around + 2 * run.block


def test_a_model_is_spread_over_gpus_if_the_first_does_not_hold_it(folder, tmp_path):
    outline = read_outline(str(folder), None, "F16", tmp_path)
    size = 4 * outline.weights
    first, spread, neither = (
        run_of(outline, on_gpu=True, room=rooms) for rooms in ((2 * size, 1), (size, size), (size // 2, size // 2))
    )
    assert (first.is_whole, first.is_spread, first.room) == (True, False, 2 * size)
    assert (spread.is_whole, spread.is_spread, spread.room) == (True, True, 2 * size)
    assert (neither.is_whole, neither.is_spread, neither.room) == (False, False, size // 2)


def test_each_expert_has_a_gram_matrix(tmp_path):
    outline = read_outline(str(save_folder(tiny_mixtral(), tmp_path / "moe")), None, "F16", tmp_path)
    stacked = [tensor for tensor in outline.largest_block if len(tensor.shape) == 3]
    others = [tensor for tensor in outline.largest_block if len(tensor.shape) == 2]
    assert {tensor.shape[0] for tensor in stacked} == {4}
    expected = [4 * t.row_length**2 for t in others] + 4 * [4 * t.row_length**2 for t in stacked]
    assert sorted(run_of(outline).gram_bytes) == sorted(expected)


def test_what_h200s_took_is_what_the_formulas_say(outline_of):
    """docs/benchmarks.md: 96 sequences of 512 tokens in bfloat16."""
    on_card = dict(itemsize=2, on_gpu=True, sequence_tokens=512)
    of_8b = gradients(run_of(outline_of("8b", **LLAMA_8B), **on_card, room=140 * GIB, batch_size=16), 96)
    assert of_8b.gpu / GIB == pytest.approx(29.9, rel=0.05)
    assert (of_8b.scratch, of_8b.ram) == (0, 0)
    some = outline_of("70b", **LLAMA_70B | {"num_hidden_layers": 16})
    of_70b = gradients(run_of(some, **on_card, room=20 * GIB, batch_size=8), 96)
    ends = 2 * 128256 * 8192 * 2 / GIB  # stayed on the GPU then
    assert of_70b.gpu / GIB == pytest.approx(10.1 - ends, rel=0.05)
    assert of_70b.scratch == (16 + 3) * 96 * 512 * 8192 * 2
    run = run_of(some, **on_card, room=20 * GIB, batch_size=8)
    diagonals, matrices = (layer_inputs(run, 96 * 512, matrices=matrices).gpu for matrices in (False, True))
    assert (
        run.after_blocks < diagonals < run.resident + GIB < matrices < memory.compensation(run, 96 * 512).gpu < 20 * GIB
    )


def test_a_processor_takes_in_ram_what_a_gpu_takes_of_its_own(folder, tmp_path):
    outline = read_outline(str(folder), None, "F16", tmp_path)
    on_gpu, on_processor = (
        layer_inputs(run_of(outline, room=room, on_gpu=gpu), 100, matrices=True)
        for gpu, room in ((True, 1), (False, GIB))
    )
    assert on_gpu.gpu > 0 == on_processor.gpu
    assert on_processor.ram > on_processor.scratch


def test_more_sequences_and_larger_batches_take_more(folder, tmp_path):
    outline = read_outline(str(folder), None, "F16", tmp_path)
    few, many = (gradients(run_of(outline, room=1, on_gpu=True), count) for count in (10, 20))
    assert many.scratch == 2 * few.scratch
    assert many.gpu - few.gpu == 10 * TOKENS * 32 * 4  # the slopes
    whole = [gradients(run_of(outline, batch_size=size), 10).ram for size in (1, 2)]
    assert whole[1] - whole[0] == whole[0] - 4 * outline.weights


def test_a_gguf_waits_in_ram_beside_a_gpu(tiny_gguf, tmp_path):
    run = run_of(read_outline(str(tiny_gguf), None, "F16", tmp_path), on_gpu=True, room=1)
    assert not run.is_whole
    assert run.on_device(5, ram=7) == Taken(gpu=5, ram=7 + run.weights)
    assert run_of(run.outline, room=1).is_whole  # on a processor it waits nowhere else


def test_llama_quantize_has_the_largest_tensor_twice_in_float32(tiny_gguf, tmp_path):
    outline = read_outline(str(tiny_gguf), None, "F16", tmp_path)
    assert memory.llama_quantize(outline) == Taken(ram=2 * 4 * 256 * 512)


def test_limits_are_those_of_the_stages():
    assert memory.ROUNDED_AT_ONCE == {
        True: compensation._GPU_WEIGHTS_AT_A_TIME,
        False: compensation._WEIGHTS_AT_A_TIME,
    }
    assert memory.PRICED_AT_ONCE == price_rows._PART_WEIGHTS
    assert memory.STATES_SHARE == placing._SHARE


def test_both_at_once():
    assert Taken(1, 2, 3, 4).beside(Taken(10, 20, 30, 40)) == Taken(11, 22, 33, 44)
