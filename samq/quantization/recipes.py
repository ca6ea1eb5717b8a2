"""How a plan's GGUF is put together: copied from the ladder where that holds every tensor, else by llama-quantize."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from samq.allocation.ladder import rungs_of
from samq.gguf.file import TensorInfo
from samq.records import Plan


@dataclass(frozen=True)
class Recipe:
    """How one plan becomes a file."""

    plan: Plan
    copied: Mapping[str, tuple[str, ...]]  # rung -> tensors copied from it; empty: llama-quantize writes the file

    @property
    def compensated(self) -> bool:
        """Whether the plan's tensors are rounded with compensation."""
        return self.plan.rounding == "compensated"


def recipes(plans: Mapping[str, Plan], tensors: Mapping[str, TensorInfo], rungs: Iterable[str]) -> dict[str, Recipe]:
    """A recipe for each plan; without rungs llama-quantize builds them all."""
    rungs = list(rungs)
    return {name: Recipe(plan, _copied(plan, tensors, rungs)) for name, plan in plans.items()}


def _copied(plan: Plan, tensors: Mapping[str, TensorInfo], rungs: list[str]) -> dict[str, tuple[str, ...]]:
    """Rung -> tensors of the plan; empty if some tensor is in no rung."""
    needed = rungs_of(plan, tensors, rungs) or {}
    return {rung: tuple(names) for rung, names in needed.items()}


def tensors_to_compensate(recipes: Iterable[Recipe]) -> dict[str, list[str]]:
    """Rung -> the tensors that compensated plans copy from it, so that each is rounded once for all of them."""
    tensors: dict[str, set[str]] = {}
    for recipe in recipes:
        if recipe.compensated:
            for rung, names in recipe.copied.items():
                tensors.setdefault(rung, set()).update(names)
    return {rung: sorted(names) for rung, names in sorted(tensors.items())}
