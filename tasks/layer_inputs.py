"""Stage: what the inputs of the model's layers tell before there is a plan."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from samq.data.tokens import TokenBatch
from samq.files import GGUF_NAME, IMATRIX_NAME, SHARES_NAME, TOKENS_NAME
from samq.gguf.file import read_tensors
from samq.gguf.imatrix import write_imatrix
from samq.progress import bar
from samq.quantization.inputs import measure_inputs
from samq.records import CompensationShares
from samq.sensitivity.gram import without_input
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.gpu import in_turn, torch_has_gpu
from tasks.model import TorchModel, memory_of
from tasks.stage import stage

log = logging.getLogger("samq.layer_inputs")


@dataclass(frozen=True)
class InputText:
    """What layers' inputs are measured on: of the first `count` sequences as many as `most_tokens` come from."""

    tokens: Artifact  # of `tokenize`
    count: int
    most_tokens: int
    batch_size: int  # sequences a forward pass

    def load(self) -> TokenBatch:
        """The sequences."""
        batch = TokenBatch.load(self.tokens.path(TOKENS_NAME))
        enough = int(np.searchsorted(np.cumsum(batch.lengths), self.most_tokens)) + 1
        return batch.part(0, min(self.count, enough))


@stage(
    "layer_inputs",
    version=3,
    run_name="inputs of {model.source.name}",
    keyed_by=("device",),
    packages=("torch", "transformers"),
    retries=1,
    goes_on=True,
)
@in_turn(torch_has_gpu)
def layer_inputs(at: Workspace, folder: Path, model: TorchModel, text: InputText, compensated: bool) -> None:
    """`imatrix.gguf`: the importance matrix; and, if plans are to be `compensated`, `compensation-shares.json`."""
    tokens = text.load()
    torch_model, layout = model.load_with_layout(at)
    _warn(without_input(torch_model, layout.weights), model.full)
    with bar(f"inputs of {model.source.name}") as progress:
        statistics = measure_inputs(
            torch_model,
            tokens,
            layout.weights,
            shares=compensated,
            batch_size=text.batch_size,
            memory=memory_of(at),
            progress=progress,
        )
    write_imatrix(
        folder / IMATRIX_NAME,
        statistics.importance,
        dataset="calibration",
        sequences=len(tokens),
        sequence_tokens=int(tokens.lengths.max()),
    )
    if compensated:
        CompensationShares(shares=dict(sorted(statistics.shares.items()))).save(folder / SHARES_NAME)


def _warn(names: list[str], full: Artifact) -> None:
    """Say which tensors are rounded without regard to their inputs."""
    tensors = read_tensors(full.path(GGUF_NAME))
    if rounded := [name for name in names if tensors[name].type != "F32"]:
        more = f", and {len(rounded) - 8} more" if len(rounded) > 8 else ""
        log.warning(
            "%d tensors have no importances, and are rounded without compensation, since torch does not show their inputs: %s%s",
            len(rounded),
            ", ".join(rounded[:8]),
            more,
        )
