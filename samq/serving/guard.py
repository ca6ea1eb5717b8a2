"""Middleware around the whole application: it checks the API key, and counts the answers."""

import hmac
from collections.abc import Mapping

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from samq.serving.metrics import Metrics
from samq.serving.proxy import STATUS
from samq.serving.refusal import Refused

_KEYLESS = ("/health", "/ready", "/metrics")


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, keys: Mapping[str, bytes], metrics: Metrics, endpoints: frozenset[str]) -> None:
        """`endpoints` are the paths that the counter names; it counts all others as `other`."""
        self._app = app
        self._keys = keys
        self._metrics = metrics
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
            if self._keys and scope["path"] not in _KEYLESS and not self._has_key(scope):
                refused = Refused(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
                )
                await JSONResponse(refused.body, refused.status, refused.headers)(scope, receive, counting)
            else:
                await self._app(scope, receive, counting)
        finally:
            path = scope["path"] if scope["path"] in self._endpoints else "other"
            self._metrics.requests.labels(path, str(scope.get(STATUS, status))).inc()

    def _has_key(self, scope: Scope) -> bool:
        """Compare with every key, each in constant time: how long it takes tells nothing of them."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        owners = [name for name, key in self._keys.items() if hmac.compare_digest(given, key)]
        for name in owners[:1]:
            self._metrics.by_key.labels(name).inc()
        return bool(owners)
