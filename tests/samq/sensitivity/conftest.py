"""What tests of backpropagation share."""

import pytest


@pytest.fixture
def by_blocks(monkeypatch):
    """Let a model on the CPU that is in memory go through a block at a time, as on a GPU."""
    monkeypatch.setattr("samq.sensitivity.backpropagation._goes_by_blocks", lambda _: True)
