"""Promote a registered version: judge it by the gates of a policy, then move the aliases, or refuse.

registered version -> judge -> move
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow
from pydantic import Field, model_validator

from flows.parameters import Parameters, TrackingUri
from samq.errors import SamqError
from samq.home import mlflow_uri
from samq.promotion.history import MAX_REASON_CHARACTERS, Event, describe
from samq.promotion.move import Judgement
from samq.promotion.policy import PromotionPolicy, load_policy
from samq.tracking.registry import CANDIDATE_ALIAS, VERSION
from tasks.promote import judge, move

logging.getLogger("samq").setLevel(logging.INFO)  # in a worker nobody else does


class PromoteParameters(Parameters):
    """One run of the promotion flow."""

    model: str = Field(min_length=1, description="registered model")
    version: str | None = Field(
        default=None, pattern=VERSION, description="version of it; default: the one with the alias"
    )
    alias: str = Field(default=CANDIDATE_ALIAS, min_length=1, description="alias of the version, if that is not given")
    policy: PromotionPolicy = Field(description="gates; see deployments/promotion/")
    force: bool = Field(default=False, description="promote even if gates fail; needs a reason")
    reason: str = Field(default="", max_length=MAX_REASON_CHARACTERS, description="recorded with what is done")
    tracking_uri: TrackingUri | None = Field(default=None, description="MLflow's; default: SQLite in the SAMQ folder")

    @model_validator(mode="after")
    def _says_why(self) -> "PromoteParameters":
        if self.force and not self.reason.strip():
            raise ValueError("force needs a reason, which is recorded")
        return self


@dataclass(frozen=True)
class Promotion:
    """What one run of the flow found and did."""

    judgement: Judgement
    event: Event


class RefusedError(SamqError):
    """The gates refused a version."""

    def __init__(self, promotion: Promotion) -> None:
        super().__init__(promotion)
        self.promotion = promotion

    def __str__(self) -> str:
        """What was refused, and by which gates."""
        return f"{self.promotion.judgement.version.name} {describe(self.promotion.event)}"


@flow(name="promote", flow_run_name="promote {parameters.model}")
def promote(parameters: PromoteParameters) -> Promotion:
    """Judge and promote. Raises RefusedError, so that the run shows as failed, if the gates refuse the version."""
    uri = parameters.tracking_uri or mlflow_uri()
    judgement = judge(uri, parameters.model, parameters.version, parameters.alias, parameters.policy, parameters.force)
    event = move(uri, judgement, parameters.force, parameters.reason)
    promotion = Promotion(judgement, event)
    if event.action == "refused":
        raise RefusedError(promotion)
    return promotion


def read_policy(path: str) -> dict[str, Any]:
    """A build step for prefect.yaml: the validated policy file, as `policy` of the deployment's parameters."""
    return {"policy": load_policy(Path(path)).model_dump(mode="json")}
