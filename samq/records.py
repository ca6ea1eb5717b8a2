"""The records that pass between stages: frozen pydantic models, each saved as one JSON file.

A record is identified by its content: `digest()` hashes every field except those a record lists in
`NOT_IDENTITY` (where a thing lies on this machine says nothing about what it is). Tensor names are GGUF's
(`blk.11.ffn_down.weight`), sizes are bytes, and a field's unit is in its name (`_bytes`, `_ms`, `_nats`).
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samq.errors import SamqError


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON-like value in canonical form: sorted keys, no white space."""
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
        """What a file of the record holds: its kind and version, and all fields."""
        return {"schema": self.SCHEMA, **self.model_dump(mode="json")}

    def save(self, path: Path) -> Path:
        """Write the record to `path` whole or not at all, and return the path."""
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
            fields = json.loads(Path(path).read_text())
        except OSError as error:
            raise SamqError(f"cannot read {path}: {error.strerror}; give the path of a {cls.SCHEMA} file") from error
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
    """One measured value, with its standard error (None where it has no meaning) and its sample count."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    stderr: float | None = None
    n: int | None = None


class ModelSource(Record):
    """A causal LM in full precision: an HF folder (downloaded when it came from a hub), a GGUF, or both."""

    SCHEMA: ClassVar[str] = "samq.model-source/1"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"folder", "gguf"})

    name: str = Field(description="what people call it: a hub id, or the name of the folder or file")
    revision: str | None = Field(default=None, description="the hub's commit; None for local files")
    weights_digest: str = Field(description="SHA-256 over the weight files' names and contents")
    tokenizer_digest: str = Field(description="SHA-256 over the configuration's and tokenizer's files")
    folder: Path | None = Field(default=None, description="HF folder on this machine")
    gguf: Path | None = Field(
        default=None,
        description="full-precision GGUF on this machine, instead of HF weights",
    )

    def digest(self) -> str:
        """As of any record, a GGUF's name apart; a folder's stays, as the converter writes it into the GGUF."""
        nameless = self.model_copy(update={"name": ""}) if self.gguf else self
        return super(ModelSource, nameless).digest()


class Toolchain(Record):
    """The llama.cpp in use: what its output depends on."""

    SCHEMA: ClassVar[str] = "samq.toolchain/1"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"bin_folder", "lib_folder", "converter"})

    version: str = Field(description="llama-cpp-python's version, or 'user build'")
    build: str = Field(description="first 12 hex digits of SHA-256 over the programs' and libraries' contents")
    bin_folder: Path
    lib_folder: Path | None = None
    converter: Path | None = Field(default=None, description="convert_hf_to_gguf.py")


class TextSet(Record):
    """Texts as read from a dataset, before any tokenizer has seen them."""

    SCHEMA: ClassVar[str] = "samq.text-set/1"
    NOT_IDENTITY: ClassVar[frozenset[str]] = frozenset({"dataset"})

    dataset: str = Field(description="as the user named it: humaneval, a file, or a hub id")
    texts: tuple[str, ...]


class CalibrationSet(Record):
    """Which text, cut how, into which tokens. The token ids lie beside it in `tokens.npz`."""

    SCHEMA: ClassVar[str] = "samq.calibration-set/1"

    dataset: str = Field(description="as the user named it: humaneval, a file, or a hub id")
    split: str | None = None
    fields: tuple[str, ...] = ()
    samples: int
    sequence_tokens: int = Field(description="longest sequence, in tokens")
    tokens: int = Field(description="all tokens of all sequences, padding not counted")
    seed: int
    tokens_digest: str = Field(description="SHA-256 over the token ids and lengths, in order")


class TensorSensitivity(BaseModel):
    """How much the loss feels one weight tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    shape: tuple[int, ...] = Field(description="as torch has it: (rows, row length), experts first when stacked")
    gradient_norm: float = Field(description="mean over samples of the L2 norm of the sample's loss gradient")
    gradient_norm_stderr: float
    score: float = Field(description="gradient norm over the largest of the model: 0..1")
    fisher: float | None = Field(
        default=None,
        description="mean over the weights of the Fisher information: squared gradients of sequences' summed losses over "
        "all label tokens, nats per token per squared weight; means over rows and columns lie in fisher.safetensors",
    )
    sequence_squares: tuple[float, ...] = Field(
        description="of each calibration sequence: squared L2 norm of its summed loss's gradient"
    )


class SensitivityMap(Record):
    """Gradient norms, and E[g^2] if asked for, of every 2-D weight, in GGUF names; tied weights once."""

    SCHEMA: ClassVar[str] = "samq.sensitivity-map/3"

    model_digest: str
    calibration_digest: str
    labels: Literal["text", "model"] = Field(
        description="next tokens of the text, or sampled from the model itself (the true Fisher information)"
    )
    seed: int
    sequence_tokens: tuple[int, ...] = Field(description="label tokens of each calibration sequence: those in its loss")
    loss_nats: float = Field(description="mean loss per label token")
    tied_embeddings: bool
    tensors: dict[str, TensorSensitivity]

    @property
    def samples(self) -> int:
        """Number of calibration sequences."""
        return len(self.sequence_tokens)

    @property
    def tokens(self) -> int:
        """Label tokens of all sequences."""
        return sum(self.sequence_tokens)


