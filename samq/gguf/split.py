"""GGUFs in several files, as llama-gguf-split writes them: NAME-00001-of-00003.gguf and so on.

llama.cpp loads all parts when it is given the first. Only that one has the model's metadata, and each has some of the
tensors, so that a single part is never the model.
"""

import re
import shlex
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import ReaderField

from samq.errors import SamqError

_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.gguf")


@dataclass(frozen=True)
class Part:
    """Which part of a GGUF a file is: `number` counts from 1."""

    path: Path
    number: int
    count: int

    @classmethod
    def of(cls, path: Path, fields: Mapping[str, ReaderField]) -> "Part | None":
        """The part that a file with these metadata is; None for a GGUF in one file."""
        count, number = (fields[key].contents() if key in fields else 0 for key in ("split.count", "split.no"))
        return cls(path, number + 1, count) if count > 1 else None

    def __str__(self) -> str:
        """For messages: the file, and which part it is."""
        return f"{self.path} is part {self.number} of {self.count} of a GGUF"

    def refused(self) -> SamqError:
        """What to say where one file is needed."""
        missing = self._missing()
        get = f"get {missing[0]}, then " if missing else ""
        first = self._file(1)
        if first is None:
            return SamqError(f"{self}; {self._rename()}, and merge the parts with `{_merge_program()} --merge`")
        merged = first.with_name(first.name.replace(f"-00001-of-{self.count:05}", ""))
        command = f"{_merge_program()} --merge {shlex.quote(str(first))} {shlex.quote(str(merged))}"
        return SamqError(f"{self}, and not the model; {get}merge the parts with `{command}` and give {merged}")

    def all_files(self) -> list[Path]:
        """The files of all parts, in order; raises SamqError if this is not the first or one is missing."""
        first = self._file(1)
        if first is None:
            raise SamqError(f"{self}; {self._rename()}")
        if self.number != 1:
            raise SamqError(f"{self}; give the first, {first}")
        if missing := self._missing():
            raise SamqError(f"{self}, and {missing[0]} is missing; put all parts into {first.parent}")
        return [path for number in range(1, self.count + 1) if (path := self._file(number))]

    def _file(self, number: int) -> Path | None:
        """Where llama.cpp looks for a part; None if this file does not have a name of the kind."""
        name = _NAME.fullmatch(self.path.name)
        return self.path.with_name(f"{name['stem']}-{number:05}-of-{self.count:05}.gguf") if name else None

    def _missing(self) -> list[Path]:
        files = [self._file(number) for number in range(1, self.count + 1)]
        return [path for path in files if path and not path.is_file()]

    def _rename(self) -> str:
        return f"rename the parts to NAME-00001-of-{self.count:05}.gguf and so on, which llama.cpp needs"


def _merge_program() -> str:
    """The installed llama-gguf-split, or its name."""
    installed = Path(sysconfig.get_path("platlib")) / "bin" / "llama-gguf-split"
    return shlex.quote(str(installed)) if installed.is_file() else installed.name
