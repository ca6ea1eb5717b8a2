import string

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from samq.evaluation.harness import GgufLM
from samq.evaluation.llama import Model
from tests.tiny_models import byte_tokenizer, tiny_llama, write_llama_gguf

VOCABULARY = 264
LONGEST = 48  # tokens: the context of both models, so that requests are cut
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<{{ message.role }}>{{ message.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = ("the man", "an ant", "the", "Ümläut 东京", "a\n\nb", "the thane ran and ran", "?", " spaced ")


def requests(kind, *arguments, task="tiny"):
    return [Instance(kind, {}, given, index, metadata=(task, index, 1)) for index, given in enumerate(arguments)]


class Pair:
    """One tiny model under lm-eval's `hf` and under ours."""

    def __init__(self, folder, bos):
        network = tiny_llama(vocab_size=VOCABULARY, max_position_embeddings=LONGEST, hidden_size=64)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(parameter.half())  # what the GGUF holds
        tokenizer = byte_tokenizer(bos, TEMPLATE)
        network.config.eos_token_id = network.generation_config.eos_token_id = tokenizer.eos_token_id
        self.path = write_llama_gguf(network, folder / "tiny.gguf", tokenizer=tokenizer)
        self.hf = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=4)
        self.ours = GgufLM(Model(self.path))


@pytest.fixture(scope="module", params=[None, "<bos>"], ids=["without-bos", "with-bos"])
def pair(request, tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"), request.param)
    yield pair
    pair.ours.model.close()


def assert_same_scores(ours, hf):
    assert len(ours) == len(hf)
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in hf], rtol=1e-4, atol=1e-2)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in hf]


def test_tokens_are_those_of_the_hf_tokenizer(pair):
    for text in [*TEXTS, "", "<eos>the<eos>", "<bos>the man"]:
        assert pair.ours.tok_encode(text) == pair.hf.tok_encode(text)
        for special in (False, True):
            assert pair.ours.tok_encode(text, special) == pair.hf.tok_encode(text, special)
    assert pair.ours.prefix_token_id == pair.hf.prefix_token_id
    assert pair.ours.eot_token_id == pair.hf.eot_token_id
    assert pair.ours.max_length == pair.hf.max_length == LONGEST


def test_scores_are_those_of_lm_evals_hf_model(pair):
    asked = [(context, continuation) for context in ("", *TEXTS) for continuation in TEXTS]
    asked += [("the man", " a"), ("the man", " b"), ("the man ", "an"), ("the man", " a")]  # one token, and twice
    asked += [("the " * 60 + context, " an ant") for context in TEXTS]  # cut
    asked += [("the " * 40, "an " * 23), ("", "the " * 23)]
    made = requests("loglikelihood", *asked)
    assert_same_scores(pair.ours.loglikelihood(made), pair.hf.loglikelihood(made, disable_tqdm=True))


def test_what_is_greedy_is_told(pair):
    pairs = [(text, character) for text in TEXTS for character in string.printable.strip()]
    made = requests("loglikelihood", *pairs)
    told = [greedy for _, greedy in pair.ours.loglikelihood(made)]
    assert told == [greedy for _, greedy in pair.hf.loglikelihood(made, disable_tqdm=True)]
    assert any(told) and sum(told) <= len(TEXTS)


def test_whole_texts_are_scored_in_windows_as_by_hf(pair):
    made = requests("loglikelihood_rolling", *[(text,) for text in [*TEXTS, "", "the thane ran " * 30]])
    np.testing.assert_allclose(
        pair.ours.loglikelihood_rolling(made),
        pair.hf.loglikelihood_rolling(made, disable_tqdm=True),
        rtol=1e-4,
        atol=1e-2,
    )


def test_answers_are_those_of_hf(pair):
    settings = {"until": ["an", "\n"], "max_gen_toks": 12, "do_sample": False}
    others = {"until": "t", "max_gen_toks": 8}
    made = requests("generate_until", *[(text, settings) for text in TEXTS], *[(text, others) for text in TEXTS])
    made += requests("generate_until", *[("an " * 60 + text, settings) for text in TEXTS], task="cut")
    assert pair.ours.generate_until(made) == pair.hf.generate_until(made, disable_tqdm=True)