class Substitution(BaseModel):
    """A type that a tensor cannot have, and the one put in its place."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    requested: str
    used: str
    reason: str


# nearest: every weight at the nearest value of its block, as llama-quantize writes it.
# compensated: GPTQ on llama-quantize's scales (samq.quantization.compensation).
Rounding = Literal["nearest", "compensated"]


class Plan(Record):
    """Every quantizable GGUF tensor -> ggml type, explicitly, with what it is predicted to cost."""

    SCHEMA: ClassVar[str] = "samq.plan/1"

    name: str = Field(description="short name of the candidate, such as threshold-0.350 or Q4_K_M")
    policy: Literal["full", "stock", "uniform", "threshold", "budget"]
    parameters: dict[str, float | int | str | bool | None] = Field(description="what the policy was given and decided")
    types: dict[str, str] = Field(description="GGUF tensor name -> ggml type (Q4_K, Q8_0, F16, ...)")
    substitutions: dict[str, Substitution] = {}
    mixture: str = Field(
        default="Q4_K_M",
        description="llama-quantize's file type, the name that general.file_type gets",
    )
    rounding: Rounding = "nearest"
    tensor_bytes: int = Field(description="bytes of all tensors, unquantized ones included")
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
    """What a tensor's rounding does to its layer's output, mean over calibration tokens of the squared error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    nearest: float = Field(description="with every weight at the nearest value, as llama-quantize writes it")
    compensated: float = Field(description="with errors that make up for each other")

    @property
    def ratio(self) -> float:
        """What is left of the error; 1 where there was none."""
        return self.compensated / self.nearest if self.nearest else 1.0


class Compensation(Record):
    """What compensated rounding did to a GGUF; tensors that are not here are as llama-quantize wrote them."""

    SCHEMA: ClassVar[str] = "samq.compensation/1"

    tensors: dict[str, OutputError]


class Price(BaseModel):
    """What one tensor costs in one type."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bytes: int
    kl_nats: float = Field(description="predicted KL that this tensor's rounding adds, nats per token")


class TensorPrices(BaseModel):
    """A tensor's price in every type it can have; the full-precision one costs no KL."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    types: dict[str, Price]
    shares: tuple[float, ...] = Field(
        description="each calibration sequence's part of the tensor's Fisher information, and so of its KL; they sum to 1"
    )


class PriceTable(Record):
    """Bytes and predicted KL of every quantizable tensor in every type of a ladder."""

    SCHEMA: ClassVar[str] = "samq.price-table/2"

    gguf_sha256: str = Field(description="the full-precision GGUF whose tensors are priced")
    map_digest: str
    imatrix_sha256: str | None
    rounding: Rounding = "nearest"
    sequence_tokens: tuple[int, ...] = Field(description="label tokens of each calibration sequence")
    tensors: dict[str, TensorPrices]
    length_changes: dict[str, float] = Field(
        default={},
        description="type -> by how much rounding to the nearest value changes the length of weights, relative: the part of "
        "the rounding errors along the weights themselves, over all tensors priced in it",
    )


class PredictionCheck(Record):
    """How far a plan's predicted KL can be trusted: its second-order cost on samples that did not choose it.

    All in nats per token: what sequences add up to, over their label tokens, with the standard error of that ratio. With g
    the gradient of a sequence's summed loss (labels drawn from the model) and dW the plan's rounding error, a sequence adds
    to `additive` the sum over weights of g^2 dW^2 / 2; to `by_tensor` the sum over tensors of <g, dW>^2 / 2, which has the
    terms between the weights of a tensor; and to `joint` <g, dW>^2 / 2 over all tensors together.
    """

    SCHEMA: ClassVar[str] = "samq.prediction-check/1"

    plan: str = Field(description="the plan's name")
    plan_digest: str
    rounding: Rounding = "nearest"
    samples: int
    tokens: int = Field(description="label tokens of the samples")
    predicted: Metric = Field(description="what the price table says, from the samples that chose the plan")
    additive: Metric
    by_tensor: Metric
    joint: Metric


class QuantizedModel(Record):
    """A GGUF that llama-quantize wrote, or that was assembled, and that the audit passed."""

    SCHEMA: ClassVar[str] = "samq.quantized-model/1"

    name: str
    file: str = Field(description="file name of the GGUF beside this record")
    sha256: str
    file_bytes: int
    tensor_bytes: int
    bits_per_weight: float
    plan_digest: str
    types: dict[str, str] = Field(description="what the audit read back: every tensor -> ggml type")
    metadata: dict[str, str] = Field(description="the samq.* provenance that the GGUF carries")


class Evaluation(Record):
    """Everything measured on one candidate. Metric names carry their unit: `fidelity/mean_kld_nats`."""

    SCHEMA: ClassVar[str] = "samq.evaluation/1"

    name: str
    sha256: str = Field(description="the GGUF that was measured")
    metrics: dict[str, Metric]
    missing: dict[str, str] = Field(default={}, description="what was not measured, and why")
    environment: dict[str, str] = {}

    def why_missing(self, metric: str) -> str | None:
        """Why a metric was not measured, as `missing` says it of the metric or of what it belongs to; None if it does not."""
        parts = metric.split("/")
        names = ("/".join(parts[:length]) for length in range(len(parts), 0, -1))
        return next((self.missing[name] for name in names if name in self.missing), None)
