"""What a person may ask of the re-quantization flow: one pydantic model, a form in Prefect's page, a YAML file."""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from samq.allocation.budget import BudgetPolicy
from samq.allocation.budget_notation import read_budget, read_size
from samq.allocation.threshold import ThresholdPolicy, resolve_threshold
from samq.allocation.types import DEFAULT_TYPES
from samq.data.datasets import DatasetSpec
from samq.errors import SamqError
from samq.evaluation.settings import BenchmarkSettings, EvaluationSettings
from samq.gguf.formats import UNMEASURED, check_mixture, check_type
from samq.home import without_password
from samq.llamacpp.process import PROGRAM_TIMEOUT_S
from samq.records import Labels, Rounding
from samq.settings_file import read_settings
from samq.sweep.selection import Finalists, SelectionRule
from samq.sweep.serving_cost import CostSettings
from samq.sweep.significance import MARGIN

GRAM_TOKENS = 2**16  # more tokens gain little: a third of them is 2 % worse on code-46m
LEAST_SEQUENCES = 2  # to calibrate on: one alone has no standard error


class Parameters(BaseModel):
    """Shared by every block of parameters: unknown names are refused, not ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelParameters(Parameters):
    """Which model, and in which full precision it is the baseline."""

    source: str = Field(
        description="hub id, folder in Hugging Face's layout, GGUF file, or package:<module>/<file> of an installed package. "
        "rescaled:<GGUF> is the same model with other weights, off the grid of the type it was quantized to"
    )
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id")
    hf_folder: Path | None = Field(default=None, description="tokenizer and configuration for a GGUF source")
    precision: str = Field(default="F16", pattern="^(F16|BF16)$", description="of the baseline GGUF")
    mmproj: str = Field(
        default="F16",
        pattern="^(F16|Q8_0)$",
        description="type of a multimodal model's vision or audio part, which is written to a file of its own",
    )
    dtype: str = Field(default="float32", pattern="^(float32|bfloat16|float16)$", description="torch's, for gradients")
    device: str = Field(default="auto", description="auto (all GPUs, else the CPU), cpu, or cuda:0")
    memory_limit: str | None = Field(
        default=None,
        description="memory of the device that SAMQ counts on for gradients and inputs of layers, such as 20GiB; default: what "
        "is free. If it is less than twice the model, the model's blocks stay on disk until they run",
    )

    @field_validator("memory_limit")
    @classmethod
    def _is_a_size(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                read_size(text)
            except SamqError as error:
                raise ValueError(str(error)) from error
        return text

    @property
    def memory_limit_bytes(self) -> int | None:
        """The limit in bytes."""
        return None if self.memory_limit is None else read_size(self.memory_limit)


class CalibrationParameters(Parameters):
    """Which text the sensitivities and the importance matrix are measured on."""

    dataset: DatasetSpec
    sequence_tokens: int = Field(default=512, ge=2, description="longest sequence; longer text is cut")
    packing: bool = Field(default=False, description="cut long text into consecutive sequences instead of one a sample")
    batch_size: int = Field(default=1, ge=1, description="sequences a forward and backward pass")
    labels: Labels = Field(
        default="model",
        description="tokens that gradients are taken at. model: drawn from the model, for the true Fisher information, which "
        "predicts KL; text: those of the text, for the empirical Fisher information",
    )
    seed: int = Field(default=0, ge=0, description="of labels drawn from the model")
    first_sequences: int = Field(
        default=32, ge=2, description="sequences measured at first; as many more follow as the precision takes"
    )
    precision: float = Field(
        default=0.1,
        gt=0,
        description="largest relative standard error of a budget plan's predicted KL; once all sequences are used the "
        "error is what it is",
    )
    check_sequences: int = Field(
        default=8, ge=0, description="last sequences, kept apart to check the prediction on, two at least; 0: no check"
    )
    gram_tokens: int = Field(
        default=GRAM_TOKENS,
        ge=1,
        description="tokens that the layers' inputs are measured on, for the importance matrix and compensated rounding; more "
        "bring little",
    )
    imatrix: bool = Field(default=True, description="make an importance matrix of this text and quantize with it")

    @field_validator("check_sequences")
    @classmethod
    def _enough_to_check(cls, sequences: int) -> int:
        if sequences == 1:
            raise ValueError("one sequence has no standard error; give 0, or 2 and more")
        return sequences

    @model_validator(mode="after")
    def _enough_to_calibrate(self) -> Self:
        # Packing may cut more sequences than there are samples.
        if self.dataset.samples is not None and not self.packing:
            try:
                self.sequences_left(self.dataset.samples)
            except SamqError as error:
                raise ValueError(str(error)) from error
        return self

    def sequences_left(self, sequences: int) -> int:
        """How many sequences are not kept apart for the check; raises SamqError if they are too few to calibrate on."""
        left = sequences - self.check_sequences
        if left < LEAST_SEQUENCES:
            raise SamqError(
                f"{sequences} calibration sequences, {self.check_sequences} of them kept apart by check_sequences, leave "
                f"fewer than {LEAST_SEQUENCES} to calibrate on; raise samples or lower check_sequences"
            )
        return left


class CandidateParameters(Parameters):
    """Which GGUFs to build and compare."""

    stock: tuple[str, ...] = Field(
        default=("Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M"),
        description="llama-quantize's mixtures, as they are: what SAMQ's plans have to beat",
    )
    budgets: tuple[str, ...] = Field(
        default_factory=lambda given: tuple(f"size-of:{mixture}" for mixture in given.get("stock", ())),
        description="sizes to fill: 1500MiB, 4.5bpw, size-of:Q4_K_M (which is then a candidate as well), or vram:24GiB@8192. "
        "Default: the sizes of all stock mixtures, so that each is compared with a plan of its size",
    )
    budget_policy: BudgetPolicy = BudgetPolicy()
    ladder: tuple[str, ...] = Field(default=DEFAULT_TYPES, description="types that budgets choose from")
    rounding: Rounding = Field(
        default="compensated",
        description="of the budgets' plans. compensated: GPTQ on llama-quantize's own scales, where the errors of a row cancel, "
        "at the same file size; nearest: the bytes that llama-quantize writes",
    )
    thresholds: tuple[float | str, ...] = Field(
        default=(), description="scores above which a block keeps its bits: 0.35, or a quantile of the scores: q0.75"
    )
    proposed_thresholds: int = Field(
        default=0, ge=0, description="how many thresholds to choose where the plan changes"
    )
    policy: ThresholdPolicy = ThresholdPolicy()
    unmeasured_type: str = Field(
        default=UNMEASURED,
        description="type of tensors that are not measured, such as layers for multi-token prediction, which transformers does "
        "not load. A tensor that is smaller already keeps its type",
    )
    keep: Finalists = Field(
        default="all",
        description="candidates whose files stay after the sweep. front: the Pareto front of bytes and KL, with the best and "
        "the stock mixture of its size; best: those two; all. Full precision and files that an alias points at always stay. "
        "A later run that needs a dropped file makes it again",
    )

    @field_validator("stock")
    @classmethod
    def _known_mixtures(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_mixture(name) for name in names)

    @field_validator("ladder")
    @classmethod
    def _known_types(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_type(name) for name in names)

    @field_validator("unmeasured_type")
    @classmethod
    def _known_type(cls, name: str) -> str:
        return check_type(name)

    @field_validator("budgets")
    @classmethod
    def _readable_budgets(cls, budgets: tuple[str, ...]) -> tuple[str, ...]:
        for budget in budgets:
            read_budget(budget)
        return budgets

    @field_validator("thresholds")
    @classmethod
    def _thresholds_in_range(cls, thresholds: tuple[float | str, ...]) -> tuple[float | str, ...]:
        for threshold in thresholds:
            resolve_threshold(threshold, {"any": 0.0})
        return thresholds

    @property
    def compensated(self) -> bool:
        """Whether any plan gets compensated rounding, whose errors cancel each other."""
        return bool(self.budgets) and self.rounding == "compensated"

    @property
    def ladder_types(self) -> tuple[str, ...]:
        """The types that budgets choose from; none without a budget."""
        return self.ladder if self.budgets else ()

    @property
    def threshold_policy(self) -> ThresholdPolicy | None:
        """The policy of the threshold plans; None without any."""
        return self.policy if self.thresholds or self.proposed_thresholds else None

    @property
    def mixtures(self) -> tuple[str, ...]:
        """The stock candidates: those asked for, and those whose size a budget is."""
        sizes = (read_budget(budget).mixture for budget in self.budgets)
        return tuple(dict.fromkeys((*self.stock, *(mixture for mixture in sizes if mixture))))


class BenchmarkParameters(BenchmarkSettings):
    """lm-eval's tasks, and which candidates they are put to."""

    tasks: tuple[str, ...] = Field(
        default=(),
        description="names of tasks or groups: SAMQ's own, that need no network (samq_hellaswag, samq_gsm8k, "
        "samq_truthfulqa_mc1, samq_humaneval, samq_json), lm-eval's (mmlu, gsm8k, ...), or .yaml files",
    )
    candidates: Finalists = Field(
        default="front",
        description="front: the Pareto front of bytes and KL, with the best and the stock mixture of its size; best: those "
        "two; all: every candidate. Full precision is always among them",
    )
    margin: float = Field(default=MARGIN, ge=0, description="largest relative loss that counts as none: 0.01 is 1 %")

    @property
    def settings(self) -> BenchmarkSettings:
        """Settings shared by all candidates."""
        return BenchmarkSettings(**self.model_dump(include=set(BenchmarkSettings.model_fields)))


