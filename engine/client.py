"""The gateway's side of an engine process: start it, talk to it, watch it, start it again."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Literal

from .config import EngineConfig
from .messages import Progress
from .records import EngineStats, ModelInfo, SamplingParams, SequenceOutput

State = Literal["starting", "ready", "dead", "stopped"]


class EngineStream(AsyncIterator[SequenceOutput]):
    """The outputs of one request. Outputs that the consumer has not taken yet are merged into one.

    Ends after the output with ``finish_reason``; raises EngineDeadError if the engine died before it.
    A consumer that is cancelled while it waits, or leaves ``async with stream:``, aborts the request.
    """

    request_id: int

    async def __anext__(self) -> SequenceOutput:
        raise NotImplementedError

    def abort(self) -> None:
        """Stop the request in the engine; the iteration ends. Does nothing once it has ended."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """``abort`` for ``contextlib.aclosing``."""
        raise NotImplementedError


class EngineClient:
    """One engine process. All methods belong to the event loop that called ``start``."""

    ready: asyncio.Event  # set while the engine answers
    gave_up: asyncio.Event  # set when it will not be started again; ``failure`` says why
    failure: Exception | None
    info: ModelInfo | None
    stats: EngineStats | None  # of the last step; counters start again at 0 when the engine restarts
    progress: Progress | None  # the last of a load
    state: State
    restarts: int

    def __init__(
        self,
        config: EngineConfig,
        *,
        watchdog_seconds: float = 120.0,
        on_stats: Callable[[EngineStats], None] | None = None,
        on_log: Callable[[str], None] | None = None,
        worker_args: Sequence[str] = (),
    ) -> None:
        """``on_stats`` is called for each step, ``on_log`` for lines worth a log. ``worker_args``: for tests."""
        raise NotImplementedError

    async def start(self) -> None:
        """Start the process and return at once; see ``wait_ready``."""
        raise NotImplementedError

    async def wait_ready(self) -> ModelInfo:
        """Wait for the model. Raises ConfigError if its configuration cannot work, EngineDeadError if given up."""
        raise NotImplementedError

    def submit(
        self, prompt_token_ids: list[int], params: SamplingParams, cache_salt: str = ""
    ) -> EngineStream:
        """Start a sequence. Raises EngineError at once if the engine is not ready. Never blocks."""
        raise NotImplementedError

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        raise NotImplementedError

    def seconds_since_progress(self) -> float:
        """Since the last step while there is work; 0 when idle."""
        raise NotImplementedError

    async def stop(self, timeout: float = 5.0) -> None:
        """End the process (by force after ``timeout`` seconds) and every stream."""
        raise NotImplementedError
