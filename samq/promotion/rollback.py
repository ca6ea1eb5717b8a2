"""Rolling production back to the version that served before, by what the history saw and not by the alias `previous`.

Somebody may have moved either alias in MLflow. It imports nothing that judges, since a rollback must be quick.
"""

from collections.abc import Mapping

from mlflow import MlflowClient

from samq.errors import NotRegisteredError, SamqError
from samq.promotion.aliases import confirm, move_aliases, unmoved_aliases
from samq.promotion.history import Event, check_reason, history, new_event, record, served_before
from samq.promotion.lock import alias_lock
from samq.tracking.registry import PREVIOUS_ALIAS, PRODUCTION_ALIAS, aliases, find_version, mlflow_errors


def rollback(client: MlflowClient, name: str, reason: str) -> Event:
    """Let the version serve that did before, and point `previous` at the one that it replaces.

    Raises SamqError if no version is known to have served before, or if that version is deleted or cannot be served.
    """
    reason = check_reason(reason, "a rollback")
    before = aliases(client, name)
    current = before.get(PRODUCTION_ALIAS)
    target = rollback_target(client, name, before)
    with alias_lock(client, name):
        move_aliases(client, name, unmoved_aliases(client, name, current, target), target)
        if current is None and before.get(PREVIOUS_ALIAS) == target:
            with mlflow_errors(client, f"no model {name}"):
                client.delete_registered_model_alias(name, PREVIOUS_ALIAS)
        confirm(client, name, target)
        return record(client, name, new_event("rolled back", target, current, reason=reason))


def rollback_target(client: MlflowClient, name: str, current_aliases: Mapping[str, str]) -> str:
    """The version that a rollback would let serve; raises SamqError, which says why, if there is none."""
    current, previous = current_aliases.get(PRODUCTION_ALIAS), current_aliases.get(PREVIOUS_ALIAS)
    events = history(client, name)
    target = served_before(events, current) if events else previous
    if target is None or target == current:
        unknown = f" (the alias previous names version {previous}, but it never served)" if previous else ""
        raise SamqError(
            f"{name} has no version before the one in production{unknown}; promote one with `samq promote {name}`"
        )
    try:
        find_version(client, name, target)
    except NotRegisteredError as error:
        instead = f"version {current}" if current else "nothing"
        raise SamqError(
            f"version {target} of {name}, which served before {instead}, is deleted; promote another with "
            f"`samq promote {name} --version N`"
        ) from error
    return target
