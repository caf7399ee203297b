"""How fast a phase of a task goes."""

import time
from typing import Any


class Pace:
    """Of one task, by its events."""

    def __init__(self) -> None:
        self._phase = ""
        self._began = (0.0, 0)

    def seconds_left(self, event: dict[str, Any]) -> float | None:
        """To the end of the phase that a progress event is of; None while unknown."""
        now, done = time.monotonic(), event["done"]
        if event["phase"] != self._phase:
            self._phase, self._began = event["phase"], (now, done)
        began, first = self._began
        return (now - began) / (done - first) * (event["total"] - done) if done > first else None
