"""API keys: every path needs one unless it is listed here. Pure ASGI, on ``scope["path"]`` alone."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from ..engine.errors import AuthError
from .wire import error_response

OPEN_PATHS = frozenset({"/health", "/ready"})  # probes bring no key


class ApiKeys:
    """Middleware: lets a request pass that brings one of the keys as ``Authorization: Bearer KEY``."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        """``keys``: none means that no key is needed."""
        self._app = app
        self._keys = [key.encode("utf-8", "surrogateescape") for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "lifespan" or not self._keys or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # a websocket: there are none here, so it is closed unanswered
        if self._allowed(scope):
            await self._app(scope, receive, send)
            return
        error = AuthError("missing or wrong API key; send it as 'Authorization: Bearer KEY'")
        await error_response(error)(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        # Every key is compared, in constant time, so that time tells nothing about which one was near.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)
