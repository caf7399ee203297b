"""Measuring, over interpreted kernels: every kind of weight runs, and a wrong result is not a fast one."""

from collections.abc import Callable, Sequence

import pytest
import torch
from nybble.kernels.triton.launch import Launch, Machine

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("a GPU is here: kernels are compiled, not interpreted", allow_module_level=True)
import triton_interpreter  # noqa: E402
from nybble.kernels.triton.tuning import KINDS, Contest, DoesNotRun, Problem  # noqa: E402
from nybble.kernels.triton.tuning_bench import Bench  # noqa: E402

TARGET = triton_interpreter.InterpretedTarget("cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: Machine("here", "sm_90", 4)))


def clock(calls: Sequence[Callable[[], object]]) -> float:
    """How many calls: each has weights of its own."""
    for call in calls:
        call()
    return float(len(calls))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_runs(kind: str) -> None:
    bench = Bench(TARGET, 1, clock)
    problem = Problem(kind, (128, 256), 3)
    default = Launch("sparse24" if kind.endswith("24") else "mma", 8, 64, 4, 3, 1)
    contest = Contest(kind, 8, None, (problem,), default, (default, Launch("dense")))
    bench.compile(contest, 2)
    assert [bench(problem, tried) for tried in contest.candidates] == [2.0, 2.0]


def test_weights_rotate_through_more_than_a_cache() -> None:
    problem = Problem("w4", (128, 256), 1)
    bench = Bench(TARGET, 100_000, clock)
    assert bench(problem, Launch("mma", 8, 64)) == -(-100_000 // (128 * 128 + 128 * 2 * 2))


def test_a_wrong_result_is_not_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(TARGET, 1, clock)
    problem = Problem("w4", (128, 256), 3)
    bench(problem, Launch("mma", 8, 64))
    linear = type(bench._of(problem)[0])
    monkeypatch.setattr(linear, "launched", lambda self, x, tried: torch.full((3, 128), float("nan")))
    with pytest.raises(DoesNotRun, match="another result: relative error nan"):
        bench(problem, Launch("mma", 8, 128))
    monkeypatch.undo()


@pytest.mark.parametrize(
    "error", [triton.runtime.OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("no")]
)
def test_what_cannot_start_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(TARGET, 1, clock)
    problem = Problem("w4", (128, 256), 3)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(type(bench._of(problem)[0]), "launched", fail)
    with pytest.raises(DoesNotRun, match=type(error).__name__):
        bench(problem, Launch("mma", 8, 64))
    monkeypatch.setattr(
        type(bench._of(problem)[0]),
        "launched",
        lambda *_: (_ for _ in ()).throw(torch.AcceleratorError("lost")),
    )
    with pytest.raises(torch.AcceleratorError):
        bench(problem, Launch("mma", 8, 64))
