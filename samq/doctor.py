"""`samq doctor`: the parts that SAMQ needs, which of them this machine lacks, and how to get them.

Versions come from the packages' metadata. So the report does not import large packages, and a broken package cannot break
it.
"""

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from samq.errors import ToolError
from samq.home import home, mlflow_uri, store_folder
from samq.llamacpp.toolchain import PROGRAMS, environment, find_toolchain, program
from samq.records import Toolchain

PYTHON = (3, 11)
DISK_BYTES = 3 * 10**9  # enough for the demo's store and MLflow's copies of its tables
MEMORY_BYTES = 3 * 10**9  # the demo's calibration: under 4 times 0.54 GB of float32 weights, and Python
START_S = 60.0  # limit for a program's first start, which reads its libraries from disk


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    `ok` is False only if SAMQ cannot work without a fix. A missing optional part is ok, and `advice` says what it is for.
    `advice` is empty if there is nothing to do.
    """

    name: str
    ok: bool
    detail: str
    advice: str = ""

    @property
    def state(self) -> str:
        """The result in one word."""
        if not self.ok:
            return "MISSING"
        return "optional" if self.advice else "ok"


def diagnose() -> list[Finding]:
    """Run all checks, required parts first. Takes about a second and does not change anything."""
    return [
        _python(),
        *_packages(),
        *_llama_cpp(),
        _disk(store_folder(), DISK_BYTES),
        _memory(MEMORY_BYTES),
        _gpu(),
        _mlflow(),
        _prefect(),
    ]


def _python() -> Finding:
    needed = ".".join(map(str, PYTHON))
    advice = f"install Python {needed} or newer, and run `make setup`"
    ok = sys.version_info >= PYTHON
    return Finding("Python", ok, f"{platform.python_version()} in {sys.prefix}", "" if ok else advice)


def _packages() -> list[Finding]:
    """The dependencies in pyproject.toml, read from the metadata of the installed SAMQ."""
    try:
        requirements = [Requirement(line) for line in requires("samq") or ()]
    except PackageNotFoundError:
        return [Finding("samq", False, "not installed", "run `make setup`")]
    required = [_package(requirement) for requirement in requirements if _needed(requirement, "")]
    for_demo = [requirement for requirement in requirements if requirement.marker and _needed(requirement, "demo")]
    return required + [_demo_package(requirement) for requirement in for_demo]


def _needed(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement) -> Finding:
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        return Finding(requirement.name, False, "not installed", f"run `make setup` to get {requirement}")
    if not requirement.specifier.contains(installed, prereleases=True):
        advice = f"run `make setup` to get {requirement.name}{requirement.specifier}"
        return Finding(requirement.name, False, installed, advice)
    return Finding(requirement.name, True, installed)


def _demo_package(requirement: Requirement) -> Finding:
    finding = _package(requirement)
    if finding.ok:
        return finding
    return Finding(finding.name, True, finding.detail, f"only for the demo's data: {finding.advice}")


def _llama_cpp() -> list[Finding]:
    try:
        toolchain = find_toolchain()
    except ToolError as error:
        return [Finding("llama.cpp", False, "not found", str(error))]
    user_build = os.environ.get("SAMQ_LLAMA_CPP")
    origin = f" (SAMQ_LLAMA_CPP={user_build})" if user_build else ""
    return [
        Finding("llama.cpp", True, f"{toolchain.version}, build {toolchain.build}, in {toolchain.bin_folder}{origin}"),
        _programs(toolchain),
        _server(toolchain),
        _converter(toolchain),
    ]


def _programs(toolchain: Toolchain) -> Finding:
    name = "llama.cpp's programs"
    broken = [f"{program}: {reason}" for program in PROGRAMS if (reason := _why_not_starting(toolchain, program))]
    if not broken:
        return Finding(name, True, ", ".join(PROGRAMS))
    return Finding(name, False, "; ".join(broken), "build them again, for this machine: `rm -r .venv && make setup`")


def _server(toolchain: Toolchain) -> Finding:
    """The default engine of `samq serve`, which a user's own build may lack."""
    reason = _why_not_starting(toolchain, "llama-server")
    if reason is None:
        return Finding("llama-server", True, str(program(toolchain, "llama-server")))
    advice = "only for `samq serve`: run `make setup`, build it in SAMQ_LLAMA_CPP, or set engine: llama-cpp-python"
    return Finding("llama-server", True, reason, advice)


