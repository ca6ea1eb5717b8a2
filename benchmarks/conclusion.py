"""Whether a benchmark's claims hold. Needs none of lm-eval and llama.cpp, which a GPU's machine may lack."""

import json
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def conclude(result: dict[str, Any], verdicts: dict[str, bool], path: Path | None) -> None:
    """Print whether each claim holds, and write the result with the verdicts, if `path` is given; exits 1 if one does not."""
    for claim, holds in verdicts.items():
        print(f"{claim}: {'yes' if holds else 'NO'}")
    if path:
        path.write_text(json.dumps({**result, "verdicts": verdicts}, indent=1) + "\n")
    if not all(verdicts.values()):
        raise SystemExit(1)


def installed(*packages: str) -> dict[str, str | None]:
    """Package -> its version; None if it is here without its metadata."""
    versions: dict[str, str | None] = dict.fromkeys(packages)
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
