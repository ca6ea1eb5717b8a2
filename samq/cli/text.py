"""Text that commands calibrate and evaluate on."""

from typing import TYPE_CHECKING, Any, NamedTuple

from samq.cli.start import loading_packages, validated
from samq.progress import bar

if TYPE_CHECKING:
    from samq.data.datasets import DatasetSpec
    from samq.records import TextSet


class CalibrationText(NamedTuple):
    """Text to calibrate on, and how it becomes sequences.

    At most `sequences` sequences are used (None: all); with `exact`, fewer are an error.
    """

    text: "TextSet"
    seed: int
    packing: bool
    sequences: int | None = None
    exact: bool = False


def dataset_spec(dataset: str, field: list[str] | None, **settings: Any) -> "DatasetSpec":
    """The data set that a command's options name; raises SamqError for an invalid option."""
    with loading_packages():
        from samq.data.datasets import DatasetSpec

    return validated(DatasetSpec, name=dataset, fields=tuple(field or ()), **settings)


def read_text(spec: "DatasetSpec", limit: int | None = None) -> "TextSet":
    """The texts of a data set, at most `limit` (None: all)."""
    from samq.data.datasets import load_texts
    from samq.records import TextSet

    with bar(f"read {spec.name}"):
        return TextSet(dataset=spec.name, texts=tuple(load_texts(spec)[:limit]))


def read_calibration(
    spec: "DatasetSpec", samples: int | None, default: int | None, packing: bool | None
) -> CalibrationText:
    """The first `samples` samples, or by default at most `default`.

    A text file that is one document has no samples: there `samples` counts the sequences cut from it.
    """
    from samq.data.datasets import is_one_document

    if packing is not False and is_one_document(spec.name):
        return CalibrationText(read_text(spec), spec.seed, True, samples or default, exact=samples is not None)
    text = read_text(spec.model_copy(update={"samples": samples}), samples or default)
    return CalibrationText(text, spec.seed, bool(packing))
