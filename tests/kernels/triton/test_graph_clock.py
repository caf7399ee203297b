"""The clock's calls of CUDA, against stand-ins with CUDA's signatures."""

from unittest import mock

import pytest
import torch
from nybble.kernels.triton.graph_clock import graph_seconds


def test_seconds_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Event", "Stream", "CUDAGraph", "graph", "stream", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
    events = torch.cuda.Event.return_value  # type: ignore[attr-defined]
    events.elapsed_time.side_effect = [5.0, 1.0, 3.0]  # milliseconds of two calls
    made = []
    assert graph_seconds([lambda: made.append(1), lambda: made.append(2)], rounds=3) == 1.5e-3
    assert made == [1, 2, 1, 2]  # once to compile, once captured
