"""The candidates' GGUFs: llama-quantize writes stock mixtures and thresholds; the budgets' plans are compensated together."""

from collections.abc import Mapping

from flows.costs import Costs
from flows.gather import Gather
from flows.inputs import Inputs
from samq.quantization.provenance import unreached_experts
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.compensate import candidate, compensate
from tasks.plan import FULL, load_plan
from tasks.quantize import quantize


def build(
    at: Workspace, inputs: Inputs, plans: Mapping[str, Artifact], costs: Costs, gather: Gather
) -> dict[str, Artifact]:
    """Name -> GGUF of every plan that could be built; full precision is the converted file itself."""
    target, provenance = inputs.target, inputs.provenance | unreached_experts(costs.routing)
    rounding = {name: load_plan(plan).rounding for name, plan in plans.items() if name != FULL}
    compensated = {name: plans[name] for name, how in rounding.items() if how == "compensated"}
    futures = {
        name: quantize.submit(at, name, target, plans[name], provenance)
        for name, how in rounding.items()
        if how == "nearest"
    }
    if compensated:
        together = compensate.submit(at, inputs.model, inputs.input_text, target.imatrix, compensated, provenance)
        built = gather.keeping_errors({"compensate": together})["compensate"]
        for name, plan in compensated.items():
            if isinstance(built, Exception):
                gather.lose(name, "compensate", str(built))
            else:
                futures[name] = candidate.submit(at, name, target.full, plan, built, provenance)
    ggufs = gather("quantize", futures) | ({FULL: target.full} if FULL in plans else {})
    return {name: ggufs[name] for name in plans if name in ggufs}
