import shutil
from pathlib import Path

import pytest

from samq.promotion.move import promote
from samq.tracking.registry import connect
from tests.samq.promotion.moves import judged
from tests.samq.versions import three_nights


@pytest.fixture(scope="session")
def database(tmp_path_factory, empty_database, toolchain):
    folder = tmp_path_factory.mktemp("nights")
    path = Path(shutil.copy(empty_database, folder / "mlflow.db"))
    three_nights(folder, path, toolchain)
    return path


@pytest.fixture(scope="session")
def promoted_home(database, tmp_path_factory):
    home = shutil.copytree(database.parent, tmp_path_factory.mktemp("promoted") / "home")
    client = connect(f"sqlite:///{home / 'mlflow.db'}")
    promote(client, judged(client, "1"))
    promote(client, judged(client, "2"))
    return home


@pytest.fixture
def client(database, tmp_path):
    return client_of_copy(database.parent, tmp_path)


@pytest.fixture
def two_promoted(promoted_home, tmp_path):
    return client_of_copy(promoted_home, tmp_path)


def client_of_copy(home, folder):
    return connect(f"sqlite:///{shutil.copytree(home, folder / 'home') / 'mlflow.db'}")
