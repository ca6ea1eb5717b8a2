import os
import shutil
import subprocess
import sys
import time

import pytest

from samq.errors import SamqError
from samq.output import discard
from samq.store import MANIFEST, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def publish(store, key="k" * 64, text="hello"):
    with store.publish("stage", key) as folder:
        (folder / "file.txt").write_text(text)
    artifact = store.find("stage", key)
    assert artifact is not None
    return artifact


def test_published_artifact_is_found_with_its_files(store):
    artifact = publish(store)
    assert artifact.path("file.txt").read_text() == "hello"
    assert list(store.artifacts()) == [artifact]


def test_digest_depends_on_content_and_not_on_the_key(store):
    assert publish(store, "a").digest() == publish(store, "b").digest()
    assert publish(store, "c", "other").digest() != publish(store, "a").digest()


def test_a_log_is_no_part_of_the_content(store):
    for key in ("a", "b"):
        with store.publish("stage", key) as folder:
            (folder / "file.txt").write_text("same")
            (folder / "stage.log").write_text(f"took {key} seconds")
    one, other = (store.find("stage", key) for key in ("a", "b"))
    assert one.digest() == other.digest()


def test_an_unknown_file_of_an_artifact_is_an_error(store):
    with pytest.raises(SamqError, match=r"has no file nothing\.txt; it has file\.txt"):
        publish(store).path("nothing.txt")


@pytest.mark.parametrize("damage", ["delete", "truncate", "alter", "manifest", "manifest-gone"])
def test_a_damaged_artifact_is_not_found_and_is_removed(store, damage):
    artifact = publish(store)
    path = artifact.path("file.txt")
    match damage:
        case "delete":
            path.unlink()
        case "truncate":
            path.write_text("hel")
        case "alter":
            path.write_text("jello")
        case "manifest":
            (artifact.folder / MANIFEST).write_text("{}")
        case "manifest-gone":
            (artifact.folder / MANIFEST).unlink()
    assert store.find("stage", artifact.key) is None
    assert not artifact.folder.exists()


@pytest.mark.parametrize("damage", ["delete", "truncate", "alter"])
@pytest.mark.parametrize("name", ["large.bin", "small.json", "stage.log"])
def test_damage_to_any_one_file_of_several_is_found(store, name, damage):
    with store.publish("stage", "k") as folder:
        for file, content in {"large.bin": bytes(10000), "small.json": b"{}", "stage.log": b"done"}.items():
            (folder / file).write_bytes(content)
    artifact = store.find("stage", "k")
    path = artifact.path(name)
    content = path.read_bytes()
    match damage:
        case "delete":
            path.unlink()
        case "truncate":
            path.write_bytes(content[:-1])
        case "alter":
            path.write_bytes(content[:-1] + b"?")
            os.utime(path, ns=(0, 0))  # a clock's tick may be longer than this test
    assert store.find("stage", "k") is None
    assert not artifact.folder.exists()


def test_a_touched_but_unaltered_file_is_still_whole(store):
    artifact = publish(store)
    os.utime(artifact.path("file.txt"))
    assert store.find("stage", artifact.key) == artifact


def test_thorough_find_sees_an_alteration_that_keeps_size_and_time(store):
    artifact = publish(store)
    path = artifact.path("file.txt")
    times = path.stat()
    path.write_text("jello")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert store.find("stage", artifact.key, thorough=True) is None


def test_a_failed_stage_publishes_nothing(store):
    with pytest.raises(ZeroDivisionError), store.publish("stage", "k") as folder:
        (folder / "file.txt").write_text("half")
        raise ZeroDivisionError
    assert store.find("stage", "k") is None
    assert list((store.root / ".tmp").iterdir()) == []


def test_publishing_a_key_again_replaces_it(store):
    publish(store, text="old")
    assert publish(store, text="new").path("file.txt").read_text() == "new"


