import dataclasses
import io
import math

import pytest
from rich.console import Console

from samq.records import Metric
from samq.report import (
    COLUMNS,
    describe_plan,
    markdown_report,
    results_table,
    substitution_counts,
    terminal_table,
    type_counts,
    verdict,
)
from samq.selection import KLD, SelectionRule, choose

RULE = SelectionRule(max_size_ratio=1.6)


def report(sweep, best):
    return markdown_report(
        sweep.source, sweep.calibration, sweep.heldout, sweep.toolchain, sweep.results, sweep.failures, best, RULE
    )


def without(result, metric):
    """A copy of a result in which a metric was not measured."""
    metrics = {name: value for name, value in result.evaluation.metrics.items() if name != metric}
    return dataclasses.replace(result, evaluation=result.evaluation.model_copy(update={"metrics": metrics}))


def test_the_table_has_every_candidate_by_size_with_units_and_errors(sweep):
    table = results_table(sweep.results, sweep.failures).set_index("candidate")
    assert list(table.index) == ["F16", "threshold-0.2", "threshold-0.4", "Q4_K_M", "threshold-0.9"]
    row, result = table.loc["threshold-0.2"], sweep.result("threshold-0.2")
    assert row["size (MB)"] == result.bytes / 1e6
    assert row["mean KLD (nats)"] == result.kld.value
    assert row["± mean KLD (nats)"] == result.kld.stderr
    assert row["threshold"] == 0.2
    assert table["kept tensors"].iloc[:4].is_monotonic_decreasing
    assert "± p99 latency (ms)" not in table, "no candidate has a standard error there"
    assert table.loc["threshold-0.9", "status"] == "failed in quantize: llama-quantize ended with code 1 | see log"


def test_what_was_not_measured_is_nan_in_the_table_and_a_dash_for_people(sweep):
    results = [without(sweep.results[0], "json/valid_percent"), *sweep.results[1:]]
    table = results_table(results, []).set_index("candidate")
    assert math.isnan(table.loc["F16", "JSON valid (%)"])
    json_column = next(column for column in COLUMNS if column.metric == "json/valid_percent")
    assert json_column.show(results[0].evaluation) == "–"
    assert json_column.show(results[1].evaluation, spread=True).count(".") == 3, "value and interval"


def test_markdown_says_what_is_best_and_why_and_what_fell_out(sweep):
    best = choose(sweep.results, RULE)
    text = report(sweep, best)
    assert text.startswith("# SmolLM2-135M-Instruct: 4 candidates measured, 1 failed\n\n" + best.name)
    assert "Against Q4_K_M: -" in text
    assert f"| ★ | {best.name} |" in text
    assert "- **threshold-0.9** in quantize: llama-quantize ended with code 1 | see log" in text
    assert "- memory/measured_vram_bytes (4 of 4): no NVIDIA GPU" in text
    assert "llama-cpp-python 0.3.36, build 0123456789ab" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all(row.endswith("|") for row in rows)


def test_markdown_explains_who_could_not_be_the_best(sweep):
    text = markdown_report(
        sweep.source, sweep.calibration, sweep.heldout, sweep.toolchain, sweep.results, [], None, SelectionRule()
    )
    large = sweep.result("threshold-0.2").bytes / sweep.result("Q4_K_M").bytes
    assert f"| threshold-0.2 | {large:.3f} times the size of Q4_K_M, over 1.1 |" in text
    assert "## Failed" not in text


def test_a_cell_cannot_break_the_markdown_table(sweep):
    named = dataclasses.replace(sweep.results[1], plan=sweep.results[1].plan.model_copy(update={"name": "a|b\nc"}))
    text = markdown_report(
        sweep.source, sweep.calibration, sweep.heldout, sweep.toolchain, [sweep.results[0], named], [], None, RULE
    )
    assert "| a\\|b c |" in text


def test_nothing_chosen_is_said(sweep):
    text = verdict(sweep.results, None, SelectionRule(max_bytes=1))
    assert text.startswith("Nothing was chosen: there are no quantized candidates no larger than")


def test_the_reference_is_not_compared_with_itself(sweep):
    assert "Against" not in verdict(sweep.results, sweep.result("Q4_K_M"), RULE)


@pytest.mark.parametrize("best", ["threshold-0.2", None])
def test_the_terminal_table_fits_120_columns_and_marks_the_best(sweep, best):
    output = io.StringIO()
    console = Console(file=output, width=120)
    console.print(terminal_table(sweep.results, sweep.failures, sweep.result(best) if best else None))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in output.getvalue()
    marks = {name: line.split()[0] for line in lines for name in ("threshold-0.2", "threshold-0.9") if name in line}
    assert marks == {"threshold-0.2": "★" if best else "◆", "threshold-0.9": "✗"}
    kld = sweep.result("threshold-0.2").kld
    assert f"{kld.value:.5f} ± {kld.stderr:.5f}" in output.getvalue()


def test_bold_is_the_best_figure_and_nothing_where_all_are_alike(sweep):
    even = Metric(value=0.0, stderr=0.0, n=40)
    results = []
    for result in sweep.results:
        metrics = {**result.evaluation.metrics, "speed/time_to_first_token_ms": even}
        results.append(
            dataclasses.replace(result, evaluation=result.evaluation.model_copy(update={"metrics": metrics}))
        )
    made_from = (sweep.source, sweep.calibration, sweep.heldout, sweep.toolchain)
    text = markdown_report(*made_from, results, [], None, RULE)
    lowest = sweep.result("threshold-0.2").kld
    assert f"| **{lowest.value:.5f} ± {lowest.stderr:.5f}** |" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "± " in line]
    heads = ["", "candidate", "size", "bits", *(column.metric for column in COLUMNS)]
    assert {row[heads.index("speed/time_to_first_token_ms")] for row in rows if len(row) == len(heads)} == {"0 ± 0"}


def test_a_wilson_interval_is_shown_rather_than_a_standard_error(sweep):
    column = next(column for column in COLUMNS if column.metric == "json/valid_percent")
    metrics = {name: Metric(value=value) for name, value in zip(column.interval, (0.0, 8.8), strict=True)}
    metrics["json/valid_percent"] = Metric(value=0.0, stderr=0.0, n=40)
    evaluation = sweep.results[0].evaluation.model_copy(update={"metrics": metrics})
    assert column.show(evaluation, spread=True) == "0.0 (0.0 to 8.8)"


def test_every_column_shows_a_metric_once():
    assert len({column.metric for column in COLUMNS}) == len({column.heading for column in COLUMNS}) == len(COLUMNS)
    assert COLUMNS[0].metric == KLD


def test_plans_are_described_by_what_they_keep(sweep):
    kept = sweep.result("threshold-0.2").plan
    assert describe_plan(kept) == (
        f"Score above 0.2: {kept.parameters['kept_tensors']} of 29 tensors in 3 groups keep Q8_0; the rest is Q4_K_M."
    )
    stock = sweep.result("Q4_K_M").plan
    assert type_counts(stock) == "29 Q5_0"
    assert substitution_counts(stock) == "29 Q4_K → Q5_0"
    assert substitution_counts(sweep.result("F16").plan) == "none"
