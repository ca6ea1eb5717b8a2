"""Middleware that checks each request before the application reads it: API key and body length; it counts the answers."""

import hmac
import json

from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from samq.serving.refusal import Refused

STATUS = "samq.status"  # in a request's scope: the status to count, if it differs from the one that was sent
_KEYLESS = ("/health", "/ready", "/metrics")


class RequestGuard:
    """ASGI middleware around the whole application."""

    def __init__(
        self, app: ASGIApp, *, api_key: str | None, max_body_bytes: int, requests: Counter, endpoints: frozenset[str]
    ) -> None:
        """`endpoints` are the paths that the counter names; it counts all others as `other`."""
        self._app = app
        self._key = api_key.encode() if api_key else None
        self._limit = max_body_bytes
        self._requests = requests
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
            except Refused as refused:
                await send_refusal(refused, counting)
            else:
                await self._app(scope, self._bounded(receive), counting)
        finally:
            path = scope["path"] if scope["path"] in self._endpoints else "other"
            self._requests.labels(path, str(scope.get(STATUS, status))).inc()

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if self._key and scope["path"] not in _KEYLESS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
                raise Refused(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
                )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length[:20]) > self._limit:
            raise _too_long(self._limit)

    def _bounded(self, receive: Receive) -> Receive:
        """Count the body's bytes as they arrive: the header with its length may be missing or wrong."""
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, str(_too_long(self._limit)))
            return message

        return bounded


async def send_refusal(refused: Refused, send: Send) -> None:
    """Answer a request with an error."""
    body = json.dumps(refused.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def _too_long(limit: int) -> Refused:
    return Refused(413, f"the body is longer than {limit} bytes; send less", code="body_too_large")
