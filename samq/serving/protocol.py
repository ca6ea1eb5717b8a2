"""OpenAI's requests. A field or value that is not supported is refused, never ignored. null means the default."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from samq.serving.grammar import json_grammar, schema_grammar
from samq.serving.sampling import SamplerSettings


def _encodable(text: str) -> str:
    """JSON can hold half a character (a lone surrogate), which cannot be encoded."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopText = Annotated[Text, Field(min_length=1, max_length=256)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StreamOptions(_Strict):
    """Options of a stream."""

    include_usage: bool = Field(default=False, description="send a last chunk with the token counts")


class AnyText(_Strict):
    """No constraint."""

    type: Literal["text"]


class JsonObject(_Strict):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Strict):
    """A named JSON schema."""

    name: Text = ""
    description: Text | None = None
    schema_: dict[Text, Any] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="the answer always follows the schema, whatever this says")


class JsonSchemaFormat(_Strict):
    """JSON of a schema. A grammar enforces it, which cannot express everything: not `minimum` or `uniqueItems`."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[AnyText | JsonObject | JsonSchemaFormat, Field(discriminator="type")]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


def _allow_null(schema: dict[str, Any]) -> None:
    """Let the schema allow null for every optional field."""
    properties = schema["properties"]
    for name in properties.keys() - set(schema["required"]):
        field = properties[name]
        if {"type": "null"} not in field.get("anyOf", ()):
            about = {key: field.pop(key) for key in ("title", "description", "default") if key in field}
            properties[name] = {"anyOf": [field, {"type": "null"}], **about}


def _needs(flag: str, value: Any, info: ValidationInfo) -> Any:
    """The value; raises PydanticCustomError if it has no effect because the flag is off."""
    if value is not None and info.data.get(flag) is False:
        raise PydanticCustomError(
            "has_no_effect", f"it has no effect without {flag}; set {flag} to true, or leave it out"
        )
    return value


class _Generation(_Strict):
    """The fields that both kinds of completion share."""

    model_config = ConfigDict(json_schema_extra=_allow_null)

    model: Text | None = Field(default=None, description="name of the served model; default: that model")
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1, ge=0, le=2, allow_inf_nan=False)
    top_p: Probability = 1
    top_k: int = Field(default=0, ge=0, le=2**31 - 1, description="0: all tokens (not in OpenAI's protocol)")
    min_p: Probability = Field(
        default=0, description="least probability, relative to the best token's (not in OpenAI's protocol)"
    )
    repeat_penalty: float = Field(
        default=1, ge=0.01, le=10, allow_inf_nan=False, description="not in OpenAI's protocol"
    )
    presence_penalty: Penalty = 0
    frequency_penalty: Penalty = 0
    seed: int | None = Field(default=None, ge=-(2**63), le=2**64 - 1, description="default: a random one")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = Field(default=None, description="needs stream")
    response_format: ResponseFormat | None = None
    n: Literal[1] | None = Field(default=None, description="answers; only one is supported")
    user: Text | None = Field(default=None, description="not used")

    @field_validator("*", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        return field.default if value is None and not field.is_required() else value

    @field_validator("stream_options")
    @classmethod
    def _only_streamed(cls, value: Any, info: ValidationInfo) -> Any:
        return _needs("stream", value, info)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, seed: int) -> SamplerSettings:
        """The sampler's settings, with this seed if the request has none; raises Refused for a schema without a grammar."""
        grammar = None
        if isinstance(self.response_format, JsonObject):
            grammar = json_grammar()
        elif isinstance(self.response_format, JsonSchemaFormat):
            grammar = schema_grammar(self.response_format.json_schema.schema_)
        return SamplerSettings(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repeat_penalty=self.repeat_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed if self.seed is None else self.seed,
            grammar=grammar,
        )


class CompletionRequest(_Generation):
    """`POST /v1/completions`."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)] | Annotated[list[int], Field(min_length=1)]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20, description="number of alternatives for each token")
    echo: Literal[False] | None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(_Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None

    @property
    def turn(self) -> dict[str, Any]:
        """The message in the form that chat templates expect."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return turn if self.name is None else {**turn, "name": self.name}


class ChatRequest(_Generation):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1, description="the newer name of max_tokens")
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="needs logprobs")

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: Any, info: ValidationInfo) -> Any:
        return _needs("logprobs", value, info)

    @property
    def limit(self) -> int | None:
        """The limit of the answer in tokens; None: as many as the context has room for."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
