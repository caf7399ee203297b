"""Worker: how fast the machine's threads read memory, with numba."""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from protocol import serve

WORDS = 64 << 20  # 512 MiB of uint64: far beyond any cache


@njit("uint64(uint64[::1])", nogil=True, cache=False)
def read(words: NDArray[np.uint64]) -> int:
    """Their sum, modulo 2**64; LLVM makes vector loads of it."""
    total = np.uint64(0)
    for word in words:
        total += word
    return total


class Bandwidth:
    """The operation. The memory is written once, so that every page is real."""

    def __init__(self) -> None:
        self._words = np.arange(WORDS, dtype=np.uint64)
        self._sum = WORDS * (WORDS - 1) // 2

    def measure(self, threads: int, repeats: int) -> dict[str, Any]:
        """Median over ``repeats``, in bytes per second."""
        rates = []
        parts = np.array_split(self._words, threads)
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(repeats):
                began = time.perf_counter()
                total = sum(int(part) for part in pool.map(read, parts))
                rates.append(self._words.nbytes / (time.perf_counter() - began))
                assert total % 2**64 == self._sum
        return {"bytes_per_second": statistics.median(rates), "best": max(rates)}


if __name__ == "__main__":
    bandwidth = Bandwidth()
    serve(measure=bandwidth.measure)
