"""The grid of a group of weights: scale and zero point from its range, and rounding onto it.

After GPTQ's quantizer (IST-DASLab/gptq, quant.py) with two differences: symmetric ranges are mirrored
even where a group has no negative weight, and the scale is rounded to fp16, as checkpoints store it,
*before* the codes are chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec

SMALLEST_SCALE = 2.0**-24  # the least positive fp16 number
MSE_STEPS = 80  # ranges tried by the search, from whole down to a fifth, in hundredths


class ScaleOverflowError(ArithmeticError):
    """A group of weights is so wide that its scale is no finite fp16 number."""


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
    low = counted.amin(1, keepdim=True).clamp_(max=0)
    high = counted.amax(1, keepdim=True).clamp_(min=0)
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    low, high = low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    grid = _grid(low, high, spec)
    return _search(counted, low, high, spec, mse) if mse > 0 else grid


def _grid(low: Tensor, high: Tensor, spec: QuantSpec) -> Grid:
    max_code = 2**spec.num_bits - 1
    half = ((high - low) / max_code).to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise ScaleOverflowError(f"weights in {float(low.min()):g}..{float(high.max()):g}")
    scales = half.clamp_(min=SMALLEST_SCALE).to(low.dtype)
    if spec.symmetric:
        zeros = torch.full_like(scales, 2 ** (spec.num_bits - 1))
    else:
        zeros = torch.round(-low / scales).clamp_(0, max_code)
    return Grid(scales, zeros, max_code)


def _search(weight: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, exponent: float) -> Grid:
    best = _grid(low, high, spec)
    least = torch.full_like(low, torch.inf)
    for step in range(MSE_STEPS):
        shrink = 1 - step / 100
        grid = _grid(low * shrink, high * shrink, spec)
        error = (grid.values(grid.codes(weight)) - weight).abs_().pow_(exponent).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(
            torch.where(better, grid.scales, best.scales),
            torch.where(better, grid.zeros, best.zeros),
            best.max_code,
        )
    return best


def round_nearest(
    weight: Tensor, spec: QuantSpec, mse: float = 0.0, exclude: Tensor | None = None
) -> PackedWeight:
    """Round to nearest: every group fitted and rounded by itself; inputs in order, no ``g_idx``.

    weight: [rows, K] float. The scales come back in fp16. Raises ScaleOverflowError.
    """
    size = weight.shape[1] if spec.group_size == -1 else spec.group_size
    codes, grids = [], []
    for start in range(0, weight.shape[1], size):
        group = slice(start, start + size)
        grid = fit(weight[:, group], spec, mse, None if exclude is None else exclude[:, group])
        codes.append(grid.codes(weight[:, group]).to(torch.uint8))
        grids.append(grid)
    return pack(torch.cat(codes, 1), grids, spec)


def pack(codes: Tensor, grids: list[Grid], spec: QuantSpec, g_idx: Tensor | None = None) -> PackedWeight:
    """Codes [rows, K] uint8 and one grid per group as a PackedWeight (symmetric: zeros None)."""
    return PackedWeight(
        values=codes,
        spec=spec,
        scales=torch.cat([grid.scales for grid in grids], 1).to(torch.float16),
        zeros=None if spec.symmetric else torch.cat([grid.zeros for grid in grids], 1).to(torch.uint8),
        g_idx=g_idx,
    )
