"""The room that lm-eval's tasks get on a GPU, beside the layers of the model."""

from samq.llamacpp.fit import Room
from samq.llamacpp.generation import PARALLEL
from samq.llamacpp.runtime import Model

_USUAL_TOKENS = 2048  # of a prompt with its answer; room for more would be taken from the layers on the GPU


def benchmark_room(context_tokens: int | None, kv_type: str, model: Model) -> Room:
    """The context that tasks need whose longest prompt with its answer has `context_tokens`; None: usual ones.

    What they ask is not known yet. A longer text can still find room, in the memory that stays free.
    """
    return Room(min(context_tokens or _USUAL_TOKENS, model.trained_tokens), PARALLEL, kv_type)
