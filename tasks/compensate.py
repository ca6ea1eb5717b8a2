"""Stages of compensated rounding (GPTQ): all plans of a sweep together, or a file that another program quantized."""

from collections.abc import Callable, Mapping
from pathlib import Path

from samq.errors import SamqError
from samq.files import COMPENSATION_NAME, GGUF_NAME, IMATRIX_NAME, QUANTIZED_NAME
from samq.gguf import audit
from samq.gguf.file import read_tensors
from samq.gguf.nearest import NearestRounding
from samq.llamacpp.convert import link_or_copy
from samq.progress import bar
from samq.quantization.compensated_file import PlannedFile
from samq.quantization.compensation import write_compensated
from samq.records import Compensation
from samq.sensitivity.gram import input_moments
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.gpu import in_turn, torch_has_gpu
from tasks.layer_inputs import InputText
from tasks.model import TorchModel, memory_of
from tasks.plan import load_plan
from tasks.stage import stage

_ERRORS_NAME = "errors.jsonl"  # in the scratch folder


def _rounded_name(name: str) -> str:
    return f"{name}.gguf"


def _errors_name(name: str) -> str:
    return f"{name}.json"


@stage(
    "compensate",
    version=4,
    run_name="compensate {model.source.name}",
    keyed_by=("device",),
    packages=("torch", "transformers", "llama-cpp-python"),
    retries=1,
    goes_on=True,
)
@in_turn(torch_has_gpu)
def compensate(
    at: Workspace,
    folder: Path,
    model: TorchModel,
    text: InputText,
    imatrix: Artifact | None,
    plans: dict[str, Artifact],
    provenance: dict[str, str],
) -> None:
    """`NAME.gguf` and `NAME.json` of each plan: its file, not audited yet, and the errors of its layers' outputs.

    The model goes through once for all plans.
    """
    full, matrix = model.full.path(GGUF_NAME), imatrix.path(IMATRIX_NAME) if imatrix else None
    loaded = {name: load_plan(plan) for name, plan in plans.items()}
    audit.require_space(folder, ", ".join(loaded), sum(plan.tensor_bytes for plan in loaded.values()))

    def create(work: Path) -> dict[str, PlannedFile]:
        return {
            name: PlannedFile.create(
                work / _rounded_name(name), full, plan, audit.provenance_metadata(plan, provenance), matrix
            )
            for name, plan in loaded.items()
        }

    rounding = NearestRounding(full, matrix)
    errors = _compensate(at, folder, model, text, create, rounding, everything=True)
    for name, of_one in errors.items():
        of_one.save(folder / _errors_name(name))


@stage("candidate", version=1, run_name="audit {name}")
def candidate(
    at: Workspace,
    folder: Path,
    name: str,
    full: Artifact,
    plan: Artifact,
    built: Artifact,
    provenance: dict[str, str],
) -> None:
    """The files of `quantize` and `compensation.json`: one of the files in an artifact of `compensate`, audited."""
    partial, loaded = folder / f"{GGUF_NAME}.partial", load_plan(plan)
    link_or_copy(built.path(_rounded_name(name)), partial)
    with bar(f"audit {name}"):
        metadata = audit.provenance_metadata(loaded, provenance)
        audit.accept(partial, loaded, metadata, full.path(GGUF_NAME)).save(folder / QUANTIZED_NAME)
    Compensation.load(built.path(_errors_name(name))).save(folder / COMPENSATION_NAME)


@stage(
    "compensate_file",
    version=3,
    run_name="compensate a file of {model.source.name}",
    keyed_by=("device",),
    packages=("torch", "transformers", "llama-cpp-python"),
    retries=1,
    goes_on=True,
)
@in_turn(torch_has_gpu)
def compensate_file(at: Workspace, folder: Path, model: TorchModel, text: InputText, quantized: Artifact) -> None:
    """`model.gguf` and `compensation.json`: a quantized GGUF, with every tensor compensated that can be."""
    full, nearest = model.full.path(GGUF_NAME), quantized.path(GGUF_NAME)
    shapes = [{tensor.name: tensor.extents for tensor in read_tensors(path).values()} for path in (full, nearest)]
    if shapes[0] != shapes[1]:
        raise SamqError(f"{nearest} and {full} do not hold the same tensors; give the GGUF that it was made from")
    audit.require_space(folder, nearest.name, nearest.stat().st_size)

    def create(work: Path) -> dict[str, PlannedFile]:
        return {"": PlannedFile.copy(work / GGUF_NAME, nearest)}

    rounding = NearestRounding(nearest)
    errors = _compensate(at, folder, model, text, create, rounding, everything=False)
    errors[""].save(folder / COMPENSATION_NAME)


def _compensate(
    at: Workspace,
    folder: Path,
    model: TorchModel,
    text: InputText,
    create: Callable[[Path], Mapping[str, PlannedFile]],
    rounded: NearestRounding,
    *,
    everything: bool,
) -> dict[str, Compensation]:
    """Write the files that `create` gives where a killed process goes on with them, and link them into the folder.

    They stay there, with all that says what is done, until the folder is in the store: the process may be killed before.
    """
    torch_model, layout = model.load_with_layout(at)
    work = at.scratch or folder
    work.mkdir(parents=True, exist_ok=True)
    files, memory = create(work), memory_of(at)
    with bar(f"compensate {model.source.name}") as progress:
        pieces = input_moments(
            torch_model,
            text.load(),
            layout.weights,
            batch_size=text.batch_size,
            memory=memory,
            progress=progress,
        )
        full, log = NearestRounding(model.full.path(GGUF_NAME)), work / _ERRORS_NAME
        errors = write_compensated(files, full, rounded, pieces, log, everything=everything, devices=memory.devices)
    if work == folder:
        log.unlink(missing_ok=True)
    else:
        for file in files.values():
            link_or_copy(file.path, folder / file.path.name)
    return errors
