"""Whole steps over a tape: the same bits on any number of threads, however late they come."""

import threading

import pytest
import torch
from delayed_pool import Delays
from nybble.engine.hardware import cpu_features
from nybble.engine.tape_model import TapeModel
from nybble.kernels.cpu import pool as pool_module
from nybble.kernels.cpu.contention import Contention
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.dispatch import Target
from tape_models import low_bit_tape_model, run_steps
from torch import Tensor

FEATURES = cpu_features()
ISAS = [
    isa
    for isa in ("avx2", "vnni", "amx")
    if instruction_set(Target(cpu_features=FEATURES, cpu_kernels=isa)) == isa
]
BF16 = "vnni" in ISAS and "avx512_bf16" in FEATURES
MODES = [(isa, activations) for isa in ISAS for activations in ("int8", "fp32")] + [("vnni", "bf16")] * BF16
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU has neither AVX2 nor AVX-512 VNNI")


@pytest.fixture(scope="module")
def delays() -> Delays:
    return Delays()


@pytest.fixture
def late_threads(delays: Delays, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools made from now on keep to all their threads, and those dawdle."""
    monkeypatch.setattr(pool_module, "_functions", delays.functions)
    monkeypatch.setattr(Contention, "alone", lambda self, now: False)


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("spin", [0, 2000])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
@pytest.mark.parametrize(("isa", "activations"), MODES)
def test_late_threads_do_not_change_a_bit(
    isa: str, activations: str, num_threads: int, spin: int, delays: Delays, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole steps (prompts, chunks beside decoding, decoding) of linears of every kind, residuals, attention.

    That this can fail shows the next test.
    """
    model = low_bit_tape_model(isa, 1, activations)
    expected = run_steps(model)
    model.close()
    monkeypatch.setattr(pool_module, "_functions", delays.functions)
    monkeypatch.setattr(Contention, "alone", lambda self, now: False)
    before = delays.count
    model = low_bit_tape_model(isa, num_threads, activations)
    model._pool.close()
    model._pool = pool_module.Pool(num_threads, spin)
    for _ in range(5):
        assert same(run_steps(model), expected)
    model.close()
    assert delays.count - before > 5 * 4 * len(model._body.records)


@pytest.mark.parametrize("num_threads", [2, 4])
def test_without_any_one_barrier_late_threads_do(num_threads: int, late_threads: None) -> None:
    """The tape has no barrier too many, and the test above sees each that is missing."""
    isa = ISAS[-1]
    model = low_bit_tape_model(isa, num_threads)
    expected = run_steps(model)
    flags = model._body.records[:, 2]
    barriers = flags.nonzero()[0][:-1]  # the last one ends the run
    assert len(barriers) > 15
    for place in barriers:
        flags[place] = 0
        assert any(not same(run_steps(model), expected) for _ in range(200)), (
            f"none is needed after call {place}"
        )
        flags[place] = 1
    assert same(run_steps(model), expected)
    model.close()


def test_two_models_at_once_do_not_disturb_each_other() -> None:
    models = [low_bit_tape_model(ISAS[-1], 2) for _ in range(2)]
    expected = run_steps(models[0])
    good: list[bool] = []

    def run(model: TapeModel) -> None:
        good.append(all(same(run_steps(model), expected) for _ in range(20)))

    callers = [threading.Thread(target=run, args=(model,), daemon=True) for model in models]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(60)
    assert good == [True, True]
    for model in models:
        model.close()
