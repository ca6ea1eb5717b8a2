from pathlib import Path

import pytest

from samq.records import Toolchain
from samq.workspace import Workspace


@pytest.fixture
def at(tmp_path):
    """A workspace with a store of its own, for stages that run none of llama.cpp's programs."""
    toolchain = Toolchain(version="1", build="none", bin_folder=Path("/nowhere"))
    return Workspace(tmp_path / "store", toolchain, device="cpu", timeout_s=60.0)
