"""Calibration text becomes the tokens that llama.cpp makes of it."""

import pytest

from samq.calibration import TokenBatch
from samq.datasets import DatasetSpec
from samq.records import CalibrationSet, TextSet
from samq.store import Store
from tasks.text import SET_NAME, TOKENS_NAME, tokenize
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf

TEXTS = TextSet(dataset="words", texts=("the other bathtub", "an ant", "x"))


@pytest.mark.parametrize(("bos", "packing"), [(None, False), ("<s>", False), ("<s>", True)])
def test_sequences_are_the_ggufs_own_tokens(bos, packing, tmp_path):
    tokenizer, store = byte_tokenizer(bos=bos), Store(tmp_path / "store")
    with store.publish("convert", "k") as folder:
        write_llama_gguf(tiny_llama(vocab_size=300), folder / "model.gguf", tokenizer=tokenizer)
    full, spec = store.find("convert", "k"), DatasetSpec(name="words", seed=1)
    made = tokenize.fn(store.root, full, TEXTS, spec, 6, packing)
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
    record = CalibrationSet.load(made.path(SET_NAME))
    assert (record.dataset, record.samples, record.tokens_digest) == ("words", len(tokens), tokens.digest())
