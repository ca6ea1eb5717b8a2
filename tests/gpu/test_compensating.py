"""Compensated rounding on a GPU: what the CPU gives, but for ties, and the same bytes every time."""

import numpy as np
import pytest
import torch

from samq.gguf.codes import GROUP, CodeGrid
from samq.gguf.nearest import NearestRounding
from samq.quantization import gptq
from samq.quantization.compensated_file import PlannedFile
from samq.quantization.compensation import write_compensated
from samq.quantization.gptq import Compensator, variances
from samq.sensitivity.moments import Moments, Piece
from tests.samq.allocation.test_prediction_check import write_gguf
from tests.samq.quantization.test_compensation import random_gram

DEVICES = ("cpu", "cuda", "cuda")


def test_codes_and_shares_are_those_of_the_cpu():
    random, gram = np.random.default_rng(3), torch.tensor(random_gram(704), dtype=torch.float32)
    weights = random.normal(0, 1, (200, 704)).astype(np.float32)
    grid = CodeGrid(
        random.uniform(0.2, 0.4, (200, 704 // GROUP)).astype(np.float32),
        random.uniform(-1.2, -0.8, (200, 704 // GROUP)).astype(np.float32),
        np.arange(8, dtype=np.float32),
        0,
    )
    makers = [Compensator(gram.to(device)) for device in DEVICES]
    cpu, one, two = (maker.codes([(weights, grid)])[0] for maker in makers)
    assert np.array_equal(one, two)
    assert (one == cpu).mean() > 0.99
    assert variances(gram.to("cuda")) == pytest.approx(variances(gram), rel=1e-6)
    errors = [maker.output_error(weights) for maker in makers]
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-4)


@pytest.mark.parametrize("levels", [np.arange(8.0), [-2.1, -1.3, -0.6, 0.1, 0.9, 1.7]])
def test_replayed_bands_give_the_same_codes(levels, monkeypatch):
    columns = 5 * 128 + 64  # bands of two shapes
    random, gram = np.random.default_rng(4), torch.tensor(random_gram(columns), dtype=torch.float32, device="cuda")
    scale = random.uniform(0.2, 0.4, (300, columns // GROUP)).astype(np.float32)
    grid = CodeGrid(scale, -4 * scale, np.array(levels, np.float32), 0)
    weights = random.normal(0, 1, (300, columns)).astype(np.float32)
    maker = Compensator(gram)
    replayed = maker.codes([(weights, grid)])[0]
    monkeypatch.setattr(gptq._RoundBand, "__call__", lambda self, *band: gptq._round_band(self._levels, *band))
    assert np.array_equal(maker.codes([(weights, grid)])[0], replayed)


def test_a_compensated_file_is_as_near_as_the_cpus(tmp_path):
    name = "blk.0.ffn_up.weight"
    tensors = {name: np.random.default_rng(0).normal(0, 0.02, (300, 512)).astype(np.float32)}
    full = write_gguf(tmp_path / "full.gguf", tensors, {})
    nearest = write_gguf(tmp_path / "nearest.gguf", tensors, {name: "Q8_0"})
    gram, errors, contents = torch.tensor(random_gram(512), dtype=torch.float32), [], []
    for number, device in enumerate(DEVICES):
        file, piece = (
            PlannedFile.copy(tmp_path / f"{number}.gguf", nearest),
            Piece(0, [Moments((name,), 1, gram.to(device))]),
        )
        log = tmp_path / f"log-{number}"
        compensations = write_compensated(
            {"": file}, NearestRounding(full), NearestRounding(nearest), [piece], log, everything=False
        )
        errors.append(compensations[""].tensors)
        contents.append(file.path.read_bytes())
    cpu, one, two = errors
    assert one == two and contents[1] == contents[2]
    assert one[name].nearest == pytest.approx(cpu[name].nearest, rel=1e-4)
    assert one[name].compensated == pytest.approx(cpu[name].compensated, rel=0.01)
    assert one[name].ratio < 0.9
