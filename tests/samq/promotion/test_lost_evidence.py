"""Versions whose measurements are lost: refused, or promoted by force."""

import dataclasses
from pathlib import Path

import pytest

from samq.errors import SamqError
from samq.promotion.move import judge_version, promote
from samq.tracking.registry import find_version
from tests.samq.promotion.moves import gate_tags, in_use, judged
from tests.samq.versions import NAME, POLICY


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


def test_a_version_whose_run_is_gone_cannot_be_judged(client, database):
    version = dataclasses.replace(find_version(client, NAME, "1"), run_id="0" * 32)
    with pytest.raises(
        SamqError, match=r"cannot read the measurements of llama version 1 from MLflow: .*; run the sweep again"
    ):
        judge_version(client, version, POLICY)
