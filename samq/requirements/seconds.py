"""How long stages take, extrapolated: what they compute, read and write, over what this machine does in a second.

The products of a pass reach a share of the rate of one large product. On an H200 gradients of 8B in memory reached 0.47,
and of 20 blocks of a 70B shape from disk 0.54 (benchmarks/large_model.py). On 2 cores the demo's reached 0.8.
Inputs of layers and llama.cpp reached 0.4 to 0.5 in the demo.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from samq.evaluation.agreement import CHUNK_TOKENS, CHUNKS
from samq.evaluation.settings import EvaluationSettings
from samq.requirements.memory import TorchRun
from samq.requirements.rates import Rates

GRADIENTS_SHARE = {True: 0.45, False: 0.8}  # on a GPU, on a processor
PRODUCTS_SHARE = 0.4  # of other passes
JSON_PROMPTS, JSON_PROMPT_TOKENS = 40, 100  # of samq/evaluation/json_prompts.jsonl, about
BATCH_TOKENS = 512  # that llama.cpp computes at a time


@dataclass(frozen=True)
class Clock:
    """Seconds of the parts of a run."""

    run: TorchRun
    dtype: str
    rates: Rates
    ram: int  # bytes free: files that fit there are read from the disk once
    gpu: int  # bytes free, for llama.cpp

    def files(self, read: int = 0, written: int = 0) -> float:
        """Read files and hash them; write files, and read them once more for their hashes."""
        return read / self._reading(read) + written / self.rates.write_bytes + (read + written) / self.rates.hash_bytes

    def compare(self) -> float:
        """Compare torch's weights with the GGUF's: one thread takes as long as for hashing both."""
        return 2 * self.run.outline.bytes / self.rates.hash_bytes

    def gradients(self, sequences: int, states: int) -> float:
        """Backward passes: 6 operations a weight and token; weights are read twice, and states written, meanwhile."""
        tokens = sequences * self.run.sequence_tokens
        operations = 6 * self.run.outline.active_weights * tokens
        products = operations / (GRADIENTS_SHARE[self.run.on_gpu] * self.rates.products[self.dtype])
        return max(products, self._fetching(2), states / self.rates.write_bytes)

    def check(self, size: int, sequences: int, states: int) -> float:
        """The same, and a plan's file of such a size read with the full-precision one."""
        return self.gradients(sequences, states) + (self.run.outline.bytes + size) / self.rates.hash_bytes

    def inputs(self, tokens: int, *, matrices: bool) -> float:
        """A forward pass, and of each Gram matrix its sums in float32 and its factor in float64."""
        outline = self.run.outline
        products = self._products(2 * outline.active_weights * tokens, self.dtype)
        if matrices:
            tensors = [tensor for block in outline.blocks for tensor in block if len(tensor.shape) > 1]
            each = [(math.prod(tensor.shape[:-2]), outline.share(tensor), tensor.row_length) for tensor in tensors]
            sums = 2 * tokens * sum(experts * share * length**2 for experts, share, length in each)
            factors = 2 / 3 * sum(experts * length**3 for experts, _, length in each)
            products += self._products(sums, "float32") + self._products(factors, "float64")
        return max(products, self._fetching(1))

    def rounding(self, weights: Iterable[Mapping[str, int]]) -> float:
        """Round so many weights of each type to the nearest values, for each of some plans."""
        return sum(count / self.rates.rounding[kind] for plan in weights for kind, count in plan.items())

    def compensation(self, weights: Iterable[Mapping[str, int]], tokens: int) -> float:
        """The nearest values of all plans, the pass over the inputs, and GPTQ with the errors of outputs before and after."""
        plans, outline = list(weights), self.run.outline
        matrices = [tensor for block in outline.blocks for tensor in block if len(tensor.shape) > 1]
        gptq = 5 * len(plans) * sum(tensor.weights * tensor.row_length for tensor in matrices)
        return self.rounding(plans) + self.inputs(tokens, matrices=True) + self._products(gptq, "float32")

    def agreement(self) -> float:
        """llama.cpp and torch on a few hundred tokens, after the weights are compared."""
        torch = max(
            self._fetching(1), self._products(2 * self.run.outline.active_weights * CHUNKS * CHUNK_TOKENS, self.dtype)
        )
        return self.compare() + torch + self._prompts(self.run.outline.bytes, CHUNKS * CHUNK_TOKENS)

    def baseline(self, settings: EvaluationSettings, chunks: int) -> float:
        """Logits on the held-out text."""
        logits = 4 * chunks * settings.scored_per_chunk * self.run.outline.vocabulary
        return self._prompts(self.run.outline.bytes, chunks * settings.context_tokens) + self.files(written=logits)

    def evaluation(self, size: int, settings: EvaluationSettings, chunks: int) -> float:
        """A candidate of such a size: held-out text, JSON prompts, and requests that are timed."""
        prompts = JSON_PROMPTS if settings.json_prompts is None else min(JSON_PROMPTS, settings.json_prompts)
        requests = settings.speed_requests + settings.speed_warmup if settings.speed_requests else 0
        read = chunks * settings.context_tokens + prompts * JSON_PROMPT_TOKENS
        read += requests * settings.speed_prompt_tokens
        generated = prompts * settings.json_tokens + requests * settings.speed_generated_tokens
        return self._prompts(size, read) + generated * self._through(size)

    def _products(self, operations: float, dtype: str) -> float:
        return operations / (PRODUCTS_SHARE * self.rates.products[dtype])

    def _reading(self, size: int) -> float:
        """The rate at which files of this size are read: they may be in memory from the stage before."""
        return self.rates.host_bytes if size <= self.ram else self.rates.read_bytes

    def _fetching(self, times: int) -> float:
        """Bring the blocks' weights to the device, if they wait elsewhere."""
        size = 2 * self.run.outline.weights_in_blocks
        return 0.0 if self.run.is_whole else times * size / self._reading(size)

    def _on_gpu(self, size: int) -> int:
        """Bytes of a model that llama.cpp has on the GPU: as much as fits."""
        return min(size, self.gpu) if self.rates.gpu_bytes else 0

    def _through(self, size: int) -> float:
        """Read the weights that a token is multiplied with, once: what a generated token takes."""
        on_gpu = self._on_gpu(size)
        used = self.run.outline.active_weights / self.run.outline.weights
        seconds = on_gpu / self.rates.gpu_bytes if self.rates.gpu_bytes else 0.0
        return min(1.0, used) * (seconds + (size - on_gpu) / self._reading(size - on_gpu))

    def _prompts(self, size: int, tokens: int) -> float:
        """Compute prompts: the rest of the weights comes to the GPU for each batch, or the processor computes all."""
        operations, batches = 2 * self.run.outline.active_weights * tokens, -(-tokens // BATCH_TOKENS)
        rest = size - self._on_gpu(size)
        fetching = batches * rest / self._reading(rest)
        if self.rates.gpu_bytes:
            return self._products(operations, self.dtype) + fetching
        return max(operations / (PRODUCTS_SHARE * self.rates.host_products), fetching)
