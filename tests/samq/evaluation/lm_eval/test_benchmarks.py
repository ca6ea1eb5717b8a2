import json
import math
import subprocess
import sys

import pandas as pd
import pytest

from samq.errors import SamqError
from samq.evaluation.json_compliance import measure_json
from samq.evaluation.json_prompts import load_prompts
from samq.evaluation.lm_eval.benchmarks import benchmark, measure_benchmarks, run_benchmarks
from samq.evaluation.settings import BenchmarkRequest, BenchmarkSettings, EvaluationSettings
from samq.files import ITEMS_NAME
from samq.llamacpp.runtime import Model
from samq.records import Evaluation
from samq.sweep.significance import compare_items
from tests.samq.evaluation.lm import RuleLM
from tests.samq.evaluation.nonsense import nonsense_after
from tests.samq.evaluation.task_files import COLOURS, write_task
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf


def run(lm, *tasks, **settings):
    return run_benchmarks(lm, BenchmarkSettings(tasks=tasks, **settings))


def test_each_item_is_kept_with_its_value_and_its_answer(tmp_path):
    write_task(tmp_path)
    lm = RuleLM(score=lambda context, colour: -1.5 if colour == " white" else -2.0)
    results = run(lm, "colours", task_folders=(tmp_path,))
    assert results.metrics["eval/colours/acc"].value == 0.25
    assert results.metrics["eval/colours/acc"].stderr == pytest.approx(math.sqrt(0.25 * 0.75 / 3))
    assert results.metrics["eval/colours/acc"].n == 4 and not results.missing
    items = results.items
    assert items["value"].tolist() == [1.0, 0.0, 0.0, 0.0] and items["item"].tolist() == [0, 1, 2, 3]
    assert set(items["benchmark"]) == set(items["task"]) == {"colours"} and set(items["metric"]) == {"acc"}
    assert json.loads(items["answer"][0]) == [-1.5, -2.0, -2.0, -2.0]
    assert items["document"].nunique() == 4 and items["higher_is_better"].all()


def test_metrics_have_legal_names_with_the_filter_where_it_is_not_the_first():
    results = run(RuleLM(write=lambda prompt: "#### 18"), "samq_gsm8k", "samq_humaneval", limit=2, run_code=True)
    assert set(results.metrics) == {
        "eval/samq_gsm8k/exact_match",
        "eval/samq_gsm8k/exact_match_flexible-extract",
        "eval/samq_humaneval/pass_at_1",
    }
    names = results.items["benchmark"] + "/" + results.items["metric"]
    assert {f"eval/{name}" for name in names} == set(results.metrics), "items and metrics are named alike"
    assert set(results.items[results.items["task"] == "samq_gsm8k"]["answer"]) == {"#### 18"}


