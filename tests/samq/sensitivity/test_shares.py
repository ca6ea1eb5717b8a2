"""Several devices share the sequences, and give the bits that one gives."""

from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from samq.data.tokens import TokenBatch
from samq.quantization.inputs import measure_inputs
from samq.sensitivity.blocks import Blocks
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.gram import input_moments
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.hidden_states import HiddenStates, Writer
from samq.sensitivity.layout import GgufLayout, weights_of
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity
from samq.sensitivity.memory import Memory, compute_devices
from samq.sensitivity.offloading import stored_of
from samq.sensitivity.resume import Checkpoints
from samq.sensitivity.shares import in_turn, over_devices, rounds, shares
from tests.architectures.models import write_model
from tests.samq.sensitivity.test_block_pass import MODELS, Killed, killing, require_identical  # noqa: F401
from tests.tiny_models import names_of, random_tokens, tiny_gpt2, tiny_llama, tiny_mixtral

LENGTHS = (12, 5, 9, 2, 12, 7, 3, 11, 4, 6, 8)
WITH_GPT2 = {name: (make, "llama") for name, make in MODELS.items()} | {"GPT-2": (tiny_gpt2, "gpt2")}


def cpus(count):
    """As many CPUs as torch takes for different devices: each but the first gets copies of all weights."""
    return (torch.device("cpu"), *(torch.device("cpu", number) for number in range(1, count)))


def measure(model, tokens, devices, folder=None, architecture="llama", batch_size=2):
    layout = GgufLayout(weights_of(model, names_of(model, architecture)))
    memory = Memory(folder=folder, devices=cpus(devices))
    labelling, origin = Labelling("model"), Origin("model", "text")
    return measure_sensitivity(model, tokens, layout, origin, labelling=labelling, batch_size=batch_size, memory=memory)


def moments_of(model, tokens, devices, folder=None, architecture="llama"):
    weights, memory = weights_of(model, names_of(model, architecture)), Memory(folder=folder, devices=cpus(devices))
    pieces = input_moments(model, tokens, weights, batch_size=2, memory=memory)
    return {(m.tensors, m.expert): m for piece in pieces for m in piece.moments}


def require_same_moments(one, other):
    assert one.keys() == other.keys() and one
    for key, moments in one.items():
        assert torch.equal(moments.gram, other[key].gram) and moments.tokens == other[key].tokens, key


@pytest.mark.parametrize(
    ("items", "devices", "expected"),
    [(5, 1, [5]), (5, 2, [2, 3]), (6, 3, [2, 2, 2]), (2, 4, [1, 1, 0, 0]), (0, 2, [0, 0])],
)
def test_shares_are_runs_in_order_of_about_one_length(items, devices, expected):
    parts = shares(range(items), devices)
    assert [len(part) for part in parts] == expected
    assert [item for part in parts for item in part] == list(range(items))


def test_devices_get_one_item_each_in_turn():
    assert list(in_turn(["abc", "d", "", "ef"])) == [(0, "a"), (1, "d"), (3, "e"), (0, "b"), (3, "f"), (0, "c")]


@pytest.mark.parametrize("items", [1, 7, 8, 30])
def test_the_runs_of_rounds_do_not_depend_on_the_devices(items):
    runs = [[list(run) for of_round in rounds(range(items), devices) for run in of_round] for devices in (1, 2, 3, 20)]
    assert all(some == runs[0] for some in runs) and len(runs[0]) == min(items, 8)
    assert [item for run in runs[0] for item in run] == list(range(items))
    assert max(len(of_round) for of_round in rounds(range(30), 3)) == 3


def test_results_of_several_devices_come_in_order_and_errors_are_raised():
    used = Counter()

    def work(item, device):
        used[device] += 1
        return item * item

    assert over_devices(work, range(20), cpus(3)) == [item * item for item in range(20)]
    assert set(used) <= set(cpus(3)) and sum(used.values()) == 20
    assert over_devices(lambda item, device: device, [1, 2], cpus(1)) == [None, None]
    with pytest.raises(ZeroDivisionError):
        over_devices(lambda item, device: 1 / item, [1, 0, 2], cpus(2))


def test_the_models_own_device_is_the_first_of_those_that_share():
    cpu, gpus = torch.device("cpu"), [torch.device("cuda", number) for number in range(3)]
    assert Memory().sharing(cpu) == [cpu]
    assert Memory(devices=(cpu,)).sharing(gpus[1]) == [gpus[1]]
    assert Memory(devices=tuple(gpus)).sharing(gpus[1]) == [gpus[1], gpus[0], gpus[2]]
    assert Memory(devices=(cpu,) * 3).sharing(cpu) == [cpu] * 3


