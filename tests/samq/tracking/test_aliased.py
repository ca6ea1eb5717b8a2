"""Files that aliases point at: known by their content, and missed when they are gone."""

import shutil

import pytest

from samq.errors import SamqError
from samq.gguf.file import file_sha256
from samq.store import Store
from samq.tracking.aliased import aliased_content, aliased_files, check_none_is_missing
from samq.tracking.registry import connect, name_mmproj
from tests.samq.registered import BEST, NAME, uri_of


@pytest.fixture
def home(home_and_sweep, tmp_path):
    return shutil.copytree(home_and_sweep[0], tmp_path / "home")


@pytest.fixture
def client(home):
    return connect(uri_of(home))


@pytest.fixture
def store(home):
    return Store(home / "store")


@pytest.fixture
def gguf(home, home_and_sweep):
    return home / "store" / "candidate" / home_and_sweep[1].result(BEST).model.sha256 / "model.gguf"


def test_a_file_is_known_by_its_aliases_place_and_content(client, gguf):
    (file,) = aliased_files([client])
    assert (file.model, file.version, file.aliases) == (NAME, "1", ("candidate", "production"))
    assert (file.path, file.sha256) == (gguf, file_sha256(gguf))
    assert file.is_in_place() and aliased_content([file]) == {file_sha256(gguf)}


def test_versions_that_others_registered_or_no_alias_points_at_name_no_files(client):
    client.create_registered_model("of somebody else")
    client.create_model_version("of somebody else", source="/elsewhere", run_id=None)
    client.set_registered_model_alias("of somebody else", "candidate", "1")
    for alias in ("candidate", "production"):
        client.delete_registered_model_alias(NAME, alias)
    assert aliased_files([client]) == []


def test_the_content_may_be_anywhere_in_the_store_or_in_the_place(client, store, gguf, tmp_path):
    client.set_model_version_tag(NAME, "1", "gguf_uri", "file:///nowhere/model.gguf")
    check_none_is_missing(aliased_files([client]), store)
    outside = shutil.move(gguf, tmp_path / "outside.gguf")
    client.set_model_version_tag(NAME, "1", "gguf_uri", outside.as_uri())
    check_none_is_missing(aliased_files([client]), store)
    client.set_model_version_tag(NAME, "1", "gguf_uri", "s3://bucket/model.gguf")
    check_none_is_missing(aliased_files([client]), store)


@pytest.mark.parametrize("damage", ["delete", "truncate", "alter"])
def test_a_file_that_is_gone_or_altered_is_missed(client, store, gguf, damage):
    match damage:
        case "delete":
            gguf.unlink()
        case "truncate":
            gguf.write_bytes(gguf.read_bytes()[:-1])
        case "alter":
            gguf.write_bytes(gguf.read_bytes()[:-1] + b"?")
    message = (
        rf"version 1 of llama \(candidate, production\) needs {gguf}, which is missing or altered; put the file back"
    )
    with pytest.raises(SamqError, match=message):
        check_none_is_missing(aliased_files([client]), store)


def test_the_vision_part_of_a_version_is_known_and_missed_like_its_gguf(client, store, gguf, tmp_path):
    with store.publish("mmproj", "key") as folder:
        (folder / "mmproj.gguf").write_bytes(b"GGUF of images")
    mmproj = store.root / "mmproj" / "key" / "mmproj.gguf"
    name_mmproj(client, NAME, "1", mmproj)
    assert client.get_model_version(NAME, "1").tags["mmproj_uri"] == "store/mmproj/key/mmproj.gguf"
    assert aliased_content(aliased_files([client])) == {file_sha256(gguf), file_sha256(mmproj)}
    client.delete_model_version_tag(NAME, "1", "mmproj_sha256")  # as before SAMQ noted it
    assert aliased_content(aliased_files([client])) == {file_sha256(gguf), file_sha256(mmproj)}
    mmproj.unlink()
    with pytest.raises(SamqError, match=rf"needs {mmproj}, which is missing"):
        check_none_is_missing(aliased_files([client]), store)