def _why_not_starting(toolchain: Toolchain, name: str) -> str | None:
    """Why a program does not print its help; None if it does, which llama-quantize ends with exit status 1."""
    try:
        process = subprocess.run(
            [str(program(toolchain, name)), "--help"],
            env={**os.environ, **environment(toolchain)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=START_S,
            check=False,
        )
    except OSError as error:
        return error.strerror or str(error)
    except subprocess.TimeoutExpired:
        return f"no answer in {START_S:.0f} s"
    if process.returncode in (0, 1):
        return None
    if process.returncode < 0:  # such as 4, illegal instruction, of a build for another processor
        return f"killed by signal {-process.returncode}"
    return process.stderr.strip().split("\n")[-1] or f"exit status {process.returncode}"  # such as a missing library


def _converter(toolchain: Toolchain) -> Finding:
    name = "llama.cpp's converter"
    if toolchain.converter:
        return Finding(name, True, str(toolchain.converter))
    advice = (
        "run `make setup`, or copy convert_hf_to_gguf.py, conversion/ and gguf-py/ of its sources to SAMQ_LLAMA_CPP"
    )
    return Finding(name, False, "not found", advice)


def _disk(folder: Path, needed_bytes: int) -> Finding:
    """Free space on the disk where `folder` is or will be."""
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(present).free
    free_space = f"{free / 1e9:.1f} GB free for {folder}"
    if not os.access(present, os.W_OK):
        return Finding("disk", False, f"{present} cannot be written to", "set SAMQ_HOME to a folder of your own")
    if free < needed_bytes:
        advice = f"free {needed_bytes / 1e9:.0f} GB for the demo, or set SAMQ_HOME to a folder on a larger disk"
        return Finding("disk", False, free_space, advice)
    return Finding("disk", True, free_space)


def _memory(needed_bytes: int) -> Finding:
    memory = psutil.virtual_memory()
    free_memory = f"{memory.available / 1e9:.1f} GB available of {memory.total / 1e9:.1f} GB"
    if memory.available < needed_bytes:
        return Finding("memory", False, free_memory, f"end other programs: the demo needs {needed_bytes / 1e9:.0f} GB")
    return Finding("memory", True, free_memory)


def _gpu() -> Finding:
    """The GPUs that NVIDIA's driver reports; SAMQ works without one."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # no package (ImportError), no driver or no permission (NVMLError)
        return Finding("GPU", True, f"none: {error}")
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        cards = [
            f"{pynvml.nvmlDeviceGetName(h)}, {pynvml.nvmlDeviceGetMemoryInfo(h).total / 1e9:.0f} GB" for h in handles
        ]
    finally:
        pynvml.nvmlShutdown()
    if not cards:
        return Finding("GPU", True, "none")
    advice = "" if _built_for_cuda() else "for llama.cpp to use it: `CMAKE_ARGS=-DGGML_CUDA=ON make setup`"
    return Finding("GPU", True, "; ".join(cards), advice)


def _built_for_cuda() -> bool:
    try:
        libraries = find_toolchain().lib_folder
    except ToolError:
        return False
    return libraries is not None and any(libraries.glob("libggml-cuda*"))


def _mlflow() -> Finding:
    return Finding("MLflow", True, mlflow_uri())


def _prefect() -> Finding:
    """The user's own settings of Prefect, or the folder in the SAMQ folder that the command line uses without them."""
    settings = [name for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE") if name in os.environ]
    place = ", ".join(f"{name}={os.environ[name]}" for name in settings) or str(home() / "prefect")
    return Finding("Prefect", True, place)
