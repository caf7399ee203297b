"""Time on the GPU: calls in a CUDA graph, replayed between events; in a rehearsal, by the wall clock.

Imports nothing but torch and ours: it runs on machines where nothing is installed.
"""

import time
from collections.abc import Sequence
from typing import Protocol
from unittest import mock

import torch
from nybble.kernels.triton.graph_clock import Call
from nybble.kernels.triton.graph_clock import graph_seconds as cuda_clock


class Clock(Protocol):
    """Seconds of one of ``calls``, that are made one after another: the median of ``rounds``."""

    def __call__(self, calls: Sequence[Call], rounds: int = 20) -> float:
        """See the class."""


def wall_clock(calls: Sequence[Call], rounds: int = 20) -> float:
    """One round: a rehearsal is not a measurement. The GPU's clock is gone through with stand-ins as well."""
    del rounds
    started = time.perf_counter()
    for call in calls:
        call()
    seconds = time.perf_counter() - started
    names = ("Event", "Stream", "CUDAGraph", "graph", "stream", "synchronize", "current_stream")
    with mock.patch.multiple(torch.cuda, **{name: _stand_in(name) for name in names}):
        cuda_clock([lambda: None], rounds=2)
    return seconds / len(calls)


def _stand_in(name: str) -> mock.Mock:
    """Of a member of torch.cuda, with its signature."""
    stand_in: mock.Mock = mock.create_autospec(getattr(torch.cuda, name))
    if name == "Event":
        stand_in.return_value.elapsed_time.return_value = 1.0
    return stand_in


def copy_bandwidth(clock: Clock, device: str, num_bytes: int) -> float:
    """Bytes read and written per second by torch's copy."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * num_bytes / clock([lambda: target.copy_(source)])


def matmul_rate(clock: Clock, device: str, size: int, dtype: torch.dtype) -> float:
    """Operations per second of torch's matmul of square matrices."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2.0 * size**3 / clock([lambda: a @ b])
