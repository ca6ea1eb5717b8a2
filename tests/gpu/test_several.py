"""Several GPUs of one host share the sequences, and give the bits that one gives."""

import pytest
import torch

from samq.quantization.inputs import measure_inputs
from samq.sensitivity.blocks import main_device
from samq.sensitivity.checkpoint import describe_source
from samq.sensitivity.gram import input_moments
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import weights_of
from samq.sensitivity.memory import Memory, compute_devices
from tests.gpu.test_measuring import WIDE, measure, text
from tests.samq.sensitivity.test_block_pass import require_identical
from tests.samq.sensitivity.test_shares import require_same_moments
from tests.tiny_models import names_of, random_tokens, save_folder, tiny_llama, tiny_mixtral


@pytest.fixture(scope="module", autouse=True)
def gpus(gpu):
    devices = compute_devices("auto")
    if len(devices) < 2:
        pytest.skip("one GPU")
    return devices


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("limit", [None, 1], ids=["in memory", "on disk"])
@pytest.mark.parametrize("tied", [False, True])
def test_sensitivities_are_those_of_one_gpu(tied, limit, dtype, gpus, tmp_path):
    source = describe_source(save_folder(tiny_llama(tied, **WIDE), tmp_path / "tiny"))
    model, _ = load_model(source, dtype, "auto", memory_limit=limit)
    assert main_device(model) == gpus[0]
    one = measure(model, text(11), batch_size=2, memory=Memory(folder=tmp_path / "one"))
    for folder in (None, tmp_path / "several"):
        several = measure(model, text(11), batch_size=2, memory=Memory(folder=folder, devices=gpus))
        require_identical(several, one)


def test_a_model_that_accelerate_has_spread_gives_the_same(gpus, tmp_path):
    source = describe_source(save_folder(tiny_llama(num_hidden_layers=4, **WIDE), tmp_path / "tiny"))
    one = measure(load_model(source, "float32", "cuda:0")[0], text(), batch_size=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samq.sensitivity.hf_model.placement", lambda *_: "auto")
        model, _ = load_model(source, "float32", "auto")
    assert len({parameter.device for parameter in model.parameters()}) > 1
    require_identical(measure(model, text(), batch_size=2, memory=Memory(devices=gpus)), one)
    require_identical(measure(model, text(), batch_size=2), one)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_moments_and_what_compensation_leaves_are_those_of_one_gpu(make, gpus):
    model, tokens = make().cuda(), random_tokens((12, 5, 9, 2, 12, 7, 3, 11, 4, 6, 8))
    weights, moments, left = weights_of(model, names_of(model)), [], []
    for memory in (Memory(), Memory(devices=gpus)):
        pieces = list(input_moments(model, tokens, weights, batch_size=2, memory=memory))
        moments.append({(m.tensors, m.expert): m for piece in pieces for m in piece.moments})
        left.append(measure_inputs(model, tokens, weights, shares=True, memory=memory).shares)
    require_same_moments(*moments)
    assert left[0] == left[1] and left[0]
    assert all(m.gram.device == gpus[0] for m in moments[1].values())


def test_a_second_gpu_alone_gives_what_the_first_gives(gpus, tmp_path):
    source = describe_source(save_folder(tiny_llama(**WIDE), tmp_path / "tiny"))
    one, two = (measure(load_model(source, "float32", f"cuda:{number}")[0], text()) for number in (0, 1))
    require_identical(two, one)
    assert torch.cuda.current_device() == 0
