"""The policy file of a promotion: what must hold of a version before its users get it."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from samq.settings_file import read_settings
from samq.sweep.significance import MARGIN


class _Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccuracyPolicy(_Policy):
    """What users ask of the model must not get worse."""

    benchmarks: tuple[Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")], ...] = Field(
        min_length=1, description="TASK/METRIC, as in the metric eval/TASK/METRIC: hellaswag/acc_norm"
    )
    margin: float = Field(default=MARGIN, ge=0, lt=1, description="loss that counts as none, relative to the reference")


class JsonPolicy(_Policy):
    """Answers that are valid JSON of the schema asked for must not get fewer."""

    margin: float = Field(default=MARGIN, ge=0, lt=1, description="loss that counts as none, relative to the reference")


class PromotionPolicy(_Policy):
    """What must hold of a version. A condition that is null is not asked for; none can be forgotten, as all are required."""

    accuracy: AccuracyPolicy | None
    json_answers: JsonPolicy | None
    max_mean_kld_nats: float | None = Field(gt=0, description="mean KL divergence to full precision, nats per token")
    max_predicted_vram_bytes: int | None = Field(gt=0, description="weights, KV cache and compute buffers")
    max_latency_p99_ms: float | None = Field(gt=0, description="of a request as the evaluation times it")
    audit: bool = Field(description="the file is the one that was registered and measured, and is its plan")
    provenance: tuple[str, ...] | None = Field(
        description="samq.* keys that the GGUF must carry; the version's tags are asked for with them"
    )


def load_policy(path: Path) -> PromotionPolicy:
    """Read a YAML file; raises SamqError that names the field at fault."""
    return read_settings(path, PromotionPolicy, "deployments/promotion/")
