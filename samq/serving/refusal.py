"""Refused requests, in the format of OpenAI's errors."""

from typing import Any

from pydantic import BaseModel

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


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
        self._detail = ErrorDetail(message=message, type=_TYPES.get(status, "server_error"), param=param, code=code)

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        return ErrorBody(error=self._detail).model_dump()

    @property
    def headers(self) -> dict[str, str]:
        """The headers that tell the client when to try again, or how to authenticate."""
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})
