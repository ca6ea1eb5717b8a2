"""`samq plan`: a type for each tensor, by budget or by threshold."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from samq.cli import stages
from samq.cli.files import adopt, fisher_beside
from samq.cli.options import FullGguf, Grouping, Imatrix, NoImatrix, UnmeasuredType
from samq.cli.start import loading_packages, prepare_prefect, validated
from samq.errors import SamqError
from samq.files import FISHER_NAME, GGUF_NAME, IMATRIX_NAME, MAP_NAME
from samq.output import check_file
from samq.progress import bar, console

if TYPE_CHECKING:
    from samq.allocation.target import OpenTarget
    from samq.allocation.threshold import ThresholdPolicy
    from samq.records import Plan, SensitivityMap


def plan(
    sensitivity: Annotated[Path, typer.Option("--map", help="Sensitivity map written by `samq calibrate`.")],
    gguf: FullGguf,
    out: Annotated[Path | None, typer.Option(help="Plan to write (JSON).")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Size to fill: 1500MiB, 4.5bpw, size-of:Q4_K_M, or vram:24GiB@8192 (context in tokens)."),
    ] = None,
    ladder: Annotated[
        list[str] | None,
        typer.Option("--type", metavar="TYPE", help="Type that a budget plan may use. Repeat the option for several."),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(help="Score from 0 to 1, or a quantile of the scores such as q0.75. [default: 0.85]"),
    ] = None,
    keep: Annotated[str, typer.Option(help="Type of tensors that score above the threshold.")] = "Q8_0",
    base: Annotated[
        str, typer.Option(help="Type or llama-quantize mixture of the tensors below the threshold.")
    ] = "Q4_K_M",
    grouping: Annotated[
        Grouping,
        typer.Option(help="Score that the threshold applies to: the highest of a block, or each tensor's own."),
    ] = "block",
    unmeasured_type: UnmeasuredType = "Q8_0",
    imatrix: Imatrix = None,
    no_imatrix: NoImatrix = False,
) -> None:
    """Choose a type for each tensor, by budget or by threshold.

    With --budget, the plan has the lowest predicted KL divergence of that size. With --threshold, tensors that score
    above it keep more bits.
    """
    from samq.gguf.formats import check_type

    if budget and threshold:
        raise SamqError("--budget and --threshold exclude each other; drop one of them")
    if imatrix and no_imatrix:
        raise SamqError("--imatrix and --no-imatrix exclude each other; drop one of them")
    if budget and not (imatrix or no_imatrix):
        raise SamqError(
            "a budget plan needs an importance matrix; make one with `samq imatrix` and pass it as --imatrix, or pass "
            "--no-imatrix"
        )
    if out:
        check_file(out)
    unmeasured = check_type(unmeasured_type)
    if budget:
        tensor_plan = _budget_plan(sensitivity, gguf, budget, ladder, unmeasured, imatrix)
    else:
        policy = {"keep": keep, "base": base, "grouping": grouping}
        tensor_plan = _threshold_plan(sensitivity, gguf, threshold or "0.85", policy, unmeasured, imatrix)
    if tensor_plan.substitutions:
        reasons = "; ".join(sorted({swap.reason for swap in tensor_plan.substitutions.values()}))
        count = len(tensor_plan.substitutions)
        console.print(f"{count} tensors get another type than requested ({reasons})", highlight=False)
    if out:
        tensor_plan.save(out)
        console.print(str(out), highlight=False)


def _budget_plan(
    map_path: Path, gguf: Path, budget: str, types: list[str] | None, unmeasured: str, imatrix: Path | None
) -> "Plan":
    """The plan of a budget, printed."""
    prepare_prefect()
    with loading_packages():
        from samq.allocation.budget import why_doubted
        from samq.allocation.budget_notation import read_budget
        from samq.report.description import describe_plan
        from tasks.target import Target

    read_budget(budget)  # raises SamqError for a malformed budget, before the work
    target = Target(adopt({GGUF_NAME: gguf}), adopt({IMATRIX_NAME: imatrix}) if imatrix else None)
    sensitivity = adopt({MAP_NAME: map_path, FISHER_NAME: fisher_beside(map_path)})
    budget_plan, prices = stages.plan_budget(stages.workspace(), target, sensitivity, budget, types, unmeasured)
    console.print(f"{budget_plan.tensor_bytes / 1e6:.1f} MB. {describe_plan(budget_plan)}", highlight=False)
    if doubt := why_doubted(budget_plan, prices):
        console.print(f"Warning: {doubt}", highlight=False)
    return budget_plan


def _threshold_plan(
    map_path: Path, gguf: Path, threshold: str, options: dict[str, str], unmeasured: str, imatrix: Path | None
) -> "Plan":
    """The plan of a threshold, printed with other thresholds that change it; `options` are the policy's."""
    from samq.allocation.prices import scarce_experts
    from samq.allocation.target import OpenTarget
    from samq.allocation.threshold import ThresholdPolicy, threshold_plan
    from samq.llamacpp.toolchain import find_toolchain
    from samq.records import SensitivityMap
    from samq.sensitivity.fisher import load_fisher

    policy = validated(ThresholdPolicy, **options)
    sensitivity, fisher_path = SensitivityMap.load(map_path), fisher_beside(map_path)
    fisher = load_fisher(fisher_path) if fisher_path.exists() else {}
    with bar(f"plan {gguf.name}"):
        target = OpenTarget.open(gguf, find_toolchain(), imatrix)
        guarded = policy.guarded(scarce_experts(target, fisher))
        chosen = threshold_plan(target, sensitivity, _number(threshold), policy, unmeasured, guarded)
        alternatives = _other_thresholds(target, sensitivity, policy, guarded)
    kept, groups = chosen.parameters["kept_tensors"], chosen.parameters["kept_groups"]
    console.print(
        f"threshold {chosen.parameters['threshold']:.4g} keeps {kept} of {len(chosen.types)} tensors "
        f"({groups} {'blocks or single tensors' if policy.grouping == 'block' else 'tensors'}) at {policy.keep}: "
        f"{chosen.tensor_bytes / 1e6:.1f} MB, {chosen.bits_per_weight:.2f} bits per weight",
        highlight=False,
    )
    if guarded:
        console.print(
            f"{len(guarded)} tensors have experts that saw few tokens, and at least {policy.expert_guard}",
            highlight=False,
        )
    console.print(alternatives)
    return chosen


def _other_thresholds(
    target: "OpenTarget", sensitivity: "SensitivityMap", policy: "ThresholdPolicy", guarded: Mapping[str, str]
) -> Table:
    """Some thresholds at which the plan changes, with the size of each plan."""
    from samq.allocation.threshold import change_points, propose_thresholds, threshold_plan

    count = len(change_points(sensitivity, target.quantizable, policy.grouping))
    title = f"{count} thresholds change the plan, for example:"
    table = Table("threshold", "kept", "MB", "bits per weight", title=title)
    for threshold in propose_thresholds(target, sensitivity, policy, 6, guarded):
        other = threshold_plan(target, sensitivity, threshold, policy, guarded=guarded)
        size = f"{other.tensor_bytes / 1e6:.1f}"
        table.add_row(f"{threshold:g}", str(other.parameters["kept_tensors"]), size, f"{other.bits_per_weight:.2f}")
    return table


def _number(threshold: str) -> float | str:
    """A score as a number; a quantile stays text."""
    try:
        return float(threshold)
    except ValueError:
        return threshold
