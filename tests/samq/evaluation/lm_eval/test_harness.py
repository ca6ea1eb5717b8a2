"""Scores and answers are those of lm-eval's `hf` for the same model; requests that fail are reported."""

import string

import numpy as np
import pytest
import torch

from samq.errors import SamqError
from samq.evaluation.lm_eval.harness import GgufLM
from samq.llamacpp.runtime import Model
from tests.samq.evaluation.lm_eval.hf_pair import LONGEST, TEMPLATE, TEXTS, VOCABULARY, assert_same_scores, requests
from tests.samq.evaluation.nonsense import nonsense_after
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf


def test_tokens_are_those_of_the_hf_tokenizer(pair):
    for text in [*TEXTS, "", "<eos>the<eos>", "<bos>the man"]:
        assert pair.ours.tok_encode(text) == pair.hf.tok_encode(text)
        for special in (False, True):
            assert pair.ours.tok_encode(text, special) == pair.hf.tok_encode(text, special)
    assert pair.ours.prefix_token_id == pair.hf.prefix_token_id
    assert pair.ours.eot_token_id == pair.hf.eot_token_id
    assert pair.ours.max_length == pair.hf.max_length == LONGEST


def test_scores_are_those_of_lm_evals_hf_model(pair):
    pairs = [(context, continuation) for context in ("", *TEXTS) for continuation in TEXTS]
    pairs += [("the man", " a"), ("the man", " b"), ("the man ", "an"), ("the man", " a")]  # one token, and twice
    pairs += [("the " * 60 + context, " an ant") for context in TEXTS]  # cut
    pairs += [("the " * 40, "an " * 23), ("", "the " * 23)]
    instances = requests("loglikelihood", *pairs)
    assert_same_scores(pair.ours.loglikelihood(instances), pair.hf.loglikelihood(instances, disable_tqdm=True))


def test_what_is_greedy_is_told(pair):
    pairs = [(text, character) for text in TEXTS for character in string.printable.strip()]
    instances = requests("loglikelihood", *pairs)
    told = [greedy for _, greedy in pair.ours.loglikelihood(instances)]
    assert told == [greedy for _, greedy in pair.hf.loglikelihood(instances, disable_tqdm=True)]
    assert any(told) and sum(told) <= len(TEXTS)


def test_whole_texts_are_scored_in_windows_as_by_hf(pair):
    instances = requests("loglikelihood_rolling", *[(text,) for text in [*TEXTS, "", "the thane ran " * 30]])
    np.testing.assert_allclose(
        pair.ours.loglikelihood_rolling(instances),
        pair.hf.loglikelihood_rolling(instances, disable_tqdm=True),
        rtol=1e-4,
        atol=1e-2,
    )


def test_answers_are_those_of_hf(pair):
    settings = {"until": ["an", "\n"], "max_gen_toks": 12, "do_sample": False}
    others = {"until": "t", "max_gen_toks": 8}
    instances = requests("generate_until", *[(text, settings) for text in TEXTS], *[(text, others) for text in TEXTS])
    instances += requests("generate_until", *[("an " * 60 + text, settings) for text in TEXTS], task="cut")
    assert pair.ours.generate_until(instances) == pair.hf.generate_until(instances, disable_tqdm=True)


def test_a_prompt_longer_than_the_context_loses_its_beginning_with_one_warning(pair, caplog):
    long = [("the " * 60 + text, " an ant") for text in TEXTS]
    short = [("the man", " an ant")]
    for call, kind, arguments in (
        (pair.ours.loglikelihood, "loglikelihood", long + short),
        (pair.ours.generate_until, "generate_until", [(text, {"max_gen_toks": 4}) for text, _ in long + short]),
    ):
        caplog.clear()
        call(requests(kind, *arguments))
        (warning,) = [record.message for record in caplog.records if record.name == "samq.evaluation.lm_eval.harness"]
        assert f"{len(long)} " in warning and f"lose their beginning: the context has {LONGEST} tokens" in warning


def test_an_empty_continuation_is_certain(pair):
    prefix = pair.hf.tokenizer.decode(pair.hf.prefix_token_id)
    instances = requests("loglikelihood", ("the man", ""), ("", ""), ("", prefix), ("the man", " an"))
    *empty, other = pair.ours.loglikelihood(instances)
    assert empty == [(0.0, True)] * 3
    assert_same_scores([other], pair.hf.loglikelihood(instances[3:], disable_tqdm=True))
    assert pair.ours.loglikelihood(instances[:1]) == [(0.0, True)]
    for call in (pair.ours.loglikelihood, pair.ours.loglikelihood_rolling, pair.ours.generate_until):
        assert call([]) == []


