"""Measurements run one at a time: their latencies are compared, and a GPU holds one model."""

import logging
import os
import re
import threading
import time

import pytest
from filelock import FileLock

from samq.data.tokens import TokenBatch
from samq.errors import ToolError
from samq.evaluation.settings import EvaluationSettings
from samq.store import Store
from tasks.evaluate import baseline
from tests.conftest import write_tiny_gguf


@pytest.fixture
def store(at):
    return Store(at.store)


def publish(store, stage, write):
    with store.publish(stage, "k") as folder:
        write(folder)
    return store.find(stage, "k")


def test_a_measurement_waits_for_the_one_before(at, store, caplog):
    caplog.set_level(logging.DEBUG, "filelock")
    measuring = store.root / ".tmp" / "measuring"
    full = publish(store, "convert", lambda folder: write_tiny_gguf(folder / "model.gguf"))
    tokens = publish(store, "heldout", lambda folder: TokenBatch.of([[1] * 64]).save(folder / "heldout.npz"))
    settings = EvaluationSettings(context_tokens=32, chunks=1)
    errors = []

    def measure():
        try:
            baseline(at, full, tokens, settings)
        except ToolError as error:  # the model has no tokenizer: it gets as far as that
            errors.append(str(error))

    with FileLock(measuring):
        thread = threading.Thread(target=measure)
        thread.start()
        while not re.search(rf"not acquired on {re.escape(str(measuring))}, waiting", caplog.text):
            assert thread.is_alive(), errors
            time.sleep(0.01)
        assert not list((store.root / ".tmp").glob("baseline-*/evaluate.log")), "it has started nothing yet"
    thread.join()
    assert len(errors) == 1 and "model.gguf" in errors[0]
    assert os.path.exists(errors[0].rpartition("log: ")[2].rstrip(")"))
