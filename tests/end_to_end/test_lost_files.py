"""Whatever file of the store is lost or altered, the next run makes that artifact again, and nothing else."""

import os

import pytest

from samq.store import MANIFEST, Store
from tests.end_to_end.conftest import GROUPS, SMALL, STAGES, artifacts, measure, rebuilt

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("prefect_home")]


@pytest.fixture
def of_stage(home, made_by_sweep):
    """Stage -> an artifact of the sweep, and the largest of its files."""

    def find(stage):
        artifact = Store(home / "store").find(*next(identity for identity in made_by_sweep if identity[0] == stage))
        return artifact, largest_file(artifact)

    return find


def largest_file(artifact):
    name = max(artifact.files, key=lambda name: artifact.files[name].bytes)
    return artifact.path(name)


def smallest_file(artifact):
    names = [name for name in artifact.files if not name.endswith(".log")]
    return artifact.path(min(names, key=lambda name: artifact.files[name].bytes))


def run_again(sweep):
    """Measure the sweep again; the GGUFs are those of the first run, byte for byte."""
    again = measure(SMALL)
    assert again.failures == ()
    ggufs, before = ({result.name: result.model.sha256 for result in one.results} for one in (again, sweep))
    assert ggufs == before


def test_every_stage_of_the_sweep_is_looked_at(made_by_sweep):
    assert {stage for stage, _ in made_by_sweep} == set(STAGES)


@pytest.mark.parametrize("stages", GROUPS, ids=" ".join)
def test_a_deleted_file_is_made_again_and_nothing_that_came_of_it(sweep, home, of_stage, stages):
    lost = {stage: of_stage(stage) for stage in stages}
    before = artifacts(home)
    for _, path in lost.values():
        path.unlink()
    run_again(sweep)
    assert rebuilt(before, artifacts(home)) == sorted(stages)
    for stage, (artifact, _) in lost.items():
        assert Store(home / "store").find(stage, artifact.key, thorough=True) is not None


def test_the_smallest_files_of_all_stages_with_several_lost_at_once_cost_these_artifacts_and_no_more(
    sweep, home, of_stage
):
    lost = {stage: smallest_file(of_stage(stage)[0]) for stage in STAGES}
    lost = {stage: path for stage, path in lost.items() if path != of_stage(stage)[1]}  # others have only that one
    assert {"tokenize", "calibrate", "layer_inputs", "compensate", "candidate", "evaluate"} <= lost.keys()
    for path in lost.values():
        path.unlink()
    before = artifacts(home)  # a folder's time is that of its last file's coming or going
    run_again(sweep)
    assert rebuilt(before, artifacts(home)) == sorted(lost)


@pytest.mark.parametrize("stage", ["convert", "quantize"])
def test_a_file_altered_in_place_is_made_again_and_nothing_that_came_of_it(sweep, home, of_stage, stage):
    artifact, path = of_stage(stage)
    before = artifacts(home)
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert path.stat().st_size == artifact.files[path.name].bytes
    run_again(sweep)
    assert rebuilt(before, artifacts(home)) == [stage]


def test_an_alteration_of_a_file_that_two_artifacts_share_costs_both(sweep, home, of_stage):
    """A compensated candidate is the file that was made together with others, by a name of its own."""
    _, path = of_stage("candidate")
    before = artifacts(home)
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(byte ^ 1 for byte in path.read_bytes()[-1000:]))
    run_again(sweep)
    assert rebuilt(before, artifacts(home)) == ["candidate", "compensate"]


def test_a_lost_manifest_or_token_of_the_store_costs_that_artifact_at_most(sweep, home, of_stage):
    before = artifacts(home)
    plan, _ = of_stage("plan")
    (plan.folder / MANIFEST).unlink()
    inputs, _ = of_stage("layer_inputs")
    inputs.folder.with_name(f"{inputs.key}.incarnation").unlink()  # what Prefect's key holds of it
    run_again(sweep)
    assert rebuilt(before, artifacts(home)) == ["plan"]
