"""Refused requests, and the engine's errors, in the format of OpenAI's errors.

Who refuses: `guard` (keys), `limits` (bodies), `app` (model names), `admission` (queue) and `proxy` (time limits).
"""

import json
import re
from typing import Any

from pydantic import BaseModel

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_supported_error",
    502: "engine_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_NAMED_EVENTS = ("/v1/responses", "/v1/messages")
_GENERAL = {*_TYPES.values(), "server_error"}  # kinds that say no more than the status
# What engines call an error of theirs although the request was wrong.
_CLIENTS_FAULT = re.compile(
    r"json|parse|valid|template|jinja|grammar|schema|base64|image|audio|type must be", re.IGNORECASE
)
_PYDANTIC = re.compile(
    r"'loc': \((?P<place>[^)]*)\), 'msg': (?P<quote>['\"])(?P<message>.*?)(?P=quote)"
)  # llama-cpp-python's
# A parser's own names, places in memory and in its source are no help to a client.
_INTERNALS = re.compile(r"\[json\.exception\.[\w.]+\] |0x[0-9a-f]{6,}|\S+\.(?:cpp|h|py):\d+:? ?")


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class Refused(Exception):
    """The request gets this error status instead of an answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.identity: dict[str, str] = {}  # headers that name the version, if one had the request
        self._detail = ErrorDetail(message=message, type=_TYPES.get(status, "server_error"), param=param, code=code)

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return ErrorBody(error=self._detail).model_dump()

    @property
    def headers(self) -> dict[str, str]:
        """The headers that name the version, and tell the client when to try again or how to authenticate."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return self.identity | headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def last_event(self, path: str) -> bytes:
        """The error as the last event of a stream that has begun, in the form of the API at `path`."""
        if path in _NAMED_EVENTS:
            return b"event: error\ndata: " + json.dumps({"type": "error", **self.body}).encode() + b"\n\n"
        return b"data: " + json.dumps(self.body).encode() + b"\n\ndata: [DONE]\n\n"


def refused_by_engine(status: int, body: bytes) -> Refused:
    """What the engine answered in place of a success; an error of the client's that it calls its own becomes a 400."""
    try:
        answer = json.loads(body)
        detail = answer.get("error") or answer.get("detail")
        message = str(detail["message"] if isinstance(detail, dict) else detail)
        if match := _PYDANTIC.search(message):
            place = match["place"].replace("'", "").removeprefix("body, ").replace(", ", ".")
            status, message = 400, f"{place}: {match['message']}"
    except (ValueError, LookupError, TypeError, AttributeError):
        detail, message = {}, body.decode(errors="replace")[:300] or "the engine gave no reason"
    if status == 500 and _CLIENTS_FAULT.search(message):
        status = 400
    code = detail.get("code") if isinstance(detail, dict) else None
    kind = detail.get("type") if isinstance(detail, dict) else None
    param = detail.get("param") if isinstance(detail, dict) else None
    if kind == "exceed_context_size_error":
        code = "context_length_exceeded"  # OpenAI's name for it
    elif not isinstance(code, str):
        code = kind if isinstance(kind, str) and kind not in _GENERAL else None
    message = _INTERNALS.sub("", message).partition("\n")[0].strip()
    return Refused(status, message, code=code, param=param if isinstance(param, str) else None)
