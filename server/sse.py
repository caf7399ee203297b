"""The answer to a generation request, streamed as server-sent events or whole. Pure ASGI."""

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..engine.errors import NybbleError, RequestError
from .errors import error_body, internal_error
from .generate import Generation, Piece, Usage
from .metrics import Outcome, RequestRecord
from .wire import json_response, on_disconnect

DONE = b"data: [DONE]\n\n"


class Writer(Protocol):
    """How one API shows pieces."""

    request_id: str

    def events(self, pieces: list[Piece], usage: Callable[[], Usage]) -> bytes:
        """The events of one message; may be empty."""

    def last_event(self, usage: Usage) -> bytes:
        """What comes before the end of a stream; may be empty."""

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> dict[str, Any]:
        """The answer to a request that does not stream."""


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


class GenerationResponse(Response):
    """Runs a generation and sends what it makes. Ends the request's record, whatever happens.

    A stream's headers are sent with its first piece, so what fails before that has its own HTTP status.
    """

    def __init__(self, generation: Generation, writer: Writer, record: RequestRecord, stream: bool) -> None:
        super().__init__()
        self._generation = generation
        self._writer = writer
        self._record = record
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        outcome: Outcome = "failed"
        try:
            with on_disconnect(receive, self._generation.abort):
                async with aclosing(self._generation.pieces()) as batches:
                    if self._stream:
                        outcome = await self._send_stream(batches, send)
                    else:
                        outcome = await self._send_whole(batches, scope, receive, send)
        except RequestError:
            outcome = "rejected"
            raise
        finally:
            self._generation.close()
            self._record.end(outcome)

    async def _send_whole(
        self, batches: AsyncIterator[list[Piece]], scope: Scope, receive: Receive, send: Send
    ) -> Outcome:
        pieces = [piece async for batch in batches for piece in batch]
        if self._generation.aborted:
            return "aborted"
        content = self._writer.whole(pieces, self._generation.usage())
        await json_response(content, headers={"x-request-id": self._writer.request_id})(scope, receive, send)
        return "finished"

    async def _send_stream(self, batches: AsyncIterator[list[Piece]], send: Send) -> Outcome:
        started = False
        try:
            async for batch in batches:
                data = self._writer.events(batch, self._generation.usage)
                if not started:
                    started = True
                    await send(self._start())
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            if self._generation.aborted:
                return "aborted"
            last = self._writer.last_event(self._generation.usage())
            await send({"type": "http.response.body", "body": last + DONE, "more_body": False})
        except NybbleError as error:
            if not started:
                raise
            await send(_final(error))
            return "failed"
        except Exception:
            if started:
                await send(_final(internal_error()))
            raise
        return "finished"

    def _start(self) -> dict[str, Any]:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
            (b"x-request-id", self._writer.request_id.encode()),
        ]
        return {"type": "http.response.start", "status": 200, "headers": headers}


def _final(error: NybbleError) -> dict[str, Any]:
    """The end of a stream that failed."""
    return {"type": "http.response.body", "body": event(error_body(error)) + DONE, "more_body": False}
