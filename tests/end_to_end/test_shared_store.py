"""A second machine that shares the first one's store by S3."""

import pytest

import samq
from samq.files import GGUF_NAME
from samq.store import Store
from tests.conftest import BUCKET
from tests.end_to_end.conftest import SMALL

pytestmark = pytest.mark.e2e


def outcome(sweep):
    return [(result.name, result.model.sha256, result.evaluation, result.predicted) for result in sweep.results]


def ggufs(sweep):
    return {result.name: result.model.sha256 for result in sweep.results}


def test_a_second_machine_finds_what_the_first_one_made(home, sweep, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMQ_STORE", f"s3://{BUCKET}/sweep")
    first = samq.measure_sweep(SMALL)
    monkeypatch.setenv("SAMQ_HOME", str(tmp_path / "second"))
    monkeypatch.setattr(Store, "publish", lambda _, stage, *__: pytest.fail(f"{stage} was made again"))
    second = samq.measure_sweep(SMALL)
    assert outcome(second) == outcome(first)
    assert ggufs(first) == ggufs(sweep)  # other tests here may have had an evaluation made again, with other times
    here = sorted(path.parent.parent.name for path in (tmp_path / "second" / "store").rglob(GGUF_NAME))
    assert here == ["convert"], "candidates' files stay where they are until somebody reads them"
    assert Store(tmp_path / "second" / "store").having({second.best.model.sha256})
