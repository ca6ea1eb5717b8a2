"""Where a person wants results: refused before hours of work, not after, and written whole or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from samq.errors import SamqError

if TYPE_CHECKING:
    from samq.store import Artifact


def check_file(path: Path) -> None:
    """Raise SamqError unless a file can be written at `path`."""
    folder = path.absolute().parent
    if path.is_dir():
        raise SamqError(f"{path} is a folder; name a file in it")
    if not folder.is_dir():
        raise SamqError(f"the folder of {path} does not exist; make it first")
    make_folder(folder, advice=f"choose another place for {path.name}")


def make_folder(folder: Path, advice: str = "choose another folder") -> None:
    """Make a folder if need be; raises SamqError if no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # root may write anywhere, but not on a read-only file system
    except OSError as error:
        raise SamqError(f"{folder} cannot be written to ({error.strerror}); {advice}") from error


@contextlib.contextmanager
def work_folder(inside: Path) -> Iterator[Path]:
    """A temporary folder inside another, where results are finished before they are moved to their place there.

    When the work fails its logs stay, as the error names them, and nothing else. Raises SamqError if the disk gets full.
    """
    try:
        work = Path(tempfile.mkdtemp(prefix="samq-", dir=inside))
        try:
            yield work
            shutil.rmtree(work)
        finally:
            remove_all_but_logs(work)
    except OSError as error:
        raise SamqError(f"cannot write to {inside}: {error.strerror}; free some space") from error


def export(artifact: "Artifact", folder: Path) -> None:
    """Copy an artifact's files, logs apart, into a folder."""
    with work_folder(folder) as work:
        for name in artifact.files:
            if not name.endswith(".log"):
                shutil.copyfile(artifact.path(name), work / name)
                (work / name).replace(folder / name)


def remove_all_but_logs(folder: Path) -> None:
    """Remove what failed work left in its folder, if there is one, except its logs."""
    for path in folder.glob("*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix != ".log":
            path.unlink()
    with contextlib.suppress(OSError):  # it holds logs, or is gone
        folder.rmdir()
