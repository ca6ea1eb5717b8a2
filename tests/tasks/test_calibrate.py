"""Calibration as a stage: what it shows before its own bar, models that stay on disk, and a process that is killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from samq.data.datasets import DatasetSpec
from samq.data.tokens import tokenize
from samq.files import CALIBRATION_SET_NAME, GGUF_NAME, TOKENS_NAME
from samq.llamacpp.toolchain import find_toolchain
from samq.sensitivity.checkpoint import describe_source
from samq.store import Store
from samq.workspace import Workspace
from tasks.agreement import agreement
from tasks.calibrate import Passes, calibrate, load_map
from tasks.layer_inputs import InputText, layer_inputs
from tasks.model import TorchModel
from tasks.text import FirstSequences
from tests.tiny_models import byte_tokenizer, save_folder, tiny_llama, write_llama_gguf

SHAPE = dict(vocab_size=300, hidden_size=64, max_position_embeddings=64)


def test_loading_a_model_and_comparing_it_with_its_gguf_are_seen_on_the_terminal(tmp_path, terminal):
    model, store = tiny_llama(), Store(tmp_path / "store")
    with store.publish("convert", "k") as folder:
        write_llama_gguf(model, folder / "model.gguf")
    source = describe_source(save_folder(model, tmp_path / "tiny"))
    at = Workspace(store.root, find_toolchain(), "cpu")
    _, layout = TorchModel(source, store.find("convert", "k")).load_with_layout(at)
    parameters, weights = len(list(model.parameters())), len(layout.weights)
    assert sum(weight.view.rows is not None for weight in layout.weights) == 4 and weights < parameters
    load, compare = (
        [line for line in terminal.getvalue().splitlines() if what in line]
        for what in ("load tiny", "compare tiny with its GGUF")
    )
    assert f"{parameters}/{parameters}" in load[-1]
    assert f"{weights}/{weights}" in compare[-1]


def inputs_in(store_folder, model_folder, **shape):
    """A model as a folder and its GGUF, and tokens, in a store: (model, sequences)."""
    model, store = tiny_llama(**SHAPE | shape), Store(store_folder)
    if not model_folder.exists():
        byte_tokenizer().save_pretrained(save_folder(model, model_folder))
    if store.find("convert", "k") is None:
        with store.publish("convert", "k") as folder:
            write_llama_gguf(model, folder / GGUF_NAME, tokenizer=byte_tokenizer())
        texts = [f"the man ran and ran {number} times, and then the {number} others" * 3 for number in range(12)]
        spec, encode = DatasetSpec(name="some", samples=12), byte_tokenizer().encode
        record, tokens = tokenize(texts, encode, bos=None, spec=spec, sequence_tokens=60)
        with store.publish("tokenize", "k") as folder:
            record.save(folder / CALIBRATION_SET_NAME)
            tokens.save(folder / TOKENS_NAME)
    source = describe_source(model_folder)
    return TorchModel(source, store.find("convert", "k")), FirstSequences(store.find("tokenize", "k"), 12)


def test_a_model_that_stays_on_disk_gives_the_same(at, tmp_path):
    maps, inputs = [], []
    for limit in (None, 1):
        here = replace(at, store=tmp_path / f"store-{limit}", memory_limit=limit)
        model, sequences = inputs_in(here.store, tmp_path / "model")
        agreement(here, model, sequences.tokens)
        maps.append(load_map(calibrate(here, model, sequences, None, Passes(batch_size=4))))
        inputs.append(layer_inputs(here, model, InputText(sequences.tokens, sequences.count, 500, 4), True).digest())
        assert not list(here.store.glob(".tmp/going-on-*"))
    assert inputs[0] == inputs[1]
    for name, tensor in maps[0].tensors.items():
        assert maps[1].tensors[name].sequence_squares == pytest.approx(tensor.sequence_squares, rel=1e-4), name


KILLED = """
import sys
from pathlib import Path
from tests.tasks.test_calibrate import calibrate_in
calibrate_in(*map(Path, sys.argv[1:]))
"""


def calibrate_in(store, model_folder):
    at = Workspace(store, find_toolchain(), "cpu", memory_limit=1)
    model, sequences = inputs_in(store, model_folder, num_hidden_layers=12)
    return calibrate.fn(at, model, sequences, None, Passes(batch_size=2))


@pytest.mark.slow
@pytest.mark.parametrize("until", ["states-0005", "slopes-0007"])
def test_a_calibration_that_is_killed_goes_on_and_gives_the_same(until, tmp_path):
    whole = calibrate_in(tmp_path / "undisturbed", tmp_path / "model")
    store = tmp_path / "killed"
    root = Path(__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, store, tmp_path / "model"], cwd=root, start_new_session=True
    )
    while not list(store.glob(f".tmp/going-on-calibrate-*/{until}.safetensors")):
        assert child.poll() is None, "ended before it was killed"
        time.sleep(0.001)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    (left,) = [path for path in store.glob(".tmp/going-on-calibrate-*") if path.is_dir()]
    assert any(left.iterdir()), "there is something to go on from"
    assert calibrate_in(store, tmp_path / "model").digest() == whole.digest()
    assert not list((store / ".tmp").iterdir())
