"""Whatever file of the store is lost or altered, the next run makes that artifact again, and nothing else."""

import os

import pytest

from flows.parameters import RequantizeParameters
from flows.requantize import requantize
from samq.store import MANIFEST, Store
from tests.end_to_end.conftest import SMALL, artifacts, rebuilt

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home")]

STAGES = (
    "convert tokenize heldout imatrix baseline plan rung gram calibrate price check assemble compensate_rung evaluate benchmark"
).split()


@pytest.fixture
def of_stage(home, made_by_sweep):
    """Stage -> an artifact of the sweep."""
    return lambda stage: Store(home / "store").find(*next(made for made in made_by_sweep if made[0] == stage))


def largest_file(artifact):
    name = max(artifact.files, key=lambda name: artifact.files[name].bytes)
    return artifact.path(name)


def smallest_file(artifact):
    names = [name for name in artifact.files if not name.endswith(".log")]
    return artifact.path(min(names, key=lambda name: artifact.files[name].bytes))


def run_again(sweep):
    """Run the flow again; the GGUFs are those of the first run, byte for byte."""
    again = requantize(RequantizeParameters.model_validate(SMALL))
    assert again.failures == []
    assert {made.name: made.model.sha256 for made in again.results} == {
        made.name: made.model.sha256 for made in sweep.results
    }


def test_every_stage_of_the_sweep_is_looked_at(made_by_sweep):
    assert {stage for stage, _ in made_by_sweep} == set(STAGES)


# Every third stage, and three in a row: whichever two stages, in some group one is lost and the other is not.
GROUPS = [STAGES[first::3] for first in range(3)] + [STAGES[first : first + 3] for first in range(0, len(STAGES), 3)]


@pytest.mark.parametrize("stages", GROUPS, ids=",".join)
def test_deleted_files_are_made_again_and_nothing_that_came_of_them(sweep, home, of_stage, stages):
    lost = [of_stage(stage) for stage in stages]
    for artifact in lost:
        (largest_file if stages in GROUPS[:3] else smallest_file)(artifact).unlink()
    before = artifacts(home)  # a folder's time is that of its last file's coming or going
    run_again(sweep)
    assert rebuilt(before, artifacts(home)) == sorted(stages)
    for artifact in lost:
        assert Store(home / "store").find(artifact.stage, artifact.key, thorough=True) is not None


@pytest.mark.parametrize("stage", ["convert", "assemble"])
def test_a_file_altered_in_place_is_made_again_and_nothing_that_came_of_it(sweep, home, of_stage, stage):
    artifact = of_stage(stage)
    path = largest_file(artifact)
    before = artifacts(home)
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert path.stat().st_size == artifact.files[path.name].bytes
    run_again(sweep)
    assert rebuilt(before, artifacts(home)) == [stage]


def test_a_lost_manifest_or_token_of_the_store_costs_that_artifact_at_most(sweep, home, of_stage):
    before = artifacts(home)
    plan = of_stage("plan")
    (plan.folder / MANIFEST).unlink()
    rung = of_stage("rung")
    rung.folder.with_name(f"{rung.key}.incarnation").unlink()  # what Prefect's key holds of it
    run_again(sweep)
    assert rebuilt(before, artifacts(home)) == ["plan"]
