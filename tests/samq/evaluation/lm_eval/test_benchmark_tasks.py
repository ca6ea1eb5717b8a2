import random

import nltk
import numpy as np
import pytest

from samq.errors import SamqError
from samq.evaluation.lm_eval.benchmark_tasks import TaskLibrary, UnavailableError, check_benchmarks, seeded
from samq.evaluation.settings import BenchmarkSettings
from tests.samq.evaluation.task_files import write_task

NO_CODE, CODE = BenchmarkSettings(), BenchmarkSettings(run_code=True)


def open_task(name, *, folders=(), settings=NO_CODE):
    return TaskLibrary(folders).open(str(name), settings)


def test_a_task_of_the_users_is_found_by_its_folder_and_by_its_file(tmp_path):
    path = write_task(tmp_path)
    assert list(open_task("colours", folders=[tmp_path]).tasks) == ["colours"]
    assert open_task(path).name == "colours"


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known_but_need_the_hub(tmp_path, monkeypatch):
    (tmp_path / "tokenizers/punkt_tab").mkdir(parents=True)  # which ifeval would fetch as it is imported
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    for name in ("hellaswag", "mmlu", "humaneval", "gsm8k", "ifeval"):
        with pytest.raises(UnavailableError, match=rf"^cannot load the data of {name} \(.*connect to the network"):
            open_task(name, settings=CODE)


def test_what_is_samqs_or_the_users_is_known_without_lm_evals_own_tasks(tmp_path):
    (tmp_path / "colours.yaml").write_text("task: colours\ndataset_path: json\n")
    library = TaskLibrary([tmp_path])
    assert library.are_near(["samq_hellaswag", "colours"])
    assert not library.are_near(["samq_hellaswag", "mmlu"])


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest():
    with pytest.raises(SamqError, match=r"^the task 'samq_helaswag' does not exist; similar names are samq_hellaswag"):
        open_task("samq_helaswag")
    with pytest.raises(SamqError, match=r"`samq lm-eval ls tasks` lists"):
        open_task("3141592653589793")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [unclosed", r"colours.yaml is not a valid task file \(.*\); correct it"),
        ("- a\n- list", "is not a valid task file"),
        ("include: nowhere.yaml", "is not a valid task file"),
        ("dataset_path: json", r"colours.yaml does not name its task; add a line `task: NAME`"),
        (
            "task: colours\noutput_type: dance",
            r"lm-eval cannot open the task .*colours.yaml \(ValueError: Got invalid output",
        ),
        ("task: colours\nno_such_setting: 1", r"lm-eval cannot open the task .* \(TypeError"),
        ("task: colours\nprocess_docs: !function nowhere.function", r"needs the Python package nowhere; install it"),
        (
            "task: colours\ndataset_path: json\ndataset_kwargs: {data_files: {test: /no/such.jsonl}}",
            "cannot load the data of .*",
        ),
    ],
)
def test_a_malformed_task_file_is_one_sentence(tmp_path, text, message):
    path = tmp_path / "colours.yaml"
    path.write_text(text)
    with pytest.raises(SamqError, match=message) as caught:
        open_task(path)
    assert "\n" not in str(caught.value)


