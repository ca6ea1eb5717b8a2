"""A store that several machines share, at any place that fsspec reaches, such as s3://BUCKET/PREFIX.

Each machine has a store of its own as a cache of it (`samq.store`). Of every artifact there are

    STAGE/KEY/SHA-256/FILE      written first and never altered; the hash is that of the file
    STAGE/KEY/artifact.json     written last: an artifact that has it is whole

No step needs a rename. If two machines make an artifact at the same time, and their bytes differ, the last manifest counts, and
the files of both are there.
"""

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

import fsspec

from samq.errors import SamqError, UnreachableError
from samq.progress import bar

PART_BYTES = 64 * 2**20  # of an upload or download that can be resumed; S3 allows 10,000 parts
_THREADS = 4
_DAY_S = 86400.0
_BARE = 8 * 2**20  # a smaller file takes no time to speak of
_NETWORK = re.compile(r"botocore|aiobotocore|aiohttp|s3fs|gcsfs|adlfs")  # packages whose errors are the network's


def shared_store() -> "SharedStore | None":
    """The store that `SAMQ_STORE` names; None if it is not set."""
    uri = os.environ.get("SAMQ_STORE")
    return _at(uri) if uri else None


@dataclass(frozen=True)
class Stored:
    """What a store has of an artifact."""

    stage: str
    key: str
    bytes: int
    last_use: float  # seconds since 1970; to the day in a shared store
    contents: frozenset[str]  # SHA-256 of its files


