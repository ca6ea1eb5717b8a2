"""The policy file of a promotion: the conditions that a version must meet before it goes into production."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from samq.settings_file import read_settings
from samq.sweep.significance import MARGIN


class _Policy(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AccuracyPolicy(_Policy):
    """Benchmarks on which the model must not get worse."""

    benchmarks: tuple[Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")], ...] = Field(
        min_length=1, description="TASK/METRIC, as in the metric eval/TASK/METRIC: hellaswag/acc_norm"
    )
    margin: float = Field(
        default=MARGIN, ge=0, lt=1, description="non-inferiority margin, as a share of the reference's value"
    )


class JsonPolicy(_Policy):
    """The share of answers that are valid JSON of the required schema must not get worse."""

    margin: float = Field(
        default=MARGIN, ge=0, lt=1, description="non-inferiority margin, as a share of the reference's value"
    )


class PromotionPolicy(_Policy):
    """The conditions for a promotion. All fields are required, so that none is forgotten; null turns a condition off."""

    accuracy: AccuracyPolicy | None
    json_answers: JsonPolicy | None
    max_mean_kld_nats: float | None = Field(gt=0, description="mean KL divergence to full precision, nats per token")
    max_predicted_vram_bytes: int | None = Field(gt=0, description="weights, KV cache and compute buffers")
    max_latency_p99_ms: float | None = Field(gt=0, description="of a request, as the evaluation times it")
    audit: bool = Field(description="the file is the registered and measured one, and matches its plan")
    provenance: tuple[str, ...] | None = Field(
        description="samq.* keys that the GGUF must carry; the version must then have its tags too"
    )


def load_policy(path: Path) -> PromotionPolicy:
    """Read a YAML file; raises SamqError that names the faulty field."""
    return read_settings(path, PromotionPolicy, "deployments/promotion/")
