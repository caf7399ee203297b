"""GPTQ's identities (../shared/methods.md 8.5) against float64 numpy."""

import numpy as np
import pytest
import torch
from layers_to_round import correlated, proxy_loss
from nybble.engine.quantize.gptq import GPTQ, round_gptq
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.quantize.hessian import FactorizationError, HessianFactor, HessianMean, factorize
from nybble.engine.quantize.pipeline import ToRound
from nybble.engine.quantize.sweep import How, sweep
from nybble.kernels.layout import PackedWeight, QuantSpec
from torch import Tensor


def sweep_in_order(weight: Tensor, hessian: Tensor, spec: QuantSpec) -> tuple[PackedWeight, float]:
    factor = factorize(hessian, spec, 0.01)
    return round_gptq(weight, factor, spec), sweep(weight, factor, spec, How()).loss


@pytest.mark.parametrize("group_size", [-1, 32, 48])
@pytest.mark.parametrize("symmetric", [True, False])
def test_squared_errors_are_the_trace(group_size: int, symmetric: bool) -> None:
    weight, hessian = correlated(16, 160)
    packed, loss = sweep_in_order(weight, hessian, QuantSpec(4, group_size, symmetric))
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    assert loss == pytest.approx(proxy_loss(weight, packed, damped), rel=1e-9)


