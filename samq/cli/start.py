"""What commands share before they work: slow imports behind a progress bar, Prefect's settings, checked options."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from samq.errors import SamqError
from samq.home import home
from samq.output import make_folder
from samq.progress import bar, console

if TYPE_CHECKING:
    from pydantic import BaseModel

M = TypeVar("M", bound="BaseModel")

PROJECT = Path(__file__).parents[2]  # the checkout, with prefect.yaml and deployments/


@contextmanager
def loading_packages(description: str = "load Python packages") -> Iterator[None]:
    """Show a progress bar during slow imports: torch, transformers, MLflow and lm-eval take seconds each.

    Python's garbage collector waits, which saves a sixth of the time: what an import creates stays.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        with bar(description):
            yield
    finally:
        if was_on:
            gc.enable()


def validated(kind: type[M], **options: Any) -> M:
    """Options built from a command's options; raises SamqError that names the first invalid option, or says how they disagree."""
    from pydantic import ValidationError

    try:
        return kind(**options)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:  # of all together
            raise SamqError(str(first.get("ctx", {}).get("error", first["msg"]))) from error
        option = ".".join(map(str, first["loc"]))
        raise SamqError(f"invalid {option} {first['input']!r}: {first['msg']}; choose another value") from error


def prepare_prefect() -> None:
    """Set Prefect's environment, before Prefect is imported, and show SAMQ's own log on the terminal.

    Prefect keeps its data in the SAMQ folder unless the user names a server, home or profile.
    """
    import logging

    from rich.logging import RichHandler

    make_folder(home(), advice="set SAMQ_HOME to a folder of your own")
    if not any(name in os.environ for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE")):
        os.environ["PREFECT_HOME"] = str(home() / "prefect")
    os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    log = logging.getLogger("samq")
    log.addHandler(RichHandler(console=console, show_path=False, show_level=False, log_time_format="%X"))
    log.setLevel(logging.INFO)


def require_prefect() -> None:
    """Start Prefect's server (10 s or more) or reach the user's; raises SamqError if it does not answer."""
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
    except RuntimeError as not_started:
        error = not_started
    if error:
        advice = "check PREFECT_API_URL or unset it" if "PREFECT_API_URL" in os.environ else "try again"
        raise SamqError(f"Prefect's server does not answer ({type(error).__name__}: {error}); {advice}") from error
