"""The entry point of `samq`, and its commands in the order in which `samq --help` lists them."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from samq import __version__
from samq.cli.build import compensate, inspect, quantize
from samq.cli.calibrate import calibrate, imatrix
from samq.cli.evaluate import evaluate, lm_eval
from samq.cli.machine import doctor, migrate, prune, relocate, ui, up
from samq.cli.plan import plan
from samq.cli.production import promote, rollback, serve, status
from samq.cli.sweep import demo, requantize
from samq.errors import SamqError
from samq.progress import console

COMMANDS = (
    *(demo, requantize),
    *(calibrate, imatrix, plan, quantize, compensate, inspect, evaluate, lm_eval),
    *(promote, rollback, status, serve),
    *(doctor, prune, relocate, migrate, ui, up),
)
# lm-eval parses its own options, --help included.
UNPARSED = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}

app = typer.Typer(
    help="Find the GGUF quantization with the lowest quality loss for a given size.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command(context_settings=UNPARSED if command is lm_eval else None)(command)


@app.callback(invoke_without_command=True)
def start(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Handle the options that come before the command."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; an error that the user can fix becomes one sentence and exit code 2."""
    try:
        app(arguments)
    except SamqError as error:
        console.print(f"samq: {error}", style="red", highlight=False, soft_wrap=True)
        sys.exit(2)
