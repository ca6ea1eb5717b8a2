"""Settings files: YAML that a user writes, read into a pydantic model."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from samq.errors import SamqError

Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(path: Path | None, model: type[Settings], examples: str, **given: Any) -> Settings:
    """Read a YAML file, if `path` is given; the values in `given` that are not None override the file's.

    Raises SamqError, which names the wrong field and `examples`, the place of annotated files.
    """
    try:
        fields: Any = (yaml.safe_load(Path(path).read_text()) or {}) if path else {}
    except OSError as error:
        raise SamqError(f"cannot read {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SamqError(f"{path} is not YAML: {str(error).splitlines()[0]}; see {examples}") from error
    if not isinstance(fields, dict):
        raise SamqError(f"{path} does not hold settings; see {examples} for annotated examples")
    try:
        return model.model_validate(fields | {key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = first["msg"].removeprefix("Value error, ")
        raise SamqError(
            f"{path or 'settings'}: {f'{where}: ' if where else ''}{what}; see {examples} for annotated examples"
        ) from error
