"""Sensitivity-aware mixed quantization of causal language models to GGUF.

For notebooks and scripts, `import samq` has what `samq.api` exports; nothing heavy is imported before it is used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name.startswith("_") or find_spec(f"samq.{name}"):  # Python itself imports submodules
        raise AttributeError(name)
    api = import_module("samq.api")
    if name not in api.__all__:
        raise AttributeError(f"samq has no {name}; it has {', '.join(api.__all__)}")
    return getattr(api, name)
