"""The clock's calls of CUDA, against stand-ins with CUDA's signatures."""

from unittest import mock

import pytest
import torch
from nybble.kernels.triton.graph_clock import graph_seconds


def test_seconds_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Event", "Stream", "CUDAGraph", "graph", "stream", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.create_autospec(getattr(torch.cuda, name)))
    events = torch.cuda.Event.return_value  # type: ignore[attr-defined]
    # Milliseconds: the two calls took 0.8 at best, so that they are captured three times for a replay of 2.
    events.elapsed_time.side_effect = [0.9, 0.8, 5.0, 1.8, 2.4]
    made = []
    seconds = graph_seconds([lambda: made.append(1), lambda: made.append(2)], rounds=3)
    assert seconds == pytest.approx(2.4e-3 / 6)
    assert made == [1, 2] * (1 + 1 + 3)  # once to compile, once to see how long it takes
    events.elapsed_time.side_effect = [5.0, 5.0, 5.0, 1.0, 3.0]
    assert graph_seconds([lambda: None, lambda: None], rounds=3) == 1.5e-3  # long enough as it is
