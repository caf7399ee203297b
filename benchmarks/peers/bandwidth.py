"""Worker: how fast the machine's threads read memory."""

import statistics
import time
from typing import Any

from nybble.kernels.cpu.pool import Pool
from protocol import serve
from read_loop import ReadLoop

BYTES = 512 << 20  # far beyond a thread's caches


class Bandwidth:
    """The operation."""

    def __init__(self) -> None:
        self._loop: ReadLoop | None = None

    def measure(self, threads: int, repeats: int) -> dict[str, Any]:
        """Median over ``repeats``, in bytes per second."""
        if self._loop is None:
            self._loop = ReadLoop(Pool(threads), BYTES)
        rates = []
        for _ in range(repeats):
            began = time.perf_counter()
            self._loop()
            rates.append(BYTES / (time.perf_counter() - began))
        return {"bytes_per_second": statistics.median(rates), "best": max(rates)}


if __name__ == "__main__":
    serve(measure=Bandwidth().measure)
