import os
import shutil

from samq.serving.settings import ServingSettings
from samq.serving.source import FileSource
from samq.serving.warmup import RecentPrompts
from tests.samq.serving.conftest import put, running, serves


def test_only_the_newest_prompts_are_kept_and_none_by_default():
    recent, none = RecentPrompts(2), RecentPrompts(ServingSettings().shadow.prompts)
    for text in "abc":
        for prompts in (recent, none):
            prompts.add("/v1/completions", {"prompt": text, "max_tokens": 3})
            prompts.add("/tokenize", {"content": text})
    assert recent.newest() == [("/v1/completions", {"prompt": text}) for text in "bc"]
    assert none.newest() == []


def test_a_new_model_that_agrees_too_little_does_not_take_over(tmp_path, chat_gguf, other_gguf):
    file = tmp_path / "tiny.gguf"
    put(chat_gguf, file)
    with running(FileSource(file), shadow={"prompts": 4, "least_agreement": 0.9}) as server:
        put(other_gguf, file)  # no prompts yet, so nothing to compare
        server.wait(serves(server, other_gguf))
        server.complete(prompt="hello"), server.chat(), server.complete(prompt="x" * 4000)
        put(chat_gguf, file)
        server.wait(lambda: server.metric("samq_model_reload_failed") == 1)
        server.wait(lambda: server.ready()["problem"])
        assert "of the tokens of 3 recent prompts, less than least_agreement (0.9)" in server.ready()["problem"]
        assert serves(server, other_gguf)()
        assert 0 <= server.metric("samq_shadow_agreement_ratio") < 0.9


def test_a_model_agrees_with_itself_under_another_name(tmp_path, chat_gguf):
    file = tmp_path / "tiny.gguf"
    put(chat_gguf, file)
    sources = iter([FileSource(file)()])
    other = FileSource(shutil.copy(chat_gguf, tmp_path / "other.gguf"))
    with running(lambda: next(sources, None) or other(), shadow={"prompts": 4}, poll_interval_s=2) as server:
        server.complete(prompt="hello"), server.chat()
        server.wait(lambda: server.ready()["model"]["name"] == "other")
        assert server.metric("samq_shadow_agreement_ratio") == 1


def test_without_a_least_agreement_it_is_only_recorded(tmp_path, chat_gguf, other_gguf):
    file = tmp_path / "tiny.gguf"
    put(chat_gguf, file)
    with running(FileSource(file), shadow={"prompts": 4}) as server:
        server.complete(prompt="hello")
        os.replace(shutil.copy(other_gguf, tmp_path / "new"), file)
        server.wait(serves(server, other_gguf))
        assert server.metric("samq_shadow_agreement_ratio") < 0.9
