"""Sensitivity-aware mixed quantization of causal language models to GGUF.

For notebooks and scripts, `import samq` has what `samq.api` exports; nothing heavy is imported before it is used.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = [
    "Plan",
    "RequantizeParameters",
    "SamqError",
    "SensitivityMap",
    "Sweep",
    "Workspace",
    "load_parameters",
    "markdown_report",
    "measure_sweep",
    "pareto_figure",
    "results_table",
]


def __getattr__(name: str) -> Any:
    # `from samq import progress` asks for the submodule here first: only the names above may import the pipeline.
    if name not in __all__:
        raise AttributeError(f"module samq has no attribute {name}")
    from samq import api

    return getattr(api, name)