def test_a_malformed_file_in_a_folder_and_a_missing_folder_are_said_at_once(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: [unclosed")
    with pytest.raises(SamqError, match=r"broken.yaml is not a valid task file"):
        TaskLibrary([tmp_path])
    with pytest.raises(SamqError, match=r"^the folder of tasks .*nowhere does not exist; check task_folders$"):
        TaskLibrary([tmp_path / "nowhere"])
    with pytest.raises(SamqError, match=r"^the task file .*nowhere.yaml does not exist; check the path$"):
        open_task(tmp_path / "nowhere.yaml")


def test_code_is_run_only_where_the_settings_allow_it():
    with pytest.raises(SamqError, match=r"^samq_humaneval runs code that the model writes; allow it with run_code"):
        open_task("samq_humaneval")
    assert open_task("samq_humaneval", settings=CODE).runs_code


@pytest.mark.slow  # lm-eval reads all of its tasks
def test_a_task_that_runs_code_as_it_is_imported_is_refused_before_that(tmp_path):
    (tmp_path / "utils.py").write_text(
        "import os\n\nif os.environ.get('HF_ALLOW_CODE_EVAL') != '1':\n    raise ValueError('as code_eval does')\n\n\n"
        "def process_docs(docs):\n    return docs\n"
    )
    path = write_task(tmp_path, name="coded", more="process_docs: !function utils.process_docs\nunsafe_code: true\n")
    (tmp_path / "again.yaml").write_text("include: coded.yaml\ntask: again\n")
    (tmp_path / "inner.yaml").write_text("group: inner\ntask: [again]\n")
    (tmp_path / "outer.yaml").write_text("group: outer\ntask: [inner]\n")
    (tmp_path / "changed.yaml").write_text("group: changed\ntask: [{task: coded, num_fewshot: 0}]\n")
    names = ("coded", str(path), "again", "inner", "outer", "changed")
    for name in names:  # all of them before it is imported
        with pytest.raises(SamqError) as caught:
            open_task(name, folders=[tmp_path])
        assert (
            str(caught.value)
            == f"{name} runs code that the model writes; allow it with run_code, or leave the task out"
        )
    with pytest.raises(SamqError, match=r"^humaneval runs code that the model writes; allow it"):
        open_task("humaneval")  # lm-eval's own
    assert all(open_task(name, folders=[tmp_path], settings=CODE).runs_code for name in names)


def test_a_digest_is_of_configuration_and_items_and_not_of_the_place(tmp_path):
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder in folders:
        folder.mkdir()
    digests = [
        open_task(write_task(folders[0])).digest(),
        open_task(write_task(folders[1])).digest(),
        open_task(write_task(folders[2], prompt="Which colour has {{thing}}?")).digest(),
        open_task(write_task(folders[3], items=[("snow", "white"), ("coal", "brown")])).digest(),
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    assert open_task("samq_gsm8k").digest() == open_task("samq_gsm8k").digest() != open_task("samq_json").digest()


def test_a_digest_is_of_what_a_function_of_the_task_calls_too(tmp_path):
    path = write_task(tmp_path, more="process_docs: !function utils.process_docs\n")
    code = "def helper(docs):\n    return docs{}\n\n\ndef process_docs(docs):\n    return helper(docs)\n"
    digests = []
    for change in ("", ".select(range(2, 4))", ".select([3, 2])"):
        (tmp_path / "utils.py").write_text(code.format(change))
        digests.append(open_task(path).digest())
    (tmp_path / "utils.py").write_text(code.format("") + "\n\ndef unused():\n    return 1\n")
    assert len({*digests, open_task(path).digest()}) == 4


def test_a_check_tells_what_can_be_run_and_why_the_rest_cannot():
    digests, missing = check_benchmarks(BenchmarkSettings(tasks=("samq_json", "hellaswag")))
    assert list(digests) == ["samq_json"] and "connect to the network" in missing["hellaswag"]
    with pytest.raises(SamqError, match="the task 'samq_jsn' does not exist"):
        check_benchmarks(BenchmarkSettings(tasks=("samq_json", "samq_jsn")))


def test_seeds_are_put_back():
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()
    with seeded(None):
        first = random.random(), np.random.random()
    with seeded(None):
        assert (random.random(), np.random.random()) == first
    with seeded(7):
        assert (random.random(), np.random.random()) != first
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


LOADER = """
import datasets
from pathlib import Path

def load(**_):
    calls = Path(__file__).with_name("calls")
    calls.write_text(calls.read_text() + "x" if calls.exists() else "x")
    if len(calls.read_text()) <= {lost}:
        raise ConnectionResetError("reset by peer")
    return {{"test": datasets.Dataset.from_list([{{"question": "red?", "answer": "yes"}}])}}
"""
FLAKY = """
task: flaky
custom_dataset: !function loader.load
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.mark.parametrize(("lost", "calls"), [(1, 2), (2, 3), (9, 3)])
def test_a_task_whose_connection_drops_is_opened_again_and_missing_only_if_that_goes_on(
    tmp_path, monkeypatch, caplog, lost, calls
):
    monkeypatch.setattr("samq.data.hub.is_offline_mode", lambda: False)
    (tmp_path / "flaky.yaml").write_text(FLAKY)
    (tmp_path / "loader.py").write_text(LOADER.format(lost=lost))
    settings = BenchmarkSettings(tasks=("flaky",), task_folders=(tmp_path,))
    digests, missing = check_benchmarks(settings, retry_delays_s=(0.0, 0.0))
    assert len((tmp_path / "calls").read_text()) == calls
    assert list(digests) == (["flaky"] if lost < 3 else [])
    assert list(missing) == ([] if lost < 3 else ["flaky"])
    assert "trying again in 0 s" in caplog.text
