"""llama.cpp's programs and converter: where they are, and which build they are.

`make setup` builds the programs and the Python library together, from the source distribution of llama-cpp-python.
`SAMQ_LLAMA_CPP=DIR` uses another build: a llama.cpp checkout built in DIR/build, or an installed tree with DIR/bin and
DIR/lib.
"""

import hashlib
import os
import sys
import sysconfig
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from samq.errors import ToolError
from samq.records import Toolchain

PROGRAMS = ("llama-quantize", "llama-imatrix", "llama-perplexity")


def find_toolchain() -> Toolchain:
    """Find llama.cpp's programs; raises ToolError with the missing program and how to get it."""
    user_build = os.environ.get("SAMQ_LLAMA_CPP")
    return _inspect(Path(user_build).absolute() if user_build else None)


@lru_cache
def _inspect(user_build: Path | None) -> Toolchain:
    if user_build:
        roots: tuple[Path, ...] = (user_build, user_build / "build")
        advice = "point SAMQ_LLAMA_CPP at a folder with bin/llama-quantize, or unset it"
        script_folders: tuple[Path, ...] = (user_build, user_build.parent, user_build / "share" / "llama.cpp")
    else:
        roots = (Path(sysconfig.get_path("platlib")),)
        advice = "run `make setup`, or set SAMQ_LLAMA_CPP to a build of llama.cpp"
        script_folders = (Path(sys.prefix) / "share" / "llama.cpp",)
    root = next((root for root in roots if (root / "bin" / PROGRAMS[0]).is_file()), roots[0])
    for name in PROGRAMS:
        if not os.access(root / "bin" / name, os.X_OK):
            raise ToolError(f"{name} is not in {root / 'bin'}; {advice}")
    libraries = root / "lib" if (root / "lib").is_dir() else root / "bin"
    scripts = (folder / "convert_hf_to_gguf.py" for folder in script_folders)
    return Toolchain(
        version="user build" if user_build else version("llama-cpp-python"),
        build=_fingerprint(root / "bin", libraries),
        bin_folder=root / "bin",
        lib_folder=libraries,
        converter=next((script for script in scripts if script.is_file()), None),
    )


def _fingerprint(programs: Path, libraries: Path) -> str:
    """First 12 hex digits of SHA-256 over the programs and the libraries that determine their output."""
    prefixes = ("libllama.", "libllama-common.", "libllama-quantize", "libggml")
    return _digest([*(programs / name for name in PROGRAMS), *_libraries(libraries, prefixes)])


def converter_build(toolchain: Toolchain) -> str | None:
    """First 12 hex digits of SHA-256 over the converter's scripts, which the programs' build does not cover.

    None if the toolchain has no converter.
    """
    script = toolchain.converter
    if script is None:
        return None
    packages = (script.parent / "conversion", script.parent / "gguf-py" / "gguf")
    return _digest([script, *(file for package in packages for file in sorted(package.rglob("*.py")))])


@lru_cache
def python_library_build() -> str:
    """First 12 hex digits of SHA-256 over the libraries that llama_cpp loads. Builds of one version differ in it."""
    return _digest(_libraries(Path(sysconfig.get_path("platlib")) / "llama_cpp" / "lib", ("libllama.", "libggml")))


def _libraries(folder: Path, prefixes: tuple[str, ...]) -> list[Path]:
    return [path for path in sorted(folder.glob("lib*.so")) if path.name.startswith(prefixes)]


def _digest(files: list[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        whole.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()[:12]


def program(toolchain: Toolchain, name: str) -> Path:
    """Path of one of the toolchain's programs."""
    return toolchain.bin_folder / name


def environment(toolchain: Toolchain) -> dict[str, str]:
    """Environment variables that the programs need to find their libraries."""
    if toolchain.lib_folder is None:
        return {}
    inherited = os.environ.get("LD_LIBRARY_PATH")
    return {"LD_LIBRARY_PATH": os.pathsep.join([str(toolchain.lib_folder), *([inherited] if inherited else [])])}
