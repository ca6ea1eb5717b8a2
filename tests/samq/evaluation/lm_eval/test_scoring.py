import numpy as np
import pytest
from scipy.special import log_softmax

from samq.errors import SamqError
from samq.evaluation.lm_eval.scoring import Continuation, score
from samq.llamacpp.runtime import Model
from tests.samq.evaluation.nonsense import nonsense_after
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf, write_mamba_gguf

VOCABULARY = 264


@pytest.fixture(scope="module", params=["llama", "mamba"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("scored") / "model.gguf"
    if request.param == "llama":
        network = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=2048)
        write_llama_gguf(network, path, tokenizer=byte_tokenizer())
    else:
        write_mamba_gguf(path, byte_tokenizer(), VOCABULARY)
    with Model(path) as model:
        assert model.is_recurrent == (request.param == "mamba")
        yield model


def alone(model, request):
    """The score of one request, from one sequence in a context of its own."""
    tokens = np.concatenate([request.context, request.tokens])
    with model.context(len(tokens), kv_type="F32") as context:
        logits = context.decode(tokens, np.arange(len(tokens)), 0, True).astype(np.float64)
    predicted = log_softmax(logits, axis=1)[len(request.context) - 1 : -1]
    greedy = (predicted.argmax(axis=1) == request.tokens).all()
    return predicted[np.arange(len(request.tokens)), request.tokens].sum(), greedy


def check(model, requests):
    scores = list(score(model, requests, kv_type="F32"))  # a rounded cache would hide small mistakes
    assert sorted(scored.index for scored in scores) == list(range(len(requests)))
    for scored in scores:
        expected, greedy = alone(model, requests[scored.index])
        assert scored.log_probability == pytest.approx(expected, rel=1e-5, abs=5e-3)
        assert scored.is_greedy == greedy
    return scores


def random_tokens(*lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]


def test_scores_do_not_depend_on_what_shares_the_work(model):
    preamble, *questions = random_tokens(40, *range(3, 33))
    choices = random_tokens(1, 1, 1, 2, 9, seed=1)
    requests = [
        Continuation(np.concatenate([preamble, question]), choice) for question in questions for choice in choices
    ]
    requests += [requests[0], Continuation(questions[0][:1], choices[4]), Continuation(questions[0], questions[0])]
    check(model, requests)


def test_requests_longer_than_a_batch_are_scored_whole(model):
    long, longer, tail = random_tokens(700, 1300, 5)
    check(
        model, [Continuation(long[:2], long[2:]), Continuation(longer, tail), Continuation(longer, tail[::-1].copy())]
    )


def test_tokens_within_the_context_of_others_are_scored_too(model):
    (tokens,) = random_tokens(30)
    cuts = [Continuation(tokens[:cut], tokens[cut:end]) for cut in (1, 9, 20) for end in (21, 25, 30)]
    check(model, cuts)


def test_the_best_continuation_is_greedy_and_no_other(model):
    context = random_tokens(12)[0]
    single = [Continuation(context, np.array([token], np.int32)) for token in range(VOCABULARY)]
    scores = check(model, single)
    best = max(scores, key=lambda scored: scored.log_probability)
    assert [scored for scored in scores if scored.is_greedy] == [best]
    assert sum(np.exp(scored.log_probability) for scored in scores) == pytest.approx(1)


def test_nothing_asked_is_nothing_scored(model):
    assert list(score(model, [])) == []


def test_a_model_that_computes_nonsense_is_named(tmp_path):
    with nonsense_after(7, tmp_path) as model, pytest.raises(SamqError, match=r"nonsense.gguf gives logits"):
        list(score(model, [Continuation(np.array([7], np.int32), random_tokens(2)[0])]))


def test_nonsense_spreads_no_further_than_its_batch(tmp_path):
    with nonsense_after(7, tmp_path) as model:
        tokens = random_tokens(*[11] * 150)
        requests = [Continuation(each[:9], each[9:]) for each in tokens]
        for request in requests:
            request.context[request.context == 7] = 8
        requests[0].context[:] = 0  # sorts first, into the first batch
        requests[0].context[4] = 7
        reasons = {}
        scores = list(score(model, requests, kv_type="F32", failed=reasons.__setitem__))
        assert 0 in reasons and "nonsense.gguf gives logits that are not finite" in reasons[0]
        assert sorted([*reasons, *(scored.index for scored in scores)]) == list(range(150))
        assert len(scores) >= 150 - 64
        expected = [alone(model, requests[scored.index])[0] for scored in scores[:9]]
        assert [scored.log_probability for scored in scores[:9]] == pytest.approx(expected, rel=1e-5, abs=5e-3)


def test_a_batch_that_fails_once_takes_no_other_along(model, decode_fails):
    preamble, *questions = random_tokens(40, *[5] * 150)
    requests = [Continuation(np.concatenate([preamble, question]), question[:2]) for question in questions]
    decode_fails(at=2)
    reasons = {}
    scores = list(score(model, requests, kv_type="F32", failed=reasons.__setitem__))
    assert set(reasons.values()) == {"llama.cpp failed on a batch"} and len(reasons) <= 64
    assert sorted([*reasons, *(scored.index for scored in scores)]) == list(range(150))
    for scored in scores[:: len(scores) // 9]:
        assert scored.log_probability == pytest.approx(alone(model, requests[scored.index])[0], rel=1e-5, abs=5e-3)
    decode_fails(at=2)
    with pytest.raises(SamqError, match=r"llama.cpp failed"):
        list(score(model, requests))
