"""Tasks: a registered version held against the gates, and the aliases moved if they let it through."""

from prefect import task
from prefect.artifacts import create_markdown_artifact

from samq.progress import bar
from samq.promotion.gate_report import markdown_gates
from samq.promotion.history import Event
from samq.promotion.move import Judgement, judge_version, promote
from samq.promotion.policy import PromotionPolicy
from samq.tracking.registry import connect, find_version, resolve


@task(name="judge", task_run_name="judge {model}")
def judge(
    tracking_uri: str, model: str, version: str | None, alias: str, policy: PromotionPolicy, force: bool
) -> Judgement:
    """Hold a version, or the one that an alias points at, against the policy. Not cached: production changes."""
    client = connect(tracking_uri)
    candidate = find_version(client, model, version) if version is not None else resolve(client, model, alias)
    with bar(f"judge {model} version {candidate.version}"):
        return judge_version(client, candidate, policy, force=force)


@task(name="move", task_run_name="move {judgement.version.name}")
def move(tracking_uri: str, judgement: Judgement, force: bool, reason: str) -> Event:
    """Promote or refuse the judged version, and keep the gate report as an artifact of the flow run."""
    event = promote(connect(tracking_uri), judgement, force=force, reason=reason)
    create_markdown_artifact(
        markdown_gates(judgement, event), key="promote-gates", description=f"Gates of {judgement.version.name}"
    )
    return event
