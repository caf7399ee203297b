"""Rounding to nearest against a numpy oracle, and the edges of a group's range."""

import numpy as np
import pytest
import torch
from nybble.engine.quantize.grid import ScaleOverflowError, fit, round_nearest
from nybble.kernels.layout import QuantSpec


def oracle(weight: np.ndarray, bits: int, size: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Codes, scales, zeros by ../shared/methods.md 2.2, scalar by scalar in float32."""
    rows, cols = weight.shape
    size = cols if size == -1 else size
    groups = -(-cols // size)
    codes = np.zeros((rows, cols), np.uint8)
    scales, zeros = np.zeros((rows, groups), np.float16), np.zeros((rows, groups), np.uint8)
    for row in range(rows):
        for group in range(groups):
            part = weight[row, group * size : (group + 1) * size]
            low, high = min(part.min(), np.float32(0)), max(part.max(), np.float32(0))
            if symmetric:
                high = max(-low, high)
                low = -high
            if low == high:
                low, high = np.float32(-1), np.float32(1)
            scale = np.float16(np.float32(high - low) / np.float32(2**bits - 1))
            zero = (
                2 ** (bits - 1) if symmetric else np.clip(np.round(-low / np.float32(scale)), 0, 2**bits - 1)
            )
            codes[row, group * size : (group + 1) * size] = np.clip(
                np.round(part / np.float32(scale)) + zero, 0, 2**bits - 1
            )
            scales[row, group], zeros[row, group] = scale, zero
    return codes, scales, zeros


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [-1, 16, 40, 128])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_oracle(bits: int, size: int, symmetric: bool) -> None:
    weight = np.random.default_rng(bits).normal(size=(6, 96)).astype(np.float32)
    weight[0] = np.abs(weight[0])  # no negative weight
    weight[1] = -np.abs(weight[1])
    weight[2] = 0
    packed = round_nearest(torch.from_numpy(weight), QuantSpec(bits, size, symmetric))
    codes, scales, zeros = oracle(weight, bits, size, symmetric)
    assert packed.scales is not None
    assert packed.scales.dtype == torch.float16
    np.testing.assert_array_equal(packed.scales.numpy(), scales)
    np.testing.assert_array_equal(packed.values.numpy(), codes)
    if symmetric:
        assert packed.zeros is None
    else:
        assert packed.zeros is not None
        np.testing.assert_array_equal(packed.zeros.numpy(), zeros)


def test_symmetric_range_is_mirrored_without_negative_weights() -> None:
    """The original's pitfall: s = max/15 with z = 8 would clip all above 7/15 of the largest."""
    packed = round_nearest(torch.linspace(0, 1.5, 32)[None], QuantSpec(4, -1, True))
    assert float(packed.dequantize().max()) == pytest.approx(1.4, abs=2e-3)  # 7 s, s = 2 * 1.5 / 15
    assert int(packed.values.min()) == 8


def test_zeros_come_back_exactly() -> None:
    for symmetric in (True, False):
        weight = torch.zeros(2, 64)
        weight[1, 3] = 0.7
        assert float(round_nearest(weight, QuantSpec(4, 32, symmetric)).dequantize()[0].abs().max()) == 0
        assert float(round_nearest(weight, QuantSpec(4, 32, symmetric)).dequantize()[1, 4]) == 0


def test_scale_that_fp16_cannot_hold() -> None:
    with pytest.raises(ScaleOverflowError):
        round_nearest(torch.tensor([[1e6, -1e6]]), QuantSpec(4, -1, True))
    tiny = round_nearest(torch.tensor([[1e-9, -1e-9]]), QuantSpec(4, -1, True))
    assert bool(torch.isfinite(tiny.dequantize()).all())


def test_range_search_lowers_its_error() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 9.0
    for symmetric in (True, False):
        spec = QuantSpec(3, -1, symmetric)
        whole, searched = fit(weight, spec), fit(weight, spec, mse=2.4)
        errors = [float((g.values(g.codes(weight)) - weight).abs().pow(2.4).sum()) for g in (whole, searched)]
        assert errors[1] < 0.8 * errors[0]


def test_excluded_weights_do_not_count() -> None:
    weight = torch.tensor([[0.5, -1.0, 40.0, 0.25]])
    exclude = torch.tensor([[False, False, True, False]])
    grid = fit(weight, QuantSpec(4, -1, True), exclude=exclude)
    assert float(grid.scales) == pytest.approx(2 / 15, rel=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("mse", [0.0, 2.4])
def test_a_zero_point_of_0_can_be_left_out(bits: int, mse: float) -> None:
    """The largest weight stays in reach; groups that have another zero point stay as they are."""
    random = torch.Generator().manual_seed(0)
    weight = torch.cat([torch.rand(4, 32, generator=random), torch.randn(4, 32, generator=random)])
    free = fit(weight, QuantSpec(bits, -1, False), mse)
    bound = fit(weight, QuantSpec(bits, -1, False, least_zero=1), mse)
    assert free.zeros[:4].flatten().tolist() == [0.0] * 4
    assert bound.zeros[:4].flatten().tolist() == [1.0] * 4
    assert torch.equal(free.zeros[4:], bound.zeros[4:])
    assert torch.equal(free.scales[4:], bound.scales[4:])
    positive, steps = weight[:4], 2**bits - 1
    grid = fit(positive, QuantSpec(bits, -1, False, least_zero=1), mse)
    assert torch.equal(grid.scales, bound.scales[:4])
    if mse == 0:
        worst = (grid.values(grid.codes(positive)) - positive).abs().amax(1, keepdim=True)
        assert bool((worst <= 0.501 * grid.scales).all())
        assert bool((grid.scales <= 1.002 * free.scales[:4] * steps / (steps - 1)).all())
