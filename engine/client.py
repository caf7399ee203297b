"""The gateway's side of an engine process: start it, talk to it, watch it, start it again."""

import asyncio
import itertools
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Literal

import msgspec

from .config import EngineConfig
from .errors import ConfigError, EngineDeadError, EngineError
from .hardware import default_threads
from .messages import (
    FRAME_HEADER,
    Abort,
    Add,
    Failed,
    FromEngine,
    Progress,
    Ready,
    StepDone,
    Stop,
    body_length,
    decode_from_engine,
    encode,
)
from .records import EngineRequest, EngineStats, ModelInfo, SamplingParams, SequenceOutput

State = Literal["starting", "ready", "dead", "stopped"]

MAX_DEATHS = 3  # within DEATH_WINDOW seconds, then the engine is given up
DEATH_WINDOW = 300.0
_FIRST_BACKOFF = 0.1  # seconds before the first restart; doubles with each death in the window
_READ_BUFFER = 1 << 20
_EXIT_SECONDS = 2.0  # from the end of its messages to the end of the process, then it is killed


class EngineStream(AsyncIterator[SequenceOutput]):
    """The outputs of one request. Outputs that the consumer has not taken yet are merged into one.

    Ends after the output with ``finish_reason``; raises EngineDeadError if the engine died before it.
    A consumer that is cancelled while it waits, or calls ``abort`` or ``aclose``, stops the request.
    """

    def __init__(self, request_id: int, abort: Callable[[int], None]) -> None:
        self.request_id = request_id
        self._abort = abort
        self._pending: SequenceOutput | None = None
        self._ended = False
        self._error: EngineError | None = None
        self._wake = asyncio.Event()

    async def __anext__(self) -> SequenceOutput:
        while self._pending is None:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._wake.clear()
            try:
                await self._wake.wait()
            except asyncio.CancelledError:
                self.abort()
                raise
        output, self._pending = self._pending, None
        return output

    def abort(self) -> None:
        """Stop the request in the engine; the iteration ends. Does nothing once it has ended."""
        if not self._ended:
            self._abort(self.request_id)
            self._pending = None
            self._end()

    async def aclose(self) -> None:
        """``abort`` for ``contextlib.aclosing``."""
        self.abort()

    def _deliver(self, output: SequenceOutput) -> None:
        self._pending = output if self._pending is None else _merge(self._pending, output)
        if output.finish_reason is not None:
            self._ended = True
        self._wake.set()

    def _end(self, error: EngineError | None = None) -> None:
        self._ended = True
        self._error = error
        self._wake.set()


