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


@pytest.fixture
def client(database, tmp_path):
    home = shutil.copytree(database.parent, tmp_path / "home")
    return connect(f"sqlite:///{home / 'mlflow.db'}")


@pytest.fixture
def two_promoted(client):
    promote(client, judged(client, "1"))
    promote(client, judged(client, "2"))
    return client
