"""Calibration text becomes the tokens that llama.cpp makes of it."""

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
def test_sequences_are_the_ggufs_own_tokens(bos, packing, tmp_path):
    tokenizer, store = byte_tokenizer(bos=bos), Store(tmp_path / "store")
    with store.publish("convert", "k") as folder:
        write_llama_gguf(tiny_llama(vocab_size=300), folder / "model.gguf", tokenizer=tokenizer)
    full, spec = store.find("convert", "k"), DatasetSpec(name="words", seed=1)
    made = tokenize.fn(store.root, full, TEXTS, spec.seed, 6, packing)
    tokens = TokenBatch.load(made.path(TOKENS_NAME))
    found = [tokens.sequence(index).tolist() for index in range(len(tokens))]
    ids = [tokenizer(text)["input_ids"] for text in TEXTS.texts]
    start = [tokenizer.bos_token_id] if bos else []
    if packing:
        parts = [ids[0][1 + 5 * part : 6 + 5 * part] for part in range(len(ids[0]) // 5)]
        assert sorted(found) == sorted([*([*start, *part] for part in parts if len(part) == 5), ids[1][:6], ids[2]])
    else:
        assert found == [text[:6] for text in ids if len(text) > 1]
    assert all(sequence[: len(start)] == start for sequence in found)
    record = load_calibration_set(made, spec)
    assert (record.dataset, record.samples, record.tokens_digest) == ("words", len(tokens), tokens.digest())


def test_the_same_text_under_another_name_is_the_same_artifact_and_has_the_name_of_now(tmp_path):
    stores = [Store(tmp_path / name) for name in ("one", "other")]
    for store in stores:
        with store.publish("convert", "k") as folder:
            write_llama_gguf(tiny_llama(vocab_size=300), folder / "model.gguf", tokenizer=byte_tokenizer(bos=None))
    full, moved = stores[0].find("convert", "k"), TEXTS.model_copy(update={"dataset": "/moved/words.txt"})
    spec = DatasetSpec(name=moved.dataset, fields=("body",))
    made = tokenize.fn(stores[0].root, full, TEXTS, 0, 6, False)
    assert tokenize.fn(stores[0].root, full, moved, 0, 6, False) == made
    assert tokenize.fn(stores[1].root, full, moved, 0, 6, False).digest() == made.digest(), "nor is it in the files"
    assert heldout.fn(stores[0].root, full, TEXTS) == heldout.fn(stores[0].root, full, moved)
    record = load_calibration_set(made, spec)
    assert (record.dataset, record.fields, record.samples) == ("/moved/words.txt", ("body",), 2)


def test_reading_and_tokenizing_held_out_text_are_seen_on_the_terminal(tmp_path, terminal):
    store = Store(tmp_path / "store")
    with store.publish("convert", "k") as folder:
        write_llama_gguf(tiny_llama(vocab_size=300), folder / "model.gguf", tokenizer=byte_tokenizer())
    rows = tmp_path / "rows.txt"
    rows.write_text("the other bathtub")
    text = load_text.fn(DatasetSpec(name=str(rows)))
    assert f"read {rows}" in terminal.getvalue()
    heldout.fn(store.root, store.find("convert", "k"), text)
    assert f"tokenize {rows}" in terminal.getvalue()
    assert "keep what heldout made" in terminal.getvalue()
