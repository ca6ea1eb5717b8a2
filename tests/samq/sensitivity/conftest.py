"""What tests of backpropagation share."""

from collections import Counter

import pytest

from samq.sensitivity.offloading import StoredTensor


@pytest.fixture
def by_blocks(monkeypatch):
    """Let a model on the CPU that is in memory go through a block at a time, as on a GPU."""
    monkeypatch.setattr("samq.sensitivity.backpropagation._goes_by_blocks", lambda _: True)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often each tensor is read from its file."""
    counts, read = Counter(), StoredTensor.read

    def count(stored, into, rows=...):
        counts[stored.name] += 1
        return read(stored, into, rows)

    monkeypatch.setattr(StoredTensor, "read", count)
    return counts
