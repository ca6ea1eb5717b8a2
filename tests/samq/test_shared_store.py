"""Machines that share a store, each with a cache of its own: folders, and a real S3 server on loopback."""

import json
import os
import random
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import httpx
import pytest
from s3fs import S3FileSystem

from samq import shared_store as module
from samq.errors import SamqError, UnreachableError
from samq.shared_store import SharedStore
from samq.store import MANIFEST, Store, stored_file
from tests.conftest import BUCKET

KEY = "a" * 64


class Flaky(BaseHTTPRequestHandler):
    """Passes requests on to S3, answers some with 503, and breaks off some answers in their midst."""

    protocol_version = "HTTP/1.1"
    target = ""
    chance = random.Random(4)
    faults: ClassVar[Counter[str]] = Counter()

    def log_message(self, *_):
        """Say nothing."""

    def _pass_on(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.chance.choices(["503", "broken", ""], [2, 1, 7])[0]
        self.faults[fault] += 1
        if fault == "503":
            self.send_response(503)
            self.send_header("content-length", "0")
            self.end_headers()
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        answer = httpx.request(self.command, self.target + self.path, headers=headers, content=body, timeout=30)
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "content-encoding"):
                self.send_header(name, value)
        length = answer.headers.get("content-length") if self.command == "HEAD" else str(len(answer.content))
        self.send_header("content-length", length or "0")
        self.end_headers()
        if fault == "broken" and len(answer.content) > 1:
            self.wfile.write(answer.content[: len(answer.content) // 2])
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self.command != "HEAD":
            self.wfile.write(answer.content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _pass_on


@pytest.fixture
def flaky(s3, monkeypatch):
    monkeypatch.setattr(Flaky, "target", s3.meta.endpoint_url)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("SAMQ_STORE", f"s3://{BUCKET}/flaky")
    module._at.cache_clear()
    S3FileSystem.clear_instance_cache()
    yield Flaky.faults
    server.shutdown()
    module._at.cache_clear()
    S3FileSystem.clear_instance_cache()


@pytest.mark.slow  # s3fs waits before it tries again
def test_503s_and_broken_connections_lose_nothing(flaky, machine, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 5 * 2**20)
    files = {f"file{number}": os.urandom(2**20 * number) for number in range(1, 13)}
    publish(machine("one"), **files)
    made = patient(lambda: machine("one").find("stage", KEY))
    found = patient(lambda: machine("two").find("stage", KEY))
    assert found.digest() == made.digest()
    for name, content in files.items():
        assert patient(lambda name=name: found.path(name)).read_bytes() == content
    assert flaky["503"] > 5 and flaky["broken"] > 2, flaky


def patient(do):
    """As a stage is: tried again after what may pass."""
    for _ in range(5):
        try:
            return do()
        except UnreachableError as error:
            print(error)
    return do()


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.slow)])
def shared(request, tmp_path, monkeypatch):
    """The shared store; `SAMQ_STORE` names it."""
    uri = f"file://{tmp_path / 'shared'}"
    if request.param == "s3":
        request.getfixturevalue("s3")
        uri = f"s3://{BUCKET}/{tmp_path.name}"
    monkeypatch.setenv("SAMQ_STORE", uri)
    return module.shared_store()


@pytest.fixture
def machine(tmp_path):
    """Make the store of a machine by its name. Machines know nothing of each other."""

    def make(name):
        forget()
        return Store(tmp_path / name)

    return make


def forget():
    from samq import store

    store._agreed.clear()


def publish(store, **files):
    with store.publish("stage", KEY) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)


def test_what_one_machine_made_another_has(shared, machine):
    one = machine("one")
    publish(one, small=b"1", large=b"2" * 1000)
    made = one.find("stage", KEY)
    found = machine("two").find("stage", KEY)
    assert found.digest() == made.digest()
    assert not (found.folder / "large").exists(), "nothing is fetched before it is read"
    assert found.path("large").read_bytes() == b"2" * 1000
    assert found.file("large").sha256 == made.files["large"].sha256
    assert [path.name for path in found.folder.iterdir()].count("small") == 0


def test_a_machine_that_may_only_read_finds_what_was_last_used_long_ago(disk, machine, monkeypatch):
    monkeypatch.setenv("SAMQ_STORE", f"file://{disk.folder}")
    publish(machine("one"), file=b"one")
    machine("one").find("stage", KEY)
    os.utime(disk.folder / "stage" / KEY / MANIFEST, (0, 0))
    disk.make_read_only()
    assert machine("two").find("stage", KEY).path("file").read_bytes() == b"one"


def test_neither_machine_has_what_was_never_made(shared, machine):
    assert machine("one").find("stage", KEY) is None


def test_a_store_from_before_is_shared_when_it_is_used(shared, machine, monkeypatch):
    uri = os.environ["SAMQ_STORE"]
    monkeypatch.delenv("SAMQ_STORE")
    publish(machine("one"), file=b"old")
    monkeypatch.setenv("SAMQ_STORE", uri)
    assert machine("two").find("stage", KEY) is None
    machine("one").find("stage", KEY)
    assert machine("two").find("stage", KEY).path("file").read_bytes() == b"old"