def test_a_continuation_that_fits_no_context_fails_alone(pair, caplog):
    instances = requests("loglikelihood", ("the", " an"), ("the", "an " * LONGEST), ("the", " ant"))
    scores = pair.ours.loglikelihood(instances)
    assert scores[1] == (-float("inf"), False)
    assert "1 of 3 requests failed: a continuation is longer than the context" in caplog.text
    assert pair.ours.failures.total() == 1
    assert_same_scores([scores[0], scores[2]], pair.hf.loglikelihood([instances[0], instances[2]], disable_tqdm=True))


def test_without_bos_a_text_starts_after_eos(pair):
    tokenizer = pair.hf.tokenizer
    expected = tokenizer.eos_token_id if tokenizer.bos_token is None else tokenizer.bos_token_id
    assert pair.ours.prefix_token_id == expected
    after = requests("loglikelihood", ("", "the man"), (tokenizer.decode(expected), "the man"))
    assert_same_scores(*([score] for score in pair.ours.loglikelihood(after)))
    other = GgufLM(pair.ours.model, prefix_token_id=7)
    assert other.prefix_token_id == 7
    if tokenizer.bos_token is None:
        with pytest.raises(SamqError, match="has no BOS token; leave add_bos_token out"):
            GgufLM(pair.ours.model, add_bos_token=True)
    else:
        assert GgufLM(pair.ours.model, add_bos_token=False).tok_encode("the") == tokenizer.encode(
            "the", add_special_tokens=False
        )


def test_a_model_that_only_ends_answers_nothing(tmp_path):
    network = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=LONGEST)
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
        network.model.embed_tokens.weight.fill_(1)
        network.lm_head.weight[tokenizer.eos_token_id] = 1
    lm = GgufLM(str(write_llama_gguf(network, tmp_path / "ends.gguf", tokenizer=tokenizer)))
    settings = {"until": ["an"], "max_gen_toks": 9}
    assert lm.generate_until(requests("generate_until", *[(text, settings) for text in ("", *TEXTS)])) == [""] * 9
    assert lm.loglikelihood(requests("loglikelihood", ("the", "<eos>"), ("the", "an")))[0] == (
        pytest.approx(0, abs=1e-6),
        True,
    )
    lm.model.close()


def test_sampling_follows_its_seed(pair):
    def answers(**settings):
        settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5} | settings
        return pair.ours.generate_until(requests("generate_until", *[(text, settings) for text in TEXTS]))

    assert answers(seed=1) == answers(seed=1) != answers(seed=2)
    assert answers(top_k=1) == answers(do_sample=False, temperature=0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_gen_toks": LONGEST},
            f"max_gen_toks {LONGEST} leaves no room for a prompt in a context of {LONGEST} tokens",
        ),
        ({"max_gen_toks": 0}, "max_gen_toks 0"),
        ({"max_gen_toks": 4, "num_beams": 2}, "does not support the setting num_beams"),
        ({"max_gen_toks": "many"}, "cannot generate with the settings {'max_gen_toks': 'many'}"),
    ],
)
def test_settings_that_cannot_be_followed_fail_and_take_no_others_along(pair, settings, message, caplog):
    lm, told = GgufLM(pair.ours.model, progress=lambda done, total: told.append((done, total))), []
    good = {"max_gen_toks": 4}
    expected = pair.ours.generate_until(requests("generate_until", *[(text, good) for text in TEXTS]))
    mixed = [(text, kind) for text in TEXTS for kind in (settings, good)]
    answers = lm.generate_until(requests("generate_until", *mixed))
    assert answers[::2] == [""] * len(TEXTS) and answers[1::2] == expected
    ((reason, count),) = lm.failures.items()
    assert message in reason and count == len(TEXTS) and told[-1] == (16, 16)
    (warning,) = [record.message for record in caplog.records if record.name == "samq.evaluation.lm_eval.harness"]
    assert warning == f"8 of 16 requests failed: {reason}"


def test_requests_that_fail_are_answered_in_their_place_and_not_kept(tmp_path):
    with nonsense_after(7, tmp_path, max_position_embeddings=LONGEST) as model:
        lm = GgufLM(model)
        kept = []
        lm.cache_hook.add_partial = lambda *given: kept.append(given)
        texts = ("the man", model.piece(7).decode() + "the man", "an ant")
        assert [7 in lm.tok_encode(text) for text in texts] == [False, True, False]
        scores = lm.loglikelihood(requests("loglikelihood", *[(text, " ran") for text in texts]))
        assert len(scores) == 3 and scores[1] == (-float("inf"), False)
        assert len(kept) + lm.failures.total() == 3
        lm.failures.clear()
        assert lm.loglikelihood_rolling(requests("loglikelihood_rolling", (texts[0],), (texts[1],)))[1] == -float("inf")
        assert lm.failures and texts[1] not in [given[0] for _, given, _ in kept]
        lm.failures.clear()
        kept.clear()
        answers = lm.generate_until(requests("generate_until", *[(text, {"max_gen_toks": 3}) for text in texts]))
        assert len(answers) == 3 and answers[1] == "" and lm.failures.total() == 1 and len(kept) == 2


