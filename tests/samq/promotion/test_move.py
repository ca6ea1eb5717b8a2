"""Promotion and rollback on a real registry: three versions, of which the third answers worse."""

import dataclasses
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from samq.errors import SamqError
from samq.promotion.history import MAX_REASON_CHARACTERS, history, with_moves_by_hand
from samq.promotion.lock import CLAIM, STALE_S, alias_lock, others
from samq.promotion.move import judge_version, promote
from samq.promotion.rollback import rollback, rollback_target
from samq.promotion.status import rollback_note
from samq.relocation import relocate
from samq.services import mlflow_page
from samq.tracking.registry import aliases, connect, connect_registry, find_version, notable_versions
from tests.samq.versions import NAME, POLICY, three_nights


@pytest.fixture(scope="module")
def database(tmp_path_factory, empty_database, toolchain):
    folder = tmp_path_factory.mktemp("nights")
    path = Path(shutil.copy(empty_database, folder / "mlflow.db"))
    three_nights(folder, path, toolchain)
    return path


@pytest.fixture
def client(database, tmp_path):
    home = shutil.copytree(database.parent, tmp_path / "home")
    return connect(f"sqlite:///{home / 'mlflow.db'}")


def judged(client, version):
    return judge_version(client, find_version(client, NAME, version), POLICY)


def in_use(client):
    """(production, previous)"""
    found = aliases(client, NAME)
    return found.get("production"), found.get("previous")


def gate_tags(client, version):
    tags = client.get_model_version(NAME, version).tags
    return {key.removeprefix("samq.gate."): text for key, text in tags.items() if key.startswith("samq.gate.")}


def check_promotion(client):
    """What must hold over SQLite and over a server alike."""
    first = promote(client, judged(client, "1"), reason="the first")
    assert (first.action, first.version, first.replaced, first.verdict) == ("promoted", "1", None, "passed")
    assert in_use(client) == ("1", None)
    against_production = "json/valid against production"
    assert gate_tags(client, "1")[against_production] == "not applicable: nothing is in production yet"

    promote(client, judged(client, "2"))
    assert in_use(client) == ("2", "1")
    assert gate_tags(client, "2")[against_production].startswith("pass: 0.750 against 0.750")
    assert (
        "(limit: worse by less than 0.0375, 5 % of production (version 1))"
        in gate_tags(client, "2")[against_production]
    )

    before = aliases(client, NAME)
    refused = promote(client, judged(client, "3"))
    against = ("json/valid against full precision", against_production)
    assert (refused.action, refused.failed, refused.verdict) == ("refused", against, "failed")
    assert aliases(client, NAME) == before, "nothing moves"
    assert gate_tags(client, "3")[against[0]].startswith("fail: 0.500 against 0.750")

    forced = promote(client, judged(client, "3"), force=True, reason="the customer wants it")
    assert (forced.action, forced.failed, forced.verdict) == ("promoted", against, "forced")
    assert in_use(client) == ("3", "2")

    back = rollback(client, NAME, "users complain")
    assert (back.action, back.version, back.replaced) == ("rolled back", "2", "3")
    assert in_use(client) == ("2", "3")
    rollback(client, NAME, "they are quiet")
    assert in_use(client) == ("3", "2"), "a second rollback swaps again"

    events = history(client, NAME)
    assert [(event.action, event.version, event.reason) for event in events] == [
        ("rolled back", "3", "they are quiet"),
        ("rolled back", "2", "users complain"),
        ("promoted", "3", "the customer wants it"),
        ("refused", "3", ""),
        ("promoted", "2", ""),
        ("promoted", "1", "the first"),
    ]
    assert all(event.who and event.at for event in events)
    assert not [key for key in client.get_registered_model(NAME).tags if key.startswith(CLAIM)], "no claim is left"


def test_promotions_and_rollbacks_in_sqlite(client):
    check_promotion(client)


def test_force_needs_a_reason(client):
    judgement = judged(client, "3")
    for reason in ("", "  \n"):
        with pytest.raises(SamqError, match=r"--force needs a reason"):
            promote(client, judgement, force=True, reason=reason)
    with pytest.raises(SamqError, match=r"has 1,001 characters; give one of at most 1,000"):
        promote(client, judgement, force=True, reason="x" * (MAX_REASON_CHARACTERS + 1))
    assert in_use(client) == (None, None)
    assert history(client, NAME) == []