def test_of_two_that_were_made_at_once_the_shared_one_counts(shared, machine):
    one, two = machine("one"), machine("two")
    publish(two, file=b"two")
    publish(one, file=b"one")
    assert one.find("stage", KEY).path("file").read_bytes() == b"one"
    forget()
    assert two.find("stage", KEY).path("file").read_bytes() == b"one"


def test_a_file_altered_here_is_fetched_again(shared, machine):
    store = machine("one")
    publish(store, file=b"right")
    path = store.find("stage", KEY).path("file")
    path.write_bytes(b"wrong!")
    assert store.find("stage", KEY).path("file").read_bytes() == b"right"


def test_an_upload_that_was_broken_off_is_nothing_to_others(shared, machine, monkeypatch):
    store = machine("one")
    publish(store, a=b"1", b=b"2")
    with monkeypatch.context() as patch:
        patch.setattr(SharedStore, "write", broken)
        with pytest.raises(UnreachableError):
            store.find("stage", KEY)
    assert machine("two").find("stage", KEY) is None
    assert machine("one").find("stage", KEY)
    assert machine("two").find("stage", KEY).path("b").read_bytes() == b"2"


def broken(*_, **__):
    raise UnreachableError("the network is down; wait")


def test_bytes_that_are_not_those_published_are_refused(shared, machine):
    store = machine("one")
    publish(store, file=b"right")
    made = store.find("stage", KEY)
    shared.write("stage", KEY, f"{made.files['file'].sha256}/file", b"wrong")
    with pytest.raises(UnreachableError, match="other bytes than it was published with"):
        machine("two").find("stage", KEY).path("file")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (b"{", "is not JSON"),
        ({"files": {"../../escaped": {"sha256": "0" * 64, "bytes": 1, "mtime_ns": 1}}}, "is no name of a file"),
        ({"key": "b" * 64}, "is of stage/bbbb"),
    ],
)
def test_a_hostile_manifest_is_one_sentence_and_writes_nothing(shared, machine, damage, reason, tmp_path):
    publish(machine("one"), file=b"1")
    made = machine("one").find("stage", KEY)
    content = damage if isinstance(damage, bytes) else json.dumps({**made.content(), **damage}).encode()
    shared.write("stage", KEY, MANIFEST, content)
    with pytest.raises(SamqError, match=reason):
        machine("two").find("stage", KEY)
    assert not [path for path in (tmp_path / "two").rglob("*") if path.is_file()]


def test_what_the_shared_store_has_lost_is_one_sentence(shared, machine):
    publish(machine("one"), file=b"x")
    machine("one").find("stage", KEY)
    found = machine("two").find("stage", KEY)
    shared.remove("stage", KEY)
    with pytest.raises(SamqError, match="has lost file of stage/"):
        found.path("file")
    assert machine("two").find("stage", KEY) is None


def test_a_path_of_the_registry_is_fetched(shared, machine, tmp_path):
    publish(machine("one"), **{"model.gguf": b"GGUF"})
    machine("one").find("stage", KEY)
    path = machine("two").root / "stage" / KEY / "model.gguf"
    assert stored_file(path).read_bytes() == b"GGUF"


def test_threads_fetch_a_file_once(shared, machine, monkeypatch):
    publish(machine("one"), file=b"x" * 10**6)
    machine("one").find("stage", KEY)
    found, fetched = machine("two").find("stage", KEY), []
    download = SharedStore.download
    monkeypatch.setattr(SharedStore, "download", lambda *a: (fetched.append(a), download(*a)))
    threads = [threading.Thread(target=found.path, args=["file"]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_a_large_upload_goes_on_where_it_was(s3, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(module, "_THREADS", 1)
    monkeypatch.setenv("SAMQ_STORE", f"s3://{BUCKET}/large")
    content = os.urandom(22 * 2**20)
    (tmp_path / "file").write_bytes(content)
    store, sent = module.shared_store(), []
    call = store._files.call_s3

    def third_fails(method, **fields):
        if method == "upload_part":
            sent.append(fields["PartNumber"])
            if len(sent) == 3:
                raise OSError("broken pipe")
        return call(method, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(store._files, "call_s3", third_fails)
        with pytest.raises(UnreachableError, match="broken pipe"):
            store.upload(tmp_path / "file", "stage", KEY, "b" * 64)
        store.upload(tmp_path / "file", "stage", KEY, "b" * 64)
    assert sorted(sent) == [1, 2, 3, 3, 4, 5]
    store.download("stage", KEY, "b" * 64, "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content


def test_a_download_goes_on_where_it_was(shared, machine, tmp_path):
    publish(machine("one"), file=b"0123456789")
    made = machine("one").find("stage", KEY)
    (tmp_path / "part").write_bytes(b"01234")
    shared.download("stage", KEY, made.files["file"].sha256, "file", tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == b"0123456789"


@pytest.mark.parametrize("uri, words", [("nowhere://x", "nowhere"), ("s3://no-such-bucket-here/x", "no-such-bucket")])
def test_a_place_that_cannot_be_used_is_one_sentence(uri, words, s3, machine, monkeypatch):
    monkeypatch.setenv("SAMQ_STORE", uri)
    store = machine("one")
    with pytest.raises(SamqError, match=words):
        publish(store, file=b"1")
        store.find("stage", KEY)