class SharedStore:
    """Files below one URI."""

    def __init__(self, uri: str) -> None:
        """Nothing is read yet. Raises SamqError if no installed package reaches such a place."""
        self.uri = uri.rstrip("/")
        try:
            # Other machines write there, so what was listed a moment ago tells nothing.
            self._files, root = fsspec.url_to_fs(self.uri, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise SamqError(
                f"SAMQ_STORE={uri} cannot be used: {error}; install its package, such as samq[s3]"
            ) from error
        self._root = PurePosixPath(root)

    def read(self, stage: str, key: str, name: str) -> bytes | None:
        """The content of a small file of an artifact, such as its manifest; None if there is none."""
        with self._reached():
            try:
                content: bytes = self._files.cat_file(str(self._root / stage / key / name))
                return content
            except FileNotFoundError:
                return None

    def write(self, stage: str, key: str, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""
        with self._reached(), self._whole(str(self._root / stage / key / name)) as target:
            self._files.pipe_file(target, content)

    def note_use(self, stage: str, key: str, name: str, content: bytes) -> None:
        """Let the time of a small file tell, to the day, when it was last read; who may only read leaves no trace."""
        path = str(self._root / stage / key / name)
        with self._reached(), suppress(OSError):
            if time.time() - self._files.modified(path).timestamp() > _DAY_S:
                with self._whole(path) as target:
                    self._files.pipe_file(target, content)

    def put_folder(self, folder: Path, place: str) -> None:
        """Copy all files of a folder to a place below the URI; those that are there are written anew."""
        with self._reached():
            self._files.put(f"{folder}/", f"{self._root / place}/", recursive=True)

    def artifacts(self) -> list[Stored]:
        """What is there, unfinished artifacts included."""
        with self._reached():
            found = self._files.find(str(self._root), detail=True)
        files: dict[tuple[str, str], list[tuple[PurePosixPath, dict[str, Any]]]] = defaultdict(list)
        for path, of_file in found.items():
            place = PurePosixPath(path).relative_to(self._root)
            if len(place.parts) > 2:  # else it is somebody else's
                files[place.parts[0], place.parts[1]].append((place, of_file))
        return [
            Stored(
                stage,
                key,
                bytes=sum(of_file["size"] for _, of_file in those),
                last_use=max(_written(of_file) for _, of_file in those),
                contents=frozenset(place.parts[2] for place, _ in those if len(place.parts) > 3),
            )
            for (stage, key), those in files.items()
        ]

    def upload(self, path: Path, stage: str, key: str, sha256: str) -> None:
        """Copy a file there, unless it is there already. An upload to S3 that was broken off goes on where it was."""
        target = str(self._root / stage / key / sha256 / path.name)
        size = path.stat().st_size
        with self._reached(), _shown(f"upload {path.name}", size) as report:
            if self._size(target) == size:
                return
            if "s3" in self._files.protocol and size > PART_BYTES:
                self._upload_parts(path, target, size, report)
                return
            with self._whole(target) as place:
                self._files.put_file(str(path), place)

    def download(self, stage: str, key: str, sha256: str, name: str, path: Path) -> None:
        """Copy a file from there. What `path` has of it already is not read again."""
        source = str(self._root / stage / key / sha256 / name)
        with self._reached():
            size = self._size(source)
        if size is None:
            raise SamqError(f"{self.uri} has lost {name} of {stage}/{key}; run the sweep again, which makes it anew")

        def part(start: int) -> bytes:
            content: bytes = self._files.cat_file(source, start=start, end=min(start + PART_BYTES, size))
            return content

        with (
            self._reached(),
            _shown(f"download {name}", size) as report,
            path.open("ab") as file,
            ThreadPoolExecutor(_THREADS) as pool,
        ):
            while (done := file.tell()) < size:
                for content in pool.map(part, range(done, size, PART_BYTES)[:_THREADS]):
                    file.write(content)
                    report(file.tell(), size)

    def remove(self, stage: str, key: str) -> None:
        """Remove an artifact: its manifest first, so that nobody takes the rest for a whole one."""
        folder = self._root / stage / key
        with self._reached():
            for path in (folder / "artifact.json", folder):
                if self._files.exists(str(path)):
                    self._files.rm(str(path), recursive=True)

    @contextmanager
    def _whole(self, target: str) -> Iterator[str]:
        """Where to write a file, so that it appears whole. An object store does that by itself, and has no folders."""
        if "file" not in self._files.protocol:
            yield target
            return
        self._files.makedirs(os.path.dirname(target), exist_ok=True)
        yield (work := f"{target}.{uuid4().hex}")
        os.replace(work, target)

    def _size(self, path: str) -> int | None:
        try:
            size: int = self._files.info(path)["size"]
            return size
        except FileNotFoundError:
            return None

    def _upload_parts(self, path: Path, target: str, size: int, report: Callable[[int, int], None]) -> None:
        """By S3's multipart upload. The target has the hash in its name, so parts under that name are of this file."""
        bucket, _, key = target.partition("/")
        where = {"Bucket": bucket, "Key": key}
        call = self._files.call_s3
        begun = [
            one
            for one in call("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads", [])
            if one["Key"] == key
        ]
        upload = begun[-1]["UploadId"] if begun else call("create_multipart_upload", **where)["UploadId"]
        parts = {part["PartNumber"]: part for part in self._parts(where, upload)}
        done = sum(part["Size"] for part in parts.values())
        report(done, size)

        def send(number: int) -> dict[str, Any]:
            nonlocal done
            start = (number - 1) * PART_BYTES
            length = min(PART_BYTES, size - start)
            if number in parts and parts[number]["Size"] == length:
                return {"PartNumber": number, "ETag": parts[number]["ETag"]}
            with path.open("rb") as file:
                file.seek(start)
                sent = call("upload_part", **where, UploadId=upload, PartNumber=number, Body=file.read(length))
            done += length
            report(done, size)
            return {"PartNumber": number, "ETag": sent["ETag"]}

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                sent = list(pool.map(send, range(1, -(-size // PART_BYTES) + 1)))
            call("complete_multipart_upload", **where, UploadId=upload, MultipartUpload={"Parts": sent})
        except Exception:
            if self._size(target) != size:  # else another machine has completed this very upload
                raise

    def _parts(self, where: dict[str, str], upload: str) -> Iterator[dict[str, Any]]:
        marker = 0
        while True:
            page = self._files.call_s3("list_parts", **where, UploadId=upload, PartNumberMarker=marker)
            yield from page.get("Parts", [])
            if not page.get("IsTruncated"):
                return
            marker = page["NextPartNumberMarker"]

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Say what the errors of the many kinds of places mean."""
        try:
            yield
        except (PermissionError, FileNotFoundError) as error:
            raise SamqError(f"cannot use {self.uri}: {error}; check SAMQ_STORE and the credentials") from error
        except Exception as error:
            if not (isinstance(error, OSError) or _NETWORK.match(type(error).__module__)):
                raise
            raise UnreachableError(f"cannot reach {self.uri}: {error}; check the network, and run it again") from error


def _written(of_file: dict[str, Any]) -> float:
    """When a listed file was written, in seconds since 1970; kinds of places name it differently."""
    written = next(of_file[name] for name in ("LastModified", "mtime", "last_modified", "updated") if name in of_file)
    if isinstance(written, str):
        written = datetime.fromisoformat(written)
    return float(written.timestamp() if isinstance(written, datetime) else written)


_at = lru_cache(SharedStore)


@contextmanager
def _shown(what: str, size: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, for what takes a while."""
    if size < _BARE:
        yield lambda done, total: None
        return
    with bar(what, in_bytes=True) as report:
        yield report
