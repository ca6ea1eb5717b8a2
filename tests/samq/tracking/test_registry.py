import shutil
import subprocess
import sys

import pytest
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from samq.errors import SamqError
from samq.tracking.registry import connect, find_version, register, resolve
from tests.samq.tracking.mlflow_server import mlflow_server


def candidate_run(client):
    """A candidate's run, as the tracking of a sweep leaves it."""
    experiment = client.get_experiment_by_name("sweeps")
    experiment_id = experiment.experiment_id if experiment else client.create_experiment("sweeps")
    run = client.create_run(experiment_id, run_name="threshold-0.2", tags={MLFLOW_PARENT_RUN_ID: "the-parent"})
    metric = Metric("fidelity/mean_kld_nats", 0.04, run.info.start_time, 0)
    client.log_batch(run.info.run_id, [metric], [Param("threshold", "0.2"), Param("quantile", "")])
    client.set_terminated(run.info.run_id)
    return run.info.run_id


def register_result(client, result, name="llama-3.1", gguf=None, **others):
    run_id = candidate_run(client)
    described = {"model": result.model, "plan": result.plan, "evaluation": result.evaluation}
    return register(client, name, run_id, gguf=gguf or result.gguf, **described, **others), run_id


def check_registration(client, sweep, tmp_path):
    """What must hold over SQLite and over a server alike."""
    result = sweep.result("threshold-0.2")
    version, run_id = register_result(client, result)
    candidate = resolve(client, "llama-3.1", "candidate")
    assert (candidate.version, candidate.run_id) == (version, run_id) == ("1", run_id)
    assert candidate.path == result.gguf
    assert (candidate.sha256, candidate.size_bytes) == (result.model.sha256, result.bytes)
    assert candidate.plan_digest == result.plan.digest()

    registered = client.get_model_version("llama-3.1", version)
    assert registered.tags["parent_run"] == "the-parent"
    assert f"| mean KLD (nats) | {result.kld.value:.5f} ± {result.kld.stderr:.5f} |" in registered.description
    (output,) = client.get_run(run_id).outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    assert (logged.source_run_id, str(logged.status)) == (run_id, "READY")
    assert {metric.key: metric.value for metric in logged.metrics} == {"fidelity/mean_kld_nats": 0.04}
    assert logged.params == {"threshold": "0.2"}
    assert len(client.get_metric_history(run_id, "fidelity/mean_kld_nats")) == 1, "linking doubles no metric"
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == result.gguf.read_bytes()]
    assert copies == [result.gguf], "the GGUF is not copied"

    other, _ = register_result(client, sweep.result("threshold-0.4"))
    assert other == "2"
    assert resolve(client, "llama-3.1").version == "2", "the alias has moved on"

    moved = shutil.copy(result.gguf, tmp_path / "moved to.gguf")
    again, _ = register_result(client, result, gguf=moved)
    assert again == "1", "the same content is the same version"
    assert resolve(client, "llama-3.1").path == moved
    assert len(client.search_model_versions("name = 'llama-3.1'")) == 2


def test_registration_in_sqlite(sweep, mlflow_uri, tmp_path):
    check_registration(connect(mlflow_uri), sweep, tmp_path)


@pytest.fixture
def server(tmp_path):
    """An MLflow server with its own database."""
    with mlflow_server(
        tmp_path / "server", "--backend-store-uri", f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"
    ) as uri:
        yield uri


@pytest.mark.e2e
def test_registration_on_a_server(sweep, server, tmp_path):
    check_registration(connect(server), sweep, tmp_path)


@pytest.mark.e2e
def test_several_processes_may_make_the_database_at_once(tmp_path):
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    code = "import sys; from samq.tracking.registry import connect; connect(sys.argv[1]).create_experiment(sys.argv[2])"
    children = [subprocess.Popen([sys.executable, "-c", code, uri, name], stderr=subprocess.PIPE) for name in "abc"]
    errors = [child.communicate()[1].decode() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], errors
    assert {one.name for one in connect(uri).search_experiments()} >= set("abc")


