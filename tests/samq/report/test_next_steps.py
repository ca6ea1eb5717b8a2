import shlex
import sys
from pathlib import Path

import pytest

from samq.report.next_steps import next_commands


def commands(lines):
    """The commands without what they are for."""
    assert lines[0] == "next:"
    return [shlex.split(line, comments=True) for line in lines[1:]]


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """A project with a virtual environment that has `samq`, and is not on the PATH; its folder."""
    programs = tmp_path / "project" / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "samq").write_text("#!/bin/sh\n")
    (programs / "samq").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def test_a_registered_model_is_shown_promoted_and_served_by_its_name(environment):
    policy = environment / "deployments" / "promotion" / "demo.yaml"
    lines = next_commands("smollm2-135m-instruct", Path("best.gguf"), policy)
    assert commands(lines) == [
        ["make", "ui"],
        [".venv/bin/samq", "promote", "smollm2-135m-instruct", "--policy", "deployments/promotion/demo.yaml"],
        [".venv/bin/samq", "serve", "models:/smollm2-135m-instruct@production"],
    ]
    assert len({line.index("#") for line in lines[1:]}) == 1


def test_an_activated_environment_needs_no_path_and_odd_names_are_quoted(environment, monkeypatch):
    monkeypatch.setenv("PATH", f"{environment / '.venv' / 'bin'}:/usr/bin:/bin")
    _, promote, serve = commands(next_commands("my model", None, Path("/else where/policy.yaml")))
    assert promote == ["samq", "promote", "my model", "--policy", "/else where/policy.yaml"]
    assert serve == ["samq", "serve", "models:/my model@production"]


def test_what_is_not_registered_is_served_as_a_file_and_nothing_is_without_a_best(environment):
    best = environment / ".samq" / "store" / "model.gguf"
    assert commands(next_commands(None, best, Path("policy.yaml")))[1:] == [
        [".venv/bin/samq", "serve", ".samq/store/model.gguf"]
    ]
    assert commands(next_commands(None, None, Path("policy.yaml"))) == [["make", "ui"]]
