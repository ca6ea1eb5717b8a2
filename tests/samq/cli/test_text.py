"""Which text of a data set is calibrated on, and how it becomes sequences."""

import pytest

from samq.cli.text import dataset_spec, read_calibration


@pytest.fixture
def stream(tmp_path):
    """A text file without form feeds: one document."""
    path = tmp_path / "stream.txt"
    path.write_text("one\ntwo\n")
    return str(path)


@pytest.fixture
def documents(tmp_path):
    """A text file of five documents."""
    path = tmp_path / "documents.txt"
    path.write_text("\n\f\n".join(f"document {number}" for number in range(5)))
    return str(path)


@pytest.mark.parametrize(
    ("samples", "sequences", "exact"),
    [(None, 32, False), (7, 7, True)],
)
def test_one_document_is_cut_into_sequences_that_samples_counts(stream, samples, sequences, exact):
    text = read_calibration(dataset_spec(stream, None), samples, 32, None)
    assert (text.packing, text.sequences, text.exact) == (True, sequences, exact)


def test_one_document_is_one_sample_without_packing(stream):
    text = read_calibration(dataset_spec(stream, None), None, 32, False)
    assert (text.packing, text.sequences, len(text.text.texts)) == (False, None, 1)


@pytest.mark.parametrize(("samples", "default", "count"), [(None, 3, 3), (None, 32, 5), (None, None, 5), (4, 3, 4)])
def test_documents_are_samples(documents, samples, default, count):
    text = read_calibration(dataset_spec(documents, None), samples, default, None)
    assert (text.packing, text.sequences, len(text.text.texts)) == (False, None, count)
