"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, each error repaid by later columns.

The objective is tr((W - Q) H (W - Q)^T) for the Hessian H = 2 E[x x^T] of a linear's inputs x.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from .grid import Grid, fit, pack
from .hessian import HessianFactor

LAZY_BLOCK = 128  # columns whose errors reach the columns after them in one matrix product


@dataclass(frozen=True, slots=True)
class Sweep:
    """codes: [rows, K] uint8 and one grid per group, in the order of the sweep; loss: sum of squared errors,
    which is tr((W - Q) H (W - Q)^T) for the damped H."""

    codes: Tensor
    grids: list[Grid]
    loss: float


def round_gptq(
    weight: Tensor,
    factor: HessianFactor,
    spec: QuantSpec,
    mse: float = 0.0,
    exclude: Tensor | None = None,
) -> PackedWeight:
    """Quantize ``weight`` [rows, K] (not changed). With ``actorder`` "group" the result has a ``g_idx``.

    exclude: [rows, K] bool, weights kept apart: they neither widen a grid nor make an error, and hold
    the code nearest to what the sweep made of them. Raises ScaleOverflowError.
    """
    perm = factor.perm
    if perm is None:
        swept = sweep(weight, factor.upper, spec, mse, exclude)
        return pack(swept.codes, swept.grids, spec)
    swept = sweep(weight[:, perm], factor.upper, spec, mse, None if exclude is None else exclude[:, perm])
    place = torch.argsort(perm)
    size = len(perm) if spec.group_size == -1 else spec.group_size
    return pack(swept.codes[:, place], swept.grids, spec, (place // size).to(torch.int32))


def sweep(
    weight: Tensor, upper: Tensor, spec: QuantSpec, mse: float = 0.0, exclude: Tensor | None = None
) -> Sweep:
    """Round the columns of ``weight`` [rows, K] from first to last; groups form in this order.

    A group is fitted when its first column is reached, on weights that hold every error so far: those
    of the lazy block are added for the columns after it. So the result does not depend on the blocks.
    """
    work = weight.clone()
    rows, cols = work.shape
    size = cols if spec.group_size == -1 else spec.group_size
    codes = torch.empty((rows, cols), dtype=torch.uint8, device=work.device)
    grids: list[Grid] = []
    loss = 0.0
    for start in range(0, cols, LAZY_BLOCK):
        stop = min(start + LAZY_BLOCK, cols)
        errors = torch.zeros((rows, stop - start), dtype=work.dtype, device=work.device)
        for col in range(start, stop):
            if col % size == 0:
                group = slice(col, min(col + size, cols))
                masked = None if exclude is None else exclude[:, group]
                current = work[:, group]
                if group.stop > stop:
                    current = current.clone()
                    current[:, stop - col :] -= errors @ upper[start:stop, stop : group.stop]
                grids.append(fit(current, spec, mse, masked))
            column = work[:, col : col + 1]
            code = grids[-1].codes(column)
            codes[:, col : col + 1] = code.to(torch.uint8)
            error = (column - grids[-1].values(code)) / upper[col, col]
            if exclude is not None:
                error = error.masked_fill(exclude[:, col : col + 1], 0)
            errors[:, col - start : col - start + 1] = error
            work[:, col + 1 : stop] -= error * upper[col, col + 1 : stop]
        loss += float(errors.square().sum(dtype=torch.float64))
        work[:, stop:] -= errors @ upper[start:stop, stop:]
    return Sweep(codes, grids, loss)
