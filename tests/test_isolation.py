"""Tests leave the user's Prefect home, MLflow database and SAMQ folder alone, and one that does not is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TESTS = """
import sqlite3
from pathlib import Path

import prefect
import pytest

from samq.home import home, mlflow_uri
from samq.tracking.registry import connect


def test_a_place_of_its_own(tmp_path):
    connect(f"sqlite:///{tmp_path}/mlflow.db")


def test_database_in_the_working_folder():
    sqlite3.connect("mlflow.db").execute("create table runs (id)")


def test_prefects_home():
    (Path.home() / ".prefect" / "profiles.toml").write_text("")


def test_samqs_folder():
    connect(mlflow_uri())


def test_calm_again():
    assert home().is_dir()
"""


@pytest.mark.slow
def test_a_test_that_uses_a_default_place_fails_and_the_users_home_stays_as_it_is(tmp_path):
    user, working = tmp_path / "user", tmp_path / "working"
    user.mkdir()
    working.mkdir()
    (working / "test_strays.py").write_text(TESTS)
    environment = {
        **os.environ,
        "HOME": str(user),
        "PYTHONPATH": str(ROOT),
        "PREFECT_API_URL": "http://127.0.0.1:1/api",
    }
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-rE", "--tb=line", "test_strays.py"]
    done = subprocess.run(command, cwd=working, env=environment, capture_output=True, text=True, check=False)
    failed = [line.split("::")[1].split(" ")[0] for line in done.stdout.splitlines() if line.startswith("ERROR ")]
    assert failed == ["test_database_in_the_working_folder", "test_prefects_home", "test_samqs_folder"], done.stdout
    assert list(user.iterdir()) == []
