"""What figures of a benchmark depend on beside its arguments; every benchmark's JSON has it."""

import os
import platform
from importlib.metadata import version

from samq.evaluation.llama import system_info
from samq.toolchain import find_toolchain

_PACKAGES = ("llama-cpp-python", "lm-eval", "torch", "transformers", "numpy", "fastapi", "uvicorn")


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that are measured, and of llama.cpp's programs."""
    packages = {name: version(name) for name in _PACKAGES}
    return packages | {"python": platform.python_version(), "llama.cpp build": find_toolchain().build}


def machine() -> dict[str, str | int | None]:
    """The processor: its cores, and the instructions that llama.cpp uses of it."""
    return {"cores": os.cpu_count(), "llama.cpp": system_info()}