def test_what_has_moved_since_the_judgement_is_not_overwritten(client):
    first, second = judged(client, "1"), judged(client, "2")  # both while nothing was in production
    promote(client, first)
    with pytest.raises(
        SamqError,
        match=r"somebody else moved production of llama from nothing to version 1 in the meantime, so version 2",
    ):
        promote(client, second)
    assert in_use(client) == ("1", None)
    assert [event.version for event in history(client, NAME)] == ["1"]


def test_a_version_in_production_stays_there(client):
    promote(client, judged(client, "1"))
    again = promote(client, judged(client, "1"))
    assert (again.action, in_use(client)) == ("kept", ("1", None))
    assert len(history(client, NAME)) == 1


def test_without_a_version_to_go_back_to_a_rollback_is_refused(client):
    with pytest.raises(SamqError, match=r"llama has no version before the one in production; promote one"):
        rollback(client, NAME, "why not")
    promote(client, judged(client, "1"))
    with pytest.raises(SamqError, match=r"llama has no version before the one in production"):
        rollback(client, NAME, "why not")
    with pytest.raises(SamqError, match=r"a rollback needs a reason"):
        rollback(client, NAME, "")
    assert in_use(client) == ("1", None)


class Failing(MlflowClient):
    """A client that MLflow answers for so many moves of an alias, and then not: once if `mended`, else ever again."""

    def __init__(self, client, moves, *, mended=False):
        super().__init__(client.tracking_uri, client.tracking_uri)
        self._left, self._mended = moves, mended

    def set_registered_model_alias(self, name, alias, version):
        if self._left == 0:
            self._left = 99 if self._mended else 0
            raise MlflowException("it is gone")
        self._left -= 1
        super().set_registered_model_alias(name, alias, version)

    def delete_registered_model_alias(self, name, alias):
        self.set_registered_model_alias(name, alias, "1")  # counted alike
        super().delete_registered_model_alias(name, alias)


@pytest.fixture
def two_promoted(client):
    promote(client, judged(client, "1"))
    promote(client, judged(client, "2"))
    return client


@pytest.mark.parametrize("moves", [0, 1])
def test_a_promotion_that_fails_halfway_leaves_the_aliases_as_they_were(two_promoted, moves):
    judgement = judged(two_promoted, "3")
    with pytest.raises(SamqError, match=r"cannot use MLflow at .*: it is gone"):
        promote(Failing(two_promoted, moves, mended=True), judgement, force=True, reason="a test")
    assert in_use(two_promoted) == ("2", "1")
    assert [event.version for event in history(two_promoted, NAME)] == ["2", "1"]


def test_a_first_promotion_after_another_that_fails_halfway_leaves_no_previous_version(client):
    promote(client, judged(client, "1"))
    with pytest.raises(SamqError, match="it is gone"):
        promote(Failing(client, 1, mended=True), judged(client, "2"))
    assert in_use(client) == ("1", None)


@pytest.mark.parametrize("moves", [0, 1])
def test_a_rollback_that_fails_halfway_leaves_the_aliases_as_they_were(two_promoted, moves):
    with pytest.raises(SamqError, match="it is gone"):
        rollback(Failing(two_promoted, moves, mended=True), NAME, "a test")
    assert in_use(two_promoted) == ("2", "1")


def test_when_even_the_repair_fails_history_knows_what_to_go_back_to(two_promoted):
    with pytest.raises(SamqError, match="it is gone"):
        promote(Failing(two_promoted, 1), judged(two_promoted, "3"), force=True, reason="a test")
    assert in_use(two_promoted) == ("2", "2"), "what serves has not changed"
    assert rollback(two_promoted, NAME, "it was broken off").version == "1"
    assert in_use(two_promoted) == ("1", "2")
    with pytest.raises(SamqError, match="it is gone"):
        rollback(Failing(two_promoted, 1), NAME, "a test")
    assert in_use(two_promoted) == ("1", "1")
    assert rollback(two_promoted, NAME, "and again").version == "2"
    assert in_use(two_promoted) == ("2", "1")


def test_an_answer_that_is_lost_undoes_nothing(two_promoted):
    class Lost(MlflowClient):
        def set_registered_model_alias(self, name, alias, version):
            super().set_registered_model_alias(name, alias, version)
            if alias == "production":
                raise MlflowException("no answer")

    with pytest.raises(SamqError, match="no answer"):
        rollback(Lost(two_promoted.tracking_uri, two_promoted.tracking_uri), NAME, "a test")
    assert in_use(two_promoted) == ("1", "2")


