"""A YAML file that a person writes, read into a pydantic model."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from samq.errors import SamqError

Settings = TypeVar("Settings", bound=BaseModel)


def read_settings(path: Path, model: type[Settings], examples: str) -> Settings:
    """Read a YAML file; raises SamqError that names the field at fault, and `examples`, where annotated files lie."""
    try:
        fields: Any = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise SamqError(f"cannot read {path}: {error.strerror}; give the path of a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SamqError(f"{path} is not YAML: {str(error).splitlines()[0]}; see {examples}") from error
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise SamqError(f"{path}: {where}: {first['msg']}; see {examples} for annotated examples") from error
