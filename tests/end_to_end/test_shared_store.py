"""A second machine that shares the first one's store by S3."""

import pytest

import samq
from flows.nightly import nightly
from flows.parameters import RequantizeParameters
from flows.requantize import requantize
from samq.files import GGUF_NAME
from samq.gguf.file import file_sha256
from samq.store import Store
from samq.tracking.registry import connect, resolve
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


def test_two_machines_share_nothing_but_s3_and_postgresql(home, sweep, s3, postgres, tmp_path, monkeypatch):
    monkeypatch.setenv("SAMQ_STORE", f"s3://{BUCKET}/sweep")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)
    artifacts = {"tracking": {**SMALL["tracking"], "experiment": "shared"}}
    parameters = RequantizeParameters.model_validate({**SMALL, **artifacts})
    first = requantize(parameters)
    monkeypatch.setenv("SAMQ_HOME", str(tmp_path / "third"))
    registered = resolve(connect(postgres), "small")
    assert file_sha256(registered.path) == registered.sha256 == first.sweep.best.model.sha256 == sweep.best.model.sha256
    second = nightly(parameters)
    assert second.tracked.model_version == first.tracked.model_version, "the same bytes are one version"
    assert outcome(second.sweep) == outcome(first.sweep)
