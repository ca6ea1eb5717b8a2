"""Moving the aliases of a registered model.

The alias `production` names the version that is served, `previous` the one before it. MLflow moves one alias at a time.
`previous` moves first, so that what is served changes last. If `production` then does not move, `previous` goes back. If
that fails too, both aliases name one version, and the history says where a rollback leads.
"""

from collections.abc import Mapping
from contextlib import suppress

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from samq.errors import SamqError
from samq.tracking.registry import PREVIOUS_ALIAS, PRODUCTION_ALIAS, aliases, mlflow_errors


def move_aliases(client: MlflowClient, name: str, current_aliases: Mapping[str, str], version: str) -> None:
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


def unmoved_aliases(client: MlflowClient, name: str, expected: str | None, version: str) -> dict[str, str]:
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


def confirm(client: MlflowClient, name: str, version: str) -> None:
    """Check that production is the version it was moved to: MLflow's own page and client do not take the lock."""
    current = aliases(client, name).get(PRODUCTION_ALIAS)
    if current != version:
        raise SamqError(
            f"somebody else moved {name} to version {current} at the same time; look at `samq status {name}`"
        )
