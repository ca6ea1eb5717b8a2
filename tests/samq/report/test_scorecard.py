import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError

from samq.evaluation.metrics import VRAM
from samq.files import ITEMS_NAME
from samq.records import Metric
from samq.report.scorecard import benchmark_section, scorecard_section, why_missing
from samq.sweep.benchmarking import compare_benchmarks, join_items
from samq.sweep.selection import SelectionRule
from samq.sweep.serving_cost import CostSettings, cost_metrics, cost_section
from tests.samq.sweeps import items_of, with_results

COST = CostSettings(price_per_gpu_hour=2.5, gpu_memory_bytes=70_000_000)
ACCURACY = {"F16": 0.5, "Q4_K_M": 0.4, "budget-size-of-Q4_K_M": 0.49}
ARTICLE = "## Full precision, uniform and mixed"
BEST = "budget-size-of-Q4_K_M"


def with_evaluation(result, *, metrics=None, without=(), missing=None):
    """The result with other metrics, and reasons for those that it lacks."""
    kept = {name: metric for name, metric in result.evaluation.metrics.items() if name not in without}
    update = {"metrics": kept | (metrics or {}), "missing": result.evaluation.missing | (missing or {})}
    return type(result)(**{**vars(result), "evaluation": result.evaluation.model_copy(update=update)})


@pytest.fixture
def benchmarked(sweep):
    """A sweep of which three candidates were asked GSM8K, with their items; there was no network for MMLU."""
    results = []
    for result in sweep.results:
        if (accuracy := ACCURACY.get(result.name)) is not None:
            items_of(accuracy).to_parquet(result.folder / ITEMS_NAME)
            gsm8k = {"eval/samq_gsm8k/exact_match": Metric(value=accuracy, stderr=0.035, n=200)}
            result = with_evaluation(result, metrics=gsm8k, missing={"eval/mmlu": "the hub cannot be reached"})
            result = replace(result, benchmark_folders=(result.folder,))
        results.append(result)
    benchmarked = replace(sweep, results=tuple(results), rule=SelectionRule(max_size_ratio=1.05))
    assert benchmarked.best is benchmarked.result(BEST)
    return benchmarked


def compared(sweep, production=None):
    """The sweep with its candidates compared on benchmarks."""
    return replace(sweep, benchmarks=tuple(compare_benchmarks(sweep.results, 0.01, production)))


def table_of(section, heading):
    """The lines of the table under a heading, as cells."""
    table = section[section.index(heading) + 1]
    return {
        cells[0]: cells[1:]
        for cells in ([c.strip() for c in line.strip("| ").split(" | ")] for line in table.split("\n"))
    }


def test_the_articles_table_has_full_precision_uniform_and_mixed(benchmarked):
    section = scorecard_section(compared(benchmarked))
    lines = section[1].split("\n")
    assert lines[0] == f"|  | F16 | Q4_K_M | {BEST} ★ |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == [
        "VRAM (MB)",
        "p99 latency (ms)",
        "throughput (tok/s)",
        "mmlu: acc (%)",
        "samq_gsm8k: exact_match (%), 200 items",
        "JSON valid (%)",
    ]
    rows = table_of(section, ARTICLE)
    full, mixed = (benchmarked.result(name).evaluation.metrics[VRAM].value for name in ("F16", BEST))
    assert rows["VRAM (MB)"][0] == f"{full / 1e6:.1f}"
    assert rows["VRAM (MB)"][2] == f"{mixed / 1e6:.1f} ({100 * (mixed / full - 1):+.1f} %)"
    gsm8k = rows["samq_gsm8k: exact_match (%), 200 items"]
    assert gsm8k[0] == "50.0 ± 3.5" and gsm8k[1].startswith("40.0 ± 3.5 (-10.0 ± 2.1, inferior")
    assert gsm8k[2].startswith("49.0 ± 3.5 (-1.0 ± 0.7, undecided")


def test_json_has_its_paired_error_and_its_verdict(benchmarked):
    for name, valid in (("F16", 40), ("Q4_K_M", 10), (BEST, 38)):
        answers = pd.DataFrame({"id": list(map(str, range(40))), "valid": np.arange(40) < valid})
        answers.to_parquet(benchmarked.result(name).folder / "json.parquet")
    production = join_items(pd.DataFrame({"id": answers["id"], "valid": True}), None)
    benchmarked = compared(benchmarked, production)
    rows = table_of(scorecard_section(benchmarked), ARTICLE)
    # the change is that of the percentages measured; its error is of the answers, in points too
    assert rows["JSON valid (%)"][1].endswith(" ± 6.9, inferior)") and "± 3.5, undecided)" in rows["JSON valid (%)"][2]
    rows = table_of(benchmark_section(benchmarked), "### Against what is in production")
    assert sorted(rows["JSON valid (%)"]) == ["-5.0 ± 3.5, undecided", "-75.0 ± 6.9, inferior"]


