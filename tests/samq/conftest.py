import shutil

import pytest

from samq.errors import SamqError
from samq.llamacpp.runtime import Context
from tests.samq.sweeps import make_sweep


@pytest.fixture
def sweep(tmp_path):
    (tmp_path / "sweep").mkdir()
    return make_sweep(tmp_path / "sweep")


@pytest.fixture
def mlflow_uri(empty_database, tmp_path, monkeypatch):
    """A database of the test's own, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow").mkdir()
    path = shutil.copy(empty_database, tmp_path / "mlflow" / "mlflow.db")
    return f"sqlite:///{path}"


@pytest.fixture
def decode_fails(monkeypatch):
    """Call it to let the batch number `at` from now on fail, and no other."""
    decode = Context.decode
    left = []

    def failing(self, *arguments, **settings):
        if left:
            left[0] -= 1
            if left[0] == 0:
                left.clear()
                raise SamqError("llama.cpp failed on a batch")
        return decode(self, *arguments, **settings)

    monkeypatch.setattr(Context, "decode", failing)
    return lambda at: left.append(at)
