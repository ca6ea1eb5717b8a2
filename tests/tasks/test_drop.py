import dataclasses

import pytest
from mlflow import MlflowClient

from samq.store import Store
from tasks.drop import drop_files
from tests.samq.conftest import mlflow_uri  # noqa: F401
from tests.samq.sweeps import make_sweep, with_results


@pytest.fixture
def stored(tmp_path):
    """(store, a sweep whose GGUFs are in it)."""
    store, results = Store(tmp_path / "store"), []
    (tmp_path / "sweep").mkdir()
    sweep = make_sweep(tmp_path / "sweep")
    for result in sweep.results:
        with store.publish("candidate", result.name) as folder:
            (folder / "model.gguf").write_bytes(result.gguf.read_bytes())
        results.append(dataclasses.replace(result, gguf=store.root / "candidate" / result.name / "model.gguf"))
    return store, with_results(sweep, results)


@pytest.mark.parametrize("keep", ["all", "front", "best"])
def test_files_of_candidates_that_lost_are_dropped_but_not_those_served(keep, at, stored, mlflow_uri):  # noqa: F811
    _, sweep = stored
    kept = set(sweep.finalists(keep))
    lost = [result for result in sweep.results if result.name not in kept]
    assert bool(lost) == (keep != "all") and sweep.best.name in kept and sweep.full.name in kept
    client, served = MlflowClient(tracking_uri=mlflow_uri), (lost or sweep.results)[-1]
    client.create_registered_model("model")
    tags = {"gguf_uri": "file:///where/it/was/before/model.gguf", "sha256": served.model.sha256}
    version = client.create_model_version("model", served.folder.as_uri(), tags=tags)
    client.set_registered_model_alias("model", "production", version.version)
    drop_files.fn(at, sweep, keep, mlflow_uri)
    left = {result.name for result in sweep.results if result.gguf.exists()}
    assert left == kept | {served.name}
