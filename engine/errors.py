"""The error tree. Every error a user can cause is one of these; anything else is a bug.

NybbleError
 +-- ConfigError            an option or a model's configuration cannot work; exit code 2, HTTP 400
 |    +-- UnsupportedModelError   architecture, rope type, quant_method... that we do not compute
 |    +-- CheckpointError         files that lie, are truncated, miss a tensor or hold one too many
 |    +-- LayerError              quantizing cannot go on because of one module, which it names
 +-- RequestError           one request is invalid; the server and all other requests go on; HTTP 400
 +-- NotFoundError          unknown model, job or route; HTTP 404
 +-- AuthError              missing or wrong key; HTTP 401
 +-- ForbiddenError         the key does not allow this; HTTP 403
 +-- ConflictError          the state does not allow this; HTTP 409
 +-- OverloadedError        the queue is full, try again; HTTP 429 with Retry-After
 +-- EngineError            the engine failed or is away; HTTP 503
      +-- EngineDeadError   its process died; in-flight requests end with this
"""


class NybbleError(Exception):
    """Base of all errors a user may see. ``str(error)`` is one line: what, the value, the remedy."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ConfigError(NybbleError):
    """An option or a configuration file holds a value that cannot work."""


class UnsupportedModelError(ConfigError):
    """The model needs something this engine does not compute."""


class CheckpointError(ConfigError):
    """The checkpoint's files do not hold what they should."""


class LayerError(ConfigError):
    """One module of a model stops the work. ``layer`` is its name in the checkpoint."""

    def __init__(self, message: str, *, layer: str) -> None:
        super().__init__(message)
        self.layer = layer


class RequestError(NybbleError):
    """One request is invalid. ``param`` names the field."""


class NotFoundError(NybbleError):
    """The named thing does not exist."""


class AuthError(NybbleError):
    """No key, or a wrong one."""


class ForbiddenError(NybbleError):
    """The key is right but does not allow this."""


class ConflictError(NybbleError):
    """The state of the server does not allow this now."""


class OverloadedError(NybbleError):
    """The queue is full. ``retry_after`` is in seconds."""

    def __init__(self, message: str, *, retry_after: int = 1) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineError(NybbleError):
    """The engine failed, is starting, or is draining."""


class EngineDeadError(EngineError):
    """The engine's process died while it held this request."""


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's error, or torch's, a RuntimeError in its allocators' words."""
    words = ("allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
