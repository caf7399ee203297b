"""When a loss change is predicted, and from what text."""

from typing import Any

import pytest
from nybble.engine.quantize import prediction
from nybble.engine.scoring import cut_windows


@pytest.mark.parametrize(
    ("asked", "method", "params", "needed", "reason"),
    [
        (None, "gptq", 100_000_000, 1, None),
        (None, "gptq", 100_000_001, 1, "only when asked"),
        (True, "gptq", 10**10, 1, None),
        (None, "requant", 10**10, 1, None),
        (False, "requant", 1, 1, "not asked for"),
        (True, "gptq", 1, 1 << 60, r"gradients need 1152921504.6 GB"),
    ],
)
def test_when(asked: bool | None, method: str, params: int, needed: int, reason: Any) -> None:
    found = prediction.refusal(asked, method, params, needed)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_its_text_is_bounded_and_repeats_nothing() -> None:
    windows = [window for n in range(3) for window in cut_windows(list(range(n, n + 3000)), 700)]
    pieces = prediction._pieces(windows)
    assert [(piece[0], len(piece)) for piece in pieces] == [(0, 512), (1, 512)]
