"""The flow that prunes, as a worker runs it."""

import pytest

from flows.prune import PruneParameters, prune
from tests.samq.registered import age, uri_of

pytestmark = pytest.mark.usefixtures("prefect_home")


def test_it_says_what_would_go_and_deletes_when_told(registered_home):
    age(registered_home)
    parameters = {"rules": {"older_than_days": 1}, "tracking_uri": uri_of(registered_home)}
    shown = prune(PruneParameters(**parameters))
    assert len(list(registered_home.glob("store/candidate/*"))) == 2
    assert prune(PruneParameters(**parameters, delete=True)).artifacts == shown.artifacts
    (kept,) = registered_home.glob("store/candidate/*/model.gguf")
    assert kept.read_bytes() == b"GGUF Q4_K_M"
