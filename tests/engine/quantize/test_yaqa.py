"""YAQA's two-sided rounding: its fixed point, its loss, and GPTQ as the special case."""

from pathlib import Path

import pytest
import torch
from nybble.engine.quantize import yaqa
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.quantize.kronecker import Sketches
from nybble.engine.quantize.pipeline import ToRound
from nybble.engine.quantize.yaqa import YAQA, round_two_sided, unit_lower
from nybble.kernels.layout import PackedWeight, QuantSpec
from safetensors.torch import save_file
from torch import Tensor


def curvature(size: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, 2 * size, generator=random, dtype=torch.float64)
    rows = rows * torch.linspace(0.2, 2, 2 * size, dtype=torch.float64)
    return rows @ rows.T / size + 0.3


def problem(rows: int = 40, cols: int = 56) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return weight, curvature(rows, 1), curvature(cols, 2)


def lower(matrix: Tensor) -> Tensor:
    found = unit_lower(matrix)
    assert found is not None
    return found[0]


def loss(weight: Tensor, packed: PackedWeight, outputs: Tensor, inputs: Tensor) -> float:
    error = weight.double() - packed.dequantize(torch.float64)
    return float(torch.trace(error.T @ outputs @ error @ inputs))


def nearest(packed: PackedWeight, wanted: Tensor) -> Tensor:
    """``wanted`` rounded on the grids of ``packed``."""
    assert packed.scales is not None
    assert packed.spec is not None
    group = packed.group_of_inputs()
    scale = packed.scales.double()[:, group]
    zero = 2.0 ** (packed.spec.num_bits - 1) if packed.zeros is None else packed.zeros.double()[:, group]
    codes = (torch.round(wanted / scale) + zero).clamp(0, 2**packed.spec.num_bits - 1)
    return scale * (codes - zero)