def by_hand(client, alias, version):
    """Move an alias as MLflow's page does, which no history tells of."""
    if version is None:
        client.delete_registered_model_alias(NAME, alias)
    else:
        client.set_registered_model_alias(NAME, alias, version)


@pytest.mark.parametrize(
    ("moves", "target"),
    [
        ([("production", "3")], "2"),  # `previous` still names 1
        ([("production", "1")], "2"),  # what a person thinks of as a rollback
        ([("previous", "3")], "1"),  # 3 never served
        ([("previous", None)], "1"),
        ([("production", "3"), ("previous", "3")], "2"),
        ([("production", None)], "2"),
        ([("production", None), ("previous", None)], "2"),
    ],
)
def test_a_rollback_after_a_move_by_hand_goes_to_what_served(two_promoted, moves, target):
    for alias, version in moves:
        by_hand(two_promoted, alias, version)
    moved_to, _ = in_use(two_promoted)
    assert rollback_target(two_promoted, NAME, aliases(two_promoted, NAME)) == target
    event = rollback(two_promoted, NAME, "a test")
    assert (event.version, event.replaced) == (target, moved_to)
    assert in_use(two_promoted)[0] == target
    if moved_to:
        assert in_use(two_promoted)[1] == moved_to
        assert rollback(two_promoted, NAME, "undo it").version == moved_to


def test_a_refusal_is_a_sighting_of_what_served(two_promoted):
    by_hand(two_promoted, "production", "1")
    promote(two_promoted, judged(two_promoted, "3"))  # refused, and recorded beside version 1
    by_hand(two_promoted, "production", "3")
    assert rollback(two_promoted, NAME, "a test").version == "1"


def test_without_a_history_a_rollback_goes_by_the_alias(client):
    by_hand(client, "production", "2")
    by_hand(client, "previous", "1")
    assert rollback(client, NAME, "a test").version == "1"


def test_a_rollback_says_why_it_goes_nowhere(two_promoted):
    by_hand(two_promoted, "previous", None)
    two_promoted.delete_model_version(NAME, "1")
    with pytest.raises(
        SamqError, match=r"version 1 of llama, which served before version 2, is deleted; promote another"
    ):
        rollback(two_promoted, NAME, "a test")
    by_hand(two_promoted, "production", "3")
    two_promoted.set_model_version_tag(NAME, "2", "sha256", "edited")
    with pytest.raises(SamqError, match=r"the tag sha256 of version 2 of llama is 'edited', not a SHA-256"):
        rollback(two_promoted, NAME, "a test")
    assert in_use(two_promoted) == ("3", None)
    assert len(history(two_promoted, NAME)) == 2


def test_an_alias_on_a_version_that_never_served_is_no_version_to_go_back_to(client):
    promote(client, judged(client, "1"))
    by_hand(client, "previous", "2")
    with pytest.raises(
        SamqError, match=r"no version before the one in production \(the alias previous names version 2, but"
    ):
        rollback(client, NAME, "a test")


def moves_by_hand(client):
    production, _ = in_use(client)
    events = with_moves_by_hand(history(client, NAME), production)
    return [(event.replaced, event.version) for event in events if event.action == "moved by hand"]


def test_moves_by_hand_are_seen_between_events_and_after_the_last(client):
    by_hand(client, "production", "3")
    promote(client, judged(client, "1"), force=True, reason="a test")
    promote(client, judged(client, "2"))
    assert moves_by_hand(client) == [(None, "3")]
    by_hand(client, "production", "1")
    promote(client, judged(client, "3"))  # refused: production stays
    assert moves_by_hand(client) == [("2", "1"), (None, "3")]
    by_hand(client, "production", None)
    assert moves_by_hand(client) == [("1", ""), ("2", "1"), (None, "3")]
    actions = [event.action for event in with_moves_by_hand(history(client, NAME), None)]
    assert actions == ["moved by hand", "refused", "moved by hand", "promoted", "promoted", "moved by hand"]


def test_promotions_and_rollbacks_alone_are_no_moves_by_hand(two_promoted):
    rollback(two_promoted, NAME, "a test")
    promote(two_promoted, judged(two_promoted, "3"))
    assert moves_by_hand(two_promoted) == []


