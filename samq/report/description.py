"""Plans in words."""

from collections import Counter
from collections.abc import Sequence

from samq.allocation.budget_notation import read_budget
from samq.gguf.formats import bits_per_weight
from samq.records import Plan


def describe_plan(plan: Plan) -> str:
    """One sentence: what the plan does."""
    parameters = plan.parameters
    match plan.policy:
        case "full":
            return "Full precision: the baseline that all others are compared with."
        case "stock":
            return f"llama-quantize's own mixture {plan.mixture}, the same recipe in every layer."
        case "threshold":
            groups = f" in {parameters['kept_groups']} groups" if parameters["grouping"] == "block" else ""
            least = parameters.get("expert_guard")
            guard = f", but experts that saw few tokens have at least {least}" if least else ""
            return (
                f"Score above {parameters['threshold']:.4g}: {parameters['kept_tensors']} of {len(plan.types)} tensors"
                f"{groups} keep {parameters['keep']}; the rest is {parameters['base']}{guard}."
            )
        case "uniform":
            return f"Every tensor in {parameters['type']}, or in what its rows allow."
        case "budget":
            return _describe_budget_plan(plan)


def _describe_budget_plan(plan: Plan) -> str:
    kinds = sorted(set(plan.types.values()), key=bits_per_weight)
    predicted = "an unknown KL"
    if plan.predicted_kl_nats is not None:
        predicted = f"{plan.predicted_kl_nats:.5f}"
        if plan.predicted_kl_stderr is not None:
            predicted += f" ± {plan.predicted_kl_stderr:.5f}"
    guards = {
        "output_guard": "the output",
        "embedding_guard": "the embedding",
        "expert_guard": "experts that saw few tokens",
        "least_type": "every tensor",
    }
    least = [f"{what} at least {plan.parameters[key]}" for key, what in guards.items() if plan.parameters.get(key)]
    guarded = f"; {', '.join(least)}" if least else ""
    gap = f"; the best may be {100 * plan.solver_gap:.1f} % lower" if plan.solver_gap else ""
    rounding = "; rounding errors cancel each other" if plan.rounding == "compensated" else ""
    budget = read_budget(str(plan.parameters["budget"]))
    return (
        f"Least predicted KL within {budget.in_words}: {predicted} nats per token at {plan.bits_per_weight:.2f} "
        f"bits per weight, with {_list(kinds)}{guarded}{gap}{rounding}."
    )


def _list(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def type_counts(plan: Plan) -> str:
    """How many tensors have which type: `30 Q8_0, 181 Q5_0`."""
    return ", ".join(f"{count} {kind}" for kind, count in Counter(plan.types.values()).most_common())


def substitution_counts(plan: Plan) -> str:
    """How many tensors got another type than asked for, as their rows do not allow it: `181 Q4_K → Q5_0`."""
    pairs = Counter((one.requested, one.used) for one in plan.substitutions.values())
    return ", ".join(f"{count} {requested} → {used}" for (requested, used), count in pairs.most_common()) or "none"
