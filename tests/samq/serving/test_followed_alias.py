"""The server follows an alias of a registered model to another version."""

import logging
import os
import shutil

import pytest

from samq.gguf.file import file_sha256
from samq.serving import watch
from samq.serving.source import registry_source
from tests.samq.serving.conftest import put, running, serves


def test_the_alias_is_followed_to_another_version_and_back(registered, mlflow_uri, chat_gguf, other_gguf):
    with running(registry_source("tiny-llama", "production", mlflow_uri)) as server:
        assert server.ready()["model"] == {
            "name": "tiny-llama",
            "version": "1",
            "alias": "production",
            "sha256": file_sha256(chat_gguf),
            "plan": "plan-1",
        }
        assert server.complete(model="tiny-llama").status_code == 200
        registered.set_registered_model_alias("tiny-llama", "production", "2")
        server.wait(serves(server, other_gguf))
        registered.set_registered_model_alias("tiny-llama", "production", "1")
        server.wait(serves(server, chat_gguf))
        assert server.metric("samq_model_reload_failed") == 0


def test_a_version_is_read_whole_once_until_its_file_changes(
    registered, mlflow_uri, tmp_path, chat_gguf, other_gguf, caplog
):
    """So that going back takes no longer than loading, and still loads nothing but what was registered."""
    copies = {"1": tmp_path / "first.gguf", "2": tmp_path / "second.gguf"}
    for (version, copy), gguf in zip(copies.items(), (chat_gguf, other_gguf), strict=True):
        put(gguf, copy)
        registered.set_model_version_tag("tiny-llama", version, "gguf_uri", copy.as_uri())
    caplog.set_level(logging.INFO, "samq.serving.source")
    with running(registry_source("tiny-llama", "production", mlflow_uri)) as server:
        for version, gguf in (("2", other_gguf), ("1", chat_gguf), ("2", other_gguf), ("1", chat_gguf)):
            registered.set_registered_model_alias("tiny-llama", "production", version)
            server.wait(serves(server, gguf))
        read = [record.args[0] for record in caplog.records if record.name == "samq.serving.source"]
        assert read == list(copies.values())

        before = copies["2"].stat()
        with copies["2"].open("r+b") as file:  # in place, and its size and time are as they were
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        os.utime(copies["2"], ns=(before.st_atime_ns, before.st_mtime_ns))
        registered.set_registered_model_alias("tiny-llama", "production", "2")
        server.wait(lambda: "put the file back" in (server.ready()["problem"] or ""))
        assert serves(server, chat_gguf)()


def test_without_room_for_both_a_broken_version_gives_way_to_the_old_one_again(registered, mlflow_uri, monkeypatch):
    """That memory is short is the one thing that is not real here."""
    monkeypatch.setattr(watch, "fits_beside", lambda served, settings: False)
    with running(registry_source("tiny-llama", "production", mlflow_uri)) as server:
        registered.set_registered_model_alias("tiny-llama", "production", "3")
        server.wait(lambda: server.metric("samq_model_reload_failed") == 1)
        server.wait(lambda: server.client.get("/ready").status_code == 200)
        assert server.ready()["model"]["version"] == "1"
        assert "version 3" in server.ready()["problem"]
        assert server.complete().status_code == 200


def test_a_file_that_is_not_what_was_registered_is_not_served(registered, mlflow_uri, tmp_path, chat_gguf, other_gguf):
    moved = shutil.copy(other_gguf, tmp_path / "changed.gguf")
    registered.set_model_version_tag("tiny-llama", "1", "gguf_uri", moved.as_uri())
    with running(registry_source("tiny-llama", "production", mlflow_uri), wait=False) as server:
        server.wait(lambda: server.ready()["problem"])
        assert f"not {file_sha256(chat_gguf)}; put the file back" in server.ready()["problem"]
        assert server.client.get("/ready").status_code == 503


def test_a_version_that_is_no_file_does_not_stop_the_watcher(registered, mlflow_uri, tmp_path, chat_gguf):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    uri = registered.get_model_version("tiny-llama", "1").tags["gguf_uri"]
    registered.set_model_version_tag("tiny-llama", "1", "gguf_uri", (tmp_path / "pipe").as_uri())
    with running(registry_source("tiny-llama", "production", mlflow_uri), wait=False) as server:
        for path, kind in {tmp_path / "pipe": "pipe", tmp_path / "link": "device", tmp_path: "folder"}.items():
            registered.set_model_version_tag("tiny-llama", "1", "gguf_uri", path.as_uri())
            server.wait(lambda told=f"{path} is a {kind}, not": told in (server.ready()["problem"] or ""))
        registered.set_model_version_tag("tiny-llama", "1", "gguf_uri", uri)
        server.wait(serves(server, chat_gguf))


def missing(gguf, wanted):
    gguf.unlink()


def other_bytes(gguf, wanted):
    gguf.write_bytes(wanted.read_bytes()[:-1] + b"?")


