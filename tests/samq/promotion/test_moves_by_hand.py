"""Aliases that somebody moves on MLflow's page, and where a rollback leads then."""

import pytest

from samq.errors import SamqError
from samq.promotion.history import history, with_moves_by_hand
from samq.promotion.move import promote
from samq.promotion.rollback import rollback, rollback_target
from samq.promotion.status import rollback_note
from samq.tracking.registry import aliases
from tests.samq.promotion.moves import by_hand, in_use, judged
from tests.samq.versions import NAME


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
