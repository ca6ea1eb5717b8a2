"""Nights on which nothing changed, and one on which something did."""

import pytest

from flows.nightly import nightly
from flows.parameters import RequantizeParameters
from flows.requantize import FinishedSweep
from samq.tracking.nights import Unchanged
from tests.end_to_end.conftest import SMALL, artifacts

pytestmark = pytest.mark.e2e


def night(**change):
    return nightly(RequantizeParameters.model_validate({**SMALL, **change}))


def test_a_night_on_which_nothing_changed_makes_measures_and_tracks_nothing(sweep, home):
    first = night()
    assert isinstance(first, FinishedSweep)
    before = artifacts(home)
    second = night(name="another-name")
    assert isinstance(second, Unchanged)
    assert second.tracked.parent_run_id == first.tracked.parent_run_id
    assert artifacts(home) == before
    third = night(selection={**SMALL.get("selection", {}), "max_size_ratio": 0.9})
    assert isinstance(third, FinishedSweep) and third.tracked.parent_run_id != first.tracked.parent_run_id
