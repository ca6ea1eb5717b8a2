"""Compensated rounding on a GPU: what the CPU gives, but for ties, and the same bytes every time."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samq.gguf.codes import CodeGrid
from samq.quantization.compensation import Compensator, compensate
from samq.sensitivity.gram import GramMatrices
from tests.samq.allocation.test_prediction_check import write_gguf
from tests.samq.quantization.test_compensation import random_gram

DEVICES = ("cpu", "cuda", "cuda")


def test_codes_and_shares_are_those_of_the_cpu():
    random, gram = np.random.default_rng(3), torch.tensor(random_gram(700), dtype=torch.float32)
    weights = random.normal(0, 1, (200, 700)).astype(np.float32)
    grid = CodeGrid(
        random.uniform(0.2, 0.4, weights.shape).astype(np.float32),
        random.uniform(-1.2, -0.8, weights.shape).astype(np.float32),
        np.arange(8, dtype=np.float32),
        0,
    )
    makers = [Compensator(gram.to(device)) for device in DEVICES]
    cpu, one, two = (maker.codes(weights, grid) for maker in makers)
    assert np.array_equal(one, two)
    assert (one == cpu).mean() > 0.99
    assert makers[1].share_left == pytest.approx(makers[0].share_left, rel=1e-6)
    errors = [maker.output_error(weights) for maker in makers]
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-4)


def test_a_compensated_file_is_as_near_as_the_cpus(tmp_path):
    tensors = {"blk.0.ffn_up.weight": np.random.default_rng(0).normal(0, 0.02, (300, 512)).astype(np.float32)}
    full = write_gguf(tmp_path / "full.gguf", tensors, {})
    nearest = write_gguf(tmp_path / "nearest.gguf", tensors, dict.fromkeys(tensors, "Q8_0"))
    matrices = {name: torch.tensor(random_gram(512), dtype=torch.float32) for name in tensors}
    save_file(matrices, tmp_path / "gram", metadata={"source": json.dumps({name: name for name in tensors})})
    files = [tmp_path / f"{number}.gguf" for number in range(3)]
    cpu, one, two = (
        compensate(full, nearest, GramMatrices(tmp_path / "gram"), file, device=device).tensors
        for file, device in zip(files, DEVICES, strict=True)
    )
    assert one == two and files[1].read_bytes() == files[2].read_bytes()
    for name, error in cpu.items():
        assert one[name].nearest == pytest.approx(error.nearest, rel=1e-4)
        assert one[name].compensated == pytest.approx(error.compensated, rel=0.01)
        assert one[name].ratio < 0.9