def test_a_note_says_where_a_rollback_leads_if_the_alias_does_not(two_promoted):
    def note():
        return rollback_note(two_promoted, NAME, aliases(two_promoted, NAME))

    assert note() is None
    by_hand(two_promoted, "production", "3")
    assert (
        note() == "the alias previous names version 1, but `samq rollback llama` goes to version 2, which served last"
    )
    two_promoted.set_model_version_tag(NAME, "2", "size_bytes", "")
    assert note().startswith("a rollback is not possible: the tag size_bytes of version 2 of llama is ''")


def test_a_claim_that_somebody_edited_holds_nobody_off(client):
    for number, value in enumerate(("", "hello", "nan", "inf", "-1e999", f"{time.time() + 10 * STALE_S}")):
        client.set_registered_model_tag(NAME, f"{CLAIM}{number}", value)
    assert others(client, NAME, "mine") == []
    client.set_registered_model_tag(NAME, f"{CLAIM}fresh", f"{time.time():.0f} 1")
    assert others(client, NAME, "mine") == [f"{CLAIM}fresh"]


def lose(client, version, artifact, content):
    """Let an artifact of a version's run be what somebody wrote there; None: nothing at all. Leaves the original alone."""
    run_id = find_version(client, NAME, version).run_id
    path = Path(client.get_run(run_id).info.artifact_uri) / artifact
    original = path.read_bytes()
    path.write_text(content) if content is not None else path.unlink()
    return lambda: path.write_bytes(original)


@pytest.mark.parametrize(
    ("artifact", "content"),
    [
        ("plan.json", None),
        ("plan.json", ""),
        ("plan.json", "[]"),
        ("plan.json", '{"name": "x"}'),
        ("plan.json", '{"a":' + "[" * 100_000),
        ("evaluation/evaluation.json", None),
        ("evaluation/evaluation.json", "null"),
        ("evaluation/json.parquet", "no table"),
    ],
)
def test_lost_evidence_is_one_sentence_and_by_force_a_failed_gate(two_promoted, artifact, content):
    restore = lose(two_promoted, "3", artifact, content)
    try:
        with pytest.raises(SamqError, match=r"or promote it unjudged with --force and --reason$") as told:
            judged(two_promoted, "3")
        version = find_version(two_promoted, NAME, "3")
        judgement = judge_version(two_promoted, version, POLICY, force=True)
    finally:
        restore()
    assert "\n" not in str(told.value)
    assert judgement.production == "2"
    assert [(gate.name, gate.verdict) for gate in judgement.gates] == [("evidence", "fail"), ("content", "pass")]
    event = promote(two_promoted, judgement, force=True, reason="the run was deleted")
    assert (event.action, event.failed, event.verdict) == ("promoted", ("evidence",), "forced")
    assert in_use(two_promoted) == ("3", "2")
    assert gate_tags(two_promoted, "3").keys() == {"evidence", "content"}


def test_by_force_without_evidence_another_file_fails_and_no_force_refuses(two_promoted):
    version = dataclasses.replace(find_version(two_promoted, NAME, "3"), run_id="0" * 32, sha256="0" * 64)
    judgement = judge_version(two_promoted, version, POLICY, force=True)
    assert judgement.failed == ("evidence", "content")
    assert judgement.gates[1].reason.endswith("is not the registered file; build it again")
    assert promote(two_promoted, judgement).action == "refused"
    off = POLICY.model_copy(update={"audit": False})
    assert judge_version(two_promoted, version, off, force=True).failed == ("evidence",)


def test_a_model_that_is_not_registered_is_one_sentence(client):
    for ask in (lambda: rollback(client, "nothing", "why not"), lambda: history(client, "nothing")):
        with pytest.raises(SamqError, match=r"has no model nothing; register one first"):
            ask()
    with pytest.raises(SamqError, match=r"has no version 9 of a model llama"):
        find_version(client, NAME, "9")


def test_history_outlives_a_deleted_version_and_a_tag_that_somebody_edited(client):
    promote(client, judged(client, "1"))
    promote(client, judged(client, "2"))
    client.delete_registered_model_alias(NAME, "previous")
    client.delete_model_version(NAME, "1")
    client.set_registered_model_tag(NAME, "samq.event.0", "hello")
    assert [event.version for event in history(client, NAME)] == ["2", "1"]


def test_an_old_version_in_production_is_among_the_notable_ones(client):
    promote(client, judged(client, "1"))
    assert [version.version for version in notable_versions(client, NAME, 1)] == [3, 1]
    assert [version.version for version in notable_versions(client, NAME, 9)] == [3, 2, 1]


