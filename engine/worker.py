"""The engine's process: ``python -m nybble.engine.worker --fd N --config JSON``; started by engine.client.

A reader thread and a writer thread serve the socket, so that neither a slow gateway nor a long step blocks
the other side. The process never outlives its gateway: the end of the socket and, on Linux, the parent's
death end it at once, whatever it is doing.
"""

import argparse
import ctypes
import gc
import importlib
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

import msgspec

from .config import EngineConfig
from .errors import ConfigError, RequestError
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
    ToEngine,
    body_length,
    decode_to_engine,
    encode,
)
from .records import EngineRequest, EngineStats, ModelInfo, SequenceOutput

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ServedEngine(Protocol):
    """What this process asks of an engine (engine.engine.Engine)."""

    @property
    def has_work(self) -> bool:
        """Whether ``step`` would do anything."""

    def add(self, request: EngineRequest) -> None:
        """Accept a request; raises RequestError if it cannot be served."""

    def abort(self, request_id: int) -> None:
        """Forget a request; unknown ids are fine."""

    def step(self) -> list[SequenceOutput]:
        """One step of all sequences."""

    def stats(self) -> EngineStats:
        """A snapshot."""


class ProgressCallback(Protocol):
    """Told about each module of a load."""

    def __call__(self, phase: str, done: int, total: int, line: str = "") -> None:
        """``line``: for the log, may be empty."""


Factory = Callable[[EngineConfig, ProgressCallback], tuple[ServedEngine, ModelInfo]]


class Channel:
    """The socket to the gateway. Leaving it with an exception tells the gateway, and sends what is queued."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="writer", daemon=True)

    def __enter__(self) -> "Channel":
        threading.Thread(target=self._read, name="reader", daemon=True).start()
        self._writer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, ConfigError):
            self.send(Failed(error.message, user_error=True))
        elif error is not None:
            self.send(Failed(f"{type(error).__name__}: {error}", user_error=False))
        self._outbox.put(None)
        self._writer.join()

    def send(self, message: FromEngine) -> None:
        """Queue a message; never blocks."""
        self._outbox.put(encode(message))

    def receive(self, wait: bool) -> Iterator[ToEngine]:
        """What has arrived; ``wait``: until there is something."""
        while True:
            try:
                yield self._inbox.get(block=wait)
            except queue.Empty:
                return
            wait = False

    def _read(self) -> None:
        """Until Stop or the gateway's end; then the process ends too, whatever the main thread does."""
        code = 0
        try:
            with self._connection.makefile("rb") as stream:
                while len(header := stream.read(FRAME_HEADER.size)) == FRAME_HEADER.size:
                    message = decode_to_engine(stream.read(body_length(header)))
                    if isinstance(message, Stop):
                        break
                    self._inbox.put(message)
        except msgspec.DecodeError as error:
            print(f"engine: the gateway sent what is no message: {error}", file=sys.stderr)
            code = 1
        finally:
            os._exit(code)

    def _write(self) -> None:
        try:
            while (frame := self._outbox.get()) is not None:
                self._connection.sendall(frame)
        except OSError:  # the gateway is gone
            os._exit(0)


def serve(engine: ServedEngine, channel: Channel) -> None:
    """Take requests and compute, forever. Sleeps while there is no work."""
    while True:
        outputs: list[SequenceOutput] = []
        for message in channel.receive(wait=not engine.has_work):
            outputs += _handle(engine, message)
        if engine.has_work:
            outputs += engine.step()
        channel.send(StepDone(outputs, engine.stats()))


def _handle(engine: ServedEngine, message: ToEngine) -> list[SequenceOutput]:
    """Give a message to the engine; outputs for the requests that it refuses."""
    refused: list[SequenceOutput] = []
    match message:
        case Add(requests):
            for request in requests:
                try:
                    engine.add(request)
                except RequestError as error:
                    ending = SequenceOutput(request.request_id, [], finish_reason="error", refused=True)
                    ending.error = error.message
                    refused.append(ending)
        case Abort(request_ids):
            for request_id in request_ids:
                engine.abort(request_id)
    return refused


def _follow_the_gateway() -> None:
    """Leave it to the gateway when to end, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _factory(name: str | None) -> Factory:
    if name is not None:
        module, _, function = name.partition(":")
        chosen: Factory = getattr(importlib.import_module(module), function)
        return chosen
    # Here and not above: this takes seconds, in which the gateway must already be followed.
    from .build import build_engine

    return build_engine


def main() -> int:
    """Run until the gateway ends it. Exit code 2: the configuration cannot work; 1: anything else."""
    _follow_the_gateway()
    parser = argparse.ArgumentParser(prog="nybble.engine.worker", description="Started by nybble serve.")
    parser.add_argument("--fd", type=int, required=True, help="socket to the gateway")
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--factory", help="module:function that makes the engine, for tests")
    options = parser.parse_args()
    try:
        with socket.socket(fileno=options.fd) as connection, Channel(connection) as channel:
            config = msgspec.json.decode(options.config, type=EngineConfig)

            def progress(phase: str, done: int, total: int, line: str = "") -> None:
                channel.send(Progress(phase, done, total, line))

            engine, info = _factory(options.factory)(config, progress)
            gc.collect()
            gc.freeze()  # what a load leaves behind stays; later collections need not look at it
            channel.send(Ready(info))
            serve(engine, channel)
    except ConfigError:
        return 2  # the gateway has been told
    return 0


if __name__ == "__main__":
    sys.exit(main())
