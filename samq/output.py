"""Output files and folders of the commands: checked before hours of work, and written whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from samq.errors import SamqError

GONE = ".gone-"  # in the names of folders that are being removed
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def check_file(path: Path) -> None:
    """Raise SamqError unless a file can be written at `path`."""
    folder = path.absolute().parent
    if path.is_dir():
        raise SamqError(f"{path} is a folder; name a file in it")
    if not folder.is_dir():
        raise SamqError(f"the folder of {path} does not exist; make it first")
    make_folder(folder, advice=f"choose another place for {path.name}")


def make_folder(folder: Path, advice: str = "choose another folder") -> None:
    """Make a folder if it does not exist; raises SamqError if a file cannot be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # permissions do not stop root, and a read-only file system does
    except OSError as error:
        raise SamqError(f"{folder} cannot be written to ({error.strerror}); {advice}") from error


@contextlib.contextmanager
def work_folder(inside: Path) -> Iterator[Path]:
    """Make a temporary folder inside another, for results that are moved to their place when they are complete.

    If the work fails, only its logs stay, since the error names them. Raises SamqError if the disk gets full or a file
    cannot be used.
    """
    try:
        work = Path(tempfile.mkdtemp(prefix="samq-", dir=inside))
    except OSError as error:
        raise _not_writable(inside, error) from error
    try:
        try:
            yield work
            shutil.rmtree(work)
        finally:
            remove_all_but_logs(work)
    except OSError as error:
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        if error.errno in _FULL or error.errno == errno.EROFS or (file and file.is_relative_to(work)):
            raise _not_writable(inside, error) from error
        if file is None:
            raise
        raise SamqError(f"cannot use {file}: {error.strerror}; check that file") from error


def _not_writable(folder: Path, error: OSError) -> SamqError:
    advice = "free some space" if error.errno in _FULL else "choose another folder"
    return SamqError(f"cannot write to {folder}: {error.strerror}; {advice}")


def export(files: Iterable[Path], folder: Path) -> None:
    """Copy files, except logs, into a folder, each whole or not at all."""
    with work_folder(folder) as work:
        for file in files:
            if file.suffix != ".log":
                shutil.copyfile(file, work / file.name)
                (work / file.name).replace(folder / file.name)


def export_file(source: Path, target: Path) -> None:
    """Copy one file, whole or not at all."""
    with work_folder(target.absolute().parent) as work:
        shutil.copyfile(source, work / target.name)
        (work / target.name).replace(target)


def discard(folder: Path) -> None:
    """Remove a folder, which need not exist; a process that is killed meanwhile leaves it whole or under another name."""
    gone = folder.with_name(f"{folder.name}{GONE}{uuid.uuid4().hex}")
    with contextlib.suppress(OSError):  # it does not exist, or can only be read
        folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_all_but_logs(folder: Path) -> None:
    """Remove everything except logs from the folder of failed work, which need not exist."""
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix != ".log":
            path.unlink()
    with contextlib.suppress(OSError):  # the folder has logs, or does not exist
        folder.rmdir()
