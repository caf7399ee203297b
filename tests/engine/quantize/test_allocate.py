"""Bits under a budget: against trying everything, and sizes against what a checkpoint stores."""

from itertools import product

import pytest
import torch
from nybble.engine.formats.gptq import GPTQFormat
from nybble.engine.formats.overlay import OverlayFormat
from nybble.engine.quantize.allocate import Choice, allocate, candidates, scaled, stored_bits
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.quantize.outliers import largest
from nybble.kernels.layout import QuantSpec


def choice(bits: float, loss: float, num_bits: int = 4) -> Choice:
    return Choice(QuantSpec(num_bits, 32, True), 0.0, bits, loss)


def random_choices(seed: int) -> dict[str, list[Choice]]:
    random = torch.Generator().manual_seed(seed)
    return {
        name: [
            choice(float(b), float(torch.rand((), generator=random)) * 4.0 ** (4 - b), b)
            for b in (2, 3, 4, 8)
        ]
        for name in "abcdef"
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [12, 15.5, 20, 24, 48])
def test_about_the_best_of_all(seed: int, budget: float) -> None:
    """Within the budget, and no worse than the best of all combinations with one exchange less."""
    choices = random_choices(seed)
    chosen = allocate(choices, budget)
    assert sum(c.bits for c in chosen.values()) <= budget

    def best(room: float) -> float:
        fitting = (c for c in product(*choices.values()) if sum(x.bits for x in c) <= room)
        return min(sum(x.loss for x in combination) for combination in fitting)

    found = sum(c.loss for c in chosen.values())
    assert found <= best(max(12, budget - 4)) + 1e-12
    assert found >= best(budget) - 1e-12


def test_useless_bits_are_not_spent() -> None:
    chosen = allocate({"a": [choice(2, 1.0), choice(3, 1.5), choice(4, 1.0)], "b": [choice(2, 0.0)]}, 100)
    assert [c.bits for c in chosen.values()] == [2, 2]


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="the least is 4 bits, the budget 3"):
        allocate({"a": [choice(2, 1.0)], "b": [choice(2, 1.0)]}, 3)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outliers", [0.0, 0.02])
def test_sizes_are_the_checkpoint_s(symmetric: bool, outliers: float) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(3, 32, symmetric)
    packed = round_nearest(weight, spec, exclude=largest(weight, outliers))
    base = GPTQFormat(spec, "gptq_v2")
    count = round(outliers * weight.numel())
    stored = OverlayFormat(base, {"m": count}) if count else base
    tensors = stored.write("m", packed)
    assert stored_bits(64, 128, spec, count / weight.numel()) == sum(t.nbytes * 8 for t in tensors.values())


def test_candidates_are_what_the_format_holds() -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(3, -1, False)
    found = list(candidates(weight, spec, 0.0))
    assert {c.spec.group_size for c in found} == {-1, 16, 32, 64}
    assert all(not c.spec.symmetric for c in found)
    losses = {(c.spec, c.outliers): c.loss for c in found}
    assert losses[QuantSpec(2, 32, False), 0.0] > 3 * losses[QuantSpec(3, 32, False), 0.0]
    assert losses[QuantSpec(3, 64, False), 0.0] > losses[QuantSpec(3, 64, False), 0.01]
    for size in (-1, 32):
        whole = round_nearest(weight, QuantSpec(3, size, False)).dequantize() - weight
        expected = float(whole.square().sum())
        assert losses[QuantSpec(3, size, False), 0.0] == pytest.approx(expected, rel=1e-4)  # all 96 rows
    priced = {(c.spec, c.outliers): c.loss for c in scaled(found, 7.0, spec)}
    assert priced[spec, 0.0] == pytest.approx(7.0)
