"""No text ends the process, and each gives the tokens that llama.cpp gives it."""

import threading

import pytest

from samq.errors import SamqError, TextError
from samq.llamacpp.runtime import Model
from samq.llamacpp.tokenizing import LONGEST_MATCH, stack_bytes, with_stack
from tests.conftest import write_tiny_gguf
from tests.tiny_models import add_byte_tokenizer, byte_tokenizer

VOCABULARY = 264
PATTERNS = ["tekken", "gpt-4o", "deepseek-llm", "deepseek-v3", "default", "exaone-moe"]
OWN_CODE = ["gpt-2", "llama-bpe", "qwen2", "qwen35", "kimi-k2"]  # llama.cpp needs no stack for their matches
LONG = 60_000  # characters of one match that overflow a stack of 8 MiB
RUNS = {
    "upper case": "A" * LONG,
    "lower case": "the" * (LONG // 3),
    "digits": "7" * LONG,
    "punctuation": "-" * LONG,
    "spaces": " " * LONG + "a",
    "line ends": "!\n" + "/\n" * (LONG // 2),
    "Chinese": "\u4e2d" * LONG,
    "accents": "e\u0301" * (LONG // 2),
    "control characters": "!\x1c" * (LONG // 2),
}


@pytest.fixture(scope="module")
def model_with(tmp_path_factory):
    models = {}

    def make(pre):
        if pre not in models:
            path = write_tiny_gguf(
                tmp_path_factory.mktemp("pre") / f"{pre}.gguf",
                width=32,
                hidden=32,
                blocks=1,
                vocabulary=VOCABULARY,
                add_tokenizer=lambda writer: add_byte_tokenizer(writer, byte_tokenizer(), VOCABULARY, pre=pre),
            )
            models[pre] = Model(path, allocate=False)
        return models[pre]

    yield make
    for model in models.values():
        model.close()


@pytest.mark.parametrize(
    "pre",
    [
        "tekken",
        *(
            pytest.param(pre, marks=pytest.mark.slow)
            for pre in ("gpt-4o", "deepseek-llm", "deepseek-v3", "default", "exaone-moe", "llama-bpe")
        ),
    ],
)
@pytest.mark.parametrize("run", RUNS)
def test_a_long_run_of_one_class_is_tokenized(model_with, pre, run):
    model = model_with(pre)
    text = f"It says {RUNS[run]} the end."
    tokens = model.tokenize(text)
    assert b"".join(map(model.piece, tokens.tolist())).decode() == text


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "default"])
def test_a_large_stack_gives_the_same_tokens(model_with, pre, monkeypatch):
    model = model_with(pre)
    text = " than ".join(run[:5000] for run in RUNS.values())  # any thread's stack holds these runs, too
    assert stack_bytes(text, "gpt2", pre) > 0
    tokens = model.tokenize(text).tolist()
    monkeypatch.setattr("samq.llamacpp.runtime.stack_bytes", lambda *_: 0)
    assert tokens == model.tokenize(text).tolist()


def test_words_between_letters_and_spaces_are_one_match_of_some_vocabularies(model_with):
    text = "a the man" * (LONG // 3)
    assert stack_bytes(text, "gpt2", "tekken") == 0
    assert stack_bytes(text, "gpt2", "exaone-moe") > len(text) * 400
    assert len(model_with("exaone-moe").tokenize(text))


def test_only_long_runs_in_vocabularies_with_patterns_need_a_large_stack():
    ordinary, long = "An ordinary line of text.\n\n" * 100_000, "A" * LONGEST_MATCH
    assert stack_bytes("", "gpt2", "tekken") == stack_bytes(ordinary, "gpt2", "tekken") == 0
    assert stack_bytes(long, "gpt2", "tekken") == stack_bytes(long, "gpt2", "of another year") == 2**30
    assert [stack_bytes(2 * long, "gpt2", pre) for pre in OWN_CODE] == [0] * len(OWN_CODE)
    assert stack_bytes(2 * long, "llama", "default") == 0


def test_a_run_beyond_the_largest_stack_is_refused(model_with):
    message = f"a text has {LONGEST_MATCH + 1} characters without a break, .* shorten it"
    with pytest.raises(TextError, match=message):
        model_with("tekken").tokenize("A" * (LONGEST_MATCH + 1))


def test_digits_that_take_a_time_of_their_square_are_refused_beyond_a_few_thousand(model_with):
    model = model_with("superbpe")
    digits = "12" * 2048
    assert b"".join(map(model.piece, model.tokenize(f"it {digits} end").tolist())).decode() == f"it {digits} end"
    with pytest.raises(
        TextError, match=r"a text has 4097 digits in a row, and the tokenizer superbpe takes 4096 .* shorten"
    ):
        model.tokenize(f"it {digits}3 end")
    assert stack_bytes(f"it {digits}3 end", "gpt2", "tekken") > 0


def test_a_vocabulary_that_two_spaces_would_end_the_process_with_is_refused(model_with):
    with pytest.raises(
        SamqError, match=r"cannot tokenize with tokenizer\.ggml\.pre whitespace in a vocabulary of kind gpt2"
    ):
        model_with("whitespace").tokenize("two  spaces")


def test_half_a_character_is_named(model_with):
    with pytest.raises(
        TextError, match=r"character 4 of a text is half a character \('ab \\ud83d cd'\), .*; remove it"
    ):
        model_with("gpt-2").tokenize("ab \ud83d cd")


def test_a_file_without_a_tokenizer_is_refused(tmp_path):
    bare = write_tiny_gguf(tmp_path / "bare.gguf", add_tokenizer=lambda writer: writer.add_tokenizer_model("none"))
    with Model(bare, allocate=False) as model, pytest.raises(SamqError, match=r"bare.gguf has no tokenizer; convert"):
        model.tokenize("hello")


def test_large_stacks_exist_one_at_a_time_and_threads_keep_theirs():
    usual, running, most = threading.stack_size(), [], []

    def work():
        running.append(1)
        most.append(len(running))
        running.pop()
        return threading.current_thread().name

    callers = [threading.Thread(target=lambda: with_stack(work, 2**26)) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert most == [1] * 8 and threading.stack_size() == usual
    assert with_stack(work, 2**26) == "tokenizer" != with_stack(work, 0)
    with pytest.raises(ZeroDivisionError):
        with_stack(lambda: 1 // 0, 2**26)
    with pytest.raises(SamqError, match=r"there are no .* MiB of memory to tokenize a long run of text; shorten it"):
        with_stack(work, 2**62)
    assert threading.stack_size() == usual and with_stack(work, 2**26) == "tokenizer"
