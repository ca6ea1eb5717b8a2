"""The candidates' GGUFs: compensate the rungs' tensors once, then copy; what the ladder lacks llama-quantize writes."""

from collections.abc import Mapping

from flows.costs import Costs
from flows.gather import Gather
from flows.inputs import Inputs
from samq.files import GGUF_NAME
from samq.gguf.file import read_tensors
from samq.quantization.provenance import unreached_experts
from samq.quantization.recipes import recipes, tensors_to_compensate
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.compensate import compensate, compensate_rung
from tasks.plan import FULL, load_plan
from tasks.quantize import assemble, quantize


def build(
    at: Workspace,
    inputs: Inputs,
    plans: Mapping[str, Artifact],
    rungs: Mapping[str, Artifact],
    costs: Costs,
    gather: Gather,
) -> dict[str, Artifact]:
    """Name -> GGUF of every plan that could be built; full precision is the converted file itself.

    Without rungs llama-quantize writes every file.
    """
    full, target, grams = inputs.target.full, inputs.target, costs.grams
    provenance = inputs.provenance | unreached_experts(costs.routing)
    to_build = {name: plan for name, plan in plans.items() if name != FULL}
    loaded = {name: load_plan(plan) for name, plan in to_build.items()}
    recipe_of = recipes(loaded, read_tensors(full.path(GGUF_NAME)), rungs)
    tensors_of = tensors_to_compensate(recipe_of.values())
    compensated: dict[str, Artifact | Exception] = {}
    if grams:
        compensated = gather.keeping_errors(
            {
                rung: compensate_rung.submit(at, rung, full, rungs[rung], tensors, grams)
                for rung, tensors in tensors_of.items()
            }
        )
    futures, to_compensate = {}, []
    for name, recipe in recipe_of.items():
        plan = to_build[name]
        if not recipe.copied:
            futures[name] = quantize.submit(at, name, target, plan, provenance)
            if recipe.compensated:
                to_compensate.append(name)
            continue
        outcomes = {rung: compensated[rung] for rung in recipe.copied} if recipe.compensated else {}
        if errors := [f"{rung}: {error}" for rung, error in outcomes.items() if isinstance(error, Exception)]:
            gather.lose(name, "compensate", "; ".join(errors))
        else:
            copied = {rung: rungs[rung] for rung in recipe.copied}
            rounded = {rung: artifact for rung, artifact in outcomes.items() if isinstance(artifact, Artifact)}
            futures[name] = assemble.submit(at, name, full, plan, copied, rounded, provenance)
    ggufs = gather("quantize", futures)
    again = {
        name: compensate.submit(at, name, full, to_build[name], ggufs.pop(name), grams)
        for name in to_compensate
        if grams and name in ggufs
    }
    ggufs |= gather("compensate", again)
    return ({FULL: full} if FULL in plans else {}) | ggufs
