import shutil
import sysconfig
from pathlib import Path

import pytest

from samq.errors import ToolError
from samq.llamacpp.process import run
from samq.llamacpp.toolchain import (
    PROGRAMS,
    converter_build,
    environment,
    find_toolchain,
    program,
    python_library_build,
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_starts(toolchain, tmp_path, name):
    flag = "--help" if name == "llama-quantize" else "--version"
    command = ["sh", "-c", f"{program(toolchain, name)} {flag} || true"]
    text = run(command, log=tmp_path / "log", timeout_s=60, env=environment(toolchain))
    assert "usage" in text or "version" in text


def test_the_converter_of_the_same_source_is_there(toolchain):
    assert toolchain.converter is not None
    assert (toolchain.converter.parent / "conversion").is_dir()


def test_a_users_own_build_is_used(toolchain, monkeypatch, tmp_path):
    own = tmp_path / "llama.cpp"
    (own / "build").mkdir(parents=True)
    (own / "build" / "bin").symlink_to(toolchain.bin_folder)
    (own / "build" / "lib").symlink_to(toolchain.lib_folder)
    (own / "convert_hf_to_gguf.py").write_text("")
    monkeypatch.setenv("SAMQ_LLAMA_CPP", str(own))
    user_build = find_toolchain()
    assert (user_build.version, user_build.build) == ("user build", toolchain.build)
    assert user_build.converter == own / "convert_hf_to_gguf.py"


def test_the_build_of_the_converter_is_that_of_its_scripts(toolchain, tmp_path):
    installed = toolchain.converter.parent
    script = tmp_path / "convert_hf_to_gguf.py"
    shutil.copyfile(toolchain.converter, script)
    for package in ("conversion", "gguf-py"):
        shutil.copytree(installed / package, tmp_path / package)
    copied = toolchain.model_copy(update={"converter": script})
    assert converter_build(copied) == converter_build(toolchain)
    with (tmp_path / "conversion" / "llama.py").open("a") as module:
        module.write("# another release\n")
    assert converter_build(copied) != converter_build(toolchain)
    assert copied.digest() == toolchain.digest(), "what the programs made stays"
    assert converter_build(toolchain.model_copy(update={"converter": None})) is None


def test_the_build_of_pythons_library_is_that_of_its_files(monkeypatch, tmp_path):
    def build():
        python_library_build.cache_clear()
        return python_library_build()

    installed = build()
    libraries = tmp_path / "llama_cpp" / "lib"
    shutil.copytree(Path(sysconfig.get_path("platlib")) / "llama_cpp" / "lib", libraries)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert build() == installed
    with (libraries / "libggml-cpu.so").open("ab") as library:
        library.write(b"built for another processor")
    assert build() != installed
    monkeypatch.undo()
    assert build() == installed


def test_a_missing_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("SAMQ_LLAMA_CPP", str(tmp_path))
    with pytest.raises(ToolError, match=r"llama-quantize is not in .*; point SAMQ_LLAMA_CPP"):
        find_toolchain()
