"""`import samq`, as a notebook uses it."""

import pytest

import samq
from tests.end_to_end.conftest import SMALL

pytestmark = pytest.mark.e2e


def test_a_notebook_gets_the_flows_sweep_from_the_same_store(sweep, home):
    measured = samq.measure_sweep(SMALL)
    assert measured.best.model.sha256 == sweep.best.model.sha256
    assert list(samq.results_table(measured)["candidate"]) == [result.name for result in sweep.by_size]
    assert samq.pareto_figure(measured).axes
    assert measured.best.gguf.is_file() and samq.markdown_report(measured).startswith("# ")


def test_only_what_is_exported_is_there():
    assert not hasattr(samq, "nonsense") and samq.__version__
