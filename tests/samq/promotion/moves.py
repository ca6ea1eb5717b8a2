"""Promotions and rollbacks that tests make, and what they left."""

from samq.promotion.history import history
from samq.promotion.lock import CLAIM
from samq.promotion.move import judge_version, promote
from samq.promotion.rollback import rollback
from samq.tracking.registry import aliases, find_version
from tests.samq.versions import NAME, POLICY


def judged(client, version):
    """The judgement of a version by the tests' policy."""
    return judge_version(client, find_version(client, NAME, version), POLICY)


def in_use(client):
    """(production, previous)"""
    version_of = aliases(client, NAME)
    return version_of.get("production"), version_of.get("previous")


def gate_tags(client, version):
    """Gate -> what its tag says of the last judgement of a version."""
    tags = client.get_model_version(NAME, version).tags
    return {key.removeprefix("samq.gate."): text for key, text in tags.items() if key.startswith("samq.gate.")}


def by_hand(client, alias, version):
    """Move an alias as MLflow's page does, which no history tells of."""
    if version is None:
        client.delete_registered_model_alias(NAME, alias)
    else:
        client.set_registered_model_alias(NAME, alias, version)


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
