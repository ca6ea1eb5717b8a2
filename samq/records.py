"""The records that pass between stages: frozen pydantic models, each saved as one JSON file.

A record's identity is its content: `digest()` hashes every field except those in `NOT_IDENTITY`, such as a path on this
machine. Tensor names are GGUF's (`blk.11.ffn_down.weight`), sizes are bytes, and a field's name ends with its unit
(`_bytes`, `_ms`, `_nats`).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samq.errors import SamqError


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON-like value in canonical form, with sorted keys and without white space."""
    text = json.dumps(
        value,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
    )
    return hashlib.sha256(text.encode()).hexdigest()


class Record(BaseModel):
    """A frozen record, saved as one JSON file whose `schema` names its kind and version."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    SCHEMA: ClassVar[str]
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset()

    def digest(self) -> str:
        """SHA-256 (hex) of the record's kind, version and identifying fields."""
        fields = self.model_dump(mode="json", exclude=set(self.NOT_IDENTITY))
        return digest_of({"schema": self.SCHEMA, **fields})

    def content(self) -> dict[str, Any]:
        """The content of the record's file: its kind and version, and all fields."""
        return {"schema": self.SCHEMA, **self.model_dump(mode="json")}

    def save(self, path: Path) -> Path:
        """Write the record to `path`, whole or not at all, and return the path; raises SamqError if that fails."""
        text = json.dumps(self.content(), indent=1, allow_nan=False)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text + "\n")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise SamqError(f"cannot write {path}: {error.strerror}; choose a folder that can be written to") from error
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record; raises SamqError if the file is missing, of another kind or version, or damaged."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise SamqError(f"cannot read {path}: {error.strerror}; give the path of a {cls.SCHEMA} file") from error
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, path: str) -> Self:
        """The record of a file's content; raises SamqError, which names the path, if it is of another kind or damaged."""
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise SamqError(f"{path} is not JSON ({error}); give the path of a {cls.SCHEMA} file") from error
        schema = fields.pop("schema", None) if isinstance(fields, dict) else None
        if schema != cls.SCHEMA:
            raise SamqError(f"{path} holds {schema or 'no record'}, not {cls.SCHEMA}; make it again with this version")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise SamqError(f"{path} is damaged at {where}: {first['msg']}; make it again") from error


class Metric(BaseModel):
    """One measured value, with its standard error and its sample count (None where they do not apply)."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    stderr: float | None = None
    n: int | None = None


class ModelSource(Record):
    """A causal LM in full precision: an HF folder (downloaded if it is from the hub), a GGUF, or both."""

    SCHEMA: ClassVar[str] = "samq.model-source/1"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"folder", "gguf"})

    name: str = Field(description="a hub id, or the name of the folder or file")
    revision: str | None = Field(default=None, description="the hub's commit; None for local files")
    weights_digest: str = Field(description="SHA-256 over the weight files' names and contents")
    tokenizer_digest: str = Field(description="SHA-256 over the configuration's and tokenizer's files")
    folder: Path | None = Field(default=None, description="HF folder on this machine")
    gguf: Path | None = Field(
        default=None,
        description="full-precision GGUF on this machine, instead of HF weights",
    )

    def digest(self) -> str:
        """As for any record, without the name of a GGUF. A folder's name counts: the converter writes it into the GGUF."""
        nameless = self.model_copy(update={"name": ""}) if self.gguf else self
        return super(ModelSource, nameless).digest()


class Toolchain(Record):
    """The llama.cpp in use, identified by what its output depends on."""

    SCHEMA: ClassVar[str] = "samq.toolchain/1"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"bin_folder", "lib_folder", "converter"})

    version: str = Field(description="llama-cpp-python's version, or 'user build'")
    build: str = Field(description="first 12 hex digits of SHA-256 over the programs' and libraries' contents")
    bin_folder: Path
    lib_folder: Path | None = None
    converter: Path | None = Field(default=None, description="convert_hf_to_gguf.py")


class TextSet(Record):
    """The texts of a dataset, before any tokenizer."""

    SCHEMA: ClassVar[str] = "samq.text-set/1"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"dataset"})

    dataset: str = Field(description="as the user named it: humaneval, a file, or a hub id")
    texts: tuple[str, ...]


