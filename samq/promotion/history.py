"""What became of a registered model's versions: promotions, refusals, rollbacks, each a tag of the registered model.

A tag an event: two that are written at once do not overwrite each other, and a version may be deleted without its history.
"""

import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from mlflow import MlflowClient
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samq.errors import SamqError
from samq.tracking.registry import answering, user

Action = Literal["promoted", "refused", "kept", "rolled back"]  # kept: it was in production already
_KEY = "samq.event."
MAX_REASON_CHARACTERS = 1000
_MAX_FAILED = 20  # gates that an event names: a tag holds 5000 characters in a database


class Event(BaseModel):
    """One decision about a version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    version: str = Field(description="that was to serve from then on")
    replaced: str | None = Field(description="version that served until then; None: none did")
    at: str = Field(description="time, UTC, ISO 8601")
    who: str
    failed: tuple[str, ...] = Field(default=(), description="gates that did not hold")
    reason: str = Field(default="", description="as it was given")

    @property
    def verdict(self) -> str:
        """What the gates said, in a word; empty for a rollback, which has none."""
        if self.action == "rolled back":
            return ""
        return "passed" if not self.failed else "forced" if self.action == "promoted" else "failed"


def check_reason(reason: str | None, needed_for: str) -> str:
    """The reason for what needs one; raises SamqError if it is empty or too long."""
    text = (reason or "").strip()
    if not text:
        raise SamqError(f"{needed_for} needs a reason, which is recorded; give one with --reason")
    if len(text) > MAX_REASON_CHARACTERS:
        raise SamqError(f"the reason has {len(text):,} characters; give one of at most {MAX_REASON_CHARACTERS:,}")
    return text


def now(action: Action, version: str, replaced: str | None, failed: Sequence[str] = (), reason: str = "") -> Event:
    """An event of this moment, by this user."""
    return Event(
        action=action,
        version=version,
        replaced=replaced,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        who=user(),
        failed=tuple(failed[:_MAX_FAILED]),
        reason=reason[:MAX_REASON_CHARACTERS],
    )


def record(client: MlflowClient, name: str, event: Event) -> Event:
    """Write an event into the model's history, and return it."""
    key = f"{_KEY}{time.time_ns() // 1_000_000:014d}.{uuid.uuid4().hex[:8]}"
    with answering(client, f"no model {name}"):
        client.set_registered_model_tag(name, key, event.model_dump_json())
    return event


def history(client: MlflowClient, name: str) -> list[Event]:
    """All events of a model, the newest first; a tag that is none (a person may edit tags) is left out."""
    with answering(client, f"no model {name}"):
        tags = client.get_registered_model(name).tags
    events = []
    for key in sorted((key for key in tags if key.startswith(_KEY)), reverse=True):
        try:
            events.append(Event.model_validate_json(tags[key]))
        except ValidationError:
            continue
    return events
