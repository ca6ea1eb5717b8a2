"""The settings file of `samq serve`."""

import ipaddress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from samq.settings_file import read_settings

EngineName = Literal["llama-server", "llama-cpp-python"]
KvType = Literal["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "IQ4_NL", "Q4_1", "Q4_0"]
_SLOTS = 4  # of llama-server, if the settings name no number: as many as it has by itself


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


class SpeculationSettings(BaseModel):
    """Speculative decoding: something quick proposes tokens, and the model checks several at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["none", "draft", "mtp", "ngram"] = Field(
        default="none",
        description="who proposes: a small draft model, the model's own MTP layers, or repetitions in the text (ngram)",
    )
    draft_model: Path | None = Field(default=None, description="GGUF of the draft model, for kind draft")
    tokens: int | None = Field(
        default=None, ge=1, description="most tokens to propose at once; None: llama-server's own"
    )

    @model_validator(mode="after")
    def _whole(self) -> "SpeculationSettings":
        if (self.kind == "draft") != (self.draft_model is not None):
            raise ValueError("kind draft and draft_model go together: name both or neither")
        return self


class ServingSettings(BaseModel):
    """All settings of a server except the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    api_key: SecretStr | None = Field(
        default=None, min_length=1, description="clients must send it as `Authorization: Bearer KEY`"
    )
    api_keys: dict[str, SecretStr] = Field(default={}, description="more keys, by the name of who has them")
    allow_without_key: bool = Field(default=False, description="let other machines connect without an API key")
    cors_origins: list[str] = Field(
        default=[], description='origins of web pages that may use the server, such as "https://chat.example"; "*": all'
    )

    engine: EngineName = Field(
        default="llama-server",
        description="program that answers: llama-server, or llama-cpp-python's own server (one request at a time)",
    )
    engine_flags: dict[str, bool | int | float | str] = Field(
        default={},
        description="more flags of the engine by name, such as `cache-ram: 8192`; of llama-cpp-python: its model settings",
    )
    slots: int | None = Field(
        default=None, ge=1, description="requests to answer at the same time; None: 4, with llama-cpp-python 1"
    )
    context_tokens: int = Field(default=4096, ge=16, description="limit of prompt and answer of a request, in tokens")
    least_context_tokens: int = Field(
        default=512, ge=16, description="shortest context to load with if there is not enough memory"
    )
    kv_type: KvType = Field(default="F16", description="type of the KV cache")
    kv_type_v: KvType | None = Field(default=None, description="type of the cache's values; None: as kv_type")
    gpu_layers: int | None = Field(
        default=None, ge=-1, description="layers on the GPU; -1: all; None: as many as its memory holds"
    )
    threads: int | None = Field(default=None, ge=1, description="threads of llama.cpp; None: one a physical core")
    mmproj: Path | None = Field(
        default=None, description="vision or audio part for a GGUF file; a registered version brings its own"
    )
    speculation: SpeculationSettings = SpeculationSettings()

    queue_size: int = Field(default=32, ge=0, description="requests that may wait; further requests get 429")
    request_timeout_s: float = Field(
        default=120, gt=0, description="time limit of a request, from its first byte to the answer's last"
    )
    head_timeout_s: float = Field(default=10, gt=0, description="time limit of a request's head")
    body_timeout_s: float = Field(default=30, gt=0, description="time limit of a request's body")
    keep_alive_s: float = Field(
        default=75, gt=0, description="time that an idle connection stays open; longer than the proxy's in front"
    )
    max_connections: int = Field(default=1000, ge=1, description="open connections; further ones are closed at once")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, description="longest request body")
    max_messages: int = Field(default=2000, ge=1, description="most messages, or prompts, of a request")
    max_parts: int = Field(default=4000, ge=1, description="most content parts of all messages together")
    max_schema_bytes: int = Field(
        default=64 * 1024, ge=256, description="longest JSON schemas (answer and tools together) or grammar"
    )
    comment_interval_s: float = Field(
        default=15,
        gt=0,
        description="a stream that says nothing for so long gets a comment, so that proxies keep it open",
    )
    drain_timeout_s: float = Field(default=30, ge=0, description="time for requests to finish after SIGTERM")

    start_timeout_s: float = Field(default=900, gt=0, description="time limit of the engine's start")
    hang_timeout_s: float = Field(
        default=120, gt=0, description="a busy engine that does not respond for this long is restarted"
    )
    poll_interval_s: float = Field(default=10, gt=0, description="time between two checks of the alias or the file")
    warmup_prompt: str = Field(
        default="Name three colours of the rainbow.",
        min_length=1,
        description="prompt that a new model must answer first",
    )
    warmup_tokens: int = Field(default=16, ge=8, description="longest answer to the warm-up prompt, in tokens")
    shadow: ShadowSettings = ShadowSettings()
    model_names: list[str] = Field(
        default=[], description='other names that requests may give the model, such as "gpt-4o"; "*": any name'
    )

    @property
    def parallel(self) -> int:
        """Requests that the engine answers at the same time."""
        return self.slots or (_SLOTS if self.engine == "llama-server" else 1)

    @property
    def kv_types(self) -> tuple[str, str]:
        """Types of the KV cache's keys and values."""
        return self.kv_type, self.kv_type_v or self.kv_type

    @property
    def keys(self) -> dict[str, bytes]:
        """Name -> API key. The key of SAMQ_API_KEY has the name `default`."""
        every = ({"default": self.api_key} if self.api_key else {}) | self.api_keys
        return {name: key.get_secret_value().encode() for name, key in every.items()}

    @model_validator(mode="after")
    def _private(self) -> "ServingSettings":
        if not (self.keys or self.allow_without_key or is_loopback(self.host)):
            raise ValueError(
                f"other machines can reach host {self.host}: set SAMQ_API_KEY, or allow_without_key if a proxy in front of "
                "the server checks the clients"
            )
        if not all(self.keys.values()):
            raise ValueError("a key of api_keys is empty: write the key, or leave the name out")
        return self

    @model_validator(mode="after")
    def _one_at_a_time(self) -> "ServingSettings":
        if self.engine == "llama-cpp-python":
            for field, set_so in {
                "slots above 1": self.parallel > 1,
                "mmproj": self.mmproj is not None,
                "speculation": self.speculation.kind != "none",
            }.items():
                if set_so:
                    raise ValueError(f"the engine llama-cpp-python has no {field}: leave it out, or use llama-server")
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
