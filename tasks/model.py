"""The model in torch: what gradients and Gram matrices are taken of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from samq.files import GGUF_NAME
from samq.gguf.file import gguf_names, read_metadata
from samq.progress import bar
from samq.records import ModelSource
from samq.sensitivity.hf_model import load_model
from samq.sensitivity.layout import GgufLayout, read_layout
from samq.sensitivity.memory import Memory, compute_devices
from samq.store import Artifact
from samq.workspace import Workspace

# Digests of a model and of its GGUF -> which view of the table each tensor has.
_views: dict[tuple[str, str], Mapping[str, int | None]] = {}


def memory_of(at: Workspace) -> Memory:
    """What a pass over sequences may use: all devices of the workspace share them."""
    return Memory(at.memory_limit, at.scratch, compute_devices(at.device))


@dataclass(frozen=True)
class TorchModel:
    """A model and its full-precision GGUF, which a GGUF source's weights come from."""

    source: ModelSource
    full: Artifact
    dtype: str = "float32"  # torch's: float32, bfloat16 or float16

    def load(self, at: Workspace) -> tuple[PreTrainedModel, Callable[[str], str | None]]:
        """The model where the workspace says, and the GGUF name of each parameter (None for those that a GGUF does not hold)."""
        gguf = self.full.path(GGUF_NAME)
        weights = self.source.model_copy(update={"gguf": gguf}) if self.source.gguf else self.source
        with bar(f"load {self.source.name}") as progress:
            model, _ = load_model(weights, self.dtype, at.device, progress, at.memory_limit)
            return model, gguf_names(read_metadata(gguf))

    def load_with_layout(self, at: Workspace) -> tuple[PreTrainedModel, GgufLayout]:
        """The model where the workspace says, and how its GGUF stores the weights: compared once in a process."""
        model, names = self.load(at)
        gguf, content = self.full.path(GGUF_NAME), (self.source.digest(), self.full.digest())
        with bar(f"compare {self.source.name} with its GGUF") as progress:
            layout = read_layout(model, names, gguf, progress, views=_views.get(content))
        _views[content] = layout.views
        return model, layout