FILTERS = """filter_list:
  - {{name: {0}, filter: [{{function: regex, regex_pattern: "{1}"}}, {{function: take_first}}]}}
  - {{name: {2}, filter: [{{function: regex, regex_pattern: "{3}"}}, {{function: take_first}}]}}
output_type: generate_until
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_the_first_filter_has_the_plain_name_in_a_group_too(tmp_path):
    first, last = ("zeroth", "^([a-z]+)"), ("any", "([a-z]+)$")
    write_task(tmp_path, name="one", more=FILTERS.format(*first, *last))
    write_task(tmp_path, name="other", more=FILTERS.format(*first, *last))
    (tmp_path / "all.yaml").write_text(
        "group: all\ntask: [one, other]\naggregate_metric_list: [{metric: exact_match}]\n"
    )
    lm = RuleLM(write=lambda prompt: f"{'white' if 'snow' in prompt else 'red'}, or not")  # two of four items are right
    for task in ("one", "all"):
        results = run(lm, task, task_folders=(tmp_path,))
        value = {name: metric.value for name, metric in results.metrics.items()}
        assert value == {f"eval/{task}/exact_match": 0.5, f"eval/{task}/exact_match_any": 0.0}
        means = results.items.groupby("metric")["value"].mean().to_dict()
        assert means == {"exact_match": 0.5, "exact_match_any": 0.0}
        (one, other) = compare_items("a", results.items, "b", results.items)
        assert {one.metric_name, other.metric_name} == set(value)


def test_a_group_is_reported_in_place_of_its_tasks_which_its_items_stand_for(tmp_path):
    write_task(tmp_path, name="two", items=COLOURS[:2])
    write_task(tmp_path, name="four")
    lm = RuleLM(score=lambda context, colour: 0.0 if colour == " white" else -2.0)
    (tmp_path / "all.yaml").write_text("group: all\ntask: [two, four]\naggregate_metric_list:\n  - metric: acc\n")
    results = run(lm, "all", task_folders=(tmp_path,))
    assert {name: metric.value for name, metric in results.metrics.items()} == {"eval/all/acc": pytest.approx(2 / 6)}
    assert results.metrics["eval/all/acc"].n == 6
    assert set(results.items["benchmark"]) == {"all"} and set(results.items["task"]) == {"two", "four"}
    assert results.items["value"].mean() == pytest.approx(2 / 6)

    (tmp_path / "all.yaml").write_text(
        "group: all\ntask: [two, four]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: false}\n"
    )
    results = run(lm, "all", task_folders=(tmp_path,))
    assert results.metrics["eval/all/acc"].value == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert set(results.items["benchmark"]) == {"two", "four"}, "the mean over all items is not the group's figure"

    (tmp_path / "all.yaml").write_text("group: all\ntask: [two, four]\n")
    assert set(run(lm, "all", task_folders=(tmp_path,)).metrics) == {"eval/two/acc", "eval/four/acc"}


@pytest.mark.slow
def test_what_cannot_be_measured_is_named_and_the_rest_is_measured(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("task: broken\nno_such_setting: 1")

    def refuse(prompt):
        raise SamqError("the model is tired; let it rest")

    tasks = ("samq_humaneval", "hellaswag", "samq_helaswag", str(broken), "samq_gsm8k", "samq_truthfulqa_mc1")
    results = run(RuleLM(write=refuse), *tasks, limit=2)
    assert set(results.metrics) == {"eval/samq_truthfulqa_mc1/acc"}
    reasons = list(results.missing.values())
    assert len(reasons) == 5 and not any("\n" in reason for reason in reasons)
    assert "run_code" in results.missing["eval/samq_humaneval"]
    assert "connect to the network" in results.missing["eval/hellaswag"]
    assert "similar names are samq_hellaswag" in results.missing["eval/samq_helaswag"]
    assert results.missing["eval/samq_gsm8k"] == "the model is tired; let it rest"


def test_a_task_of_which_a_request_failed_has_no_figure(tmp_path):
    (tmp_path / "utils.py").write_text("def judge(document, answers):\n    return {'acc': 1 / len(answers[0])}\n")
    write_task(tmp_path, name="picky", more="process_results: !function utils.judge\noutput_type: generate_until\n")
    tasks = ("samq_hellaswag", "samq_gsm8k", "picky")
    settings = BenchmarkSettings(tasks=tasks, task_folders=(tmp_path,), limit=2, context_tokens=2048)
    with nonsense_after(None, tmp_path, max_position_embeddings=2048) as model:
        results = measure_benchmarks(model, settings)
    assert not results.metrics and results.items.empty and set(results.missing) == {f"eval/{task}" for task in tasks}
    reason = f"{tmp_path}/nonsense.gguf gives logits that are not finite; get the model again, or choose another one"
    assert results.missing["eval/samq_hellaswag"] == f"{reason} (8 requests)"
    assert results.missing["eval/samq_gsm8k"] == results.missing["eval/picky"] == f"{reason} (2 requests)"


def test_a_batch_that_fails_once_costs_its_task_and_no_other(tmp_path, decode_fails):
    path = write_llama_gguf(
        tiny_llama(vocab_size=264, max_position_embeddings=2048), tmp_path / "tiny.gguf", tokenizer=byte_tokenizer()
    )
    decode_fails(at=1)
    with Model(path) as model:
        results = measure_benchmarks(model, BenchmarkSettings(tasks=("samq_hellaswag", "samq_truthfulqa_mc1"), limit=2))
    assert set(results.metrics) == {"eval/samq_truthfulqa_mc1/acc"}
    assert set(results.missing) == {"eval/samq_hellaswag"}
    assert "llama.cpp failed on a batch" in results.missing["eval/samq_hellaswag"]


def test_an_error_in_a_tasks_own_code_does_not_take_the_others_along(tmp_path, caplog):
    (tmp_path / "utils.py").write_text("def judge(document, answers):\n    return answers['no such']\n")
    path = write_task(tmp_path, more="process_results: !function utils.judge\n")
    results = run(RuleLM(), str(path), "samq_truthfulqa_mc1", limit=2)
    assert results.missing == {
        "eval/colours": f"{path} failed in lm-eval (TypeError: list indices must be integers or slices, not str); see its "
        "log"
    }
    assert "Traceback" in caplog.text and "eval/samq_truthfulqa_mc1/acc" in results.metrics


def test_code_of_a_task_that_samq_does_not_confine_is_called_so(tmp_path):
    (tmp_path / "utils.py").write_text("def judge(document, answers):\n    return {'acc': 1.0}\n")
    write_task(tmp_path, more="process_results: !function utils.judge\nunsafe_code: true\n")
    results = run(RuleLM(), "colours", task_folders=(tmp_path,), run_code=True)
    assert "SAMQ does not run its code" in results.environment["code_isolation/colours"]
    assert "run_code" in run(RuleLM(), "colours", task_folders=(tmp_path,)).missing["eval/colours"]


def test_the_settings_shape_what_is_asked(tmp_path):
    write_task(tmp_path, more="fewshot_split: test\nfewshot_config: {sampler: first_n}\n")

    def prompts(**settings):
        lm = RuleLM()
        assert not run(lm, "colours", task_folders=(tmp_path,), **settings).missing
        return lm.prompts

    assert prompts() == ["snow is", "coal is", "grass is", "blood is"], "a task that names no examples gets none"
    assert prompts(limit=2) == ["snow is", "coal is"]
    assert prompts(few_shots=1)[:2] == ["coal is black\n\nsnow is", "snow is white\n\ncoal is"]
    assert prompts(few_shots=1, chat_template=True)[1] == "<user>snow is<assistant>white<user>coal is"


def test_the_choice_of_examples_follows_the_seed(tmp_path):
    write_task(tmp_path, more="fewshot_split: test\n")

    def prompts(seed):
        lm = RuleLM()
        run(lm, "colours", task_folders=(tmp_path,), few_shots=2, seed=seed)
        return lm.prompts

    assert prompts(None) == prompts(None) == prompts(1234) != prompts(5)


def test_tasks_that_say_no_examples_keep_to_it():
    lm = RuleLM()
    run(lm, "samq_truthfulqa_mc1", few_shots=3, limit=1)
    assert lm.prompts[0].count("Which blood type") == 1 and "More than 94%" not in lm.prompts[0]


def test_a_candidate_is_compared_with_itself_item_by_item():
    results = [run(RuleLM(), "samq_hellaswag", "samq_truthfulqa_mc1", limit=20) for _ in range(2)]
    comparisons = compare_items("a", results[0].items, "b", results[1].items)
    assert {(one.benchmark, one.metric) for one in comparisons} == {
        ("samq_hellaswag", "acc"),
        ("samq_hellaswag", "acc_norm"),
        ("samq_truthfulqa_mc1", "acc"),
    }
    assert all(one.difference == 0 and one.p == 1 for one in comparisons)


def test_what_was_asked_otherwise_is_not_compared(tmp_path):
    write_task(tmp_path, more="fewshot_split: test\nfewshot_config: {sampler: first_n}\n")

    def items(**settings):
        return run(RuleLM(), "colours", task_folders=(tmp_path,), **settings).items

    for settings in ({"few_shots": 1}, {"chat_template": True}):
        with pytest.raises(SamqError, match="not asked the same items of colours"):
            compare_items("a", items(), "b", items(**settings))
        assert compare_items("a", items(**settings), "b", items(**settings))


def test_a_failure_is_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr("samq.evaluation.lm_eval.benchmarks.GgufLM", lambda *_, **__: RuleLM(write=out_of_memory))
    request = BenchmarkRequest(
        name="q4",
        gguf=write_llama_gguf(tiny_llama(vocab_size=320), tmp_path / "tiny.gguf", tokenizer=byte_tokenizer()),
        sha256="0" * 64,
        output=tmp_path / "out",
        benchmarks=BenchmarkSettings(tasks=("samq_gsm8k",), limit=1),
    )
    with pytest.raises(SamqError, match=r"^samq_gsm8k failed in lm-eval \(MemoryError: no more\); see its log$"):
        benchmark(request, silent_report)
    assert list((tmp_path / "out").iterdir()) == []


def out_of_memory(_prompt):
    raise MemoryError("no more")


def silent_report(_what, _done, _total):
    pass


@pytest.mark.e2e
def test_a_real_model_is_measured_on_all_that_come_with_samq(smollm2_q4_k_m):
    tasks = ("samq_hellaswag", "samq_gsm8k", "samq_truthfulqa_mc1", "samq_json", "samq_humaneval")
    seen = []
    with Model(smollm2_q4_k_m) as model:
        results = measure_benchmarks(
            model,
            BenchmarkSettings(tasks=tasks, limit=2, run_code=True),
            progress=lambda done, total: seen.append((done, total)),
        )
    assert not results.missing
    assert {name.split("/")[1] for name in results.metrics} == set(tasks)
    assert all(metric.n == 2 and 0 <= metric.value <= 1 for metric in results.metrics.values())
    assert (8, 8) in seen and (2, 2) in seen, "four endings each of two items, two questions"
    answers = results.items.set_index(["task", "metric"])["answer"]
    assert all(len(json.loads(answer)) == 4 for answer in answers["samq_hellaswag", "acc"])
    assert any(answer.strip() for answer in answers["samq_gsm8k", "exact_match"])


@pytest.mark.e2e
def test_json_as_a_task_is_json_compliance(smollm2_q4_k_m):
    prompts = load_prompts()[:5]
    with Model(smollm2_q4_k_m) as model:
        _, expected = measure_json(model, prompts, EvaluationSettings())
        results = measure_benchmarks(model, BenchmarkSettings(tasks=("samq_json",), limit=5, chat_template=True))
    valid = results.items[results.items["metric"] == "valid"]
    assert valid["value"].tolist() == expected["valid"].astype(float).tolist()
    same = [ours.startswith(theirs) for ours, theirs in zip(valid["answer"], expected["output"], strict=True)]
    assert sum(same) >= 4, "compliance stops where nothing can help an answer any more; rounding may change one"


@pytest.mark.e2e
def test_a_child_writes_the_figures_and_the_items(tmp_path, smollm2_q4_k_m):
    request = BenchmarkRequest(
        name="q4",
        gguf=smollm2_q4_k_m,
        sha256="0" * 64,
        output=tmp_path / "out",
        benchmarks=BenchmarkSettings(tasks=("samq_truthfulqa_mc1", "samq_humaneval"), limit=2),
    )
    command = [sys.executable, "-m", "samq.evaluation", request.save(tmp_path / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "progress: benchmarks" in done.stdout
    evaluation = Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert (
        set(evaluation.metrics) == {"eval/samq_truthfulqa_mc1/acc"}
        and "run_code" in evaluation.missing["eval/samq_humaneval"]
    )
    items = pd.read_parquet(tmp_path / "out" / ITEMS_NAME)
    assert items["value"].mean() == evaluation.metrics["eval/samq_truthfulqa_mc1/acc"].value and len(items) == 2
