import logging
import os
from dataclasses import dataclass

import pytest

from samq.allocation.target import OpenTarget, stock_plan
from samq.cli.app import main
from samq.gguf.file import read_tensors
from samq.progress import console
from samq.records import SensitivityMap, TensorSensitivity
from tests.conftest import write_tiny_gguf
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def samq(samq_home, capsys, monkeypatch):
    """Run a command in this process: what it needs is imported once, not once a command."""
    monkeypatch.setattr(console, "width", 400)
    log = logging.getLogger("samq")
    handlers, level = [*log.handlers], log.level

    def run(*arguments, **variables):
        environment = {**os.environ}
        os.environ.update(variables)
        capsys.readouterr()
        try:
            main([*map(str, arguments)])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            os.environ.clear()
            os.environ.update(environment)
            log.handlers[:] = handlers
            log.setLevel(level)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def shown(terminal, samq):
    """Run a command in this process; the progress bars that it showed on the terminal."""

    def run(*arguments):
        start = terminal.tell()
        samq(*arguments)
        return terminal.getvalue()[start:]

    return run


@pytest.fixture
def gguf(tmp_path):
    return write_tiny_gguf(tmp_path / "tiny.gguf")


@pytest.fixture
def cut_gguf(tmp_path, gguf):
    path = tmp_path / "cut.gguf"
    path.write_bytes(gguf.read_bytes()[:20000])
    return path


@pytest.fixture
def speaking_gguf(tmp_path):
    """A model with a tokenizer."""
    model = tiny_llama(vocab_size=264, max_position_embeddings=128)
    return write_llama_gguf(model, tmp_path / "full.gguf", tokenizer=byte_tokenizer(bos="<s>"))


@pytest.fixture
def sensitivity(tmp_path, gguf):
    return save_map(tmp_path / "map.json", gguf, lambda number, count: number / count)


@pytest.fixture
def plan(tmp_path, gguf, toolchain):
    return stock_plan(OpenTarget.open(gguf, toolchain), "Q4_K_M").save(tmp_path / "plan.json")


def save_map(path, gguf, score):
    """A sensitivity map of the file's matrices, with a score for each (number, how many)."""
    matrices = [tensor for tensor in read_tensors(gguf).values() if len(tensor.shape) == 2]
    tensors = {
        tensor.name: TensorSensitivity(
            shape=tensor.shape,
            gradient_norm=1,
            gradient_norm_stderr=0,
            score=score(index + 1, len(matrices)),
            sequence_squares=(1.0, 1.0),
        )
        for index, tensor in enumerate(matrices)
    }
    sensitivity = SensitivityMap(
        model_digest="m",
        calibration_digest="c",
        labels="text",
        seed=0,
        sequence_tokens=(1, 1),
        loss_nats=1,
        tied_embeddings=False,
        tensors=tensors,
    )
    return sensitivity.save(path)
