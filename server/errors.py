"""Errors to HTTP: one table, and OpenAI's error body."""

from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ..engine.errors import (
    AuthError,
    ConfigError,
    ConflictError,
    EngineError,
    ForbiddenError,
    NotFoundError,
    NybbleError,
    OverloadedError,
    RequestError,
)
from .findings import finding

BRANCH = "<branch> "  # begins the tag of a union's branch, which is no name of the body's
RETRY_SECONDS = 1  # Retry-After where we cannot know better: the engine restarts, or the server drains


class ModelNotFoundError(NotFoundError):
    """No model of that name is served."""


class ContextLengthError(RequestError):
    """Prompt and output together are longer than the model's context."""


class BodyTooLargeError(RequestError):
    """The body exceeds --max-body-size; HTTP 413."""


class MediaTypeError(RequestError):
    """The body is not declared as JSON; HTTP 415."""


class HttpError(RequestError):
    """What the HTTP framework refuses, with its status: a method that a route lacks..."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


# error class: (status, OpenAI's type, code)
STATUS: dict[type[NybbleError], tuple[int, str, str | None]] = {
    RequestError: (400, "invalid_request_error", None),
    ConfigError: (400, "invalid_request_error", None),
    AuthError: (401, "invalid_request_error", "invalid_api_key"),
    ForbiddenError: (403, "invalid_request_error", "forbidden"),
    ModelNotFoundError: (404, "invalid_request_error", "model_not_found"),
    ContextLengthError: (400, "invalid_request_error", "context_length_exceeded"),
    BodyTooLargeError: (413, "invalid_request_error", "body_too_large"),
    MediaTypeError: (415, "invalid_request_error", "unsupported_media_type"),
    NotFoundError: (404, "invalid_request_error", "not_found"),
    ConflictError: (409, "invalid_request_error", "conflict"),
    OverloadedError: (429, "rate_limit_error", "queue_full"),
    EngineError: (503, "service_unavailable", "engine_unavailable"),
    NybbleError: (500, "server_error", None),
}


def status_of(error: NybbleError) -> int:
    """The HTTP status of an error."""
    return error.status if isinstance(error, HttpError) else _row(error)[0]


def error_body(error: NybbleError) -> dict[str, Any]:
    """OpenAI's error body."""
    _, kind, code = _row(error)
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": code}}


def error_headers(error: NybbleError) -> dict[str, str]:
    """Headers that belong to an error: when to try again, how to authenticate."""
    if isinstance(error, OverloadedError):
        return {"retry-after": str(error.retry_after)}
    if isinstance(error, EngineError):
        return {"retry-after": str(RETRY_SECONDS)}
    if isinstance(error, AuthError):
        return {"www-authenticate": "Bearer"}
    # The rest of a body that we refuse to read must not be taken for the next request.
    unread = isinstance(error, BodyTooLargeError) or status_of(error) == 408
    return {"connection": "close"} if unread else {}


def internal_error() -> NybbleError:
    """What a client sees of a bug: nothing but that it is ours."""
    return NybbleError("internal error; the server's log has the details")


def request_error(error: ValidationError) -> RequestError:
    """The first finding of pydantic, in one line that names the field and what was found."""
    details, *others = error.errors(include_url=False)
    path = _path(details)
    if details["type"] == "missing" and (slip := _slip(details, others)) is not None:
        return RequestError(f"unknown parameter '{slip}'; use '{details['loc'][-1]}'", param=slip)
    if details["type"] == "extra_forbidden":
        return RequestError(f"unknown parameter '{path}'; check the spelling or leave it out", param=path)
    if details["type"] == "missing":
        return RequestError(f"'{path}' is required", param=path)
    if details["type"] in ("model_type", "dict_type"):
        return RequestError(f"'{path}': must be an object (found {_shown(details['input'])})", param=path)
    return RequestError(f"'{path}': {finding(details)} (found {_shown(details['input'])})", param=path)


def _row(error: NybbleError) -> tuple[int, str, str | None]:
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


def _slip(missing: ErrorDetails, others: list[ErrorDetails]) -> str | None:
    """The unknown parameter that was probably meant to be the missing one beside it."""
    *place, name = missing["loc"]
    for other in others:
        *its_place, its_name = other["loc"]
        unknown = other["type"] == "extra_forbidden" and its_place == place
        if unknown and get_close_matches(str(its_name), [str(name)]):
            return _path(other)
    return None


def _path(details: ErrorDetails) -> str:
    path = ".".join(str(part) for part in details["loc"] if not str(part).startswith(BRANCH)) or "body"
    return path if len(path) <= 100 else path[:100] + "..."


def _shown(value: object) -> str:
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 64:
        return "an integer beyond 64 bits"  # str() of thousands of digits would raise
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."
