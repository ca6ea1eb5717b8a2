"""The end of every benchmark: the versions and the machine behind its numbers, and whether its claims hold."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
    """Print whether each claim holds, and write the result to `path`, if given, with the verdicts, versions and machine.

    Exits 1 if a claim does not hold.
    """
    for claim, holds in verdicts.items():
        print(f"{claim}: {'yes' if holds else 'NO'}")
    if path:
        whole = {**result, "verdicts": verdicts, "versions": versions(), "machine": machine()}
        path.write_text(json.dumps(whole, indent=1) + "\n")
    if not all(verdicts.values()):
        raise SystemExit(1)
