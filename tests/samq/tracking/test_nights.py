"""A night on which nothing changed is known by its fingerprint, and any change makes it another."""

from pathlib import Path

import pytest

from samq.records import ModelSource, TextSet, Toolchain
from samq.report.markdown_report import markdown_report
from samq.store import Store
from samq.tracking import nights
from samq.tracking.nights import UNCHANGED, find_unchanged, night_of, production_sha256
from samq.tracking.registry import connect
from samq.tracking.sweep_runs import track_sweep
from samq.tracking.tracked import TrackingSettings
from tests.samq.registered import NAME, uri_of

SOURCE = ModelSource(name="model", weights_digest="w", tokenizer_digest="t")
TOOLCHAIN = Toolchain(version="1", build="b", bin_folder=Path("/bin"))
PARAMETERS = {"candidates": {"budgets": ["4bpw"]}}


def asked(parameters=PARAMETERS, source=SOURCE, texts=("a", "b"), toolchain=TOOLCHAIN, files=(), production=None):
    sets = [TextSet(dataset="words", texts=(text,)) for text in texts]
    return night_of(parameters, source, sets, toolchain, files, production)


def test_the_same_night_is_the_same_wherever_its_files_are():
    moved = TOOLCHAIN.model_copy(update={"bin_folder": Path("/elsewhere")})
    assert asked() == asked(source=SOURCE.model_copy(update={"folder": Path("/moved")}), toolchain=moved)


@pytest.mark.parametrize(
    "change",
    [
        {"source": SOURCE.model_copy(update={"weights_digest": "other"})},
        {"texts": ("a", "c")},
        {"toolchain": TOOLCHAIN.model_copy(update={"build": "new"})},
        {"production": "another"},
    ],
)
def test_what_the_parameters_name_changes_the_fingerprint_and_not_the_question(change):
    assert asked(**change).question == asked().question
    assert asked(**change).fingerprint != asked().fingerprint


def test_other_parameters_are_another_question():
    other = asked({"candidates": {"budgets": ["5bpw"]}})
    assert other.question != asked().question and other.fingerprint != asked().fingerprint


def test_a_task_file_a_package_and_the_code_are_in_the_fingerprint(tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mine.yaml").write_text("task: mine")
    before = asked(files=[tmp_path / "tasks"])
    (tmp_path / "tasks" / "mine.yaml").write_text("task: other")
    assert asked(files=[tmp_path / "tasks"]).fingerprint != before.fingerprint
    known = asked().fingerprint
    monkeypatch.setattr(nights, "version", lambda name: "99")
    assert asked().fingerprint != known
    monkeypatch.undo()
    monkeypatch.setattr(nights, "_ROOT", tmp_path)
    assert asked().fingerprint != known


@pytest.fixture
def home(home_and_sweep, registered_home):
    """A folder with a sweep that was tracked with tonight's fingerprint."""
    sweep = home_and_sweep[1]
    track_sweep(settings(registered_home, asked().tags), sweep, markdown_report(sweep))
    return registered_home


def settings(home, tags=None):
    return TrackingSettings(
        tracking_uri=uri_of(home), experiment="nights", run_name="night", registered_model=NAME, tags=tags or {}
    )


def unchanged(home, **change):
    return find_unchanged(settings(home), asked(**change), Store(home / "store"))


def test_an_unchanged_night_is_found_and_noted_at_the_sweep(home):
    found = unchanged(home)
    assert found.run_name == "night" and found.tracked.registered_model == NAME
    assert "Nothing has changed since night" in found.summary
    assert f"the best is still {NAME} version {found.tracked.model_version}." in found.summary
    assert UNCHANGED in connect(uri_of(home)).get_run(found.tracked.parent_run_id).data.tags


def test_a_change_a_lost_candidate_or_a_lost_best_is_not_skipped(home):
    assert unchanged(home, texts=("a", "c")) is None
    client, found = connect(uri_of(home)), unchanged(home)
    client.set_tag(found.tracked.parent_run_id, "samq.failures", "x in build: no space")
    assert unchanged(home) is None
    client.delete_tag(found.tracked.parent_run_id, "samq.failures")
    assert unchanged(home)
    for path in home.glob("store/candidate/*/model.gguf"):
        path.unlink()
    assert unchanged(home) is None


def test_a_change_and_the_way_back_are_two_changes(home, home_and_sweep):
    other, sweep = asked(texts=("a", "c")), home_and_sweep[1]
    track_sweep(settings(home, other.tags), sweep, markdown_report(sweep))
    assert unchanged(home, texts=("a", "c"))
    assert unchanged(home) is None


def test_what_is_in_production_is_known_by_its_content(home):
    client = connect(uri_of(home))
    version = client.get_model_version_by_alias(NAME, "production")
    assert production_sha256(settings(home)) == version.tags["sha256"]
    client.delete_registered_model_alias(NAME, "production")
    assert production_sha256(settings(home)) is None
