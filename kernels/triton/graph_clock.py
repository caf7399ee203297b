"""Time on the GPU: calls captured in a CUDA graph, replayed between events."""

import statistics
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


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
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(seconds)
