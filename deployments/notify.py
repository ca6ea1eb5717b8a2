"""Notify somebody of runs that fail, crash or are refused: creates a Prefect block with the address, and an automation.

    SAMQ_NOTIFY=https://example.org/hook python deployments/notify.py webhook
    SAMQ_NOTIFY=https://hooks.slack.com/services/... python deployments/notify.py slack
    SAMQ_NOTIFY=SENDGRID_API_KEY python deployments/notify.py email --sender samq@example.org --to me@example.org

Needs PREFECT_API_URL. The secret is read from the environment and kept in the block, so that no command line shows it. The runs
are those of the deployments in prefect.yaml: all have the tag `samq`. A second call for the same kind replaces the first one.
"""

import argparse
import os
from uuid import UUID

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.blocks.core import Block
from prefect.blocks.notifications import SendgridEmail, SlackWebhook
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import get_client
from prefect.events.actions import CallWebhook, SendNotification
from prefect.settings import PREFECT_API_URL
from prefect.types import SecretDict
from pydantic import SecretStr

KINDS = ("webhook", "slack", "email")
ENDS = {"prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut"}
TAG: dict[str, str | list[str]] = {"prefect.resource.role": "tag", "prefect.resource.id": "prefect.tag.samq"}
SUBJECT = "SAMQ: {{ flow.name }} {{ flow_run.state.name | lower }}"
TEXT = "{{ flow_run.name }} of {{ deployment.name }}: {{ flow_run.state.message }}\n{{ flow_run | ui_url }}"
# A webhook gets JSON.
PAYLOAD = (
    '{"flow": {{ flow.name | tojson }}, "deployment": {{ deployment.name | tojson }}, "run": {{ flow_run.name | tojson }}, '
    '"state": {{ flow_run.state.name | tojson }}, "message": {{ flow_run.state.message | tojson }}, '
    '"url": {{ flow_run | ui_url | tojson }}}'
)


def block_for(kind: str, secret: SecretStr, sender: str, receivers: list[str]) -> Block:
    """Prefect's block that holds the address."""
    if kind == "slack":
        return SlackWebhook(url=secret)
    if kind == "email":
        return SendgridEmail(api_key=secret, sender_email=sender, to_emails=receivers)
    return Webhook(url=secret, headers=SecretDict({"content-type": "application/json"}))


def main() -> None:
    """Create or replace the block and the automation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--sender", default="", help="address that an e-mail comes from")
    parser.add_argument("--to", nargs="+", default=[], help="addresses of an e-mail")
    arguments = parser.parse_args()
    secret = os.environ.get("SAMQ_NOTIFY")
    if not secret:
        parser.error("SAMQ_NOTIFY is not set; give it the address, or for e-mail SendGrid's API key")
    if not PREFECT_API_URL.value():
        parser.error(
            "PREFECT_API_URL is not set; give it the address of Prefect's server, such as http://127.0.0.1:4200/api"
        )
    if arguments.kind == "email" and not (arguments.sender and arguments.to):
        parser.error("an e-mail needs --sender and --to")
    name = f"samq-{arguments.kind}"
    block = block_for(arguments.kind, SecretStr(secret), arguments.sender, arguments.to)
    place = UUID(str(block.save(name, overwrite=True)))
    action = (
        CallWebhook(block_document_id=place, payload=PAYLOAD)
        if arguments.kind == "webhook"
        else SendNotification(block_document_id=place, subject=SUBJECT, body=TEXT)
    )
    automation = AutomationCore(
        name=name,
        description="Created by deployments/notify.py",
        trigger=EventTrigger(expect=ENDS, match_related=TAG, posture=Posture.Reactive),
        actions=[action],
    )
    with get_client(sync_client=True) as client:
        for former in client.read_automations_by_name(name):
            client.delete_automation(former.id)
        client.create_automation(automation)
    print(f"{arguments.kind} is told of runs that fail, crash or are refused (automation {name})")


if __name__ == "__main__":
    main()
