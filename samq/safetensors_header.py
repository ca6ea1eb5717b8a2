"""What the header of a safetensors file says: the types, shapes and places of its tensors."""

import json
import struct
from pathlib import Path
from typing import Any


def read_safetensors_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the values begin in the file, in bytes, and the header's entry of each tensor; takes no part of the values.

    Raises struct.error, ValueError or AttributeError if there is no such header.
    """
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries: dict[str, Any] = json.loads(file.read(min(length, path.stat().st_size)))
    entries.pop("__metadata__", None)
    return 8 + length, entries
