"""Every message of a chat reaches the model, whatever its chat template makes of it."""

import pytest

from samq.errors import SamqError
from samq.evaluation.json_prompts import chat_tokens, load_prompts
from samq.llamacpp.chat import ChatError, render_chat, tokenize_chat
from samq.llamacpp.runtime import Model
from tests.conftest import write_tiny_gguf
from tests.tiny_models import add_byte_tokenizer, byte_tokenizer

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
ANSWER = "{% if add_generation_prompt %}<assistant>{% endif %}"
PLAIN = TURNS + ANSWER
REFUSES = "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system role') }}{% endfor %}" + PLAIN
DROPS = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endfor %}" + ANSWER
HEADS = (  # shows that there is a system message, and not what it says
    "{% if messages[0].role == 'system' %}<system>\n{% endif %}" + DROPS
)
FIRST = (  # knows a system message only at the beginning
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('not first') }}{% endif %}"
    "{% endfor %}" + PLAIN
)
DEFAULT = (  # has one of its own
    "{% if messages[0].role != 'system' %}<system>Be kind.\n{% endif %}" + PLAIN
)
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "hello"}
OTHER = {"role": "user", "content": "more"}
ASSISTANT = {"role": "assistant", "content": "hi"}
VOCABULARY = 264


@pytest.fixture
def open_model(tmp_path):
    """Opens a model with a chat template; the test ends its life."""
    models = []

    def make(template, **tokens):
        path = tmp_path / f"{len(models)}.gguf"
        tokenizer = byte_tokenizer("<bos>", template)
        write_tiny_gguf(
            path,
            width=32,
            hidden=32,
            blocks=1,
            vocabulary=VOCABULARY,
            add_tokenizer=lambda writer: add_byte_tokenizer(writer, tokenizer, VOCABULARY, **tokens),
        )
        models.append(Model(path, allocate=False))
        return models[-1]

    yield make
    for model in models:
        model.close()


@pytest.mark.parametrize("template", [PLAIN, DEFAULT, FIRST])
def test_a_template_that_takes_a_system_message_gets_it(open_model, template):
    assert render_chat(open_model(template), [SYSTEM, USER]) == "<system>Be brief.\n<user>hello\n<assistant>"


@pytest.mark.parametrize("template", [REFUSES, DROPS])
def test_a_system_message_that_a_template_refuses_or_drops_is_in_the_next_user_message(open_model, template):
    model = open_model(template)
    assert render_chat(model, [USER, ASSISTANT, OTHER]) == "<user>hello\n<assistant>hi\n<user>more\n<assistant>"
    assert render_chat(model, [SYSTEM, USER]) == "<user>Be brief.\nhello\n<assistant>"
    assert render_chat(model, [SYSTEM, SYSTEM, USER]) == "<user>Be brief.\nBe brief.\nhello\n<assistant>"
    assert render_chat(model, [SYSTEM]) == "<user>Be brief.\n<assistant>"
    assert render_chat(model, [SYSTEM, ASSISTANT, USER]) == "<user>Be brief.\n<assistant>hi\n<user>hello\n<assistant>"
    assert render_chat(model, [USER, ASSISTANT, SYSTEM, OTHER]).endswith("hi\n<user>Be brief.\nmore\n<assistant>")
    prefilled = [SYSTEM, USER, {"role": "assistant", "content": "It is "}]
    assert render_chat(model, prefilled, continue_last=True) == "<user>Be brief.\nhello\n<assistant>It is "


def test_a_system_message_of_which_only_the_heading_shows_counts_as_dropped(open_model):
    assert render_chat(open_model(HEADS), [SYSTEM, USER]) == "<user>Be brief.\nhello\n<assistant>"


def test_only_the_system_messages_that_a_template_refuses_move(open_model):
    later = {"role": "system", "content": "Be loud."}
    text = render_chat(open_model(FIRST), [SYSTEM, USER, ASSISTANT, later, OTHER])
    assert text == "<system>Be brief.\n<user>hello\n<assistant>hi\n<user>Be loud.\nmore\n<assistant>"


def test_a_chat_is_refused_if_another_message_would_be_lost(open_model):
    only_last = open_model("<user>{{ messages[-1].content }}\n" + ANSWER)
    assert render_chat(only_last, [USER]) == "<user>hello\n<assistant>"
    assert render_chat(only_last, [SYSTEM, USER]) == "<user>Be brief.\nhello\n<assistant>"
    with pytest.raises(ChatError, match=r"0.gguf drops message 1, of the role user; leave out") as refusal:
        render_chat(only_last, [USER, ASSISTANT, OTHER])
    assert refusal.value.reason == "drops message 1, of the role user"
    empty = {"role": "assistant", "content": ""}  # nothing of it can be lost
    assert render_chat(open_model(DROPS.replace("system", "assistant")), [USER, empty]) == "<user>hello\n<assistant>"


def test_content_that_a_template_cuts_is_not_dropped(open_model):
    """Templates of models that think leave earlier thoughts out."""
    model = open_model("{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}\n{% endfor %}")
    thought = {"role": "assistant", "content": "so</think>hi"}
    assert render_chat(model, [USER, thought, OTHER]) == "<user>hello\n<assistant>hi\n<user>more\n"


@pytest.mark.parametrize("fault, reason", [("raise_exception('no')", "no"), ("1 + 'a'", "unsupported operand")])
def test_whatever_a_template_raises_is_a_sentence(open_model, fault, reason):
    with pytest.raises(SamqError, match=rf"0.gguf refuses a chat: {reason}.*; leave out the template or that message"):
        render_chat(open_model(f"{{{{ {fault} }}}}"), [USER])


@pytest.mark.parametrize("add_eos", [False, True])
def test_a_prompt_never_ends_with_eos(open_model, add_eos):
    model = open_model(PLAIN, add_eos=add_eos)
    text = "<user>hello\n<assistant>"
    whole = [model.bos, *model.tokenize(text)]
    assert tokenize_chat(model, [USER]).tolist() == model.tokenize_prompt(text).tolist() == whole
    assert model.tokenize(text, add_special=True).tolist() == whole + [model.eos] * add_eos  # a document ends
    assert model.eos not in chat_tokens(model, load_prompts()[0])
    said = model.tokenize_prompt("hello<eos>", parse_special=True).tolist()
    assert said == [model.bos, *model.tokenize("hello"), model.eos]  # whoever writes EOS gets it
    without = open_model(None, add_eos=add_eos)
    assert without.eos not in chat_tokens(without, load_prompts()[0])