@pytest.mark.parametrize(
    ("device", "expected"),
    [("auto", ["cuda:0", "cuda:1"]), ("cuda:1", ["cuda:1"]), ("cuda", ["cuda"]), ("cpu", ["cpu"])],
)
def test_auto_is_all_gpus(device, expected, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert compute_devices(device) == tuple(map(torch.device, expected))


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compute_devices("auto") == (torch.device("cpu"),)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("name", WITH_GPT2)
def test_sensitivities_are_those_of_one_device(name, batch_size, by_blocks, tmp_path):
    make, architecture = WITH_GPT2[name]
    model, tokens = make(), random_tokens(LENGTHS)
    one = measure(model, tokens, 1, architecture=architecture, batch_size=batch_size)
    for devices, folder in ((2, None), (3, tmp_path / "kept"), (20, None)):
        require_identical(measure(model, tokens, devices, folder, architecture, batch_size), one)
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_killed_pass_goes_on_with_another_number_of_devices(name, killing, by_blocks, tmp_path):  # noqa: F811
    model, tokens = MODELS[name](), random_tokens()
    killing(-1)
    whole = measure(model, tokens, 1)
    worked = killing(-1)
    for number, after in enumerate(range(1, sum(worked.values()), 5)):
        folder, devices = tmp_path / f"killed-{after}", (3, 1, 2)[number % 3]
        killing(after)
        with pytest.raises(Killed):
            measure(model, tokens, devices, folder)
        killing(-1)
        require_identical(measure(model, tokens, devices % 3 + 1, folder), whole)


@pytest.mark.parametrize("kind", [tiny_llama, tiny_mixtral, lambda: tiny_llama(tied=True)])
def test_moments_are_those_of_one_device(kind, tmp_path):
    model, tokens = kind(), random_tokens(LENGTHS)
    one = moments_of(model, tokens, 1)
    for devices in (2, 3, 20):
        require_same_moments(moments_of(model, tokens, devices), one)
        require_same_moments(moments_of(model, tokens, devices, tmp_path / f"kept-{devices}"), one)


def test_shares_of_the_error_and_importances_are_those_of_one_device():
    model, tokens = tiny_mixtral(), random_tokens(LENGTHS)
    weights = weights_of(model, names_of(model))
    one, three = (
        measure_inputs(model, tokens, weights, shares=True, memory=Memory(devices=cpus(count))) for count in (1, 3)
    )
    assert three.shares == one.shares and one.shares
    assert three.importance.keys() == one.importance.keys()
    for name, entry in one.importance.items():
        assert (three.importance[name].sums == entry.sums).all()
        assert (three.importance[name].tokens == entry.tokens).all()


@pytest.mark.parametrize(("name", "architecture"), [("Qwen2.5, tied", "qwen2"), ("Mamba", "mamba")])
def test_blocks_on_disk_are_read_once_for_all_devices(name, architecture, tmp_path, reads):
    source = describe_source(write_model(name, tmp_path / "model"))
    tokens = TokenBatch.of([np.arange(length) * 7 % 200 for length in (24, 17, 24, 9)])
    measured, counts, moments = [], [], []
    for devices in (1, 3):
        model, _ = load_model(source, device="cpu", memory_limit=1)
        reads.clear()
        measured.append(measure(model, tokens, devices, tmp_path / f"kept-{devices}", architecture))
        counts.append(dict(reads))
        moments.append(moments_of(model, tokens, devices, architecture=architecture))
    require_identical(measured[1], measured[0])
    require_same_moments(*moments)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    of_ends = {stored_of(end.weight).name for end in ends}
    assert counts[1] == counts[0]
    again = architecture == "mamba"  # its first block shows that sequences go one by one, and the pass begins once more
    of_first = {name for name in counts[0] if ".layers.0." in name}
    of_blocks = {name: count for name, count in counts[0].items() if name not in of_ends}
    assert of_blocks == {name: 2 + (again and name in of_first) for name in of_blocks}, "forward and backward"
    assert max(counts[0][name] for name in of_ends) == 3 + again, "before the blocks there and back, and after them"


def test_each_device_has_its_own_copies_and_the_model_is_left_as_it_was():
    model = tiny_llama(tied=True)
    blocks, before = Blocks.of(model), dict(model.named_parameters())
    one, other = cpus(2)
    with blocks.resident([one, other]) as weights:
        for number in range(len(blocks) + 1):
            with weights.part(number, number + 1) as placed:
                with placed.on(one) as part:
                    originals = dict(part.named_parameters())
                with placed.on(other) as part:
                    copies = dict(part.named_parameters())
                    if number == len(blocks):
                        assert model.lm_head.weight is model.model.embed_tokens.weight
                        inside = {id(parameter) for layer in blocks.layers for parameter in layer.parameters()}
                        copies = {name: copy for name, copy in copies.items() if id(copy) not in inside}
                assert copies and all(copies[name] is not originals[name] for name in copies)
                assert all(torch.equal(copies[name], originals[name]) for name in copies)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)


def test_blocks_run_where_their_inputs_are_and_not_where_accelerate_sends_them():
    model = tiny_llama()
    blocks = Blocks.of(model)
    linear = blocks.layers[1].mlp.up_proj
    add_hook_to_module(linear, AlignDevicesHook(execution_device="cpu"))
    hooked = linear.forward
    with blocks.resident(cpus(1)):
        assert linear.forward is hooked
    with blocks.resident(cpus(2)):
        assert linear.forward is linear._old_forward
    assert linear.forward is hooked


@pytest.mark.parametrize("kept", ["in memory", "on disk"])
def test_states_come_for_one_batch_of_each_device_in_turn(kept, tmp_path):
    checkpoints = Checkpoints(tmp_path / "kept" if kept == "on disk" else None)
    device = torch.device("cpu") if kept == "in memory" else None
    with HiddenStates(device, checkpoints, writer := Writer()) as states, writer:
        for block in range(3):
            for batch in range(6):
                states.put(block, batch, torch.full((2,), 10.0 * block + batch))
            states.close(block)
        writer.submit(lambda: None).result()  # all before it is on disk
        for block in range(3):
            come = list(states.each(block, [range(3), range(3, 4), range(4, 6)], cpus(3)))
            assert [(share, batch) for share, batch, _ in come] == [(0, 0), (1, 3), (2, 4), (0, 1), (2, 5), (0, 2)]
            assert [of_batch.tolist() for _, _, of_batch in come] == [[10.0 * block + b] * 2 for _, b, _ in come]
        assert list(states.each(0, [range(0)], cpus(1))) == []
