"""Whether threads get the cores they want, by the kernel's own count."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path

WINDOW = 0.05  # seconds of runs between two looks at the counts
CONTENDED = (
    0.2  # of the runs' time, all threads together: a foreign process on one core makes it about a half
)
LEAST_PENALTY, MOST_PENALTY = 0.25, 4.0  # seconds on one thread; doubled when it happens again


def waits_are_counted(proc: Path = Path("/proc/self")) -> bool:
    """Whether schedstat is there and counts: without CONFIG_SCHED_INFO it is missing, or all zeros."""
    try:
        return int((proc / "schedstat").read_text().split()[0]) > 0
    except (OSError, IndexError, ValueError):
        return False


class Contention:
    """Decides when a caller with ``workers`` (native thread ids) had better run alone.

    A foreign busy process on one of the cores makes every barrier wait for a thread that is not scheduled.
    The kernel counts how long a thread was ready but not run (proc(5), schedstat); where that is a good
    part of the time of the runs, they are to go on one thread, and try all again after a while. How often
    or how long threads sleep at barriers does not tell: unequal shares and short serial calls look the same.

    Where the kernel does not count (``waits_are_counted``), runs never go on one thread.
    """

    def __init__(self, workers: Sequence[int], proc: Path = Path("/proc/self/task")) -> None:
        self._workers = workers
        self._proc = proc
        self._seconds = 0.0  # of runs in this window
        self._before: int | None = None  # nanoseconds waited when the window began
        self._penalty = LEAST_PENALTY
        self._alone_until = 0.0

    def alone(self, now: float) -> bool:
        """Whether a run that begins at ``now`` (time.monotonic) is to take one thread."""
        return now < self._alone_until

    def ran(self, seconds: float) -> None:
        """Book a run on all threads; now and then, judge."""
        self._seconds += seconds
        if self._before is not None and self._seconds < WINDOW:
            return
        waited = self._waited()
        if self._before is not None and waited - self._before > CONTENDED * self._seconds * 1e9:
            self._alone_until = time.monotonic() + self._penalty
            self._penalty = min(2 * self._penalty, MOST_PENALTY)
            self._before = None
        else:
            if self._before is not None:
                self._penalty = max(LEAST_PENALTY, self._penalty / 2)
            self._before = waited
        self._seconds = 0.0

    def _waited(self) -> int:
        """Nanoseconds that the caller and the workers were ready but not run; 0 where that is not counted."""
        total = 0
        for thread in (threading.get_native_id(), *self._workers):
            try:
                total += int((self._proc / str(thread) / "schedstat").read_text().split()[1])
            except (OSError, IndexError, ValueError):
                return 0
        return total
