"""What to do with a sweep once it is there: commands to paste into the terminal that it ran in."""

import os
import shlex
import shutil
import sys
from pathlib import Path

_PRODUCTION = "production"  # the alias that a promotion moves and a server follows


def next_commands(registered_model: str | None, best: Path | None, policy: Path) -> list[str]:
    """Commands that show, promote and serve the best candidate, a line each with what it does.

    Args:
        registered_model: where the best is registered; None: nowhere, so it is served as a file and not promoted.
        best: the best candidate's GGUF, if there is one.
        policy: file of the gates.
    """
    samq = _program("samq")
    commands = [("make ui", "open the sweep in MLflow and its run in Prefect")]
    if registered_model is not None:
        name = shlex.quote(registered_model)
        commands += [
            (
                f"{samq} promote {name} --policy {_short(policy)}",
                f"move its alias {_PRODUCTION} if it passes the gates",
            ),
            (f"{samq} serve {shlex.quote(f'models:/{registered_model}@{_PRODUCTION}')}", "serve what was promoted"),
        ]
    elif best is not None:
        commands.append((f"{samq} serve {_short(best)}", "serve the best"))
    width = max(len(command) for command, _ in commands)
    return ["next:", *(f"  {command:{width}}  # {purpose}" for command, purpose in commands)]


def _program(name: str) -> str:
    """A program of this Python's environment as the user can call it."""
    path = Path(sys.executable).with_name(name)
    on_path = shutil.which(name)
    return name if on_path and os.path.samefile(on_path, path) else _short(path)


def _short(path: Path) -> str:
    """A path from the working folder if it lies below it, else whole; quoted for the shell."""
    path = Path(os.path.abspath(path))  # not resolved: a virtual environment may be a link
    inside = path.is_relative_to(Path.cwd())
    return shlex.quote(str(path.relative_to(Path.cwd()) if inside else path))
