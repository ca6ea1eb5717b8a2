"""Stage: sensitivity map."""

import logging
from dataclasses import dataclass
from pathlib import Path

from samq.data.tokens import TokenBatch
from samq.files import CALIBRATION_SET_NAME, FISHER_NAME, MAP_NAME, TOKENS_NAME
from samq.progress import bar
from samq.records import CalibrationSet, Labels, SensitivityMap
from samq.sensitivity.fisher import load_fisher, routing, save_fisher
from samq.sensitivity.loss import Labelling
from samq.sensitivity.measure import Origin, measure_sensitivity, merge
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.gpu import in_turn, torch_has_gpu
from tasks.model import TorchModel, memory_of
from tasks.stage import stage
from tasks.text import FirstSequences

log = logging.getLogger("samq.calibrate")


@dataclass(frozen=True)
class Passes:
    """How forward and backward passes are run."""

    batch_size: int = 1  # sequences a pass
    labels: Labels = "model"  # what gradients are taken at: tokens drawn from the model, or those of the text
    seed: int = 0  # of labels drawn from the model


def load_map(sensitivities: Artifact) -> SensitivityMap:
    """The sensitivity map in an artifact of this stage."""
    return SensitivityMap.load(sensitivities.path(MAP_NAME))


@stage(
    "calibrate",
    version=6,
    run_name="calibrate {model.source.name} on {sequences.count}",
    keyed_by=("device",),
    packages=("torch", "transformers"),
    retries=1,
    goes_on=True,
)
@in_turn(torch_has_gpu)
def calibrate(
    at: Workspace,
    folder: Path,
    model: TorchModel,
    sequences: FirstSequences,
    before: Artifact | None,
    passes: Passes,
) -> None:
    """`sensitivity-map.json` and `fisher.safetensors` of the first sequences, going on from those of `before`."""
    torch_model, layout = model.load_with_layout(at)
    earlier = (load_map(before), load_fisher(before.path(FISHER_NAME))) if before else None
    first = earlier[0].samples if earlier else 0
    tokens = sequences.tokens
    with bar(f"calibrate {model.source.name}") as progress:
        sensitivity, fisher = measure_sensitivity(
            torch_model,
            TokenBatch.load(tokens.path(TOKENS_NAME)).part(first, sequences.count),
            layout,
            Origin(model.source.digest(), CalibrationSet.load(tokens.path(CALIBRATION_SET_NAME)).digest()),
            labelling=Labelling(passes.labels, passes.seed, first),
            batch_size=passes.batch_size,
            memory=memory_of(at),
            progress=progress,
        )
    if earlier:
        sensitivity, fisher = merge(earlier, (sensitivity, fisher))
    if (experts := routing(fisher)).missed:
        log.warning("%s: the prices of their weights are unknown; calibrate on more text", experts)
    sensitivity.save(folder / MAP_NAME)
    save_fisher(folder / FISHER_NAME, fisher)
