"""The history of a registered model: promotions, refusals and rollbacks, each a tag of the registered model.

Each event has its own tag. Two events written at the same time do not overwrite each other, and the history of a version
outlives the version.

Anybody can move an alias in MLflow's page or by its client, of which MLflow keeps no record. Each event tells what was in
production before it, so a move by hand shows as a gap between one event and the next.
"""

import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from mlflow import MlflowClient
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samq.errors import SamqError
from samq.tracking.registry import mlflow_errors, user

# kept: it was already in production; moved by hand: inferred, never recorded
Action = Literal["promoted", "refused", "kept", "rolled back", "moved by hand"]
_KEY = "samq.event."
MAX_REASON_CHARACTERS = 1000
_MAX_FAILED = 20  # failed gates that an event names; MLflow's database limits a tag to 5000 characters


class Event(BaseModel):
    """One decision about a version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: Action
    version: str = Field(description="the version that was to be served from then on; empty: none was")
    replaced: str | None = Field(description="the version that was in production until then; None: there was none")
    at: str = Field(description="time, UTC, ISO 8601")
    who: str
    failed: tuple[str, ...] = Field(default=(), description="names of the gates that failed")
    reason: str = Field(default="", description="as the user gave it")

    @property
    def verdict(self) -> str:
        """The gates' verdict in one word; empty for what has no gates."""
        if self.action in ("rolled back", "moved by hand"):
            return ""
        return "passed" if not self.failed else "forced" if self.action == "promoted" else "failed"


def describe(event: Event) -> str:
    """The decision in one line."""
    instead = f" in place of version {event.replaced}" if event.replaced else ""
    match event.action:
        case "promoted":
            by_force = f", by force: {', '.join(event.failed)} failed" if event.failed else ""
            return f"version {event.version} is in production{instead}{by_force}"
        case "kept":
            return f"version {event.version} is already in production"
        case "rolled back":
            return f"version {event.version} is in production again{instead}"
        case "refused":
            return f"version {event.version} is refused: {', '.join(event.failed)} failed"
        case "moved by hand":
            return f"version {event.version} is in production{instead}, moved by hand"


def check_reason(reason: str | None, needed_for: str) -> str:
    """The reason without surrounding spaces; raises SamqError if it is empty or too long."""
    text = (reason or "").strip()
    if not text:
        raise SamqError(f"{needed_for} needs a reason, for the history; give one with --reason")
    if len(text) > MAX_REASON_CHARACTERS:
        raise SamqError(f"the reason has {len(text):,} characters; give one of at most {MAX_REASON_CHARACTERS:,}")
    return text


def new_event(
    action: Action, version: str, replaced: str | None, failed: Sequence[str] = (), reason: str = ""
) -> Event:
    """An event with the current time and user."""
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
    """Add an event to the model's history, and return it."""
    key = f"{_KEY}{time.time_ns() // 1_000_000:014d}.{uuid.uuid4().hex[:8]}"
    with mlflow_errors(client, f"no model {name}"):
        client.set_registered_model_tag(name, key, event.model_dump_json())
    return event


def history(client: MlflowClient, name: str) -> list[Event]:
    """All events of a model, newest first. Skips tags that are not events, since anybody can edit tags."""
    with mlflow_errors(client, f"no model {name}"):
        tags = client.get_registered_model(name).tags
    events = []
    for key in sorted((key for key in tags if key.startswith(_KEY)), reverse=True):
        try:
            event = Event.model_validate_json(tags[key])
        except ValidationError:
            continue
        if event.action != "moved by hand":
            events.append(event)
    return events


def served_before(events: Sequence[Event], current: str | None) -> str | None:
    """The last version other than `current` that the events (newest first) saw in production; None if there is none."""
    seen = (version for event in events for version in (_after(event), event.replaced))
    return next((version for version in seen if version and version != current), None)


def with_moves_by_hand(events: Sequence[Event], current: str | None) -> list[Event]:
    """The events, newest first, and among them the moves of production that they do not tell of.

    `current` is the version in production now. Of several moves by hand between two events, only the last is seen.
    """
    result, after, when = [], current, f"after {events[0].at}" if events else "unknown"
    for event in events:
        if _after(event) != after:
            result.append(_by_hand(after, _after(event), when))
        result.append(event)
        after, when = event.replaced, f"before {event.at}"
    if after is not None:
        result.append(_by_hand(after, None, when))
    return result


def _after(event: Event) -> str | None:
    """The version in production after an event."""
    return event.version if event.action in ("promoted", "rolled back") else event.replaced


def _by_hand(version: str | None, replaced: str | None, when: str) -> Event:
    reason = "in MLflow, or by an interrupted command"
    return Event(
        action="moved by hand", version=version or "", replaced=replaced, at=when, who="unknown", reason=reason
    )
