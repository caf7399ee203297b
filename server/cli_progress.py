"""How far a task is: bars on a terminal, plain lines elsewhere (a file, a container's log)."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .pace import Pace

PLAIN_SECONDS = 10.0  # between two lines of one phase, beside its first and last

Show = Callable[[dict[str, Any]], None]


@contextmanager
def shown_progress() -> Iterator[Show]:
    """A function that shows a task's event on stderr: its log lines, and how far each phase is."""
    # Imported here: the gateway, which this module is a part of, has no use for bars.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield Plain().show
        return
    columns = (TextColumn("{task.description:<9}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=console)
    phases: dict[str, Any] = {}

    def show(event: dict[str, Any]) -> None:
        if event["event"] == "log":
            console.print(event["line"], markup=False, soft_wrap=True)
        elif event["event"] == "progress":
            if not phases:
                bars.start()  # not before: it ends with an empty line, also where there was no bar
            phase = event["phase"]
            if phase not in phases:
                phases[phase] = bars.add_task(phase, total=event["total"])
            bars.update(phases[phase], completed=event["done"], total=event["total"])

    try:
        yield show
    finally:
        if phases:
            bars.stop()


class Plain:
    """Lines of text: where a phase begins and ends, and every PLAIN_SECONDS at the most."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._phase = ""
        self._told = (0.0, -1)

    def show(self, event: dict[str, Any]) -> None:
        """See ``shown_progress``."""
        if event["event"] == "log":
            _say(event["line"])
        elif event["event"] == "progress":
            now, done, left = time.monotonic(), event["done"], self._pace.seconds_left(event)
            begins = event["phase"] != self._phase
            if begins:
                self._phase, self._told = event["phase"], (now, -1)
            told, said = self._told
            if done != said and (begins or done >= event["total"] or now - told >= PLAIN_SECONDS):
                self._told = (now, done)
                _say(_line(event, left))


def _line(event: dict[str, Any], left: float | None) -> str:
    parts = [f"{event['phase']}: {event['done']} of {event['total']}"]
    if "layer" in event:
        parts.append(f"layer {event['layer']}")
    if "loss" in event:
        parts.append(f"loss {event['loss']:.4g}")
    if left is not None and event["done"] < event["total"]:
        parts.append(f"about {_duration(left)} left")
    return ", ".join(parts)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
