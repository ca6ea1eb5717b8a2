"""The end of every benchmark: the versions and the machine behind its numbers, and whether its claims hold."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import conclusion

from samq.llamacpp.runtime import system_info
from samq.llamacpp.toolchain import find_toolchain

_PACKAGES = ("llama-cpp-python", "lm-eval", "torch", "transformers", "numpy", "fastapi", "uvicorn")


def versions() -> dict[str, str]:
    """Versions of Python, of the measured packages, and of llama.cpp's programs."""
    packages = {name: version(name) for name in _PACKAGES}
    return packages | {"python": platform.python_version(), "llama.cpp build": find_toolchain().build}


def machine() -> dict[str, str | int | None]:
    """The processor: its cores, and the instruction sets that llama.cpp uses."""
    return {"cores": os.cpu_count(), "llama.cpp": system_info()}


def conclude(result: dict[str, Any], verdicts: dict[str, bool], path: Path | None) -> None:
    """As `conclusion.conclude`, with the versions and the machine in the result."""
    conclusion.conclude({**result, "versions": versions(), "machine": machine()}, verdicts, path)
