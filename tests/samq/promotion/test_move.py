"""Promotion and rollback on a real registry: three versions, of which the third answers worse."""

import pytest

from samq.errors import SamqError
from samq.promotion.history import MAX_REASON_CHARACTERS, history
from samq.promotion.move import judge_version, promote
from samq.promotion.rollback import rollback
from samq.tracking.registry import find_version, notable_versions
from tests.samq.promotion.moves import check_promotion, gate_tags, in_use, judged
from tests.samq.versions import NAME, POLICY


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
