"""`import samq`, as a notebook uses it: the examples of docs/how-to/python.md."""

import re
from pathlib import Path

import pytest

import samq
from tests.end_to_end.conftest import SMALL

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home")]
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "python.md"


def test_the_pages_examples_run_on_a_sweep(sweep, capsys, monkeypatch):
    """Both ways to start a sweep become the small one, which the flow has measured in the same store."""
    measure, given = samq.measure_sweep, []
    monkeypatch.setattr("samq.api.measure_sweep", lambda parameters: given.append(parameters) or measure(SMALL))
    names = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL):
        exec(example, names)
    samq.RequantizeParameters.model_validate({"name": "notebook", **given[1]})
    assert Path(given[0]).is_file()
    measured = names["sweep"]
    assert [result.model.sha256 for result in measured.results] == [result.model.sha256 for result in sweep.results]
    shown = capsys.readouterr().out
    assert f"{measured.best.name} {measured.best.bytes} " in shown and "## All figures" in shown


def test_only_what_is_exported_is_there():
    assert not hasattr(samq, "nonsense")
    assert samq.Plan and samq.SensitivityMap and samq.SamqError
