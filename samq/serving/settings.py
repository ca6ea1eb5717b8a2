"""The settings file of `samq serve`."""

import ipaddress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from samq.settings_file import read_settings


class ShadowSettings(BaseModel):
    """The shadow check: compares a new model with the served one on recent prompts before it takes over."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompts: int = Field(
        default=0, ge=0, description="newest prompts to keep, in memory only, and to replay; 0: no check"
    )
    tokens: int = Field(default=16, ge=1, description="tokens to compare of each answer")
    least_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="the old model stays if the share of equal tokens is lower; None: only record the share",
    )


class ServingSettings(BaseModel):
    """All settings of a server except the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    api_key: SecretStr | None = Field(
        default=None, min_length=1, description="clients must send it as `Authorization: Bearer KEY`"
    )
    allow_without_key: bool = Field(default=False, description="let other machines connect without an API key")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="longest request body")

    context_tokens: int = Field(default=4096, ge=16, description="limit of prompt and answer together, in tokens")
    least_context_tokens: int = Field(
        default=512, ge=16, description="shortest context to load with if there is not enough memory"
    )
    kv_type: Literal["F16", "Q8_0", "Q4_0"] = Field(default="F16", description="type of the KV cache")
    gpu_layers: int | None = Field(
        default=None,
        ge=-1,
        description="layers on the GPU; -1: all; None: all if llama.cpp was built for a GPU, else 0",
    )
    threads: int | None = Field(default=None, ge=1, description="threads of llama.cpp; None: one a physical core")

    queue_size: int = Field(default=32, ge=0, description="requests that may wait; further requests get 429")
    request_timeout_s: float = Field(
        default=120, gt=0, description="time limit of a request, with its wait in the queue"
    )
    drain_timeout_s: float = Field(default=30, ge=0, description="time for requests to finish after SIGTERM")

    poll_interval_s: float = Field(default=10, gt=0, description="time between two checks of the alias or the file")
    warmup_prompt: str = Field(
        default="Name three colours of the rainbow.",
        min_length=1,
        description="prompt that a new model must answer first",
    )
    warmup_tokens: int = Field(default=16, ge=8, description="longest answer to the warm-up prompt, in tokens")
    shadow: ShadowSettings = ShadowSettings()

    @model_validator(mode="after")
    def _private(self) -> "ServingSettings":
        if not (self.api_key or self.allow_without_key or is_loopback(self.host)):
            raise ValueError(
                f"other machines can reach host {self.host}: set SAMQ_API_KEY, or allow_without_key if a proxy in front of "
                "the server checks the clients"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(path: Path | None, **given: Any) -> ServingSettings:
    """The settings of a YAML file; `given` settings that are not None override them. Raises SamqError, see read_settings."""
    return read_settings(path, ServingSettings, "deployments/serving.yaml", **given)