def test_leftovers_of_a_killed_process_are_removed_and_live_work_is_not(store):
    code = f"""
import os, signal
from pathlib import Path
from samq.store import Store
with Store(Path({str(store.root)!r})).publish("stage", "k") as folder:
    (folder / "file.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert any((store.root / ".tmp").iterdir())
    with store.publish("stage", "live") as folder:
        Store(store.root)
        assert [path for path in (store.root / ".tmp").iterdir() if path.is_dir()] == [folder]
    assert store.find("stage", "k") is None


def test_what_a_killed_process_leaves_to_go_on_from_is_there_for_the_next_alone(store):
    with pytest.raises(KeyboardInterrupt), store.scratch("stage", "k") as folder:
        folder.mkdir()
        (folder / "half").touch()
        raise KeyboardInterrupt
    Store(store.root)
    with store.scratch("stage", "k") as again:
        assert again == folder and (again / "half").exists()
        with Store(store.root).scratch("stage", "k") as other:
            assert other is None, "in use"
        with store.scratch("stage", "another") as another:
            assert not another.exists()
    assert not any((store.root / ".tmp").iterdir())
    with pytest.raises(SamqError), store.scratch("stage", "k") as folder:
        folder.mkdir()
        raise SamqError("the text is wrong")
    assert not folder.exists(), "the next process would fail in the same way"


def test_what_a_process_leaves_that_is_killed_after_its_end_is_removed(store):
    publish(store, "k")
    folder = store.root / ".tmp" / "going-on-stage-k"
    for left in (folder, folder.with_name("going-on-other-k.gone-1"), folder.with_name("going-on-other-k")):
        left.mkdir()
        (left / "half").touch()
    Store(store.root)
    assert [path.name for path in (store.root / ".tmp").iterdir()] == ["going-on-other-k"]


def test_what_another_process_works_with_stays_though_a_third_has_published_that(store):
    with store.scratch("stage", "k") as folder:
        folder.mkdir()
        publish(store, "k")
        Store(store.root)
        assert folder.exists()
    assert not any((store.root / ".tmp").iterdir())


def test_a_folder_is_discarded_whole(tmp_path, monkeypatch):
    """A process that is killed while it removes the files leaves none in their place."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
    discard(folder)
    assert not folder.exists()
    discard(folder)  # it need not exist


def test_content_is_in_the_store_only_while_a_file_has_it(store):
    artifact = publish(store)
    sha256 = artifact.files["file.txt"].sha256
    assert store.having({sha256, "0" * 64}) == {sha256}
    artifact.path("file.txt").write_text("jello")
    assert store.having({sha256}) == set()


def test_a_forgotten_file_takes_the_artifacts_with_its_other_names_along(store):
    kept, lost = publish(store), publish(store, "other")
    with store.publish("together", "k") as folder:
        for artifact in (kept, lost):
            os.link(artifact.path(next(iter(artifact.files))), folder / artifact.key)
    file = lost.path(next(iter(lost.files)))
    assert store.forget([file]) == 5
    assert store.find("stage", lost.key) is None and store.find("together", "k") is None
    assert store.find("stage", kept.key) == kept and kept.path(next(iter(kept.files))).read_bytes()
    assert store.forget([]) == 0


def test_of_failed_work_the_logs_stay_until_they_are_old(store):
    with pytest.raises(ZeroDivisionError), store.publish("stage", "k") as folder:
        (folder / "half.gguf").write_text("half")
        (folder / "tool.log").write_text("why")
        raise ZeroDivisionError
    Store(store.root)
    assert [path.name for path in folder.iterdir()] == ["tool.log"]
    day_ago = time.time() - 86400
    store.remove_logs(day_ago)
    assert folder.exists()
    os.utime(folder, (0, 0))
    store.remove_logs(day_ago)
    assert not folder.exists()


def test_a_write_that_finds_no_space_is_one_sentence_and_publishes_nothing(store):
    kept = publish(store)
    message = r"cannot write to the store at .*: No space left on device; free some"
    with pytest.raises(SamqError, match=message), store.publish("stage", "large") as folder:
        (folder / "large.bin").symlink_to("/dev/full")
        (folder / "large.bin").write_bytes(b"large")
    assert store.find("stage", "large") is None
    assert store.find("stage", kept.key, thorough=True) == kept
    assert list((store.root / ".tmp").iterdir()) == []


def test_a_full_disk_loses_nothing_and_its_store_goes_on_once_there_is_space(disk):
    store = Store(disk.folder)
    kept = publish(store)
    for _ in range(2):
        with pytest.raises(SamqError, match="No space left on device"), store.publish("stage", "large") as folder:
            (folder / "large.bin").write_bytes(bytes(2 * 2**20))
    disk.fill()
    with pytest.raises(SamqError, match="No space left on device"):
        publish(store, "small")
    assert store.find("stage", kept.key, thorough=True) == kept
    (disk.folder / "filling").unlink()
    assert publish(store, "small").path("file.txt").read_text() == "hello"
    assert list((store.root / ".tmp").iterdir()) == []


def test_a_read_only_store_can_be_read_and_says_that_it_cannot_be_written(disk):
    kept = publish(Store(disk.folder))
    (disk.folder / ".tmp" / "dead.lock").touch()
    disk.make_read_only()
    store = Store(disk.folder)
    assert store.find("stage", kept.key) == kept
    with pytest.raises(SamqError, match=r"cannot write to the store at .*: Read-only file system; .* set SAMQ_HOME"):
        publish(store, "other")


def test_a_store_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SamqError, match="cannot use the store"):
        Store(tmp_path / "file" / "store")
