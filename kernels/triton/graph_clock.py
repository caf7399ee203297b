"""Time on the GPU: calls captured in a CUDA graph, replayed between events."""

import math
import statistics
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
_LEAST = 2e-3  # seconds of a replay: its launch leaves the GPU idle for some 10 us, between the same events
_MOST = 100  # times that the calls are captured


def graph_seconds(calls: Sequence[Call], rounds: int = 20) -> float:
    """Seconds of one of ``calls``, made one after another: the median of ``rounds``.

    Each should have its own weights, so that none finds them in L2.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, and lets libraries choose
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = _captured(calls, 1)
    once = min(_replayed(graph) for _ in range(2))
    times = max(1, min(_MOST, math.ceil(_LEAST / once)))
    if times > 1:
        graph = _captured(calls, times)
    return statistics.median(_replayed(graph) for _ in range(rounds)) / (times * len(calls))


def _captured(calls: Sequence[Call], times: int) -> torch.cuda.CUDAGraph:
    """The calls in their order, ``times`` times, replayed once."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for call in calls:
                call()
    graph.replay()
    return graph


def _replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
