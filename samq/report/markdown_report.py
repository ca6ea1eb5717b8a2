"""The report of a sweep in Markdown: the choice, the figures, what failed and why, what it was made from."""

import platform
from collections import Counter

from samq import __version__, markdown
from samq.evaluation.metrics import KLD_COLUMN, MB, P999_COLUMN
from samq.report.description import describe_plan, substitution_counts, type_counts
from samq.report.prediction import prediction_section
from samq.report.scorecard import benchmark_section, scorecard_section
from samq.report.table import LEGEND, PREDICTED, choice_table, markdown_table, show_predicted
from samq.sweep.selection import BY_SENSITIVITY, Result, describe_rule, percent
from samq.sweep.serving_cost import CostSettings
from samq.sweep.sweep import Sweep


def verdict(sweep: Sweep) -> str:
    """Which candidate is the best and why, in a few sentences."""
    best, condition = sweep.best, _condition(sweep)
    rule = describe_rule(sweep.rule)
    if best is None or best.kld is None:
        return f"SAMQ chose nothing: no eligible candidate ({rule}) has a measured mean KLD.{condition}"
    text = (
        f"{best.name} has the lowest mean KLD of all eligible {rule}: "
        f"{KLD_COLUMN.show(best.evaluation, spread=True)} nats per token at {best.bytes / MB:.1f} MB "
        f"({best.model.bits_per_weight:.2f} bits per weight)."
    )
    reference = sweep.result(sweep.rule.reference)
    if reference and reference is not best and reference.kld and reference.kld.value > 0:
        comparison = sweep.comparison(best.name, reference.name)
        change = comparison.in_words if comparison else f"{percent(best.kld.value / reference.kld.value - 1)} mean KLD"
        text += f" Against {reference.name}: {change}, {percent(best.bytes / reference.bytes - 1)} bytes."
    return text + condition


def _condition(sweep: Sweep) -> str:
    """A sentence, after a space, on what SAMQ's plans had to beat; empty if the sweep has none of them."""
    policies = {result.plan.policy for result in sweep.results}
    if "budget" in policies and not any(mixture.kld for mixture in sweep.stock):
        return " No budget plan is eligible, because no stock mixture was measured to compare it with."
    if "stock" in policies and not policies.isdisjoint(BY_SENSITIVITY):
        return (
            " A SAMQ plan is eligible only if it beats every stock mixture of its size or smaller at 95 % confidence."
        )
    return ""


def markdown_report(sweep: Sweep, cost: CostSettings | None = None) -> str:
    """The whole report; with `cost` also what serving the candidates costs."""
    parts = [
        f"# {sweep.made_from.source.name}: {len(sweep.results)} candidates measured, {len(sweep.lost)} failed",
        verdict(sweep),
        choice_table(sweep),
        *_same_bytes_section(sweep),
        *scorecard_section(sweep, cost),
        "## All figures",
        markdown_table(sweep),
        f"{LEGEND}. Bold: the best figure of the quantized candidates. ±: one standard error. JSON: 95 % Wilson interval.",
        *benchmark_section(sweep),
    ]
    why_not = [(r.name, sweep.why_not(r)) for r in sweep.by_size if r.plan.policy != "full"]
    if ineligible := [[name, why] for name, why in why_not if why]:
        parts += ["## Not eligible", markdown.table(["candidate", "because"], ineligible)]
    if sweep.failures:
        parts += ["## Failed", markdown.bullets(f"**{f.name}** in {f.stage}: {f.reason}" for f in sweep.failures)]
    missing = Counter((what, why) for result in sweep.by_size for what, why in result.evaluation.missing.items())
    if missing:
        total = len(sweep.results)
        what_and_why = (f"{what} ({count} of {total}): {why}" for (what, why), count in missing.items())
        parts += ["## Not measured", markdown.bullets(what_and_why)]
    parts += prediction_section(sweep)
    plans = [[r.name, describe_plan(r.plan), type_counts(r.plan), substitution_counts(r.plan)] for r in sweep.by_size]
    heads = ["candidate", "plan", "tensors", "replaced types (rows do not allow the one asked for)"]
    parts += ["## Plans", markdown.table(heads, plans), *_unmeasured(sweep)]
    return "\n\n".join([*parts, "## Made from", markdown.bullets(_made_from(sweep))]) + "\n"


