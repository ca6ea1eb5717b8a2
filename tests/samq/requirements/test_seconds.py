"""That times are products of what is done and of rates; how long anything takes is not tested."""

from dataclasses import replace

import pytest
import torch

from samq.errors import SamqError
from samq.evaluation.settings import EvaluationSettings
from samq.requirements.memory import TorchRun
from samq.requirements.outline import read_outline
from samq.requirements.rates import Rates, measure_rates
from samq.requirements.seconds import Clock
from samq.sensitivity.hf_model import DTYPES

RATES = Rates(
    products={"float32": 1e9, "float64": 5e8},
    host_products=1e9,
    host_bytes=1e9,
    gpu_bytes=None,
    write_bytes=1e8,
    read_bytes=2e8,
    hash_bytes=5e8,
    rounding={"Q4_K": 1e6, "Q8_0": 4e6},
)


@pytest.fixture
def clock(tiny_gguf, tmp_path):
    outline = read_outline(str(tiny_gguf), None, "F16", tmp_path)
    run = TorchRun(outline, itemsize=4, on_gpu=False, rooms=(10**9,), batch_size=1, sequence_tokens=64)
    return Clock(run, "float32", RATES, ram=10**9, gpu=0)


def test_files_are_read_written_and_hashed(clock):
    assert clock.files(written=10**9) == pytest.approx(10 + 2)
    assert clock.files(read=10**9) == pytest.approx(1 + 2)  # it is in memory from before
    assert replace(clock, ram=1).files(read=10**9) == pytest.approx(5 + 2)


def test_rounding_takes_each_type_at_its_rate(clock):
    assert clock.rounding([{"Q4_K": 2_000_000, "Q8_0": 4_000_000}, {"Q8_0": 8_000_000}]) == pytest.approx(2 + 1 + 2)


def test_gradients_grow_with_tokens_and_with_states_on_disk(clock):
    once = clock.gradients(10, states=0)
    assert once == pytest.approx(6 * clock.run.outline.active_weights * 640 / 0.8e9)
    assert clock.gradients(20, states=0) == pytest.approx(2 * once)
    assert clock.gradients(10, states=10**8) == pytest.approx(max(once, 1))
    assert clock.gradients(10, states=10**12) == pytest.approx(10**4)


def test_weights_on_disk_are_waited_for_where_that_takes_longer(clock):
    run = replace(clock.run, on_gpu=True, rooms=(1,))
    slow = replace(clock, run=run, ram=1, rates=replace(RATES, read_bytes=1000.0))
    assert not run.is_whole
    assert slow.gradients(1, states=0) == pytest.approx(2 * 2 * run.outline.weights_in_blocks / 1000)


def test_faster_machines_take_less(clock):
    twice = replace(clock, rates=replace(RATES, **{
        name: {key: 2 * rate for key, rate in value.items()} if isinstance(value, dict) else value and 2 * value
        for name, value in vars(RATES).items()
    }))  # fmt: skip
    settings = EvaluationSettings()
    for stage in (
        lambda clock: clock.gradients(8, 1000),
        lambda clock: clock.inputs(512, matrices=True),
        lambda clock: clock.compensation([{"Q4_K": 10**6}], 512),
        lambda clock: clock.agreement(),
        lambda clock: clock.baseline(settings, 4),
        lambda clock: clock.evaluation(10**8, settings, 4),
    ):
        assert stage(clock) == pytest.approx(2 * stage(twice))
        assert stage(clock) > 0


def test_gram_matrices_take_longer_than_their_diagonals(clock):
    assert clock.inputs(512, matrices=True) > clock.inputs(512, matrices=False)


def test_a_model_that_does_not_fit_the_gpu_is_slower_there(clock):
    fast = replace(clock, rates=replace(RATES, gpu_bytes=1e11), gpu=10**9)
    half = replace(fast, gpu=5 * 10**8)
    none = replace(fast, gpu=0)
    times = [place.evaluation(10**9, EvaluationSettings(), 4) for place in (fast, half, none)]
    assert times == sorted(times)
    assert times[0] < times[1] < times[2]


def test_the_rates_of_this_machine(tmp_path):
    steps = []
    rates = measure_rates(
        tmp_path, torch.device("cpu"), "bfloat16", {"Q4_K", "IQ4_XS", "F16"}, lambda *step: steps.append(step)
    )
    assert rates.products.keys() == {"bfloat16", "float32", "float64"} <= DTYPES.keys() | {"float64"}
    assert rates.rounding.keys() == {"Q4_K", "IQ4_XS", "F16"}
    every = [*rates.products.values(), *rates.rounding.values(), rates.write_bytes, rates.read_bytes, rates.hash_bytes]
    assert min(*every, rates.host_products, rates.host_bytes) > 0
    assert list(tmp_path.iterdir()) == []
    assert steps == [(done, 8) for done in range(1, 9)]


def test_a_folder_that_cannot_be_written_to_is_one_sentence(disk):
    disk.make_read_only()
    with pytest.raises(SamqError, match=r"cannot write to .*set SAMQ_HOME"):
        measure_rates(disk.folder, torch.device("cpu"), "float32", [])
