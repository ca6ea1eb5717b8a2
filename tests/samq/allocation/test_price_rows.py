import math

import numpy as np
import pytest

from samq.allocation import price_rows
from samq.allocation.price_rows import draw, parts_to_price
from samq.gguf.file import TensorInfo
from samq.sensitivity.fisher import Fisher


def tensor(*shape):
    return TensorInfo(name="t", type="F16", shape=shape, bytes=2 * math.prod(shape))


def fisher_of(random, *stacked_rows):
    """Means of which a few are thousands of times the others."""
    rows = random.lognormal(0, 2, stacked_rows).astype(np.float32)
    return Fisher(rows, np.ones((*stacked_rows[:-1], 256), np.float32))


def estimate(parts, errors):
    return sum(float(part.fisher @ errors[part.rows]) for part in parts)


def test_a_small_tensor_is_priced_from_all_its_rows(monkeypatch):
    monkeypatch.setattr(price_rows, "_PART_WEIGHTS", 100 * 256)
    fisher = fisher_of(np.random.default_rng(1), 3, 250)
    parts = list(parts_to_price(tensor(3, 250, 256), fisher))
    assert [(part.expert, len(part.rows), part.stands_for) for part in parts] == [
        (expert, rows, 1.0) for expert in range(3) for rows in (100, 100, 50)
    ]
    assert np.concatenate([part.rows for part in parts]).tolist() == list(range(750))
    assert np.concatenate([part.fisher for part in parts]) == pytest.approx(fisher.rows.reshape(-1))


@pytest.mark.parametrize("stacked", [(), (16,)], ids=["a matrix", "experts"])
def test_a_large_tensor_is_priced_from_a_sample(monkeypatch, stacked):
    monkeypatch.setattr(price_rows, "LARGEST_WITHOUT_SAMPLE", 2**20)
    monkeypatch.setattr(price_rows, "SAMPLED_WEIGHTS", 2**17)
    monkeypatch.setattr(price_rows, "SAMPLED_ROWS", 400)
    random = np.random.default_rng(2)
    rows = 16384 // 16 if stacked else 16384
    fisher = fisher_of(random, *stacked, rows)
    errors = random.lognormal(0, 0.3, 16384) * (1 + 0.2 * (np.arange(16384) % 2))  # even and odd rows differ
    parts = list(parts_to_price(tensor(*stacked, rows, 256), fisher))
    assert all((part.rows // rows == part.expert).all() for part in parts)
    drawn = np.concatenate([part.rows for part in parts])
    assert (np.diff(drawn) > 0).all() and 100 < len(drawn) <= 512
    assert parts[0].stands_for == 16384 / len(drawn)
    exact = float(fisher.rows.reshape(-1).astype(float) @ errors)
    assert estimate(parts, errors) == pytest.approx(exact, rel=0.04)  # a standard error of 0.32 / sqrt(512)
    again = list(parts_to_price(tensor(*stacked, rows, 256), fisher))
    assert all((one.rows == other.rows).all() for one, other in zip(parts, again, strict=True))


def test_long_rows_are_sampled_by_their_number(monkeypatch):
    monkeypatch.setattr(price_rows, "LARGEST_WITHOUT_SAMPLE", 2**20)
    monkeypatch.setattr(price_rows, "SAMPLED_WEIGHTS", 2**12)
    means = Fisher(np.ones(20000, np.float32), np.ones(256, np.float32))
    assert sum(len(part.rows) for part in parts_to_price(tensor(20000, 256), means)) == 1024


def test_the_mean_over_samples_is_the_sum(monkeypatch):
    """Hansen and Hurwitz: drawn in proportion to size, the estimate has no bias, whatever the errors are."""
    random = np.random.default_rng(3)
    means, errors = random.lognormal(0, 2, 500), random.lognormal(0, 1, 500)
    estimates = []
    for seed in range(400):
        monkeypatch.setattr(price_rows, "_SEED", seed)
        rows, sums = draw(means, 40)
        assert sums.sum() == pytest.approx(means.sum())
        estimates.append(sums @ errors[rows])
    error = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - means @ errors) < 4 * error < 0.05 * (means @ errors)


def test_rows_without_fisher_information_are_drawn_only_if_no_row_has_any():
    means = np.zeros(100)
    assert 30 < len(draw(means, 40)[0]) <= 40  # a row may be drawn twice
    means[[20, 40]] = 5, 1
    rows, sums = draw(means, 40)
    assert rows.tolist() == [20, 40] and sums == pytest.approx([5, 1], rel=0.1)


def test_no_more_rows_are_drawn_than_there_are():
    means = np.arange(10.0)
    rows, sums = draw(means, 10)
    assert rows.tolist() == list(range(10)) and (sums == means).all()