class EngineClient:
    """One engine process. All methods belong to the event loop that called ``start``.

    ready: set while the engine answers.
    gave_up: set when the engine will not be started again; ``failure`` says why.
    stats: of the last step; the counters start again at 0 when the engine restarts.
    progress: of the last load.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        watchdog_seconds: float = 120.0,
        on_stats: Callable[[EngineStats], None] | None = None,
        on_log: Callable[[str], None] | None = None,
        worker_args: Sequence[str] = (),
    ) -> None:
        """``watchdog_seconds``: an engine with work that ends no step for so long is killed and restarted.
        ``on_stats`` is called for each step, ``on_log`` for lines worth a log. ``worker_args``: for tests."""
        self.config = config
        self.ready = asyncio.Event()
        self.gave_up = asyncio.Event()
        self.failure: ConfigError | EngineDeadError | None = None
        self.info: ModelInfo | None = None
        self.stats: EngineStats | None = None
        self.progress: Progress | None = None
        self.state: State = "starting"
        self.restarts = 0
        self._watchdog_seconds = watchdog_seconds
        self._on_stats = on_stats
        self._on_log = on_log
        self._worker_args = worker_args
        self._streams: dict[int, EngineStream] = {}
        self._ids = itertools.count(1)
        self._last_progress = 0.0
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._failed: Failed | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Start the process and return at once; see ``wait_ready``."""
        assert self._supervisor is None, "an EngineClient starts once"
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    async def wait_ready(self) -> ModelInfo:
        """Wait for the model, over restarts too.

        Raises ConfigError if its configuration cannot work, EngineDeadError if it was given up,
        EngineError if it was stopped.
        """
        assert self._supervisor is not None
        ready = asyncio.create_task(self.ready.wait())
        try:
            await asyncio.wait((ready, self._supervisor), return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if not self.ready.is_set():
            raise self.failure or EngineError("the engine was stopped")
        assert self.info is not None
        return self.info

    def submit(
        self, prompt_token_ids: list[int], params: SamplingParams, cache_salt: str = ""
    ) -> EngineStream:
        """Start a sequence. Raises EngineError at once if the engine is not ready. Never blocks."""
        if not self.ready.is_set():
            raise EngineError(_NOT_READY[self.state])
        if not self._streams:
            self._last_progress = time.monotonic()
        stream = EngineStream(next(self._ids), self._abort)
        self._streams[stream.request_id] = stream
        self._send(Add([EngineRequest(stream.request_id, prompt_token_ids, params, cache_salt)]))
        return stream

    @property
    def outstanding(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def pid(self) -> int | None:
        """The engine's process, while there is one."""
        return None if self._process is None else self._process.pid

    def seconds_since_progress(self) -> float:
        """Since the last step while there is work; 0 when idle."""
        return time.monotonic() - self._last_progress if self._streams else 0.0

    async def stop(self, timeout: float = 5.0) -> None:
        """End the process (by force after ``timeout`` seconds) and every stream."""
        self._stopping.set()
        if self._supervisor is not None:
            self._send(Stop())
            _, pending = await asyncio.wait((self._supervisor,), timeout=timeout)
            if pending:
                self._kill()
            await self._supervisor
        self.state = "stopped"

    def _send(self, message: Add | Abort | Stop) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode(message))

    def _abort(self, request_id: int) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort([request_id]))

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def _log(self, line: str) -> None:
        if self._on_log is not None:
            self._on_log(line)

    async def _supervise(self) -> None:
        """Run the engine until it is stopped or given up."""
        try:
            while not self._stopping.is_set():
                self.state = "starting"
                ending = await self._run()
                if self._stopping.is_set():
                    break
                backoff = self._note_death(ending)
                if backoff is None:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), backoff)
                self.restarts += not self._stopping.is_set()
            self.state = "stopped"
        except Exception as error:
            self.failure = EngineDeadError(f"the engine cannot be watched: {type(error).__name__}: {error}")
            raise
        finally:
            self._end_streams(EngineError("the server is shutting down"))
            if self.state != "stopped":
                self.state = "dead"
                self.gave_up.set()

    def _note_death(self, ending: str) -> float | None:
        """End the streams; seconds until the restart, or None to give up."""
        self._end_streams(EngineDeadError(f"the engine died ({ending}); try again"))
        if self._failed is not None and self._failed.user_error:
            self.failure = ConfigError(self._failed.message)  # no crash: whoever waits for it tells the user
            return None
        self._log(f"the engine died: {ending}")
        now = time.monotonic()
        self._deaths.append(now)
        recent = sum(now - death < DEATH_WINDOW for death in self._deaths)
        if recent >= MAX_DEATHS:
            self.failure = EngineDeadError(
                f"the engine died {recent} times within {DEATH_WINDOW:.0f} s, the last time: {ending}"
            )
            return None
        return _FIRST_BACKOFF * 2.0 ** (recent - 1)

    def _end_streams(self, error: EngineError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream._end(type(error)(error.message))

    async def _run(self) -> str:
        """One life of the process; returns how it ended."""
        self._failed = None
        self.progress = None
        ours, theirs = socket.socketpair()
        with theirs:
            reader, self._writer = await asyncio.open_unix_connection(sock=ours, limit=_READ_BUFFER)
            try:
                self._process = process = await asyncio.create_subprocess_exec(
                    *_command(self.config, theirs.fileno(), self._worker_args),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env=child_environment(self.config.num_threads),
                )
                theirs.close()  # so that the process's end is the socket's end
                code = await self._attend(process, reader)
            finally:
                self._writer.close()
                self._writer = self._process = None
        return _describe(code, self._failed)

    async def _attend(self, process: asyncio.subprocess.Process, reader: asyncio.StreamReader) -> int:
        """Talk to the process until it ends; returns its exit code."""
        watchdog = asyncio.create_task(self._watch(), name="engine watchdog")
        try:
            if not self._stopping.is_set():
                await self._receive_all(reader)
                with suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), _EXIT_SECONDS)
        finally:
            self.ready.clear()
            self.state = "starting"
            watchdog.cancel()
            self._kill()
            code = await process.wait()
        return code

    async def _receive_all(self, reader: asyncio.StreamReader) -> None:
        """Read until the engine says or shows that it ends."""
        try:
            while self._failed is None:
                header = await reader.readexactly(FRAME_HEADER.size)
                self._receive(decode_from_engine(await reader.readexactly(body_length(header))))
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        except msgspec.DecodeError as error:
            self._failed = Failed(f"it sent what is no message: {error}", user_error=False)

    def _receive(self, message: FromEngine) -> None:
        match message:
            case StepDone(outputs, stats):
                self._last_progress = time.monotonic()
                self.stats = stats
                for output in outputs:
                    stream = self._streams.get(output.request_id)
                    if stream is None:  # aborted
                        continue
                    if output.finish_reason is not None:
                        del self._streams[output.request_id]
                    stream._deliver(output)
                if self._on_stats is not None:
                    self._on_stats(stats)
            case Progress():
                self.progress = message
                if message.line:
                    self._log(message.line)
            case Ready(info):
                self.info = info
                self.state = "ready"
                self.ready.set()
            case Failed():
                self._failed = message

    async def _watch(self) -> None:
        """Kill an engine that has work but ends no step."""
        while True:
            await asyncio.sleep(min(1.0, self._watchdog_seconds / 4))
            if self.ready.is_set() and self.seconds_since_progress() > self._watchdog_seconds:
                self._failed = Failed(f"it made no step for {self._watchdog_seconds:g} s", user_error=False)
                self._kill()
                return