def test_a_context_that_cannot_be_made_fails_every_request(pair, monkeypatch):
    def no_memory(*_arguments, **_settings):
        raise SamqError("no memory for a context; use a shorter one")

    lm = GgufLM(pair.ours.model)
    monkeypatch.setattr(Model, "context", no_memory)
    instances = requests("loglikelihood", *[("the", text) for text in ("", *TEXTS)])
    assert lm.loglikelihood(instances) == [(0.0, True), *[(-float("inf"), False)] * len(TEXTS)]
    assert lm.generate_until(requests("generate_until", *[(text, {"max_gen_toks": 4}) for text in TEXTS])) == [""] * 8
    assert lm.failures == {"no memory for a context; use a shorter one": 2 * len(TEXTS)}


def test_chats_are_rendered_as_by_transformers(pair, tmp_path):
    chat = [{"role": role, "content": f" {role} says "} for role in ("user", "assistant", "user")]
    assert pair.ours.apply_chat_template(chat) == pair.hf.apply_chat_template(chat)
    for begun in ("It is", "It is "):
        prefilled = [*chat, {"role": "assistant", "content": begun}]
        told = [lm.apply_chat_template(prefilled, add_generation_prompt=False) for lm in (pair.ours, pair.hf)]
        assert told[0] == told[1]
    system = {"role": "system", "content": "Be brief."}  # which the template refuses, and `hf` leaves out
    told = {"role": "user", "content": f"Be brief.\n{chat[0]['content']}"}
    assert pair.ours.apply_chat_template([system, *chat]) == pair.hf.apply_chat_template([told, *chat[1:]])
    assert pair.ours.chat_template(True) == TEMPLATE
    assert pair.ours.chat_template(False) is None
    plain = write_llama_gguf(tiny_llama(vocab_size=VOCABULARY), tmp_path / "plain.gguf", tokenizer=byte_tokenizer())
    lm = GgufLM(str(plain))
    with pytest.raises(SamqError, match=r"plain.gguf has no chat template"):
        lm.apply_chat_template(chat)
    assert lm.tokenizer_name != pair.ours.tokenizer_name
    lm.model.close()


def test_a_text_that_cannot_be_tokenized_fails_alone(pair):
    lm = GgufLM(pair.ours.model)
    settings = {"max_gen_toks": 4}
    half = "the \ud83d"
    instances = requests("generate_until", ("the man", settings), (half, settings), ("an ant", settings))
    one, lost, other = lm.generate_until(instances)
    assert [one, other] == pair.ours.generate_until([instances[0], instances[2]]) and lost == ""
    assert lm.loglikelihood(requests("loglikelihood", ("the", half)))[0] == (-float("inf"), False)
    assert lm.failures.total() == 2 and all("half a character" in reason for reason in lm.failures)


def test_no_prompt_ends_with_eos(pair, tmp_path):
    network = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=LONGEST)
    path = write_llama_gguf(network, tmp_path / "eos.gguf", tokenizer=byte_tokenizer(pair.bos, TEMPLATE), add_eos=True)
    lm = GgufLM(str(path))
    assert [lm.tok_encode(text) for text in TEXTS] == [pair.ours.tok_encode(text) for text in TEXTS]
    lm.model.close()


def test_no_more_context_is_used_than_the_model_was_trained_for(pair):
    trained = pair.ours.model.trained_tokens
    assert (
        GgufLM(pair.ours.model).max_length == GgufLM(pair.ours.model, context_tokens=trained + 1).max_length == trained
    )


def test_one_beam_is_no_search(pair):
    settings = {"max_gen_toks": 3, "do_sample": False}
    instances = requests("generate_until", ("the man", settings), ("the man", settings | {"num_beams": 1}))
    one, other = pair.ours.generate_until(instances)
    assert one == other


def test_every_request_is_answered_once_and_reported(pair):
    told = []
    lm = GgufLM(pair.ours.model, progress=lambda done, total: told.append((done, total)))
    lm.loglikelihood(requests("loglikelihood", *[("the", text) for text in ("", *TEXTS)]))
    assert [done for done, _ in told] == list(range(2, len(TEXTS) + 2)) and told[-1] == (9, 9)
    told.clear()
    settings = ({"max_gen_toks": 3}, {"max_gen_toks": 2})
    lm.generate_until(requests("generate_until", *[(text, kind) for text in TEXTS for kind in settings]))
    assert sorted(done for done, _ in told) == list(range(1, 17)) and told[-1] == (16, 16)