@pytest.mark.parametrize("tile", [128, 16])
@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_fixed_point(tile: int, group_size: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Q = round(W + L_O^T E L_I - E) for its own E, and the loss is that of what rounding left."""
    monkeypatch.setattr(yaqa, "TILE", tile)
    weight, outputs, inputs = problem()
    factors = (lower(outputs), lower(inputs))
    packed = round_two_sided(weight, factors, QuantSpec(3, group_size, symmetric))
    values = packed.dequantize(torch.float64)
    wanted = weight + factors[0].T @ (weight - values) @ factors[1] - (weight - values)
    torch.testing.assert_close(nearest(packed, wanted), values, rtol=0, atol=1e-6)
    pivots = [unit_lower(matrix)[1] for matrix in (outputs, inputs)]  # type: ignore[index]
    bound = ((wanted - values).square() * pivots[0][:, None] * pivots[1]).sum()
    assert loss(weight, packed, outputs, inputs) == pytest.approx(float(bound), rel=1e-9)


def test_tiles_change_nothing_where_groups_are_fitted_before(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, outputs, inputs = problem(70, 90)
    factors, spec = (lower(outputs), lower(inputs)), QuantSpec(3, -1, True)
    results = []
    for tile in (7, 32, 89):
        monkeypatch.setattr(yaqa, "TILE", tile)
        results.append(round_two_sided(weight, factors, spec))
    for other in results[1:]:
        assert torch.equal(results[0].values, other.values)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_one_side_and_rounding_to_nearest(bits: int) -> None:
    weight, outputs, inputs = problem(64, 96)
    spec = QuantSpec(bits, 32, False)
    two = loss(weight, round_two_sided(weight, (lower(outputs), lower(inputs)), spec), outputs, inputs)
    eye = torch.eye(64, dtype=torch.float64)
    one = loss(weight, round_two_sided(weight, (eye, lower(inputs)), spec), outputs, inputs)
    none = loss(weight, round_nearest(weight, spec), outputs, inputs)
    assert two < 0.85 * one < 0.85 * none


def test_one_side_is_ldlq_from_the_right() -> None:
    """With H_O = I each row is rounded by itself, its columns from last to first."""
    weight, _, inputs = problem(12, 48)
    factor, spec = lower(inputs), QuantSpec(3, -1, True)
    packed = round_two_sided(weight, (torch.eye(12, dtype=torch.float64), factor), spec)
    values = torch.zeros_like(weight)
    for col in reversed(range(48)):
        wanted = weight[:, col] + (weight - values)[:, col + 1 :] @ factor[col + 1 :, col]
        values[:, col] = nearest(packed, wanted[:, None].expand(-1, 48))[:, col]
    torch.testing.assert_close(packed.dequantize(torch.float64), values, rtol=0, atol=1e-6)


def test_identities_are_rounding_to_nearest() -> None:
    weight, _, _ = problem(16, 64)
    eyes = (torch.eye(16, dtype=torch.float64), torch.eye(64, dtype=torch.float64))
    spec = QuantSpec(4, 32, False)
    packed, plain = round_two_sided(weight, eyes, spec), round_nearest(weight, spec)
    assert torch.equal(packed.values, plain.values)
    assert torch.equal(packed.scales, plain.scales)  # type: ignore[arg-type]


def test_excluded_weights_are_exact_in_the_recursion() -> None:
    weight, outputs, inputs = problem(24, 64)
    weight[3, 5] = 60.0
    exclude = torch.zeros_like(weight, dtype=torch.bool)
    exclude[3, 5] = exclude[10, 40] = True
    factors, spec = (lower(outputs), lower(inputs)), QuantSpec(3, 32, True)
    packed = round_two_sided(weight, factors, spec, exclude=exclude)
    assert packed.scales is not None
    assert float(packed.scales.max()) < 3
    assert packed.outliers is not None
    assert packed.outliers.rowptr.diff().nonzero()[:, 0].tolist() == [3, 10]
    values = packed.dequantize(torch.float64)
    error = weight - values
    wanted = weight + factors[0].T @ error @ factors[1] - error
    torch.testing.assert_close(values[exclude], wanted[exclude], rtol=1e-3, atol=1e-3)


def test_indefinite_matrices_are_told() -> None:
    assert unit_lower(torch.tensor([[1.0, 2.0], [2.0, 1.0]])) is None


@pytest.mark.parametrize("group_size", [-1, 16, 24])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_order_is_undone(group_size: int, symmetric: bool, tmp_path: Path) -> None:
    """What comes back is on its own grids, and as good as the proxy says; also where groups divide no row."""
    weight, outputs, inputs = (matrix.float() for matrix in problem(40, 64))
    inputs[3] *= 4
    inputs[:, 3] *= 4
    outputs[7] *= 4
    outputs[:, 7] *= 4
    save_file({"a.b.0.c/outputs": outputs, "a.b.0.c/inputs": inputs}, tmp_path / "sketch-00000.safetensors")
    rounder = YAQA(shrinkage=1e-3, activations=0.0, mse=2.0)
    rounder._sketches = Sketches(tmp_path)
    exclude = torch.zeros_like(weight, dtype=torch.bool)
    exclude[11, 30] = True
    spec = QuantSpec(3, group_size, symmetric)
    packed = rounder.round(ToRound("a.b.0.c", weight, spec, exclude), inputs)
    values = packed.dequantize(torch.float64)
    off_grid = (nearest(packed, values) - values).abs() > 1e-6
    assert off_grid.nonzero().tolist() in ([[11, 30]], [])
    plain = round_two_sided(weight, (lower(outputs), lower(inputs)), spec)
    costs = [loss(weight, found, outputs.double(), inputs.double()) for found in (packed, plain)]
    assert costs[0] < costs[1]


def test_ranges_heed_what_an_input_costs() -> None:
    """A group is narrowed for the sake of inputs that count, at the cost of a wide one that does not."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    weight[:, 5] = 20.0
    costs = torch.ones(32)
    costs[5] = 1e-6
    eyes, spec = (torch.eye(4), torch.eye(32)), QuantSpec(3, 32, True)
    heeding = round_two_sided(weight, eyes, spec, 2.0, costs=costs)
    plain = round_two_sided(weight, eyes, spec, 2.0)
    assert heeding.scales is not None
    assert plain.scales is not None
    assert bool((heeding.scales < plain.scales / 2).all())
