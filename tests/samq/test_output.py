import shutil

import pytest

from samq.errors import SamqError
from samq.output import check_file, export, make_folder, work_folder
from samq.store import Store


@pytest.fixture
def artifact(tmp_path):
    store = Store(tmp_path / "store")
    with store.publish("stage", "k") as folder:
        (folder / "result.json").write_text("{}")
        (folder / "table.parquet").write_bytes(bytes(2 * 2**20))
        (folder / "stage.log").write_text("said")
    return store.find("stage", "k")


def test_a_place_for_a_file_is_an_existing_folder(tmp_path):
    check_file(tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SamqError, match=r"is a folder; name a file in it"):
        check_file(tmp_path)
    with pytest.raises(SamqError, match=r"the folder of .*out\.gguf does not exist; make it first"):
        check_file(tmp_path / "no" / "out.gguf")


def test_a_read_only_place_is_refused(disk):
    disk.make_read_only()
    with pytest.raises(
        SamqError, match=r"disk cannot be written to \(Read-only file system\); choose .* for out\.gguf"
    ):
        check_file(disk.folder / "out.gguf")
    with pytest.raises(SamqError, match=r"new cannot be written to \(Read-only file system\); set SAMQ_HOME"):
        make_folder(disk.folder / "new", advice="set SAMQ_HOME")


def test_an_exported_artifact_is_its_files_without_logs(artifact, tmp_path):
    make_folder(tmp_path / "new" / "out")
    export(map(artifact.path, artifact.files), tmp_path / "new" / "out")
    assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {"result.json", "table.parquet"}


def test_a_full_disk_gets_no_half_file(artifact, disk):
    with pytest.raises(SamqError, match=r"cannot write to .*disk: No space left on device; free some space"):
        export(map(artifact.path, artifact.files), disk.folder)
    assert {path.name for path in disk.folder.iterdir()} == {"result.json"}


def test_another_file_that_cannot_be_used_is_named_instead_of_the_output_folder(tmp_path):
    lost = tmp_path / "lost.imatrix"
    with pytest.raises(SamqError, match=r"cannot use .*/lost\.imatrix: No such"), work_folder(tmp_path) as work:
        shutil.copyfile(lost, work / "imatrix.gguf")
    with pytest.raises(SamqError, match=r"cannot write to .*: Is a directory"), work_folder(tmp_path) as work:
        work.write_text("a file in a folder's place")
    with pytest.raises(ConnectionError), work_folder(tmp_path):
        raise ConnectionError("nothing of the disk")


def test_of_failed_work_only_the_logs_stay(tmp_path):
    with pytest.raises(ZeroDivisionError), work_folder(tmp_path) as work:
        (work / "model.gguf.partial").write_text("half")
        (work / "tool.log").write_text("why")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["tool.log"]
    with work_folder(tmp_path) as finished:
        (finished / "tool.log").write_text("fine")
    assert not finished.exists()
