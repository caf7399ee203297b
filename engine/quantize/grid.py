"""The grid of a group of weights: scale and zero point from its range, and rounding onto it.

After GPTQ's quantizer (IST-DASLab/gptq, quant.py) with two differences: symmetric ranges are mirrored
even where a group has no negative weight, and the scale is rounded to fp16, as checkpoints store it,
*before* the codes are chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec, SparseOverlay

SMALLEST_SCALE = 2.0**-24  # the least positive fp16 number
HALF_MAX = 65504.0
MSE_STEPS = 80  # ranges tried by the search, from whole down to a fifth, in hundredths


class StaysDenseError(ArithmeticError):
    """A module that cannot be quantized as asked; the message says why."""


class ScaleOverflowError(StaysDenseError):
    """A group of weights is so wide that its scale, or a residual of it, is no finite fp16 number."""


@dataclass(frozen=True, slots=True)
class Grid:
    """scales, zeros: [rows, 1], floats of the weights' dtype; scales are fp16 numbers, zeros integers."""

    scales: Tensor
    zeros: Tensor
    max_code: int

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes (ties to even) of ``weight`` [rows, n]: floats in 0..max_code."""
        return (torch.round(weight / self.scales) + self.zeros).clamp_(0, self.max_code)

    def values(self, codes: Tensor) -> Tensor:
        """What ``codes`` [rows, n] stand for."""
        return self.scales * (codes - self.zeros)


def fit(weight: Tensor, spec: QuantSpec, mse: float = 0.0, exclude: Tensor | None = None) -> Grid:
    """The grid of one group.

    weight: [rows, n] float. exclude: [rows, n] bool, weights that do not count for the range.
    mse: 0 takes the whole range; else the exponent of the error |x - q(x)|**mse which the search over
    narrower ranges minimises per row (2.4 is GPTQ's). Raises ScaleOverflowError.
    """
    counted = weight if exclude is None else weight.masked_fill(exclude, 0)
    if mse > 0:
        return fit_by(counted, spec, lambda difference: difference.abs_().pow_(mse).sum(1, keepdim=True))
    return _grid(*_range(counted, spec), spec)


def fit_by(weight: Tensor, spec: QuantSpec, measure: Callable[[Tensor], Tensor]) -> Grid:
    """The grid with the least ``measure`` of q(x) - x ([rows, n], which it may change) -> [rows, 1], among
    ranges from the whole of ``weight`` [rows, n] down to a fifth. Raises ScaleOverflowError."""
    low, high = _range(weight, spec)
    best = _grid(low, high, spec)
    least = torch.full_like(low, torch.inf)
    for step in range(MSE_STEPS):
        shrink = 1 - step / 100
        grid = _grid(low * shrink, high * shrink, spec)
        error = measure(grid.values(grid.codes(weight)).sub_(weight))
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales),
            torch.where(better, grid.zeros, best.zeros),
            best.max_code,
        )
    return best


def _range(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    low = weight.amin(1, keepdim=True).clamp_(max=0)
    high = weight.amax(1, keepdim=True).clamp_(min=0)
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    return low.masked_fill(empty, -1), high.masked_fill(empty, 1)


def _grid(low: Tensor, high: Tensor, spec: QuantSpec) -> Grid:
    max_code = 2**spec.num_bits - 1
    scales = _half_scales(low, high, max_code)
    if spec.symmetric:
        return Grid(scales, torch.full_like(scales, 2 ** (spec.num_bits - 1)), max_code)
    zeros = torch.round(-low / scales).clamp_(0, max_code)
    below = zeros < spec.least_zero
    if bool(below.any()):  # the codes above the zero point reach as far as before, in coarser steps
        wider = _half_scales(torch.zeros_like(low), high.where(below, 0), max_code - spec.least_zero)
        scales, zeros = torch.where(below, wider, scales), zeros.clamp_(min=spec.least_zero)
    return Grid(scales, zeros, max_code)


def _half_scales(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """fp16 numbers, in the dtype of ``low``, ``steps`` of which reach from ``low`` to ``high``."""
    half = ((high - low) / steps).to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        low_, high_ = float(low.min()), float(high.max())
        raise ScaleOverflowError(f"fp16 cannot hold its scales (weights in {low_:g}..{high_:g})")
    return half.clamp_(min=SMALLEST_SCALE).to(low.dtype)


def round_nearest(
    weight: Tensor, spec: QuantSpec, mse: float = 0.0, exclude: Tensor | None = None
) -> PackedWeight:
    """Round to nearest: every group fitted and rounded by itself; inputs in order, no ``g_idx``.

    weight: [rows, K] float. exclude: [rows, K] bool, weights that count for no range and come back
    exactly (to fp16), by ``outliers``. The scales come back in fp16. Raises ScaleOverflowError.
    """
    rows, cols = weight.shape
    size = cols if spec.group_size == -1 else spec.group_size
    whole = cols - cols % size
    pieces = []
    for start, stop, width in ((0, whole, size), (whole, cols, cols - whole)):
        if start < stop:  # whole groups at once, each as a row; then what is left
            part = weight[:, start:stop].reshape(-1, width)
            masked = None if exclude is None else exclude[:, start:stop].reshape(-1, width)
            grid = fit(part, spec, mse, masked)
            codes = grid.codes(part).to(torch.uint8).view(rows, stop - start)
            pieces.append((codes, Grid(grid.scales.view(rows, -1), grid.zeros.view(rows, -1), grid.max_code)))
    packed = pack(torch.cat([codes for codes, _ in pieces], 1), [grid for _, grid in pieces], spec)
    return restore(weight, packed, exclude)


def restore(weight: Tensor, packed: PackedWeight, exclude: Tensor | None) -> PackedWeight:
    """``packed`` with residuals that bring the weights in ``exclude`` [rows, K] back; None: as it is."""
    if exclude is None:
        return packed
    return replace(packed, outliers=overlay((weight - packed.dequantize()) * exclude))


def overlay(residuals: Tensor) -> SparseOverlay | None:
    """The entries of ``residuals`` [rows, K] that are not zero. Raises ScaleOverflowError.

    None where fp16 has none: they would still be stored, with where each of their rows begins.
    """
    if residuals.numel() and not float(residuals.abs().max()) <= HALF_MAX:
        raise ScaleOverflowError(f"fp16 cannot hold its residuals (up to {float(residuals.abs().max()):g})")
    found = SparseOverlay.of(residuals)
    return found if len(found.values) else None


def pack(codes: Tensor, grids: list[Grid], spec: QuantSpec, g_idx: Tensor | None = None) -> PackedWeight:
    """Codes [rows, K] uint8 and one grid per group as a PackedWeight (symmetric: zeros None)."""
    return PackedWeight(
        values=codes,
        spec=spec,
        scales=torch.cat([grid.scales for grid in grids], 1).to(torch.float16),
        zeros=None if spec.symmetric else torch.cat([grid.zeros for grid in grids], 1).to(torch.uint8),
        g_idx=g_idx,
    )