def test_an_alias_that_is_not_there_is_one_sentence(sweep, mlflow_uri):
    client = connect(mlflow_uri)
    with pytest.raises(SamqError, match=r"has no model nothing with the alias candidate; register one first"):
        resolve(client, "nothing")
    register_result(client, sweep.result("threshold-0.2"), alias="champion")
    assert resolve(client, "llama-3.1", "champion").version == "1"
    with pytest.raises(SamqError, match=r"has no model llama-3\.1 with the alias candidate"):
        resolve(client, "llama-3.1")


def test_a_version_that_somebody_else_registered_is_not_served(mlflow_uri):
    client = connect(mlflow_uri)
    client.create_registered_model("other")
    version = client.create_model_version("other", source="s3://bucket/model")
    client.set_registered_model_alias("other", "candidate", version.version)
    with pytest.raises(SamqError, match=r"has no tag gguf_uri, so SAMQ did not register it"):
        resolve(client, "other")


def test_a_gguf_on_another_machine_has_no_path_here(sweep, mlflow_uri):
    client = connect(mlflow_uri)
    version, _ = register_result(client, sweep.result("threshold-0.2"))
    client.set_model_version_tag("llama-3.1", version, "gguf_uri", "s3://bucket/model.gguf")
    with pytest.raises(SamqError, match=r"is at s3://bucket/model\.gguf, not on this machine"):
        _ = resolve(client, "llama-3.1").path


@pytest.mark.parametrize(
    ("tag", "value", "meaning"),
    [
        ("size_bytes", "large", "a number of bytes"),
        ("size_bytes", "-1", "a number of bytes"),
        ("size_bytes", "1e9", "a number of bytes"),
        ("size_bytes", "9" * 5000, "a number of bytes"),
        ("sha256", "0123", "a SHA-256"),
        ("sha256", "G" * 64, "a SHA-256"),
        ("plan_digest", " ", "a plan's digest"),
        ("gguf_uri", " ", "the place of a file"),
        ("gguf_uri", "file://[", "the place of a file"),
        ("gguf_uri", "file:///a%00b", "the place of a file"),
    ],
)
def test_a_tag_that_somebody_edited_is_one_sentence(sweep, mlflow_uri, tag, value, meaning):
    client = connect(mlflow_uri)
    version, _ = register_result(client, sweep.result("threshold-0.2"))
    client.set_model_version_tag("llama-3.1", version, tag, value)
    for look_up in (lambda: resolve(client, "llama-3.1"), lambda: find_version(client, "llama-3.1", version)):
        with pytest.raises(
            SamqError, match=f"the tag {tag} of version 1 of llama-3.1 is '.{{,81}}', not {meaning}; set it"
        ):
            look_up()


@pytest.mark.parametrize("version", ["", " ", "0", "-1", "07", " 1", "1\n", "1.0", "one", "9" * 30, "latest"])
def test_a_version_that_is_no_number_is_one_sentence(sweep, mlflow_uri, version):
    client = connect(mlflow_uri)
    register_result(client, sweep.result("threshold-0.2"))
    with pytest.raises(
        SamqError, match=r"is not a version of llama-3\.1; give a number such as 7, see `samq status llama-3\.1`"
    ):
        find_version(client, "llama-3.1", version)


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/mlflow.db", "ftp://host/mlflow"])
def test_a_place_where_mlflow_cannot_be_is_one_sentence(uri):
    with pytest.raises(SamqError, match=f"cannot use MLflow at {uri}: "):
        connect(uri)


def test_a_name_that_mlflow_refuses_is_one_sentence(sweep, mlflow_uri):
    with pytest.raises(SamqError, match=r"cannot register .* as a/b"):
        register_result(connect(mlflow_uri), sweep.result("threshold-0.2"), name="a/b")
