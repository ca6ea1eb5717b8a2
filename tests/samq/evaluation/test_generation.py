import numpy as np
import pytest

from samq.evaluation.generation import generate
from samq.evaluation.llama import Context, Model
from samq.evaluation.sampling import Sampling, choose
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf, write_mamba_gguf

VOCABULARY = 264
LIMIT = 6


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
    made = []
    for _ in range(preambles):
        preamble = random.integers(0, VOCABULARY, 100)
        made += [np.append(preamble, random.integers(0, VOCABULARY, random.integers(3, 9))) for _ in range(each)]
    return [prompt.astype(np.int32) for prompt in made]


def answers(model, prompts, **settings):
    return generate(model, prompts, limit=LIMIT, finished=lambda text: False, **settings)


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


def test_a_draw_is_that_of_the_softmax_cut_as_asked():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    random = np.random.default_rng(0)

    def shares(**settings):
        drawn = [choose(logits, Sampling(**settings), random) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(temperature=1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    squared = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(shares(temperature=0.5), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=1.0, top_p=0.85), [10 / 19, 6 / 19, 3 / 19, 0], atol=0.03)
    assert choose(logits, Sampling(), random) == 0
    assert shares(temperature=1.0, top_p=0.01)[0] == 1