def _without_password(uri: str) -> str:
    """Parameters are shown by Prefect and MLflow."""
    if without_password(uri) != uri:
        raise ValueError(
            "the URI holds a password, which others would see; give it by PGPASSWORD or MLFLOW_TRACKING_URI"
        )
    return uri


TrackingUri = Annotated[str, AfterValidator(_without_password)]


class TrackingParameters(Parameters):
    """Where results go."""

    uri: TrackingUri | None = Field(
        default=None, description="MLflow's tracking URI; default: SQLite in the SAMQ folder"
    )
    experiment: str = "samq"
    registered_model: str | None = Field(
        default=None, description="register the best candidate under this name; without / : and quotation marks"
    )

    @field_validator("registered_model")
    @classmethod
    def _name_that_mlflow_takes(cls, name: str | None) -> str | None:
        # As mlflow.utils.validation has it; a quotation mark would end the name in a search.
        if name is not None and (
            name.strip() in ("", ".") or name.startswith("..") or any(sign in name for sign in "/:'\"")
        ):
            raise ValueError(f"{name!r} cannot name a registered model; give a name without / : and quotation marks")
        return name


class RequantizeParameters(Parameters):
    """One run of the re-quantization flow."""

    name: str = Field(default="requantize", pattern=r"^[\w.-]+$", description="name of the run")
    model: ModelParameters
    calibration: CalibrationParameters
    heldout: DatasetSpec = Field(description="text that fidelity is measured on; must not overlap the calibration's")
    candidates: CandidateParameters = CandidateParameters()
    evaluation: EvaluationSettings = EvaluationSettings()
    benchmarks: BenchmarkParameters = BenchmarkParameters()
    selection: SelectionRule = SelectionRule()
    cost: CostSettings | None = Field(default=None, description="what a GPU costs, for the report's cost sheet")
    tracking: TrackingParameters = TrackingParameters()
    timeout_s: float = Field(default=PROGRAM_TIMEOUT_S, gt=0, description="time limit of each llama.cpp program")


def load_parameters(path: Path) -> RequantizeParameters:
    """Read a YAML file; raises SamqError that names the field at fault."""
    return read_settings(path, RequantizeParameters, "deployments/parameters/")


def read_parameters(path: str) -> dict[str, Any]:
    """A build step for prefect.yaml: the validated file, as the deployment's `parameters`."""
    return {"parameters": load_parameters(Path(path)).model_dump(mode="json", exclude_defaults=True)}
