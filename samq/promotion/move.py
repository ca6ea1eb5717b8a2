"""Promoting a version to production, or refusing it, and rolling back.

The alias `production` names the version that is served, `previous` the one before it. A version is judged against the
one in production at that time. If production has changed before the aliases move, nothing moves: of two promotions at
the same time, one wins.

MLflow moves one alias at a time. `previous` moves first, so that what is served changes last. If `production` then does
not move, `previous` goes back. If that fails too, both aliases name one version, and the history says where a rollback
leads.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from samq.errors import SamqError
from samq.promotion.evidence import gather
from samq.promotion.gates import Gate, failed, judge
from samq.promotion.history import Event, check_reason, history, new_event, record
from samq.promotion.lock import alias_lock
from samq.promotion.policy import PromotionPolicy
from samq.tracking.registry import PREVIOUS_ALIAS, PRODUCTION_ALIAS, RegisteredGguf, aliases, mlflow_errors

_GATE = "samq.gate."
_MAX_TAG_CHARACTERS = 5000  # the limit of MLflow's database for a version's tag


@dataclass(frozen=True)
class Judgement:
    """The gates' verdicts on a version, and the version that was in production at that time."""

    version: RegisteredGguf
    production: str | None
    policy: PromotionPolicy
    gates: tuple[Gate, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the gates that failed."""
        return tuple(gate.name for gate in failed(self.gates))


def judge_version(client: MlflowClient, version: RegisteredGguf, policy: PromotionPolicy) -> Judgement:
    """Judge a registered version by a policy. Changes nothing. Raises SamqError if MLflow has lost its evidence."""
    evidence = gather(client, version)
    return Judgement(version, evidence.production, policy, judge(evidence, policy))


def promote(client: MlflowClient, judgement: Judgement, *, force: bool = False, reason: str = "") -> Event:
    """Move `production` to the judged version, and `previous` to the one it replaces, if no gate failed or by force.

    In every case the version's tags get the gates' verdicts, and the model's history gets the decision. A version that
    is already in production stays there, and the history does not change. Raises SamqError if `force` comes without a
    reason, or if production has moved since the judgement.
    """
    if force:
        check_reason(reason, "--force")
    version, name, replaced = judgement.version.version, judgement.version.name, judgement.production
    with alias_lock(client, name):
        current_aliases = _unmoved_aliases(client, name, replaced, version)
        _tag(client, judgement)
        if replaced == version:
            return new_event("kept", version, replaced, judgement.failed, reason)
        if judgement.failed and not force:
            return record(client, name, new_event("refused", version, replaced, judgement.failed, reason))
        _move(client, name, current_aliases, version)
        _confirm(client, name, version)
        return record(client, name, new_event("promoted", version, replaced, judgement.failed, reason))


def rollback(client: MlflowClient, name: str, reason: str) -> Event:
    """Swap `production` and `previous`; raises SamqError if there is no version to go back to."""
    reason = check_reason(reason, "a rollback")
    before = aliases(client, name)
    current, previous = before.get(PRODUCTION_ALIAS), before.get(PREVIOUS_ALIAS)
    if previous is not None and previous == current:  # an earlier move was interrupted
        previous = _served_before(client, name, current)
    if previous is None:
        raise SamqError(f"{name} has no version before the one in production; promote one with `samq promote {name}`")
    with alias_lock(client, name):
        _move(client, name, _unmoved_aliases(client, name, current, previous), previous)
        if current is None:
            with mlflow_errors(client, f"no model {name}"):
                client.delete_registered_model_alias(name, PREVIOUS_ALIAS)
        _confirm(client, name, previous)
        return record(client, name, new_event("rolled back", previous, current, reason=reason))


def _move(client: MlflowClient, name: str, current_aliases: Mapping[str, str], version: str) -> None:
    """Point `production` at the version, and `previous` at the version that has been in production."""
    current, previous = current_aliases.get(PRODUCTION_ALIAS), current_aliases.get(PREVIOUS_ALIAS)
    with mlflow_errors(client, f"no version {version} of a model {name}"):
        try:
            if current is not None:
                client.set_registered_model_alias(name, PREVIOUS_ALIAS, current)
            client.set_registered_model_alias(name, PRODUCTION_ALIAS, version)
        except BaseException:  # Ctrl-C too
            with suppress(MlflowException, SamqError):
                if current is not None and aliases(client, name).get(PRODUCTION_ALIAS) == current:
                    _restore(client, name, previous)
            raise


def _restore(client: MlflowClient, name: str, previous: str | None) -> None:
    if previous is None:
        client.delete_registered_model_alias(name, PREVIOUS_ALIAS)
    else:
        client.set_registered_model_alias(name, PREVIOUS_ALIAS, previous)


def _served_before(client: MlflowClient, name: str, version: str) -> str | None:
    """The version that this one replaced when it last went into production; None if the history does not say."""
    events = (event for event in history(client, name) if event.version == version and event.action != "refused")
    return next((event.replaced for event in events if event.replaced != version), None)


def _unmoved_aliases(client: MlflowClient, name: str, expected: str | None, version: str) -> dict[str, str]:
    """The aliases now; raises SamqError if the one in production is not the `expected` version any more."""
    current_aliases = aliases(client, name)
    current = current_aliases.get(PRODUCTION_ALIAS)
    if current != expected:
        was, is_now = (f"version {one}" if one else "nothing" for one in (expected, current))
        raise SamqError(
            f"somebody else moved production of {name} from {was} to {is_now} in the meantime, so version {version} "
            f"does not go into production; look at `samq status {name}`, then try again"
        )
    return current_aliases


def _confirm(client: MlflowClient, name: str, version: str) -> None:
    """Check that production is the version it was moved to: MLflow's own page and client do not take the lock."""
    current = aliases(client, name).get(PRODUCTION_ALIAS)
    if current != version:
        raise SamqError(
            f"somebody else moved {name} to version {current} at the same time; look at `samq status {name}`"
        )


def _tag(client: MlflowClient, judgement: Judgement) -> None:
    """Write the gate report into the version's tags, one a gate; delete the tags of an earlier report."""
    version = judgement.version
    tags = {f"{_GATE}{gate.name}": _in_words(gate) for gate in judgement.gates}
    tags["samq.policy"] = judgement.policy.model_dump_json()
    with mlflow_errors(client, f"no version {version.version} of a model {version.name}"):
        known = client.get_model_version(version.name, version.version).tags
        for key in known.keys() - tags.keys():
            if key.startswith(_GATE):
                client.delete_model_version_tag(version.name, version.version, key)
        for key, text in tags.items():
            client.set_model_version_tag(version.name, version.version, key, text[:_MAX_TAG_CHARACTERS])


def _in_words(gate: Gate) -> str:
    """`fail: 0.120 nats (limit: at most 0.1 nats)`; a reason, if there is one, follows the value."""
    details = "; ".join(part for part in (gate.value, gate.reason) if part)
    limit = f" (limit: {gate.limit})" if gate.verdict != "not applicable" else ""
    return f"{gate.verdict}: {details}{limit}"
