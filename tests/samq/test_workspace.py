from pathlib import Path

import pytest

from samq.llamacpp.toolchain import converter_build
from samq.records import Toolchain
from samq.workspace import PROGRAM_TIMEOUT_S, Workspace

TOOLCHAIN = Toolchain(version="1", build="none", bin_folder=Path("/nowhere"))


@pytest.fixture
def cpus_only(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_contents_are_by_the_names_that_a_stage_is_keyed_by(cpus_only, toolchain):
    at = Workspace(Path("/store"), toolchain)
    assert at.contents(("toolchain", "converter", "device")) == {
        "toolchain": toolchain,
        "converter": converter_build(toolchain),
        "device": "cpu",
    }
    assert list(at.contents(("device",))) == ["device"]
    assert at.contents(()) == {}


def test_a_toolchain_without_the_converter_has_no_build_of_it():
    assert Workspace(Path("/store"), TOOLCHAIN).contents(("converter",)) == {"converter": None}


@pytest.mark.parametrize(("device", "kind"), [("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda")])
def test_a_device_is_known_by_its_kind(cpus_only, device, kind):
    assert Workspace(Path("/store"), TOOLCHAIN, device).contents(("device",)) == {"device": kind}


@pytest.mark.parametrize("name", ["store", "timeout_s", "nonsense"])
def test_what_no_output_depends_on_is_no_part_of_a_key(name):
    with pytest.raises(ValueError, match=f"a workspace has no {name} that a stage could be keyed by"):
        Workspace(Path("/store"), TOOLCHAIN).contents(("toolchain", name))


def test_here_is_the_samq_folders_store_with_the_installed_llama_cpp(samq_home, toolchain):
    assert Workspace.here() == Workspace(samq_home / "store", toolchain, "auto", PROGRAM_TIMEOUT_S)
    assert Workspace.here(device="cpu", timeout_s=5.0) == Workspace(samq_home / "store", toolchain, "cpu", 5.0)
