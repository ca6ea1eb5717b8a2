import time

import numpy as np
import pytest
import torch

from samq.data.datasets import DatasetSpec
from samq.data.tokens import TokenBatch, tokenize
from samq.errors import SamqError
from samq.sensitivity.batches import batches
from tests.tiny_models import tiny_tokenizer

SPEC = DatasetSpec(name="texts", fields=("body",), seed=3)


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


def by(tokenizer):
    return {"encode": lambda text: tokenizer(text)["input_ids"], "bos": tokenizer.bos_token_id}


def sequences(tokens):
    return [tokens.sequence(index).tolist() for index in range(len(tokens))]


def test_a_text_is_one_sequence_cut_at_the_limit():
    texts = [words(*range(1, 9)), words(5, 6)]
    _, tokens = tokenize(texts, **by(tiny_tokenizer()), spec=SPEC, sequence_tokens=5)
    assert sequences(tokens) == [[0, 1, 2, 3, 4], [0, 5, 6]]
    assert tokens.ids.dtype == tokens.lengths.dtype == np.int32


def test_packing_goes_on_in_sequences_that_each_start_with_bos():
    texts = [words(*range(1, 11)), words(5, 6)]
    _, tokens = tokenize(texts, **by(tiny_tokenizer()), spec=SPEC, sequence_tokens=5, packing=True)
    assert sorted(sequences(tokens)) == [[0, 1, 2, 3, 4], [0, 5, 6], [0, 5, 6, 7, 8]]  # 9 and 10 are left over


def test_without_bos_packing_loses_nothing_between_sequences():
    tokenizer = tiny_tokenizer(bos=False)
    _, tokens = tokenize([words(*range(1, 9))], **by(tokenizer), spec=SPEC, sequence_tokens=4, packing=True)
    assert sorted(sequences(tokens)) == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_the_record_says_what_was_used():
    texts = [words(1, 2, 3), words(4), words(5, 6)]
    record, tokens = tokenize(texts, **by(tiny_tokenizer(bos=False)), spec=SPEC, sequence_tokens=8)
    assert sequences(tokens) == [[1, 2, 3], [5, 6]]  # a single token predicts nothing
    assert (record.dataset, record.fields, record.seed) == ("texts", ("body",), 3)
    assert (record.samples, record.tokens, record.sequence_tokens) == (2, 5, 8)
    assert record.tokens_digest == tokens.digest()


def test_packed_sequences_are_shuffled_by_the_seed_so_that_the_first_are_of_all_the_text():
    texts, tokenizer = [words(*[number] * 30) for number in range(1, 30)], tiny_tokenizer()

    def starts(seed):
        spec = SPEC.model_copy(update={"seed": seed})
        _, tokens = tokenize(texts, **by(tokenizer), spec=spec, sequence_tokens=4, packing=True)
        return tokens.ids[:, 1].tolist()

    assert starts(0) == starts(0) != starts(1)
    assert sorted(starts(0)) == sorted(starts(1))
    assert len(set(starts(0)[:29])) > 10


def test_nothing_to_predict_is_refused():
    with pytest.raises(SamqError, match="does not give a sequence of 2 to 8 tokens"):
        tokenize([words(1)], **by(tiny_tokenizer(bos=False)), spec=SPEC, sequence_tokens=8)
    with pytest.raises(SamqError, match="sequences of 1 tokens have no next token to predict"):
        tokenize([words(1, 2)], **by(tiny_tokenizer()), spec=SPEC, sequence_tokens=1)


def test_a_text_that_cannot_be_tokenized_is_named_by_its_number():
    def encode(text):
        if text == "b":
            raise SamqError("it is too long; shorten it")
        return [1, 2]

    with pytest.raises(SamqError, match="cannot tokenize text 2 of data: it is too long; shorten it"):
        tokenize(["a", "b"], encode, bos=None, spec=DatasetSpec(name="data"), sequence_tokens=4)


def test_saved_tokens_are_the_same_bytes_at_any_time(tmp_path, monkeypatch):
    tokens = TokenBatch.of([[1, 2, 3], [4, 5]])
    first = tokens.save(tmp_path / "a.npz").read_bytes()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    assert tokens.save(tmp_path / "b.npz").read_bytes() == first
    loaded = TokenBatch.load(tmp_path / "a.npz")
    assert sequences(loaded) == [[1, 2, 3], [4, 5]] and loaded.digest() == tokens.digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def test_damaged_or_missing_tokens_are_named(tmp_path):
    path = TokenBatch.of([[1, 2, 3]]).save(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(SamqError, match=r"cannot read tokens from .*a\.npz"):
        TokenBatch.load(path)
    with pytest.raises(SamqError, match=r"cannot read tokens from .*b\.npz"):
        TokenBatch.load(tmp_path / "b.npz")
    with pytest.raises(SamqError, match="cannot write"):
        TokenBatch.of([[1, 2]]).save(tmp_path / "no" / "folder.npz")


def test_the_digest_sees_ids_order_and_lengths_but_not_padding():
    tokens = TokenBatch.of([[1, 2, 3], [4, 5]])
    others = [[[1, 2, 3], [4, 6]], [[4, 5], [1, 2, 3]], [[1, 2], [3, 4, 5]], [[1, 2, 3], [4, 5, 0]]]
    assert len({tokens.digest(), *(TokenBatch.of(other).digest() for other in others)}) == 5
    wider = TokenBatch(np.pad(tokens.ids, ((0, 0), (0, 4)), constant_values=7), tokens.lengths)
    wider.ids[1, 2] = 9
    assert wider.digest() == tokens.digest()


def test_batches_are_as_wide_as_their_longest_and_ignore_padding():
    tokens = TokenBatch.of([[1, 2], [3, 4, 5], [6, 7, 8, 9]])
    (ids, mask, labels), (last, last_mask, _) = batches(tokens, 2)
    assert ids.tolist() == [[1, 2, 0], [3, 4, 5]] and ids.dtype == torch.int64
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert labels.tolist() == [[1, 2, -100], [3, 4, 5]]
    assert last.tolist() == [[6, 7, 8, 9]] and last_mask.all()