def _unmeasured(sweep: Sweep) -> list[str]:
    """A paragraph on the tensors that were not measured; none if all were."""
    quantizable = dict.fromkeys(name for result in sweep.results for name in result.plan.types)
    names = [name for name in quantizable if name not in sweep.sensitivity.tensors]
    if not names:
        return []
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    own = [result.plan.types for result in sweep.results if result.plan.policy in ("budget", "threshold")]
    kinds = " or ".join(sorted({types[name] for types in own for name in names})) or "a type of their own"
    return [
        f"**{len(names)} of {len(quantizable)} tensors were not measured** ({shown}): torch does not load these weights, or SAMQ "
        f"does not know how the GGUF stores them. SAMQ's plans give them {kinds}."
    ]


def _made_from(sweep: Sweep) -> list[str]:
    source, calibration = sweep.made_from.source, sweep.made_from.calibration
    heldout, toolchain = sweep.made_from.heldout, sweep.made_from.toolchain
    revision = f", revision {source.revision}" if source.revision else ""
    mmproj = sweep.made_from.mmproj
    return [
        f"model: {source.name}{revision}, weights {source.weights_digest[:12]}",
        *([f"vision or audio part: `{mmproj}`, for `llama-server -m MODEL.gguf --mmproj`"] if mmproj else []),
        f"calibration: {calibration.dataset}, {calibration.samples} samples, {calibration.tokens} tokens, "
        f"digest {calibration.tokens_digest[:12]}",
        f"fidelity on: {heldout.dataset}, {len(heldout.texts)} other texts, digest {heldout.digest()[:12]}",
        f"llama.cpp: llama-cpp-python {toolchain.version}, build {toolchain.build}",
        f"SAMQ {__version__}, Python {platform.python_version()}",
    ]


_CHANGE = "change of mean KLD"
_VERDICTS = {"win": "**wins**", "tie": "no difference", "loss": "loses"}


def _same_bytes_section(sweep: Sweep) -> list[str]:
    """Each stock mixture and SAMQ's plans of its size, and the budget plans whose size no mixture has.

    Empty if the sweep has no plan of SAMQ's to compare.
    """
    pairs: list[tuple[Result | None, Result | None]] = []
    for mixture in sweep.stock:
        plans = sweep.of_its_size(mixture)
        pairs += [(mixture, plan) for plan in plans] if plans else [(mixture, None)]
    shown = {plan.name for _, plan in pairs if plan}
    others = [plan for plan in sweep.by_size if plan.plan.policy == "budget" and plan.name not in shown]
    if not shown and not others:
        return []
    pairs += [(sweep.rival(plan), plan) for plan in others]
    rows = [_same_bytes_row(sweep, mixture, plan) for mixture, plan in pairs]
    heads = [
        "mixture, bytes",
        "candidate, bytes",
        KLD_COLUMN.heading,
        P999_COLUMN.heading,
        PREDICTED,
        _CHANGE,
        "verdict",
    ]
    words = f"{_SAME_BYTES} {_OTHER_BYTES}" if others else _SAME_BYTES
    return ["## At the same bytes", words, markdown.table(heads, rows)]


def _same_bytes_row(sweep: Sweep, mixture: Result | None, plan: Result | None) -> list[str]:
    """The cells of a mixture and a plan; where one of them is missing the other's figures stand alone."""
    sizes = [f"{one.name}, {one.bytes:,}" if one else "–" for one in (mixture, plan)]
    change, outcome = "–", "no plan of its size" if plan is None else "no mixture to compare with"
    if mixture and plan:
        sizes[1] += f" ({percent(plan.bytes / mixture.bytes - 1)})"
        comparison = sweep.comparison(plan.name, mixture.name)
        change = comparison.in_words.replace(" mean KLD", "") if comparison else "–"
        outcome = _VERDICTS[comparison.verdict] if comparison else "not compared"
    figures = [
        " → ".join(column.show(one.evaluation) for one in (mixture, plan) if one)
        for column in (KLD_COLUMN, P999_COLUMN)
    ]
    return [*sizes, *figures, show_predicted(plan) if plan else "–", change, outcome]


_SAME_BYTES = (
    "Each stock mixture → SAMQ's plans of its size, on the same held-out tokens. The 95 % interval is paired, and over whole "
    "chunks of text, because the tokens of a chunk are alike. A plan that does not win is not registered in place of the "
    "mixture."
)
_OTHER_BYTES = (
    "A budget whose size no mixture has is compared with the largest mixture that is no larger; if there is none, with the "
    "smallest. The sizes differ, and part of the change comes from that."
)