def ldlq(weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """QuIP's LDLQ: H = (I + F) D (I + F)^T, F strictly upper; column k is nearest to W_k + (W - Q) F_k."""
    size = len(hessian)
    unit, rest = np.eye(size), hessian.copy()
    for k in reversed(range(size)):  # eliminate from the last row: an upper factor
        pivot = rest[k, k]
        unit[:k, k] = rest[:k, k] / pivot
        rest[:k, :k] -= np.outer(rest[:k, k], rest[:k, k]) / pivot
    feedback = unit - np.eye(size)
    result = np.zeros_like(weight)
    zero = 2 ** (bits - 1)
    for k in range(size):
        target = weight[:, k] + (weight[:, :k] - result[:, :k]) @ feedback[:k, k]
        codes = np.clip(np.round(target / scales) + zero, 0, 2 * zero - 1)
        result[:, k] = scales * (codes - zero)
    return result


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_equals_ldlq(bits: int) -> None:
    weight, hessian = correlated(24, 144, seed=bits)
    packed, _ = sweep_in_order(weight, hessian, QuantSpec(bits, -1, True))
    damped = hessian.numpy() + 0.01 * np.trace(hessian.numpy()) / 144 * np.eye(144)
    assert packed.scales is not None
    other = ldlq(weight.numpy(), damped, packed.scales[:, 0].double().numpy(), bits)
    np.testing.assert_allclose(packed.dequantize(torch.float64).numpy(), other, atol=1e-6)


@pytest.mark.parametrize("group_size", [-1, 128])
@pytest.mark.parametrize("actorder", ["none", "group"])
def test_lazy_blocks_change_nothing(group_size: int, actorder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 against 16: groups that begin where both do are fitted on the same weights."""
    weight, hessian = correlated(8, 300)
    spec = QuantSpec(3, group_size, False, actorder)  # type: ignore[arg-type]
    factor = factorize(hessian, spec, 0.01)
    lazy = round_gptq(weight, factor, spec)
    monkeypatch.setattr("nybble.engine.quantize.sweep.LAZY_BLOCK", 16)
    eager = round_gptq(weight, factor, spec)
    assert torch.equal(lazy.values, eager.values)
    assert lazy.scales is not None
    assert eager.scales is not None
    assert torch.equal(lazy.scales, eager.scales)


@pytest.mark.parametrize("actorder", ["none", "group"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_beats_rounding_to_nearest(bits: int, actorder: str) -> None:
    weight, hessian = correlated(32, 192)
    spec = QuantSpec(bits, 64, True, actorder)  # type: ignore[arg-type]
    packed, _ = sweep_in_order(weight.float(), hessian.float(), spec)
    nearest = round_nearest(weight.float(), spec)
    assert proxy_loss(weight, packed, hessian) < 0.7 * proxy_loss(weight, nearest, hessian)


def test_identity_hessian_is_rounding_to_nearest() -> None:
    weight, _ = correlated(8, 96)
    packed, _ = sweep_in_order(weight, torch.eye(96, dtype=torch.float64), QuantSpec(4, 32, False))
    assert torch.equal(packed.values, round_nearest(weight, QuantSpec(4, 32, False)).values)


def test_actorder_groups_follow_the_diagonal() -> None:
    weight, hessian = correlated(8, 100)
    spec = QuantSpec(4, 32, False, "group")
    packed, _ = sweep_in_order(weight, hessian, spec)
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable")
    expected = np.empty(100, dtype=np.int32)
    expected[order] = np.arange(100) // 32
    assert packed.g_idx is not None
    np.testing.assert_array_equal(packed.g_idx.numpy(), expected)
    permuted, _ = sweep_in_order(weight[:, order], hessian[order][:, order], QuantSpec(4, 32, False))
    assert torch.equal(permuted.values, packed.values[:, order])


@pytest.mark.parametrize("group_size", [32, 48, -1])
def test_group_aware_order_keeps_groups(group_size: int) -> None:
    """The largest first within each group, groups by their largest; the last may be short."""
    weight, hessian = correlated(8, 176)
    spec = QuantSpec(3, group_size, False)
    factor = factorize(hessian, spec, 0.01, "gar")
    assert factor.perm is not None
    order, diagonal = factor.perm.numpy(), hessian.diagonal().numpy()
    size = 176 if group_size == -1 else group_size
    runs = np.split(order, np.flatnonzero(np.diff(order // size)) + 1)
    assert len(runs) == -(-176 // size)
    assert all(np.array_equal(run, run[np.argsort(-diagonal[run], kind="stable")]) for run in runs)
    largest = [diagonal[run].max() for run in runs]
    assert largest == sorted(largest, reverse=True)
    packed = round_gptq(weight, factor, spec)
    assert packed.g_idx is None
    plain = round_gptq(weight, factorize(hessian, spec, 0.01), spec)
    assert proxy_loss(weight, packed, hessian) != proxy_loss(weight, plain, hessian)
    # The same as rounding the columns in this order with groups to match.
    if group_size == -1:
        moved, _ = sweep_in_order(weight[:, order], hessian[order][:, order], spec)
        assert torch.equal(moved.values, packed.values[:, order])


@pytest.mark.parametrize("order", ["none", "group", "gar"])
def test_static_groups_have_the_ranges_of_the_original(order: str) -> None:
    weight, hessian = correlated(8, 144)
    spec = QuantSpec(3, 32, False)
    rounder = GPTQ(0.01, 0.0, order, static_groups=True)  # type: ignore[arg-type]
    packed = rounder.round(ToRound("", weight, spec), rounder.prepare(hessian, spec))
    nearest = round_nearest(weight, spec)
    assert packed.g_idx is None
    assert packed.scales is not None
    assert nearest.scales is not None
    assert torch.equal(packed.scales, nearest.scales)
    assert torch.equal(packed.zeros, nearest.zeros)  # type: ignore[arg-type]
    assert proxy_loss(weight, packed, hessian) < 0.7 * proxy_loss(weight, nearest, hessian)


@pytest.mark.parametrize("order", ["none", "group", "gar"])
def test_squared_errors_are_the_trace_with_weights_kept_apart(order: str) -> None:
    """Exactly, residuals in fp16 and all: what is stored is what the sweep reckoned with."""
    weight, hessian = correlated(16, 160)
    exclude = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.03
    spec = QuantSpec(3, 32, True)
    factor = factorize(hessian, spec, 0.01, order)  # type: ignore[arg-type]
    swept = sweep(weight, factor, spec, How(exclude=exclude))
    packed = swept.packed(spec)
    assert packed.outliers is not None
    assert len(packed.outliers.values) == int(exclude.sum())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160, dtype=torch.float64)
    assert swept.loss == pytest.approx(proxy_loss_fp32(weight, packed, damped), rel=1e-5)


def proxy_loss_fp32(weight: torch.Tensor, packed: PackedWeight, hessian: torch.Tensor) -> float:
    """With the overlay added in fp32, as ``dequantize`` does."""
    difference = weight - packed.dequantize().double()
    return float(torch.trace(difference @ hessian @ difference.T))


def test_dead_input_is_rounded_to_nearest_and_spoils_nothing() -> None:
    weight, hessian = correlated(8, 64)
    hessian[:, 5] = hessian[5, :] = 0
    spec = QuantSpec(4, -1, True)
    packed, _ = sweep_in_order(weight, hessian, spec)
    nearest = round_nearest(weight, spec)
    assert torch.equal(packed.values[:, 5], nearest.values[:, 5])
    kept = [k for k in range(64) if k != 5]
    assert proxy_loss(weight, packed, hessian) < proxy_loss(weight, nearest, hessian)
    assert not torch.equal(packed.values[:, kept], nearest.values[:, kept])


def test_excluded_weights_make_no_error_and_widen_no_grid() -> None:
    weight, hessian = correlated(8, 64)
    weight[:, 7] = 50.0
    exclude = torch.zeros_like(weight, dtype=torch.bool)
    exclude[:, 7] = True
    spec = QuantSpec(4, -1, True)
    factor = factorize(hessian, spec, 0.01)
    packed = round_gptq(weight, factor, spec, exclude=exclude)
    assert packed.scales is not None
    assert float(packed.scales.max()) < 1.0
    assert packed.outliers is not None
    assert len(packed.outliers.values) == 8
    difference = weight - packed.dequantize(torch.float64)
    plain = round_gptq(weight, factor, spec)
    assert float(torch.trace(difference @ hessian @ difference.T)) < 0.1 * proxy_loss(weight, plain, hessian)


def test_damping_grows_until_the_hessian_factorizes() -> None:
    ones = torch.ones(64, 64)  # rank 1: needs damping
    assert factorize(ones, QuantSpec(4, 32, True), 0.01).damping == 0.01
    indefinite = torch.eye(64) - 0.5 * torch.ones(64, 64) / 64 * 4
    assert factorize(indefinite, QuantSpec(4, 32, True), 0.01).damping > 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unusable_hessian_is_reported(value: float) -> None:
    hessian = torch.eye(32)
    hessian[3, 3] = value
    with pytest.raises(FactorizationError, match="not finite"):
        factorize(hessian, QuantSpec(4, 32, True), 0.01)
    with pytest.raises(FactorizationError, match="not positive definite"):
        factorize(
            torch.eye(32) - 99 * torch.eye(32).roll(1, 0) - 99 * torch.eye(32).roll(1, 1),
            QuantSpec(4, 32, True),
            0.01,
        )


def test_factor_inverts_the_hessian() -> None:
    _, hessian = correlated(1, 48)
    factor = factorize(hessian, QuantSpec(4, 16, True), 0.0)
    assert isinstance(factor, HessianFactor)
    assert torch.equal(factor.upper, factor.upper.triu())
    torch.testing.assert_close(factor.upper.T @ factor.upper @ hessian, torch.eye(48, dtype=torch.float64))


def test_hessian_mean_is_twice_the_second_moment() -> None:
    inputs = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    mean = HessianMean(12)
    for part in inputs.split(7):
        mean.add(part)
    expected = 2 * np.asarray(inputs, dtype=np.float64).T @ np.asarray(inputs, dtype=np.float64) / 50
    np.testing.assert_allclose(mean.value.numpy(), expected, rtol=1e-5, atol=1e-6)
