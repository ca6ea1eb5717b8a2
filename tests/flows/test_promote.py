"""The promotion flow and its commands, on a real registry: exit codes, the report on the flow run's page, a rollback."""

import shutil
import sqlite3
from contextlib import closing

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from prefect.states import State
from pydantic import ValidationError

from flows.promote import PromoteParameters, Promotion, RefusedError
from flows.promote import promote as flow
from samq.tracking.registry import aliases, connect
from tests.command_line import forked_samq, refused, samq
from tests.samq.versions import NAME, POLICY, three_nights

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def home_of_nights(tmp_path_factory, toolchain):
    home = tmp_path_factory.mktemp("home")
    connect(f"sqlite:///{home / 'mlflow.db'}")
    three_nights(home, home / "mlflow.db", toolchain)
    return home


@pytest.fixture
def home(home_of_nights, samq_home):
    return shutil.copytree(home_of_nights, samq_home)


@pytest.fixture
def policy(tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(POLICY.model_dump(mode="json")))
    return path


def in_use(home):
    version_of = aliases(connect(f"sqlite:///{home / 'mlflow.db'}"), NAME)
    return version_of.get("production"), version_of.get("previous")


def run(**parameters) -> State:
    return flow(PromoteParameters(model=NAME, policy=POLICY, **parameters), return_state=True)


def reports():
    with get_client(sync_client=True) as client:
        return [artifact.data for artifact in client.read_artifacts() if artifact.key == "promote-gates"]


def test_a_promotion_is_a_flow_run_with_the_gate_report(prefect_home, home):
    state = run(version="1", reason="the first")
    assert state.is_completed()
    assert isinstance(state.result(), Promotion)
    assert in_use(home) == ("1", None)
    (report,) = [text for text in reports() if text.startswith("# llama: version 1 is in production\n")]
    assert "reason: the first" in report
    assert "| ✓ pass | mean KLD |" in report
    assert "| – not applicable | json/valid against production |" in report


def test_a_refusal_is_a_failed_run_that_names_the_gates(prefect_home, home):
    state = run()
    assert state.is_failed()
    assert "llama version 3 is refused: json/valid against full precision failed" in state.message
    with pytest.raises(RefusedError) as error:
        state.result()
    assert error.value.promotion.event.failed == ("json/valid against full precision",)
    assert in_use(home) == (None, None)
    assert any(text.startswith("# llama: version 3 is refused") for text in reports())


def test_force_without_a_reason_is_no_run_at_all():
    with pytest.raises(ValidationError, match="force needs a reason"):
        PromoteParameters(model=NAME, policy=POLICY, force=True, reason=" ")


@pytest.mark.parametrize("fault", [{"version": ""}, {"version": "latest"}, {"alias": ""}, {"model": ""}])
def test_an_empty_or_impossible_version_is_no_run_at_all(fault):
    with pytest.raises(ValidationError, match=next(iter(fault))):
        PromoteParameters(**{"model": NAME, "policy": POLICY, **fault})


def test_by_force_a_version_without_evidence_goes_into_production(prefect_home, home):
    client = connect(f"sqlite:///{home / 'mlflow.db'}")
    run_id = client.get_model_version(NAME, "3").run_id
    with closing(sqlite3.connect(home / "mlflow.db")) as database, database:  # as `mlflow gc` does
        database.execute("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", (str(home / "gone"), run_id))
    assert "promote it unjudged with --force" in run(version="3").message
    assert in_use(home) == (None, None)
    assert run(version="3", force=True, reason="the run is gone").is_completed()
    assert in_use(home) == ("3", None)
    (report,) = [text for text in reports() if "reason: the run is gone" in text]
    assert report.startswith("# llama: version 3 is in production, by force: evidence failed\n")
    assert "| ✓ pass | content |" in report


def test_the_commands_promote_refuse_roll_back_and_tell(prefect_home, home, policy):
    """One process of each command starts as a person's does, Prefect's server with it; the others are quicker."""
    quick = {"home": home, "PREFECT_API_URL": PREFECT_API_URL.value(), "PREFECT_HOME": str(home / "prefect")}

    def promote(*arguments):
        return forked_samq("promote", NAME, "--policy", policy, *arguments, **quick)

    assert refused(promote("--force"), "--force needs a reason, for the history; give one with --reason")
    done = forked_samq("rollback", NAME, "--reason", "x", **quick)
    assert refused(done, "has no version before the one in production")
    done = samq("promote", NAME, "--policy", policy, "--version", "1", home=home)
    assert done.returncode == 0, done.stderr
    assert "llama version 1 is in production" in done.stderr

    done = promote()
    assert done.returncode == 3, done.stderr
    assert "llama version 3 is refused: json/valid against full precision, json/valid against production" in done.stderr
    assert "Traceback" not in done.stderr
    assert in_use(home) == ("1", None)

    done = promote("--force", "--reason", "an old promise")
    assert done.returncode == 0, done.stderr
    assert in_use(home) == ("3", "1")
    done = samq("rollback", NAME, "--reason", "it talks nonsense", home=home)
    assert done.returncode == 0, done.stderr
    assert "llama version 1 is in production again in place of version 3" in done.stderr
    assert in_use(home) == ("1", "3")

    told = samq("status", home=home).stderr
    for words in ("production", "previous, candidate", "rolled back", "it talks nonsense", "forced", "an old promise"):
        assert words in told or ", ".join(reversed(words.split(", "))) in told, words
    assert refused(forked_samq("status", "nothing", **quick), "has no model nothing; register one first")
    assert refused(promote("--version", "9"), "has no version 9 of a model llama")