class CalibrationSet(Record):
    """A dataset cut into token sequences. The token ids are beside the record, in `tokens.npz`."""

    SCHEMA: ClassVar[str] = "samq.calibration-set/1"

    dataset: str = Field(description="as the user named it: humaneval, a file, or a hub id")
    split: str | None = None
    fields: tuple[str, ...] = ()
    samples: int
    sequence_tokens: int = Field(description="longest sequence, in tokens")
    tokens: int = Field(description="all tokens of all sequences, without padding")
    seed: int
    tokens_digest: str = Field(description="SHA-256 over the token ids and lengths, in order")


class TensorSensitivity(BaseModel):
    """Sensitivity of the loss to one weight tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: tuple[int, ...] = Field(description="in torch's order: (rows, row length), experts first if stacked")
    gradient_norm: float = Field(description="mean over samples of the L2 norm of the sample's loss gradient")
    gradient_norm_stderr: float
    score: float = Field(description="gradient norm over the largest of the model: 0..1")
    fisher: float | None = Field(
        default=None,
        description="mean of the Fisher information over the weights, in nats per token per squared weight. It is the squared "
        "gradients of the sequences' summed losses, divided by all label tokens. fisher.safetensors has the means over rows "
        "and columns",
    )
    sequence_squares: tuple[float, ...] = Field(
        description="for each calibration sequence the squared L2 norm of the gradient of its summed loss"
    )


# Labels of the loss: the text's next tokens, or tokens drawn from the model's distribution (the true Fisher information).
Labels = Literal["text", "model"]


class SensitivityMap(Record):
    """Gradient norms, and Fisher information if measured, of every weight matrix by its GGUF name; tied weights once."""

    SCHEMA: ClassVar[str] = "samq.sensitivity-map/3"

    model_digest: str
    calibration_digest: str
    labels: Labels
    seed: int
    sequence_tokens: tuple[int, ...] = Field(
        description="number of label tokens, those in its loss, of each calibration sequence"
    )
    loss_nats: float = Field(description="mean loss per label token")
    tied_embeddings: bool
    tensors: dict[str, TensorSensitivity]

    @property
    def samples(self) -> int:
        """Number of calibration sequences."""
        return len(self.sequence_tokens)

    @property
    def tokens(self) -> int:
        """Number of label tokens of all sequences."""
        return sum(self.sequence_tokens)


class Substitution(BaseModel):
    """A type that a tensor cannot have, and the type that replaces it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    requested: str
    used: str
    reason: str


# nearest: every weight at the nearest value of its block, as llama-quantize writes it.
# compensated: GPTQ on llama-quantize's scales (samq.quantization.compensation).
Rounding = Literal["nearest", "compensated"]


class Plan(Record):
    """A ggml type for every quantizable GGUF tensor, and the plan's size and predicted KL."""

    SCHEMA: ClassVar[str] = "samq.plan/1"

    name: str = Field(description="short name of the candidate, such as threshold-0.350 or Q4_K_M")
    policy: Literal["full", "stock", "uniform", "threshold", "budget"]
    parameters: dict[str, float | int | str | bool | None] = Field(description="the policy's parameters and decisions")
    types: dict[str, str] = Field(description="GGUF tensor name -> ggml type (Q4_K, Q8_0, F16, ...)")
    substitutions: dict[str, Substitution] = {}
    mixture: str = Field(
        default="Q4_K_M",
        description="llama-quantize's file type, the value of general.file_type",
    )
    rounding: Rounding = "nearest"
    tensor_bytes: int = Field(description="bytes of all tensors, including those that are not quantized")
    weights: int = Field(description="number of weights in all tensors")
    predicted_kl_nats: float | None = Field(default=None, description="predicted mean KL to F16, nats per token")
    predicted_kl_stderr: float | None = None
    solver_gap: float | None = None
    gguf_sha256: str = Field(description="the full-precision GGUF it is a plan for")
    map_digest: str | None = None
    imatrix_sha256: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight over all tensors, as llama-quantize prints it (BPW)."""
        return 8 * self.tensor_bytes / self.weights


class OutputError(BaseModel):
    """The squared error of a layer's output from one tensor's rounding, mean over calibration tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    nearest: float = Field(description="with each weight at the nearest value, as llama-quantize writes it")
    compensated: float = Field(description="with compensated rounding (GPTQ)")

    @property
    def ratio(self) -> float:
        """The share of the error that is left; 1 if there was none."""
        return self.compensated / self.nearest if self.nearest else 1.0

    def __add__(self, other: "OutputError") -> "OutputError":
        """Of the rows of both."""
        return OutputError(nearest=self.nearest + other.nearest, compensated=self.compensated + other.compensated)

    def __mul__(self, share: float) -> "OutputError":
        """As a mean over all tokens, of which this share has the error."""
        return OutputError(nearest=self.nearest * share, compensated=self.compensated * share)


