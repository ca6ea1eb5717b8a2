"""Putting a version into production, or not, and going back.

The alias `production` says what is served, `previous` what was before. A version is judged against what is in production
at that time; if that has changed when the aliases are to move, nothing moves: of two promotions at once one wins.

MLflow moves one alias at a time. `previous` goes first: what serves changes last, and if it does not, `previous` is put
back. Should that fail too, both aliases are at one version, and history says where a rollback leads.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from samq.errors import SamqError
from samq.promotion.evidence import gather
from samq.promotion.gates import Gate, failed, judge
from samq.promotion.history import Event, check_reason, history, now, record
from samq.promotion.lock import alone
from samq.promotion.policy import PromotionPolicy
from samq.tracking.registry import PREVIOUS, PRODUCTION, RegisteredGguf, aliases, answering

_GATE = "samq.gate."
_TAG_CHARACTERS = 5000  # of a version's tag in a database


@dataclass(frozen=True)
class Judgement:
    """What the gates said of a version, and what was in production when they did."""

    version: RegisteredGguf
    production: str | None
    policy: PromotionPolicy
    gates: tuple[Gate, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the gates that do not hold."""
        return tuple(gate.name for gate in failed(self.gates))


def judge_version(client: MlflowClient, version: RegisteredGguf, policy: PromotionPolicy) -> Judgement:
    """Hold a registered version against a policy; nothing is changed. Raises SamqError if MLflow lost its evidence."""
    evidence = gather(client, version)
    return Judgement(version, evidence.production, policy, judge(evidence, policy))


def promote(client: MlflowClient, judgement: Judgement, *, force: bool = False, reason: str = "") -> Event:
    """Move `production` to the judged version, and `previous` to what it leaves, if the gates let it or by force.

    Whatever comes of it, the version's tags say what the gates found, and the model's history what was done; a version
    that is in production already stays, and history has nothing new. Raises SamqError if force lacks its reason, or if
    production has moved since the judgement.
    """
    if force:
        check_reason(reason, "--force")
    version, name, replaced = judgement.version.version, judgement.version.name, judgement.production
    with alone(client, name):
        seen = _require(client, name, replaced, version)
        _tag(client, judgement)
        if replaced == version:
            return now("kept", version, replaced, judgement.failed, reason)
        if judgement.failed and not force:
            return record(client, name, now("refused", version, replaced, judgement.failed, reason))
        _move(client, name, seen, version)
        _confirm(client, name, version)
        return record(client, name, now("promoted", version, replaced, judgement.failed, reason))


def rollback(client: MlflowClient, name: str, reason: str) -> Event:
    """Swap `production` and `previous`; raises SamqError if there is no version to go back to."""
    reason = check_reason(reason, "a rollback")
    seen = aliases(client, name)
    current, previous = seen.get(PRODUCTION), seen.get(PREVIOUS)
    if previous is not None and previous == current:  # moving the aliases was broken off
        previous = _served_before(client, name, current)
    if previous is None:
        raise SamqError(f"{name} has no version before the one in production; promote one with `samq promote {name}`")
    with alone(client, name):
        _move(client, name, _require(client, name, current, previous), previous)
        if current is None:
            with answering(client, f"no model {name}"):
                client.delete_registered_model_alias(name, PREVIOUS)
        _confirm(client, name, previous)
        return record(client, name, now("rolled back", previous, current, reason=reason))


def _move(client: MlflowClient, name: str, seen: Mapping[str, str], version: str) -> None:
    """Point `production` at the version, and `previous` at what the aliases that were `seen` have in production."""
    current, before = seen.get(PRODUCTION), seen.get(PREVIOUS)
    with answering(client, f"no version {version} of a model {name}"):
        try:
            if current is not None:
                client.set_registered_model_alias(name, PREVIOUS, current)
            client.set_registered_model_alias(name, PRODUCTION, version)
        except BaseException:  # Ctrl-C too
            with suppress(MlflowException, SamqError):
                if current is not None and aliases(client, name).get(PRODUCTION) == current:
                    _restore(client, name, before)
            raise


def _restore(client: MlflowClient, name: str, previous: str | None) -> None:
    if previous is None:
        client.delete_registered_model_alias(name, PREVIOUS)
    else:
        client.set_registered_model_alias(name, PREVIOUS, previous)


def _served_before(client: MlflowClient, name: str, version: str) -> str | None:
    """What the version replaced when it last went into production; None if history has nothing of it."""
    came = (event for event in history(client, name) if event.version == version and event.action != "refused")
    return next((event.replaced for event in came if event.replaced != version), None)


def _require(client: MlflowClient, name: str, expected: str | None, wanted: str) -> dict[str, str]:
    """The aliases now, if production is what it was when this began; raises SamqError if it is not."""
    seen = aliases(client, name)
    found = seen.get(PRODUCTION)
    if found != expected:
        was, now = (f"version {one}" if one else "nothing" for one in (expected, found))
        raise SamqError(
            f"somebody else moved {name} from {was} to {now} in production while version {wanted} was on its way; "
            f"look at `samq status {name}`, then try again"
        )
    return seen


def _confirm(client: MlflowClient, name: str, wanted: str) -> None:
    """Production is where it was moved to: MLflow's page and client move aliases without asking for a turn."""
    found = aliases(client, name).get(PRODUCTION)
    if found != wanted:
        raise SamqError(
            f"somebody else moved {name} to version {found} in the same moment; look at `samq status {name}`"
        )


def _tag(client: MlflowClient, judgement: Judgement) -> None:
    """The gate report as tags of the version, a gate each; those of an earlier report go."""
    version = judgement.version
    tags = {f"{_GATE}{gate.name}": _in_words(gate) for gate in judgement.gates}
    tags["samq.policy"] = judgement.policy.model_dump_json()
    with answering(client, f"no version {version.version} of a model {version.name}"):
        known = client.get_model_version(version.name, version.version).tags
        for key in known.keys() - tags.keys():
            if key.startswith(_GATE):
                client.delete_model_version_tag(version.name, version.version, key)
        for key, text in tags.items():
            client.set_model_version_tag(version.name, version.version, key, text[:_TAG_CHARACTERS])


def _in_words(gate: Gate) -> str:
    """`fail: 0.120 nats (limit: at most 0.1 nats)`; a reason, if there is one, follows what was found."""
    found = "; ".join(part for part in (gate.value, gate.reason) if part)
    limit = f" (limit: {gate.limit})" if gate.verdict != "not applicable" else ""
    return f"{gate.verdict}: {found}{limit}"
