"""The pages and the worker on this machine: MLflow, Prefect's server, and a worker for the deployments."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from samq.errors import SamqError
from samq.home import home, mlflow_uri
from samq.llamacpp.process import kill_group

WORK_POOL = "samq"
PATIENCE_S = 15
_running: dict[str, subprocess.Popen[bytes]] = {}


def first_ended() -> str | None:
    """A sentence about a service that was started here and has ended by itself, with its log; None while all run."""
    for name, child in _running.items():
        if (code := child.poll()) is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return f"{name} {how}; see {_log(name)}, and start again"
    return None


@contextmanager
def mlflow_page(port: int) -> Iterator[str]:
    """MLflow's server over the SAMQ folder's database for the time of the `with` block; yields its address.

    If MLFLOW_TRACKING_URI names a server, that one is used.
    """
    uri = mlflow_uri()
    if uri.startswith("http"):
        yield uri.rstrip("/")
        return
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", uri]
    command += ["--artifacts-destination", str(home() / "mlartifacts")]  # else in the working directory
    # Its jobs, which nothing here asks for, would be six more processes of 250 MB.
    with _service("MLflow", command, port, "/health", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false") as address:
        yield address


@contextmanager
def prefect_page(port: int) -> Iterator[str]:
    """Prefect's server for the time of the `with` block; yields its address.

    If PREFECT_API_URL names a server, that one is used.
    """
    if own := os.environ.get("PREFECT_API_URL"):
        yield own.rstrip("/").removesuffix("/api")
        return
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    own_api = f"http://127.0.0.1:{port}/api"  # else the page asks at Prefect's usual port, whatever --port says
    with _service("Prefect", command, port, "/api/health", PREFECT_SERVER_UI_API_URL=own_api) as address:
        yield address


@contextmanager
def worker(prefect_address: str, project: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Create the work pool and the deployments of `project`/prefect.yaml, and run a worker during the `with` block."""
    # The SAMQ folder may be given relative to this working directory, and the worker has another.
    environment = {**os.environ, "PREFECT_API_URL": f"{prefect_address}/api", "SAMQ_HOME": str(home())}
    for arguments in (
        ["work-pool", "create", WORK_POOL, "--type", "process", "--overwrite"],
        ["--no-prompt", "deploy", "--all"],
    ):
        command = [sys.executable, "-m", "prefect", *arguments]
        done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise SamqError(f"`prefect {' '.join(arguments)}` failed: {' '.join(reason)}; see prefect.yaml")
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL]
    with _child("worker", command, project, environment) as child:
        yield child


@contextmanager
def _service(name: str, arguments: list[str], port: int, health: str, **environment: str) -> Iterator[str]:
    address = f"http://127.0.0.1:{port}"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SamqError(f"port {port} is taken, so {name} cannot start there; choose another with an option")
    with _child(name, [sys.executable, *arguments], Path.cwd(), {**os.environ, **environment}) as child:
        deadline = time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(address + health, timeout=5).close()
                break
            except OSError:
                if child.poll() is not None or time.monotonic() > deadline:
                    raise SamqError(f"{name} did not start; see {_log(name)}") from None
                time.sleep(0.2)
        yield address


@contextmanager
def _child(
    name: str, command: list[str], folder: Path, environment: dict[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    home().mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        log = stack.enter_context(_log(name).open("wb"))
        child = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        _running[name] = child
        try:
            yield child
        finally:
            del _running[name]
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask what a process started to end, then the process, and make what does not.

    A worker's runs are in sessions of their own, and end before it, so that it says so to Prefect: they would be "Running"
    there for ever, and where a deployment has one run at a time no other would start.
    """
    if child.poll() is not None:  # its number may soon be another's, as its group's may not while it has members
        kill_group(child)
        return
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(child.pid)
        _end(root.children(recursive=True))
        _end([root, *root.children(recursive=True)])


def _end(processes: list[psutil.Process]) -> None:
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                ask(process)
        _, processes = psutil.wait_procs(processes, timeout=PATIENCE_S)


def _log(name: str) -> Path:
    return home() / f"{name.lower()}.log"
