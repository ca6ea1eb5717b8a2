"""One tiny model under lm-eval's `hf` and under SAMQ's."""

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from samq.evaluation.lm_eval.harness import GgufLM
from samq.llamacpp.runtime import Model
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
        self.bos = bos
        self.path = write_llama_gguf(network, folder / "tiny.gguf", tokenizer=tokenizer)
        self.hf = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=4)
        self.ours = GgufLM(Model(self.path))


def assert_same_scores(ours, hf):
    assert len(ours) == len(hf)
    np.testing.assert_allclose([score for score, _ in ours], [score for score, _ in hf], rtol=1e-4, atol=1e-2)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in hf]
