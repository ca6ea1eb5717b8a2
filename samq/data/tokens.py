"""Token sequences: how texts are cut into them, and the batches that the model is measured on."""

import hashlib
import io
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from samq.data.datasets import DatasetSpec
from samq.errors import SamqError
from samq.records import CalibrationSet


@dataclass(frozen=True)
class TokenBatch:
    """Sequences of token ids: `ids` (N, T) int32, padded with zeros, and `lengths` (N,) int32."""

    ids: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def sequence(self, index: int) -> np.ndarray:
        """The token ids of one sequence, without padding."""
        return self.ids[index, : self.lengths[index]]

    def part(self, first: int, last: int) -> Self:
        """The sequences from number `first` up to, but without, number `last`."""
        return type(self)(self.ids[first:last], self.lengths[first:last])

    def digest(self) -> str:
        """SHA-256 (hex) over the lengths and the ids, in order and without the padding."""
        content = hashlib.sha256(self.lengths.astype("<i4").tobytes())
        for index in range(len(self)):
            content.update(self.sequence(index).astype("<i4").tobytes())
        return content.hexdigest()

    def save(self, path: Path) -> Path:
        """Write an npz file, whole or not at all, and return its path.

        The same tokens give the same bytes, since numpy dates the file's entries 1980. Raises SamqError if the file cannot
        be written.
        """
        content = io.BytesIO()
        np.savez_compressed(content, ids=self.ids, lengths=self.lengths)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(content.getvalue())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise SamqError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to") from error
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; raises SamqError if the file is missing or damaged."""
        try:
            with np.load(path, allow_pickle=False) as content:
                return cls(content["ids"], content["lengths"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise SamqError(f"cannot read tokens from {path}: {error}; make the calibration set again") from error

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Self:
        """Make a batch of sequences of token ids, each padded to the longest."""
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int32)
        ids = np.zeros((len(sequences), max(lengths, default=0)), dtype=np.int32)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        return cls(ids, lengths)


def tokenize(
    texts: Sequence[str],
    encode: Callable[[str], Sequence[int]],
    *,
    bos: int | None,
    spec: DatasetSpec,
    sequence_tokens: int,
    packing: bool = False,
) -> tuple[CalibrationSet, TokenBatch]:
    """Cut texts into sequences of 2 to `sequence_tokens` tokens.

    `encode` returns a text's token ids with the special tokens that the model expects before it. If the text then starts
    with `bos`, so does every sequence of it. Without `packing` a text is one sequence, cut at `sequence_tokens`. With
    `packing` a long text becomes several sequences of that length, without the rest at its end, and `spec.seed` shuffles
    the sequences. Sequences of a single token are left out.

    Returns:
        The record, and the tokens that it describes.

    Raises:
        SamqError: `sequence_tokens` is below 2, `encode` refuses a text, or the texts do not give a sequence.
    """
    if sequence_tokens < 2:
        raise SamqError(f"sequences of {sequence_tokens} tokens have no next token to predict; use 2 or more")
    sequences: list[list[int]] = []
    for number, text in enumerate(texts, start=1):
        try:
            ids = list(encode(text))
        except SamqError as error:
            raise SamqError(f"cannot tokenize text {number} of {spec.name}: {error}") from error
        parts = _cut(ids, bos, sequence_tokens, packing)
        sequences += [part for part in parts if len(part) > 1]
    if packing:
        order = np.random.default_rng(spec.seed).permutation(len(sequences))
        sequences = [sequences[index] for index in order]
    if not sequences:
        raise SamqError(f"{spec.name} does not give a sequence of 2 to {sequence_tokens} tokens; give more text")
    tokens = TokenBatch.of(sequences)
    return (
        CalibrationSet(
            dataset=spec.name,
            split=spec.split,
            fields=spec.fields,
            samples=len(tokens),
            sequence_tokens=sequence_tokens,
            tokens=int(tokens.lengths.sum()),
            seed=spec.seed,
            tokens_digest=tokens.digest(),
        ),
        tokens,
    )


def _cut(ids: list[int], bos: int | None, longest: int, packing: bool) -> list[list[int]]:
    if not packing or len(ids) <= longest:
        return [ids[:longest]]
    start = ids[:1] if ids[0] == bos else []
    rest, step = ids[len(start) :], longest - len(start)
    return [start + rest[first : first + step] for first in range(0, len(rest) - step + 1, step)]
