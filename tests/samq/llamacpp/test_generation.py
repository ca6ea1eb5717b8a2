import numpy as np
import pytest

from samq.errors import SamqError
from samq.llamacpp.generation import Decoding, generate
from samq.llamacpp.runtime import Context, Model
from samq.llamacpp.sampling import Sampling, choose_token
from tests.samq.evaluation.nonsense import nonsense_after
from tests.tiny_models import byte_tokenizer, tiny_llama, tiny_llama_that_ends, write_llama_gguf, write_mamba_gguf

VOCABULARY = 264
LIMIT = 6
GREEDY = Sampling()


@pytest.fixture(scope="module", params=["llama", "mamba"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("generating") / "model.gguf"
    if request.param == "llama":
        network = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=512)
        write_llama_gguf(network, path, tokenizer=byte_tokenizer())
    else:
        write_mamba_gguf(path, byte_tokenizer(), VOCABULARY)
    with Model(path) as model:
        yield model


@pytest.fixture
def evaluated(monkeypatch):
    """How many tokens each batch has."""
    sizes = []
    decode = Context.decode

    def counting(self, tokens, *arguments, **settings):
        sizes.append(len(tokens))
        return decode(self, tokens, *arguments, **settings)

    monkeypatch.setattr(Context, "decode", counting)
    return sizes


def prompts_with_preambles(preambles, each, seed=0):
    """`each` prompts after each of some preambles of 100 tokens, one preamble after the other."""
    random = np.random.default_rng(seed)
    prompts = []
    for _ in range(preambles):
        preamble = random.integers(0, VOCABULARY, 100)
        prompts += [np.append(preamble, random.integers(0, VOCABULARY, random.integers(3, 9))) for _ in range(each)]
    return [prompt.astype(np.int32) for prompt in prompts]


def answers(model, prompts, sampling=GREEDY, **settings):
    return generate(model, prompts, Decoding(LIMIT, lambda text: False, sampling), **settings)


def test_answers_do_not_depend_on_what_shares_the_work(model):
    prompts = prompts_with_preambles(3, 9)  # more than are decoded at once
    together = answers(model, prompts)
    assert together == [answers(model, [prompt])[0] for prompt in prompts]
    assert together == answers(model, prompts)


def test_what_prompts_begin_with_is_evaluated_once(model, evaluated):
    prompts = prompts_with_preambles(3, 9)
    answers(model, prompts)
    begun = sum(evaluated) - len(prompts) * (LIMIT - 1)
    ends = sum(len(prompt) - 100 for prompt in prompts)
    assert begun == ends + 3 * 100 if not model.is_recurrent else begun < sum(map(len, prompts))


def test_prompts_with_nothing_in_common_share_batches(model, evaluated):
    prompts = [prompt[100 - size :] for size, prompt in enumerate(prompts_with_preambles(1, 16))]
    answers(model, prompts)
    assert len(evaluated) == LIMIT


@pytest.mark.parametrize("kind", ["control", "normal"])
@pytest.mark.parametrize(
    "eos", ["[END]", "<|im_end|>"]
)  # one that llama.cpp knows by its name, and one that it does not
def test_the_text_of_an_end_token_is_in_no_answer_whatever_its_type(tmp_path, eos, kind):
    tokenizer = byte_tokenizer(eos=eos)
    network = tiny_llama_that_ends(tokenizer.eos_token_id, vocab_size=VOCABULARY)
    normal = [eos] if kind == "normal" else []
    path = write_llama_gguf(network, tmp_path / "model.gguf", tokenizer=tokenizer, normal=normal)
    with Model(path) as model:
        assert model.is_end(tokenizer.eos_token_id)
        assert answers(model, prompts_with_preambles(1, 2)) == ["", ""]


@pytest.mark.parametrize("kv_type", ["F16", "F32"])
def test_a_prompt_after_which_all_is_nonsense_fails_alone(tmp_path, kv_type):
    prompts = prompts_with_preambles(1, 20)
    for prompt in prompts:
        prompt[prompt == 7] = 8
    prompts = [prompt[-9:] for prompt in prompts]
    with nonsense_after(7, tmp_path, max_position_embeddings=512) as model:
        expected = answers(model, prompts, kv_type=kv_type)
        prompts[3][1] = prompts[18][1] = 7  # the second in a place that was free before
        reasons = {}
        told = []
        replies = answers(
            model,
            prompts,
            kv_type=kv_type,
            failed=reasons.__setitem__,
            progress=lambda done, total: told.append((done, total)),
        )
        assert set(reasons) == {3, 18} and "nonsense.gguf gives logits that are not finite" in reasons[3]
        assert replies == ["" if index in reasons else text for index, text in enumerate(expected)]
        assert [done for done, _ in told] == list(range(1, 21))
        for sampling in (GREEDY, Sampling(temperature=1.0)):
            with pytest.raises(SamqError, match="logits that are not finite"):
                answers(model, prompts, sampling=sampling)


def test_where_all_is_nonsense_every_prompt_fails(tmp_path):
    with nonsense_after(None, tmp_path) as model:
        reasons = {}
        assert answers(model, prompts_with_preambles(1, 40), failed=reasons.__setitem__) == [""] * 40
        assert sorted(reasons) == list(range(40))


@pytest.mark.parametrize("at", [1, 2, 3, 9])  # among them batches of a preamble alone
def test_a_batch_that_fails_once_takes_its_own_prompts_along_and_no_others(model, decode_fails, at):
    prompts = prompts_with_preambles(3, 9)
    prompts += prompts[:3]  # which begin like some that were answered before the failure
    expected = answers(model, prompts)
    decode_fails(at)
    reasons = {}
    replies = answers(model, prompts, failed=reasons.__setitem__)
    assert 0 < len(reasons) <= 16 and set(reasons.values()) == {"llama.cpp failed on a batch"}
    assert replies == ["" if index in reasons else text for index, text in enumerate(expected)]
    decode_fails(at)
    with pytest.raises(SamqError, match=r"llama.cpp failed"):
        answers(model, prompts)


def test_a_draw_is_that_of_the_softmax_cut_as_asked():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)

    def shares(**settings):
        drawn = [choose_token(logits, Sampling(**settings), random) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.85), [10 / 19, 6 / 19, 3 / 19, 0], atol=0.03)
    assert choose_token(logits, Sampling(), random) == 0
    assert shares(temperature=1.0, top_p=0.01)[0] == 1
