"""Calibration text becomes the tokens that llama.cpp makes of it."""

from dataclasses import replace

import pytest

from samq.data.datasets import DatasetSpec
from samq.data.tokens import TokenBatch
from samq.files import TOKENS_NAME
from samq.records import TextSet
from samq.store import Store
from tasks.text import heldout, load_calibration_set, load_text, tokenize
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf

TEXTS = TextSet(dataset="words", texts=("the other bathtub", "an ant", "x"))


@pytest.mark.parametrize(("bos", "packing"), [(None, False), ("<s>", False), ("<s>", True)])
def test_sequences_are_the_ggufs_own_tokens(bos, packing, at):
    tokenizer, store = byte_tokenizer(bos=bos), Store(at.store)
    with store.publish("convert", "k") as folder:
        write_llama_gguf(tiny_llama(vocab_size=300), folder / "model.gguf", tokenizer=tokenizer)
    full, spec = store.find("convert", "k"), DatasetSpec(name="words", seed=1)
    artifact = tokenize(at, full, TEXTS, spec.seed, 6, packing)
    tokens = TokenBatch.load(artifact.path(TOKENS_NAME))
    sequences = [tokens.sequence(index).tolist() for index in range(len(tokens))]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS.texts]
    start = [tokenizer.bos_token_id] if bos else []
    if packing:
        parts = [ids[0][1 + 5 * part : 6 + 5 * part] for part in range(len(ids[0]) // 5)]
        assert sorted(sequences) == sorted([*([*start, *part] for part in parts if len(part) == 5), ids[1][:6], ids[2]])
    else:
        assert sequences == [text[:6] for text in ids if len(text) > 1]
    assert all(sequence[: len(start)] == start for sequence in sequences)
    record = load_calibration_set(artifact, spec)
    assert (record.dataset, record.samples, record.tokens_digest) == ("words", len(tokens), tokens.digest())


def test_the_same_text_under_another_name_is_the_same_artifact_and_has_the_name_of_now(at, tmp_path):
    other = replace(at, store=tmp_path / "other")
    for workspace in (at, other):
        with Store(workspace.store).publish("convert", "k") as folder:
            write_llama_gguf(tiny_llama(vocab_size=300), folder / "model.gguf", tokenizer=byte_tokenizer(bos=None))
    full, moved = Store(at.store).find("convert", "k"), TEXTS.model_copy(update={"dataset": "/moved/words.txt"})
    spec = DatasetSpec(name=moved.dataset, fields=("body",))
    artifact = tokenize(at, full, TEXTS, 0, 6, False)
    assert tokenize(at, full, moved, 0, 6, False) == artifact
    assert tokenize(other, full, moved, 0, 6, False).digest() == artifact.digest(), "nor is it in the files"
    assert heldout(at, full, TEXTS) == heldout(at, full, moved)
    record = load_calibration_set(artifact, spec)
    assert (record.dataset, record.fields, record.samples) == ("/moved/words.txt", ("body",), 2)


def test_reading_and_tokenizing_held_out_text_are_seen_on_the_terminal(at, tmp_path, terminal):
    store = Store(at.store)
    with store.publish("convert", "k") as folder:
        write_llama_gguf(tiny_llama(vocab_size=300), folder / "model.gguf", tokenizer=byte_tokenizer())
    rows = tmp_path / "rows.txt"
    rows.write_text("the other bathtub")
    text = load_text(DatasetSpec(name=str(rows)))
    assert f"read {rows}" in terminal.getvalue()
    heldout(at, store.find("convert", "k"), text)
    assert f"tokenize {rows}" in terminal.getvalue()
    assert "keep what heldout made" in terminal.getvalue()
