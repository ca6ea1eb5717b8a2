"""Promoting a version to production, or refusing it.

A version is judged against the one in production at that time. If production has changed before the aliases move, nothing
moves: of two promotions at the same time, one wins.

By force, a version may go into production although gates fail, or although MLflow has lost what they would judge. The tags
of its registration must be right all the same: without them no server could find and verify the file.
"""

from dataclasses import dataclass

from mlflow import MlflowClient

from samq.errors import SamqError, UnreachableError
from samq.promotion.aliases import confirm, move_aliases, unmoved_aliases
from samq.promotion.evidence import gather
from samq.promotion.gates import Gate, failed, judge, judge_without_evidence
from samq.promotion.history import Event, check_reason, new_event, record
from samq.promotion.lock import alias_lock
from samq.promotion.policy import PromotionPolicy
from samq.tracking.registry import PRODUCTION_ALIAS, RegisteredGguf, aliases, mlflow_errors

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


def judge_version(
    client: MlflowClient, version: RegisteredGguf, policy: PromotionPolicy, *, force: bool = False
) -> Judgement:
    """Judge a registered version by a policy. Changes nothing.

    Raises SamqError if MLflow has lost its evidence. By `force` that is a failed gate, and of the others only the file's
    content is judged.
    """
    try:
        evidence = gather(client, version)
    except UnreachableError:
        raise
    except SamqError as error:
        if not force:
            raise SamqError(f"{error}, or promote it unjudged with --force and --reason") from error
        production = aliases(client, version.name).get(PRODUCTION_ALIAS)
        return Judgement(version, production, policy, judge_without_evidence(version, policy, str(error)))
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
        current_aliases = unmoved_aliases(client, name, replaced, version)
        _tag(client, judgement)
        if replaced == version:
            return new_event("kept", version, replaced, judgement.failed, reason)
        if judgement.failed and not force:
            return record(client, name, new_event("refused", version, replaced, judgement.failed, reason))
        move_aliases(client, name, current_aliases, version)
        confirm(client, name, version)
        return record(client, name, new_event("promoted", version, replaced, judgement.failed, reason))


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
