import os
import shutil

import pytest

from samq.serving.loading import load
from samq.serving.settings import ServingSettings
from samq.serving.shadow import RecentPrompts, token_agreement
from samq.serving.source import FileSource
from tests.samq.serving.conftest import running
from tests.samq.serving.test_reload import put, serves

PROMPTS = [lambda model, text=text: model.tokenize(text) for text in ("hello", "once upon a time", "def f(x):")]


@pytest.fixture(scope="module")
def models(chat_gguf, other_gguf):
    settings = ServingSettings(context_tokens=512)
    loaded = [load(FileSource(path)(), settings) for path in (chat_gguf, chat_gguf, other_gguf)]
    yield loaded
    for model in loaded:
        model.close()


def test_a_model_agrees_with_itself_and_not_with_another(models):
    one, same, other = models
    assert token_agreement(one, same, PROMPTS, 16) == 1
    assert token_agreement(one, other, PROMPTS, 16) < 0.5


def test_prompts_that_do_not_fit_are_left_out(models):
    one, same, _ = models
    too_long = [lambda model: model.tokenize("x" * 600)]
    assert token_agreement(one, same, too_long, 16) is None
    assert token_agreement(one, same, too_long + PROMPTS, 16) == 1


def test_only_the_newest_prompts_are_kept_and_none_by_default():
    recent = RecentPrompts(2)
    for prompt in PROMPTS:
        recent.add(prompt)
    assert recent.newest() == PROMPTS[1:]
    none = RecentPrompts(ServingSettings().shadow.prompts)
    none.add(PROMPTS[0])
    assert none.newest() == []


def test_a_new_model_that_agrees_too_little_does_not_take_over(tmp_path, chat_gguf, other_gguf):
    file = tmp_path / "tiny.gguf"
    put(chat_gguf, file)
    with running(FileSource(file), shadow={"prompts": 4, "least_agreement": 0.9}) as server:
        put(other_gguf, file)  # no prompts yet, so nothing to compare
        server.wait(serves(server, other_gguf))
        server.complete(prompt="hello"), server.chat()
        put(chat_gguf, file)
        server.wait(lambda: server.metric("samq_model_reload_failed") == 1)
        server.wait(lambda: server.ready()["problem"])
        assert "of the tokens of 2 recent prompts, less than least_agreement (0.9)" in server.ready()["problem"]
        assert serves(server, other_gguf)()
        assert 0 <= server.metric("samq_shadow_agreement_ratio") < 0.9


def test_without_a_least_agreement_it_is_only_recorded(tmp_path, chat_gguf, other_gguf):
    file = tmp_path / "tiny.gguf"
    put(chat_gguf, file)
    with running(FileSource(file), shadow={"prompts": 4}) as server:
        server.complete(prompt="hello")
        os.replace(shutil.copy(other_gguf, tmp_path / "new"), file)
        server.wait(serves(server, other_gguf))
        assert server.metric("samq_shadow_agreement_ratio") < 0.9
