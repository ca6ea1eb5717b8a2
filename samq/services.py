"""Services on this machine: MLflow's server, Prefect's server, and a worker for the deployments."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from samq.errors import SamqError
from samq.home import home, mlflow_uri, sqlite_file, sqlite_folder
from samq.llamacpp.process import kill_group, start
from samq.relocation import relocate

WORK_POOL = "samq"
GPU_LIMIT = "gpu"  # Prefect's global concurrency limit: how many runs may use GPUs at the same time
SERVICE_TIMEOUT_S = 15
_running: dict[str, subprocess.Popen[bytes]] = {}


def first_ended() -> str | None:
    """A sentence about a service of this process that has ended by itself, with its log; None while all run."""
    for name, child in _running.items():
        if (code := child.poll()) is not None:
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return f"{name} {how}; see {_log(name)}, and start again"
    return None


@contextmanager
def mlflow_page(port: int) -> Iterator[str]:
    """Run MLflow's server on the SAMQ folder's database during the `with` block, and yield its address.

    If MLFLOW_TRACKING_URI names a server, nothing is started and its address is yielded.
    """
    uri = mlflow_uri()
    if uri.startswith("http"):
        yield uri.rstrip("/")
        return
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--backend-store-uri", uri]
    artifacts = str((sqlite_folder(uri) or home()) / "mlartifacts")  # by default they go into the working directory
    command += ["--artifacts-destination", artifacts]
    if database := sqlite_file(uri):
        relocate(database)
        # Without it, runs over this server would name their artifacts in a way that only its clients can resolve.
        command += ["--default-artifact-root", artifacts]
    # SAMQ does not use MLflow's jobs, which would be six more processes of 250 MB.
    with _service("MLflow", command, port, "/health", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false") as address:
        yield address


@contextmanager
def prefect_page(port: int) -> Iterator[str]:
    """Run Prefect's server during the `with` block, and yield its address.

    If PREFECT_API_URL names a server, nothing is started and its address is yielded.
    """
    if api := os.environ.get("PREFECT_API_URL"):
        yield api.rstrip("/").removesuffix("/api")
        return
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    page = f"http://127.0.0.1:{port}"  # by default Prefect takes its usual port for it, whatever --port says
    addresses = {"PREFECT_SERVER_UI_API_URL": f"{page}/api", "PREFECT_UI_URL": page}
    with _service("Prefect", command, port, "/api/health", **addresses) as address:
        yield address


@contextmanager
def worker(prefect_address: str, project: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Create the work pool and the deployments of `project`/prefect.yaml, and run a worker during the `with` block."""
    # SAMQ_HOME may be relative to this working directory, and the worker has another.
    environment = {**os.environ, "PREFECT_API_URL": f"{prefect_address}/api", "SAMQ_HOME": str(home())}
    _prefect(["work-pool", "create", WORK_POOL, "--type", "process", "--overwrite"], project, environment)
    _limit_gpu(project, environment)
    _prefect(["--no-prompt", "deploy", "--all"], project, environment)
    # On a server that others use, a process id may be another machine's.
    own_server = "PREFECT_API_URL" not in os.environ
    if own_server:
        _report_ended(f"{prefect_address}/api", lambda run: not _is_at_work(run))
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", WORK_POOL]
    started: set[str] = set()
    try:
        with _child("worker", command, project, environment) as child:
            try:
                yield child
            finally:
                with suppress(psutil.NoSuchProcess):
                    started = {str(process.pid) for process in psutil.Process(child.pid).children(recursive=True)}
    finally:
        if own_server:
            _report_ended(f"{prefect_address}/api", lambda run: run["infrastructure_pid"] in started)


def _limit_gpu(project: Path, environment: dict[str, str]) -> None:
    """Make the limit `GPU_LIMIT`: one run at a time. One that is there already stays as somebody set it."""
    _prefect(["gcl", "create", GPU_LIMIT, "--limit", "1"], project, environment, unless="already exists")


def _prefect(arguments: list[str], project: Path, environment: dict[str, str], *, unless: str | None = None) -> None:
    """Run a command of Prefect's; raises SamqError if it fails, except with the words `unless`."""
    command = [sys.executable, "-m", "prefect", *arguments]
    process = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    said = (process.stderr or process.stdout).strip()
    if process.returncode and (unless is None or unless not in said):
        reason = " ".join(said.splitlines()[-1:])
        raise SamqError(f"`prefect {' '.join(arguments)}` failed: {reason}; see prefect.yaml")


def _report_ended(api: str, has_ended: Callable[[dict[str, Any]], bool]) -> None:
    """Tell Prefect's server which unfinished runs have ended. A busy machine may keep the worker from it, or a killed one."""
    unfinished = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
    state = {"type": "CRASHED", "message": "Ended with the services of `samq up`."}
    with suppress(OSError):  # the server has ended, too
        for run in _post(f"{api}/flow_runs/filter", unfinished):
            if has_ended(run):
                _post(f"{api}/flow_runs/{run['id']}/set_state", {"state": state, "force": True})


def _is_at_work(run: dict[str, Any]) -> bool:
    """Whether a process of this machine works on a flow run; one that no worker was given is not known, and taken to be."""
    if not run["work_pool_name"]:
        return True
    try:
        return "prefect" in " ".join(psutil.Process(int(run["infrastructure_pid"] or 0)).cmdline())
    except (psutil.Error, ValueError):
        return False


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SERVICE_TIMEOUT_S) as answer:
        return json.load(answer)


@contextmanager
def _service(name: str, arguments: list[str], port: int, health: str, **environment: str) -> Iterator[str]:
    address = f"http://127.0.0.1:{port}"
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise SamqError(f"port {port} is in use, so {name} cannot start there; choose another with an option")
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
        child = start(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _running[name] = child
        try:
            yield child
        finally:
            del _running[name]
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a process's descendants, and then the process: by SIGTERM, and by SIGKILL those that do not end in time.

    The runs of a worker are in sessions of their own. They end before the worker does, so that the worker reports their end
    to Prefect. Otherwise Prefect would show them as "Running" for ever, and a deployment limited to one run would not start
    another.
    """
    if child.poll() is not None:  # its process id may be reused, but not its group's while the group has members
        kill_group(child)
        return
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(child.pid)
        _end(root.children(recursive=True))
        _end([root, *root.children(recursive=True)])


def _end(processes: list[psutil.Process]) -> None:
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                end(process)
        _, processes = psutil.wait_procs(processes, timeout=SERVICE_TIMEOUT_S)


def _log(name: str) -> Path:
    return home() / f"{name.lower()}.log"