def test_gate_tags_are_of_the_last_judgement_only(client):
    promote(client, judged(client, "1"))
    no_accuracy = POLICY.model_copy(update={"accuracy": None})
    promote(client, judge_version(client, find_version(client, NAME, "1"), no_accuracy))
    assert {name for name in gate_tags(client, "1") if "arc" in name or "accuracy" in name} == {"accuracy"}


def test_a_version_whose_run_is_gone_cannot_be_judged(client, database):
    version = dataclasses.replace(find_version(client, NAME, "1"), run_id="0" * 32)
    with pytest.raises(
        SamqError, match=r"cannot read the measurements of llama version 1 from MLflow: .*; run the sweep again"
    ):
        judge_version(client, version, POLICY)


PROMOTE = """
import os, sys, time
from samq.promotion.move import judge_version, promote
from samq.tracking.registry import connect, find_version
from tests.samq.versions import NAME, POLICY
os.environ["SAMQ_HOME"] = sys.argv[3]  # which the tests' own modules have set anew
client = connect(sys.argv[1])
judgement = judge_version(client, find_version(client, NAME, sys.argv[2]), POLICY)
print("judged", flush=True)
sys.stdin.readline()
promote(client, judgement)
"""


def race(uri):
    """Versions 1 and 2 are promoted at once, in a process each; returns what the one that lost was told."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROMOTE, uri, version, os.environ["SAMQ_HOME"]],
            text=True,
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        )
        for version in ("1", "2")
    ]
    try:
        for child in children:
            assert child.stdout.readline() == "judged\n", child.communicate()[1]
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        told = [child.communicate(timeout=300)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    lost = dict(zip([child.returncode for child in children], told, strict=True))
    assert lost.keys() == {0, 1}, told
    (winner,) = [version for version, child in zip(("1", "2"), children, strict=True) if child.returncode == 0]
    client = connect(uri)
    assert in_use(client) == (winner, None)
    assert [event.version for event in history(client, NAME)] == [winner]
    return lost[1]


@pytest.mark.e2e
def test_of_two_promotions_at_once_in_sqlite_one_wins_and_the_other_is_told(client):
    told = race(client.tracking_uri)
    assert "samq.errors.SamqError: somebody else moved production of llama from nothing to version" in told


@pytest.fixture(scope="module")
def running_server(tmp_path_factory, empty_database):
    """(address, database) of MLflow's server."""
    home = tmp_path_factory.mktemp("server")
    path = Path(shutil.copy(empty_database, home / "mlflow.db"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAMQ_HOME", str(home))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with mlflow_page(port) as address:
            yield address, path


@pytest.fixture
def server(running_server, database, monkeypatch):
    """MLflow's server over the three nights as they were, in the SAMQ folder that their files' places are relative to."""
    address, path = running_server
    monkeypatch.setenv("SAMQ_HOME", str(path.parent))
    with closing(sqlite3.connect(database)) as nights, closing(sqlite3.connect(path)) as served:
        nights.backup(served)
    shutil.copytree(database.parent, path.parent, dirs_exist_ok=True, ignore=shutil.ignore_patterns("mlflow.db*"))
    relocate(path)
    return address


@pytest.mark.e2e
def test_promotions_and_rollbacks_on_a_server(server):
    check_promotion(connect(server))
    alone = connect_registry(server)
    assert rollback(alone, NAME, "through the registry alone").version == "2"
    assert in_use(alone) == in_use(connect(server)) == ("2", "3")


@pytest.mark.e2e
def test_of_two_promotions_at_once_on_a_server_one_wins_and_the_other_is_told(server):
    told = race(server)
    assert "samq.errors.SamqError: somebody else" in told


@pytest.mark.e2e
def test_a_claim_on_a_server_holds_others_off_until_it_is_stale(server):
    client = connect(server)
    first = f"{CLAIM}{'0' * 32}"
    client.set_registered_model_tag(NAME, first, f"{time.time():.0f} {os.getpid()}")
    with pytest.raises(SamqError, match=r"somebody else is moving the aliases of llama"), alias_lock(client, NAME):
        pass
    client.set_registered_model_tag(NAME, first, f"{time.time() - STALE_S - 1:.0f} {os.getpid()}")
    with alias_lock(client, NAME):
        pass
    assert list(client.get_registered_model(NAME).tags) == [first]