@pytest.mark.parametrize("spoil, reason", [(missing, "No such file"), (other_bytes, "put the file back")])
def test_a_version_whose_file_comes_later_serves_then(
    registered, mlflow_uri, tmp_path, other_gguf, monkeypatch, spoil, reason
):
    monkeypatch.setattr(watch, "_RETRY_S", (0.1, 0.1))
    copy = tmp_path / "copy.gguf"
    put(other_gguf, copy)
    spoil(copy, other_gguf)
    registered.set_model_version_tag("tiny-llama", "2", "gguf_uri", copy.as_uri())
    with running(registry_source("tiny-llama", "production", mlflow_uri)) as server:
        registered.set_registered_model_alias("tiny-llama", "production", "2")
        server.wait(lambda: server.metric("samq_model_reloads_total", result="failure") >= 2)
        assert reason in server.ready()["problem"] and "keeps serving" in server.ready()["problem"]
        put(other_gguf, copy)
        server.wait(serves(server, other_gguf))
        server.wait(lambda: server.metric("samq_model_reload_failed") == 0)


def test_a_file_that_is_not_what_was_registered_takes_no_model_from_memory(
    registered, mlflow_uri, tmp_path, monkeypatch, chat_gguf
):
    """That memory is short is the one thing that is not real here."""
    monkeypatch.setattr(watch, "fits_beside", lambda served, settings: False)
    registered.set_model_version_tag("tiny-llama", "2", "gguf_uri", chat_gguf.as_uri())
    with running(registry_source("tiny-llama", "production", mlflow_uri)) as server:
        child = server.child
        registered.set_registered_model_alias("tiny-llama", "production", "2")
        server.wait(lambda: "put the file back" in (server.ready()["problem"] or ""))
        assert server.child is child and child.alive


def test_a_version_whose_file_is_moved_altered_or_gone_serves_on_and_is_told_at_once(
    registered, mlflow_uri, tmp_path, chat_gguf
):
    """H3, with alias and file looked up once a minute only."""
    copy = tmp_path / "copy.gguf"
    put(chat_gguf, copy)
    registered.set_model_version_tag("tiny-llama", "1", "gguf_uri", copy.as_uri())
    with running(registry_source("tiny-llama", "production", mlflow_uri), poll_interval_s=60) as server:
        before = server.complete().json()["choices"][0]["text"]
        for spoil, told in (
            (lambda: copy.rename(tmp_path / "elsewhere"), "No such file"),
            (lambda: put(chat_gguf, copy), None),
            (lambda: copy.write_bytes(copy.read_bytes()[:-1] + b"?"), "was altered"),
            (lambda: os.truncate(copy, 1000), "was altered"),
        ):
            spoil()
            server.wait(
                lambda told=told: told in (server.ready()["problem"] or "") if told else not server.ready()["problem"]
            )
            assert server.client.get("/ready").status_code == 200 and serves(server, chat_gguf)()
            server.wait(lambda told=told: server.metric("samq_model_reload_failed") == bool(told))
            assert server.complete().json()["choices"][0]["text"] == before


def test_an_alias_that_names_nothing_yet_is_told_and_no_failure(registered, mlflow_uri, chat_gguf):
    for name, alias in (("nothing", "production"), ("tiny-llama", "champion")):
        with running(registry_source(name, alias, mlflow_uri), wait=False) as server:
            server.wait(lambda: server.ready()["problem"])
            assert server.ready()["problem"].startswith("nothing to serve yet: ")
            assert f"has no model {name} with the alias {alias}" in server.ready()["problem"]
            assert server.metric("samq_model_lookup_failures_total") == 0
            if alias == "champion":
                registered.set_registered_model_alias(name, alias, "1")
                server.wait(serves(server, chat_gguf))
                assert server.ready()["problem"] is None
                registered.delete_registered_model_alias(name, alias)
                server.wait(lambda: server.ready()["problem"])
                assert server.ready()["problem"].endswith("keeps serving")
                assert server.metric("samq_model_lookup_failures_total") == 0


def test_an_alias_at_a_version_that_cannot_be_served_here_is_a_failed_reload(registered, mlflow_uri, chat_gguf):
    with running(registry_source("tiny-llama", "production", mlflow_uri)) as server:
        registered.set_model_version_tag("tiny-llama", "2", "gguf_uri", "s3://bucket/model.gguf")
        registered.set_registered_model_alias("tiny-llama", "production", "2")
        server.wait(lambda: server.metric("samq_model_reload_failed") == 1)
        server.wait(lambda: "not on this machine" in (server.ready()["problem"] or ""))
        assert server.metric("samq_model_lookup_failures_total") == 0
        registered.set_registered_model_alias("tiny-llama", "production", "1")
        server.wait(lambda: server.ready()["problem"] is None)
        assert server.metric("samq_model_reload_failed") == 0
