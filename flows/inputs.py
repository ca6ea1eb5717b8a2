"""What every candidate is made from and measured against: model, text, tokens, importance matrix, baseline."""

from dataclasses import dataclass

from flows.parameters import RequantizeParameters
from samq.data.datasets import require_disjoint
from samq.quantization.provenance import provenance
from samq.store import Artifact
from samq.sweep.sweep import MadeFrom
from samq.workspace import Workspace
from tasks.agreement import agreement
from tasks.convert import convert
from tasks.evaluate import baseline
from tasks.layer_inputs import InputText, layer_inputs
from tasks.mmproj import convert_mmproj
from tasks.model import TorchModel
from tasks.source import find_model
from tasks.target import Target
from tasks.text import heldout, load_calibration_set, load_text, tokenize


@dataclass(frozen=True)
class Inputs:
    """Made once for a run of the flow."""

    made_from: MadeFrom  # what reports and runs name
    model: TorchModel  # what gradients are taken of
    target: Target  # what plans are for
    tokens: Artifact  # calibration sequences
    available: int  # how many of them are not kept for checks
    input_text: InputText  # what layers' inputs are measured on
    layer_inputs: Artifact | None  # None: there is no importance matrix, and no plan is compensated
    heldout: Artifact
    baseline: Artifact

    @property
    def provenance(self) -> dict[str, str]:
        """What every GGUF says of itself, beside its plan."""
        return provenance(self.made_from)


def prepare(at: Workspace, parameters: RequantizeParameters) -> Inputs:
    """Find and convert the model, see that torch computes the same, prepare the text and the baseline's logits."""
    model, calibration = parameters.model, parameters.calibration
    require_disjoint(calibration.dataset, parameters.heldout)
    source = find_model(model.source, model.revision, model.hf_folder)
    text, heldout_text = load_text(calibration.dataset), load_text(parameters.heldout)
    full = convert(at, source, model.precision)
    mmproj = convert_mmproj(at, source, model.mmproj)
    tokens = tokenize(at, full, text, calibration.dataset.seed, calibration.sequence_tokens, calibration.packing)
    calibration_set = load_calibration_set(tokens, calibration.dataset)
    available = calibration.sequences_left(calibration_set.samples)
    torch_model = TorchModel(source, full, model.dtype)
    agreement(at, torch_model, tokens)
    input_text = InputText(tokens, available, calibration.gram_tokens, calibration.batch_size)
    compensated, of_layers = parameters.candidates.compensated, None
    if calibration.imatrix or compensated:
        of_layers = layer_inputs(at, torch_model, input_text, compensated)
    chunks = heldout(at, full, heldout_text)
    return Inputs(
        made_from=MadeFrom(source, calibration_set, heldout_text, at.toolchain, mmproj),
        model=torch_model,
        target=Target(full, of_layers if calibration.imatrix else None),
        tokens=tokens,
        available=available,
        input_text=input_text,
        layer_inputs=of_layers,
        heldout=chunks,
        baseline=baseline(at, full, chunks, parameters.evaluation),
    )