class Compensation(Record):
    """Output errors before and after compensated rounding; tensors that are not listed keep llama-quantize's bytes."""

    SCHEMA: ClassVar[str] = "samq.compensation/1"

    tensors: dict[str, OutputError]


class CompensationShares(Record):
    """The share of each tensor's output error that compensated rounding leaves, as its layer's inputs tell."""

    SCHEMA: ClassVar[str] = "samq.compensation-shares/1"

    shares: dict[str, float]


class Price(BaseModel):
    """The cost of one tensor in one type."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    kl_nats: float = Field(description="predicted KL that this tensor's rounding adds, nats per token")


class TensorPrices(BaseModel):
    """A tensor's price in every type that it can have; full precision costs no KL."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    types: dict[str, Price]
    shares: tuple[float, ...] = Field(
        description="each calibration sequence's share of the tensor's Fisher information, and so of its KL; the sum is 1"
    )


class PriceTable(Record):
    """Bytes and predicted KL of every quantizable tensor in every type that was priced."""

    SCHEMA: ClassVar[str] = "samq.price-table/2"

    gguf_sha256: str = Field(description="the full-precision GGUF whose tensors are priced")
    map_digest: str
    imatrix_sha256: str | None
    rounding: Rounding = "nearest"
    sequence_tokens: tuple[int, ...] = Field(description="label tokens of each calibration sequence")
    tensors: dict[str, TensorPrices]
    length_changes: dict[str, float] = Field(
        default={},
        description="type -> relative change of the weights' length by rounding to the nearest value, over all tensors with a "
        "price in the type. It is the component of the rounding errors along the weights",
    )
    scarce_experts: dict[str, dict[int, int]] = Field(
        default={},
        description="stacked tensor -> number of an expert -> calibration tokens that it saw, if they were too few to know its "
        "price",
    )


class PredictionCheck(Record):
    """Check of a plan's predicted KL: its second-order cost on samples that did not choose it.

    Each figure is a sum over sequences divided by their label tokens, in nats per token, with the standard error of that
    ratio. Let g be the gradient of a sequence's summed loss (labels drawn from the model), and dW the plan's rounding error.
    A sequence adds three terms:

    - to `additive` the sum over weights of g^2 dW^2 / 2;
    - to `by_tensor` the sum over tensors of <g, dW>^2 / 2, which includes the terms between the weights of a tensor;
    - to `joint` <g, dW>^2 / 2 over all tensors together.
    """

    SCHEMA: ClassVar[str] = "samq.prediction-check/1"

    plan: str = Field(description="the plan's name")
    plan_digest: str
    rounding: Rounding = "nearest"
    samples: int
    tokens: int = Field(description="label tokens of the samples")
    predicted: Metric = Field(description="by the price table, from the samples that chose the plan")
    additive: Metric
    by_tensor: Metric
    joint: Metric


class QuantizedModel(Record):
    """A GGUF that llama-quantize wrote or SAMQ assembled, and that passed the audit."""

    SCHEMA: ClassVar[str] = "samq.quantized-model/1"

    name: str
    file: str = Field(description="file name of the GGUF beside this record")
    sha256: str
    file_bytes: int
    tensor_bytes: int
    bits_per_weight: float
    plan_digest: str
    types: dict[str, str] = Field(description="every tensor -> ggml type, as the audit read it back")
    metadata: dict[str, str] = Field(description="the samq.* metadata of the GGUF")


class Evaluation(Record):
    """All measurements of one candidate. A metric's name ends with its unit: `fidelity/mean_kld_nats`."""

    SCHEMA: ClassVar[str] = "samq.evaluation/1"

    name: str
    sha256: str = Field(description="the GGUF that was measured")
    metrics: dict[str, Metric]
    missing: dict[str, str] = Field(default={}, description="metric, or group of metrics -> why it was not measured")
    environment: dict[str, str] = {}

    def why_missing(self, metric: str) -> str | None:
        """Why a metric was not measured, by its own entry in `missing` or its group's; None if there is no entry."""
        parts = metric.split("/")
        names = ("/".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((self.missing[name] for name in names if name in self.missing), None)