def test_a_figure_that_is_not_there_says_why(benchmarked):
    full = with_evaluation(
        benchmarked.result("F16"),
        without=("speed/latency_p99_ms", VRAM),
        missing={"speed": "no timed requests", "memory": "odd"},
    )
    section = scorecard_section(with_results(benchmarked, [full, *benchmarked.results[1:]]))
    rows = table_of(section, ARTICLE)
    assert rows["mmlu: acc (%)"] == ["–", "–", "–"] and rows["VRAM (MB)"][0] == "–"
    assert "(" not in rows["VRAM (MB)"][1], "there is nothing to compare with"
    gaps = section[3].split("\n")
    assert "- mmlu: acc (%) of all: the hub cannot be reached" in gaps
    assert "- p99 latency (ms) of F16: no timed requests" in gaps and "- VRAM (MB) of F16: odd" in gaps


def test_reasons_are_looked_up_from_the_metric_to_what_it_belongs_to(benchmarked):
    evaluation = benchmarked.result("F16").evaluation.model_copy(
        update={"missing": {"eval/mmlu": "no network", "speed": "no requests", "speed/latency_p99_ms": "too few"}}
    )
    assert why_missing(evaluation, "eval/mmlu/acc") == "no network"
    assert why_missing(evaluation, "speed/latency_p99_ms") == "too few"
    assert why_missing(evaluation, "speed/x") == "no requests"
    assert why_missing(evaluation, "eval/ifeval/acc") == "not asked"
    assert why_missing(evaluation, "json/valid_percent") == "not measured"


def test_without_a_choice_or_a_mixture_the_columns_that_are_there_are_shown(benchmarked):
    without = scorecard_section(replace(benchmarked, rule=SelectionRule(max_bytes=1)))
    assert without[1].startswith("|  | F16 | Q4_K_M |\n")
    assert "There is no mixed column: no candidate could be the best." in without
    uncompared = replace(benchmarked, comparisons=())  # so no plan of SAMQ's can be the best
    for name, ratio in (("Q4_K_M", 1.05), ("Q5_K_M", 1.2)):
        uniform = scorecard_section(replace(uncompared, rule=SelectionRule(max_size_ratio=ratio)))
        assert f"There is no mixed column: the best is {name}, llama-quantize's own mixture." in uniform
    assert not any("no mixed column" in part for part in scorecard_section(benchmarked))
    alone = replace(benchmarked, rule=SelectionRule(reference=None, max_bytes=benchmarked.result(BEST).bytes))
    assert scorecard_section(alone)[1].startswith(f"|  | F16 | {BEST} ★ |\n")
    assert scorecard_section(uncompared)[1].startswith("|  | F16 | Q4_K_M ★ |\n")
    assert scorecard_section(with_results(benchmarked, benchmarked.results[1:])) == []


def test_the_cost_sheet_pays_for_whole_gpus_all_month(benchmarked):
    section = scorecard_section(benchmarked, COST)
    rows = table_of(section, "## Cost")
    vram = [benchmarked.result(name).evaluation.metrics[VRAM].value for name in ("F16", "Q4_K_M", BEST)]
    gpus = [math.ceil(value / 63e6) for value in vram]
    assert rows["GPUs needed"] == [str(count) for count in gpus] and gpus[0] > gpus[2]
    assert rows["$ per month"][0] == f"{gpus[0] * 2.5 * 730:,.2f}"
    assert rows["$ per month"][2] == f"{gpus[2] * 2.5 * 730:,.2f} ({100 * (gpus[2] / gpus[0] - 1):+.1f} %)"
    assert "2.5 $ an hour" in section[-1] and "90 %" in section[-1]
    assert cost_metrics(benchmarked.result(BEST).evaluation, COST) == {
        "cost/gpus_needed": Metric(value=gpus[2]),
        "cost/month_usd": Metric(value=gpus[2] * 2.5 * 730),
    }


def test_where_vram_is_not_known_there_is_no_cost(benchmarked):
    full = with_evaluation(benchmarked.result("F16"), without=(VRAM,))
    assert cost_metrics(full.evaluation, COST) == {}
    rows = table_of(cost_section([full, benchmarked.result(BEST)], COST), "## Cost")
    assert rows["GPUs needed"][0] == rows["$ per month"][0] == "–" and "(" not in rows["$ per month"][1]


def test_a_gpu_that_is_filled_exactly_is_enough():
    cost = CostSettings(price_per_gpu_hour=1, gpu_memory_bytes=100, usable_share=0.5)
    assert [cost.gpus_needed(value) for value in (1, 50, 51, 100, 101)] == [1, 1, 2, 2, 3]
    with pytest.raises(ValidationError):
        CostSettings(price_per_gpu_hour=0, gpu_memory_bytes=100)


def test_all_benchmarks_are_shown_for_who_was_asked(benchmarked):
    section = benchmark_section(compared(benchmarked))
    lines = section[1].split("\n")
    assert lines[0].strip("| ").split(" | ") == sorted(ACCURACY, key=lambda name: -benchmarked.result(name).bytes)
    assert len(lines) == 3 and "non-inferior" in section[2].lower()
    assert "items would be needed" in section[3]
    assert benchmark_section(with_results(benchmarked, [benchmarked.result("Q5_K_M")])) == []
