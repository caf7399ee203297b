"""Worker: how fast the machine's threads read memory."""

import statistics
import time
from typing import Any

from nybble.kernels.cpu.pool import Pool
from protocol import serve
from read_loop import ReadLoop


class Bandwidth:
    """The operation. Its memory stays for the next call of the same size."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}
        self._loops: dict[tuple[int, int], ReadLoop] = {}

    def measure(self, threads: int, num_bytes: int, seconds: float) -> dict[str, Any]:
        """Bytes per second while the same bytes are read for so long: the median of the later half."""
        key = threads, num_bytes
        if key not in self._loops:
            if threads not in self._pools:
                self._pools[threads] = Pool(threads)
            self._loops[key] = ReadLoop(self._pools[threads], num_bytes)
        loop, rates, end = self._loops[key], [], time.perf_counter() + seconds
        while not rates or time.perf_counter() < end:
            began = time.perf_counter()
            loop()
            rates.append(num_bytes / (time.perf_counter() - began))
        later = rates[len(rates) // 2 :]
        return {"bytes_per_second": statistics.median(later), "best": max(later)}


if __name__ == "__main__":
    serve(measure=Bandwidth().measure)
