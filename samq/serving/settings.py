"""How a model is served: the settings file of `samq serve`."""

import ipaddress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from samq.settings_file import read_settings


class ShadowSettings(BaseModel):
    """The check of a new model against the one that serves, on recent prompts, before it takes over."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    prompts: int = Field(
        default=0, ge=0, description="newest prompts that are kept, in memory only, and replayed; 0: none, no check"
    )
    tokens: int = Field(default=16, ge=1, description="tokens of each answer that are compared")
    least_agreement: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="under this share of equal tokens the old model stays; None: only recorded",
    )


class ServingSettings(BaseModel):
    """Everything a person may set about a server, the model apart."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address to listen at")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen at; 0: any that is free")
    api_key: SecretStr | None = Field(
        default=None, min_length=1, description="clients must send it as `Authorization: Bearer KEY`"
    )
    allow_without_key: bool = Field(default=False, description="listen beyond this machine without an API key")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="longest request body")

    context_tokens: int = Field(default=4096, ge=16, description="longest prompt and answer together, in tokens")
    least_context_tokens: int = Field(
        default=512, ge=16, description="how far the context is shortened when memory does not suffice"
    )
    kv_type: Literal["F16", "Q8_0", "Q4_0"] = Field(default="F16", description="type of the KV cache")
    gpu_layers: int | None = Field(
        default=None,
        ge=-1,
        description="layers on the GPU, -1: all; None: all if llama.cpp was built for one, else 0",
    )
    threads: int | None = Field(default=None, ge=1, description="threads of llama.cpp; None: one a physical core")

    queue_size: int = Field(default=32, ge=0, description="requests that may wait; more are answered 429")
    request_timeout_s: float = Field(default=120, gt=0, description="limit of a request, waiting included")
    drain_timeout_s: float = Field(default=30, ge=0, description="how long requests may go on after SIGTERM")

    poll_interval_s: float = Field(default=10, gt=0, description="how often the alias, or the file, is looked at")
    warmup_prompt: str = Field(
        default="Name three colours of the rainbow.", min_length=1, description="what a new model must answer first"
    )
    warmup_tokens: int = Field(default=16, ge=8, description="longest answer to it")
    shadow: ShadowSettings = ShadowSettings()

    @model_validator(mode="after")
    def _private(self) -> "ServingSettings":
        if not (self.api_key or self.allow_without_key or is_loopback(self.host)):
            raise ValueError(
                f"host {self.host} can be reached from other machines: set SAMQ_API_KEY, "
                "or allow_without_key if something in front of the server checks who asks"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def load_settings(path: Path | None, **given: Any) -> ServingSettings:
    """The settings of a YAML file, those that are `given` (and not None) before them; raises SamqError, see read_settings."""
    return read_settings(path, ServingSettings, "deployments/serving.yaml", **given)
