"""Which weights stay exact, and the residuals that keep them so."""

import dataclasses
import math

import pytest
import torch
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.quantize.outliers import (
    MAX_SHARE,
    adaptive_shares,
    capped,
    detach,
    kept,
    largest,
    threshold,
)
from nybble.kernels.layout import QuantSpec

RANDOM = torch.Generator().manual_seed(0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, math.inf])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.05])
def test_shares_add_up(temperature: float, share: float) -> None:
    means = {"a": 1e-8, "b": 3e-8, "c": 2e-7, "d": 0.0}
    sizes = {"a": 1000, "b": 4000, "c": 500, "d": 700}
    found = adaptive_shares(means, sizes, share, temperature)
    wanted = share * sum(sizes.values())
    assert sum(found[name] * sizes[name] for name in sizes) == pytest.approx(wanted, rel=1e-9)
    assert max(found.values()) <= MAX_SHARE
    if math.isinf(temperature):
        assert list(found.values()) == pytest.approx([share] * 4)
    else:
        assert found["d"] == 0
        assert found["a"] < found["b"] <= found["c"]


def test_shares_stop_at_the_cap() -> None:
    found = adaptive_shares({"a": 1.0, "b": 1e-9}, {"a": 100, "b": 900}, 0.5, 1.0)
    assert found == {"a": MAX_SHARE, "b": MAX_SHARE}
    assert adaptive_shares({"a": 0.0}, {"a": 10}, 0.01, 1.0) == {"a": 0.0}


def test_largest() -> None:
    weight = torch.tensor([[0.1, -5.0, 0.2], [3.0, 0.0, -0.3]])
    mask = largest(weight, 2 / 6)
    assert mask is not None
    assert mask.tolist() == [[False, True, False], [True, False, False]]
    assert largest(weight, 0.01) is None


def test_threshold_is_global() -> None:
    scores = [torch.rand(20, 30, generator=RANDOM) * scale for scale in (1, 5, 0.1)]
    least = threshold(iter(scores), 50)
    assert sum(int((part >= least).sum()) for part in scores) == 50
    assert threshold(iter(scores), 0) == math.inf
    assert threshold(iter(scores), 10**6) == min(float(part.min()) for part in scores)


def test_no_row_gets_too_many() -> None:
    scores = torch.ones(4, 1000)
    mask = capped(scores, 0.5, 0.001)
    assert mask.sum(1).tolist() == [64] * 4
    assert torch.equal(capped(scores, 0.5, 0.5), scores > 0)


@pytest.mark.parametrize("share", [0.0, 0.01, 1.0])
def test_dense_and_sparse_are_the_materialised_weight(share: float) -> None:
    """Also empty and full rows; on top of weights that were kept before."""
    weight = torch.randn(24, 64, generator=RANDOM)
    weight[5, 7] = 30.0
    first = largest(weight, 1 / weight.numel())
    packed = round_nearest(weight, QuantSpec(2, 32, False), exclude=first)
    picked = torch.rand(24, 64, generator=RANDOM) < share
    picked[3] = share > 0
    found = detach(packed, weight, picked)
    assert torch.equal(found.values, packed.values)
    expected = torch.where(picked, weight, packed.dequantize())
    torch.testing.assert_close(found.dequantize(), expected, rtol=1e-3, atol=1e-3)
    assert first is not None
    assert bool(kept(found)[first].all())
    assert found.outliers is not None
    plain = dataclasses.replace(found, outliers=None).dequantize()
    sparse = torch.zeros(24, 64)
    found.outliers.add_to(sparse)
    x = torch.randn(5, 64, generator=RANDOM)
    torch.testing.assert_close(x @ plain.T + x @ sparse.T, x @ found.dequantize().T, rtol=1e-4, atol=1e-4)


def test_nothing_picked_is_no_overlay() -> None:
    """Else the beginnings of its rows would be stored."""
    weight = torch.randn(24, 64, generator=RANDOM)
    packed = round_nearest(weight, QuantSpec(2, 32, False))
    assert detach(packed, weight, torch.zeros(24, 64, dtype=torch.bool)).outliers is None