_NOT_READY: dict[State, str] = {
    "starting": "the model is still loading; try again soon",
    "ready": "the engine is restarting; try again soon",
    "dead": "the engine is dead",
    "stopped": "the server is shutting down",
}


def _command(config: EngineConfig, fd: int, worker_args: Sequence[str]) -> list[str]:
    # -P: the working directory's files must not shadow packages.
    described = msgspec.json.encode(config).decode()
    start = [sys.executable, "-P", "-m", "nybble.engine.worker"]
    return [*start, "--fd", str(fd), "--config", described, *worker_args]


def child_environment(num_threads: int | None) -> dict[str, str]:
    """Of a process that computes: OpenMP reads it once, when torch loads. What the user has set stays."""
    environment = {
        "OMP_NUM_THREADS": str(default_threads()),
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        **os.environ,
    }
    if num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(num_threads)
    return environment


def _describe(code: int, failed: Failed | None) -> str:
    if failed is not None:
        return failed.message
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"killed by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def _merge(first: SequenceOutput, then: SequenceOutput) -> SequenceOutput:
    """One output that says what both say."""
    first.token_ids += then.token_ids
    if then.logprobs is not None:
        first.logprobs = [*(first.logprobs or ()), *then.logprobs]
    if then.prompt_logprobs is not None:
        first.prompt_logprobs = then.prompt_logprobs
    first.finish_reason = then.finish_reason
    first.stop_token_id = then.stop_token_id
    first.error = then.error
    first.refused = then.refused
    first.num_cached_tokens = max(first.num_cached_tokens, then.num_cached_tokens)
    first.queued_seconds = max(first.queued_seconds, then.queued_seconds)
    return first
