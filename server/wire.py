"""Bytes in and out: bounded bodies, JSON that cannot hurt, answers, and the end of a client."""

import asyncio
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pydantic_core import from_json, to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive

from ..engine.errors import NybbleError, RequestError
from .errors import BodyTooLargeError, HttpError, MediaTypeError, error_body, error_headers, status_of


async def read_json(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a request's body.

    Errors: BodyTooLargeError, MediaTypeError, RequestError; starlette's ClientDisconnect.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    # Other types can be posted by any web page without asking; a browser asks before it posts JSON.
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise MediaTypeError(f"content-type {media_type:.60}: send the body as application/json")
    parsed = parse_json(await _read_body(request, max_bytes))
    if not isinstance(parsed, dict):
        raise RequestError(f"the body is a JSON {_KINDS.get(type(parsed), 'value')}; send an object")
    return parsed


_LARGE_BODY = 1 << 20
_BODY_SECONDS = 60.0  # for a body to arrive
_KINDS = {list: "list", str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


async def _read_body(request: Request, max_bytes: int) -> bytes:
    too_large = BodyTooLargeError(f"the body exceeds {max_bytes} bytes; send less, or raise --max-body-size")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise HttpError(f"the body did not arrive within {_BODY_SECONDS:g} s", status=408) from error
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Parse JSON: UTF-8 only, no NaN or Infinity, at most 200 levels deep. Errors: RequestError."""
    if len(body) <= _LARGE_BODY:
        return _parse(body)
    # Millions of new lists would set off useless collections (measured: four times the time).
    gc.disable()
    try:
        return _parse(body)
    finally:
        gc.enable()


def _parse(body: bytes) -> Any:
    try:
        return from_json(
            body, allow_inf_nan=False, cache_strings="keys" if len(body) <= _LARGE_BODY else "none"
        )
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {str(error)[:200]}") from error


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """An answer as compact JSON."""
    return Response(to_json(content), status, headers, "application/json")


def error_response(error: NybbleError) -> Response:
    """OpenAI's error body with the status of the error."""
    return json_response(error_body(error), status_of(error), error_headers(error))


@contextmanager
def on_disconnect(receive: Receive, callback: Callable[[], None]) -> Iterator[None]:
    """While inside, call ``callback`` once the client is gone. The body must have been read."""

    async def wait() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        callback()

    watcher = asyncio.create_task(wait())
    try:
        yield
    finally:
        watcher.cancel()
