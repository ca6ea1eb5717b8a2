"""SAMQ in a notebook or script: `import samq` exports these names.

The whole pipeline runs in this process, with the same store as the command line, and needs no server:

    sweep = samq.measure_sweep("deployments/parameters/demo.yaml")
    samq.results_table(sweep)     # a pandas DataFrame
    samq.pareto_figure(sweep)     # a matplotlib Figure
    sweep.best.gguf               # the file that won
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.parameters import RequantizeParameters, load_parameters
from flows.requantize import measure_sweep as _measure_sweep
from flows.run import workspace_of
from samq.errors import SamqError
from samq.records import Plan, SensitivityMap
from samq.report.figures import pareto_figure
from samq.report.markdown_report import markdown_report
from samq.report.table import results_table
from samq.sweep.sweep import Sweep
from samq.workspace import Workspace

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


def measure_sweep(parameters: RequantizeParameters | Mapping[str, Any] | str | Path) -> Sweep:
    """Build, measure and compare the candidates that the parameters name: a YAML file, a mapping like it, or the model.

    Finished stages are taken from the store in `SAMQ_HOME`. Raises SamqError for what the user can put right, and
    pydantic's ValidationError for a mapping that does not fit.
    """
    match parameters:
        case str() | Path():
            parameters = load_parameters(Path(parameters))
        case Mapping():
            parameters = RequantizeParameters.model_validate(parameters)
    return _measure_sweep(workspace_of(parameters), parameters)
