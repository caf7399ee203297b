"""Work in a process of its own: ``python -m nybble.engine.tasks NAME``, for the CLI and the server's jobs.

Reads one JSON object, the options, from stdin and writes JSON lines to stdout: ``{"event": "progress",
"phase", "done", "total", "layer"?, "loss"?}``, ``{"event": "log", "line"}``, and last ``{"event": "result",
...}`` or ``{"event": "error", "code", "message", "user_error", "layer"?}``. Exit codes: 0, 2 for a user's
error, 1 for any other, 130 when interrupted. SIGINT, SIGTERM, a reader that went away and the end of the
parent end the task, which leaves nothing half done.
"""

import argparse
import errno
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import fields
from types import FrameType
from typing import Any, TextIO, TypeVar

import torch

from .check import check_model
from .config import EngineConfig
from .errors import ConfigError, LayerError, NybbleError, lacks_memory
from .evaluate import EvaluateOptions, evaluate
from .hardware import return_freed_memory
from .model_files import resolve_model
from .quantize.job import quantize
from .quantize.options import QuantizeOptions
from .tune import TuneOptions, compile_model, tune

EXIT_FAILED, EXIT_USER, EXIT_INTERRUPTED = 1, 2, 130
PARENT_SECONDS = 0.5  # between two looks at whether the parent still lives
PROGRESS_SECONDS = 0.05  # between two reports of one phase; the last is always sent

Options = dict[str, Any]
T = TypeVar("T")


class Reporter:
    """Writes events. A reader that is gone interrupts the task."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._reported = ("", 0.0)

    def emit(self, event: str, **content: Any) -> None:
        """One line."""
        try:
            self._stream.write(json.dumps({"event": event, **content}) + "\n")
            self._stream.flush()
        except BrokenPipeError as error:
            raise KeyboardInterrupt from error

    def progress(
        self, phase: str, done: int, total: int, layer: int | None = None, loss: float | None = None
    ) -> None:
        """``done`` of ``total`` in ``phase``; the decoder block at hand, and its last module's loss."""
        now = time.monotonic()
        last_phase, last = self._reported
        if phase != last_phase or done >= total or now - last >= PROGRESS_SECONDS:
            self._reported = (phase, now)
            more = {"layer": layer, "loss": loss}
            known = {name: value for name, value in more.items() if value is not None}
            self.emit("progress", phase=phase, done=done, total=total, **known)

    def log(self, line: str) -> None:
        """One line for people."""
        self.emit("log", line=line)


def _check(options: Options, reporter: Reporter) -> Options:
    revision = options.pop("revision", None)
    folder = resolve_model(options.pop("model", None), revision)
    report = check_model(folder, _record(EngineConfig, {**options, "model": str(folder)}))
    return {**report.to_dict(), "lines": report.lines()}


def _quantize(options: Options, reporter: Reporter) -> Options:
    record = _record(QuantizeOptions, options)
    _set_threads(record.num_threads)
    return quantize(record, reporter.progress, reporter.log)


def _evaluate(options: Options, reporter: Reporter) -> Options:
    record = _record(EvaluateOptions, options)
    _set_threads(record.num_threads)
    return evaluate(record, reporter.progress, reporter.log)


def _tune(options: Options, reporter: Reporter) -> Options:
    return tune(_record(TuneOptions, options), reporter.progress, reporter.log)


def _warm(options: Options, reporter: Reporter) -> Options:
    folder = resolve_model(options.pop("model", None), None)
    config = _record(EngineConfig, {**options, "model": str(folder), "device": "cuda"})
    return compile_model(config, reporter.progress, reporter.log)


TASKS: dict[str, Callable[[Options, Reporter], Options]] = {
    "check": _check,
    "quantize": _quantize,
    "evaluate": _evaluate,
    "tune": _tune,
    "warm": _warm,
}


def _record(kind: Callable[..., T], options: Options) -> T:
    """A record of options; those that are not given have their defaults. ConfigError for an unknown one."""
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise ConfigError(f"option {name}: not known; use some of {', '.join(known)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ConfigError(f"options: {error}") from error


def _set_threads(num_threads: int | None) -> None:
    """None: what OMP_NUM_THREADS says, which the parent sets."""
    if num_threads is not None:
        torch.set_num_threads(num_threads)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    # Once: a second signal, from a terminal and from the parent, must not break the cleaning up. Not SIG_IGN:
    # of a signal that has come by now Python would print that it was "ignored due to race condition".
    signal.signal(signal.SIGINT, _heard)
    signal.signal(signal.SIGTERM, _heard)
    raise KeyboardInterrupt


def _heard(signum: int, frame: FrameType | None) -> None:
    """Of the signals after the first."""


def run(name: str, source: TextIO, reporter: Reporter) -> int:
    """Run the task ``name`` with the options in ``source``; returns the exit code."""
    try:
        task = TASKS.get(name)
        if task is None:
            raise ConfigError(f"task {name}: use one of {', '.join(TASKS)}")
        try:
            options = json.load(source)
        except ValueError as error:
            raise ConfigError(f"options: not JSON ({error})") from error
        if not isinstance(options, dict):
            raise ConfigError(f"options: a JSON {type(options).__name__}, expected an object")
        reporter.emit("result", **task(options, reporter))
    except NybbleError as error:
        user_error = isinstance(error, ConfigError)
        layer = {"layer": error.layer} if isinstance(error, LayerError) else {}
        code = _lacking(error.__cause__) or ("invalid" if user_error else "failed")
        reporter.emit("error", code=code, message=error.message, user_error=user_error, **layer)
        return EXIT_USER if user_error else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the border of the process: reported, and told to the parent
        if signal.getsignal(signal.SIGTERM) is _heard:
            return EXIT_INTERRUPTED  # a library made another error of the interrupt
        traceback.print_exc()
        code, message = _described(error)
        reporter.emit("error", code=code, message=message, user_error=False)
        return EXIT_FAILED
    return 0


def _lacking(error: BaseException | None) -> str | None:
    """The code of an error for lack of memory or of room on the disk."""
    if error is None:
        return None
    if lacks_memory(error):
        return "out_of_memory"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "disk_full" if full else None


_REMEDIES = {
    "out_of_memory": "out of memory ({}); lower --num-samples or --seq-len, or give more",
    "disk_full": "no space left ({}); free some and start again",
}


def _described(error: Exception) -> tuple[str, str]:
    """A code and words for what no user can be blamed for."""
    text, code = f"{type(error).__name__}: {error}", _lacking(error)
    return ("failed", text) if code is None else (code, _REMEDIES[code].format(text[:200]))


def _take_limits(given: argparse.Namespace) -> None:
    """Of this process: niceness, memory, and the end of its parent."""
    os.nice(given.nice)
    if given.memory_limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (given.memory_limit, given.memory_limit))
    if given.parent is not None:
        threading.Thread(target=_end_with, args=(given.parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Interrupt this process once its parent is gone, which a pipe tells only at the next word."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Process entry."""
    signal.signal(signal.SIGINT, _interrupt)
    signal.signal(signal.SIGTERM, _interrupt)
    # Libraries that print must not break the protocol: their stdout is our stderr.
    stream = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    parser = argparse.ArgumentParser(
        prog="python -m nybble.engine.tasks", description="options: JSON on stdin"
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--memory-limit", type=int, metavar="BYTES")
    parser.add_argument("--parent", type=int, metavar="PID", help="end when this process does")
    given = parser.parse_args()
    _take_limits(given)
    return_freed_memory()
    sys.exit(run(given.name, sys.stdin, Reporter(stream)))


if __name__ == "__main__":
    main()
