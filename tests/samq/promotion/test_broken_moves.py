"""Promotions and rollbacks that fail halfway leave the aliases as they were."""

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from samq.errors import SamqError
from samq.promotion.history import history
from samq.promotion.move import promote
from samq.promotion.rollback import rollback
from tests.samq.promotion.moves import in_use, judged
from tests.samq.versions import NAME


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
