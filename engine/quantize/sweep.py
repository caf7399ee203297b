"""The sweep over a weight's columns that GPTQ and SparseGPT share: later columns repay each one's error."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from .grid import Grid, fit, overlay, pack
from .hessian import HessianFactor

LAZY_BLOCK = 128  # columns whose errors reach the columns after them in one matrix product; it decides ranges


@dataclass(frozen=True, slots=True)
class How:
    """mse: exponent of the range search. exclude: [rows, K] bool, weights that stay exact.

    ranges: fit every group first, on these weights [rows, K]. pruned: [rows, K] bool, weights that become
    zero (symmetric grids only), their error repaid like any other. prune: 2 of each 4 are chosen on the way.
    """

    mse: float = 0.0
    exclude: Tensor | None = None
    ranges: Tensor | None = None
    pruned: Tensor | None = None
    prune: bool = False


@dataclass(frozen=True, slots=True)
class Sweep:
    """The result, in the checkpoint's order of inputs.

    codes: [rows, K] uint8 (floats where there is no spec); grids: one per group; g_idx: [K] int32, or None
    where groups are in order; loss: sum of squared errors, which is tr((W - Q) H (W - Q)^T) for the damped H;
    residuals: [rows, K], what the excluded weights have beyond their codes.
    """

    codes: Tensor
    grids: list[Grid]
    g_idx: Tensor | None
    loss: float
    residuals: Tensor | None

    def packed(self, spec: QuantSpec) -> PackedWeight:
        """As a PackedWeight; the residuals as outliers."""
        packed = pack(self.codes, self.grids, spec, self.g_idx)
        return packed if self.residuals is None else replace(packed, outliers=overlay(self.residuals))


def sweep(weight: Tensor, factor: HessianFactor, spec: QuantSpec | None, how: How) -> Sweep:
    """Round the columns of ``weight`` [rows, K] (not changed) in ``factor``'s order. spec None: only prune.

    A group is fitted when the lazy block that it begins in is reached, on weights that hold the errors of all
    blocks before, as in the authors' code and in GPTQModel: with the errors inside the block as well, ranges
    of 2 bits grow with what earlier columns could not hold. Raises ScaleOverflowError.
    """
    state = _State(weight, factor, spec, how)
    cols = weight.shape[1]
    for start in range(0, cols, LAZY_BLOCK):
        state.block(start, min(start + LAZY_BLOCK, cols))
    return state.result()


class _State:
    """Weights lie transposed, [K, rows] in the order of the sweep: a column is then one run of memory."""

    def __init__(self, weight: Tensor, factor: HessianFactor, spec: QuantSpec | None, how: How) -> None:
        self.factor, self.spec, self.how = factor, spec, how
        self.work = self._ordered(weight)
        self.exclude = None if how.exclude is None else self._ordered(how.exclude)
        self.pruned = None if how.pruned is None else self._ordered(how.pruned)
        if how.prune:
            assert factor.perm is None
            self.pruned = torch.zeros_like(self.work, dtype=torch.bool)
        dtype = self.work.dtype if spec is None else torch.uint8
        self.codes = torch.empty(self.work.shape, dtype=dtype, device=weight.device)
        self.residuals = None if self.exclude is None else torch.zeros_like(self.work)
        self.groups = factor.groups.tolist()
        self.grids: dict[int, Grid] = {}
        if how.ranges is not None and spec is not None:
            self._fit_all(how.ranges, spec)
        self.loss = 0.0

    def _ordered(self, matrix: Tensor) -> Tensor:
        transposed = matrix.T if self.factor.perm is None else matrix.T[self.factor.perm]
        return transposed.clone(memory_format=torch.contiguous_format)

    def _fit_all(self, weight: Tensor, spec: QuantSpec) -> None:
        """On the groups of the checkpoint's order."""
        size = weight.shape[1] if spec.group_size == -1 else spec.group_size
        for group, start in enumerate(range(0, weight.shape[1], size)):
            cut = slice(start, start + size)
            masked = None if self.how.exclude is None else self.how.exclude[:, cut]
            self.grids[group] = fit(weight[:, cut], spec, self.how.mse, masked)

    def block(self, start: int, stop: int) -> None:
        """The columns [start, stop), and what their errors mean for those after them."""
        upper = self.factor.upper
        errors = torch.zeros(
            (stop - start, self.work.shape[1]), dtype=self.work.dtype, device=self.work.device
        )
        diagonal = upper.diagonal()[start:stop].tolist()
        for col in range(start, stop) if self.spec is not None else ():
            if self.groups[col] not in self.grids:
                self._fit(col)
        for col in range(start, stop):
            if self.how.prune and col % 4 == 0:
                self._choose(col)
            error = errors[col - start]
            torch.sub(self.work[col], self._round(col), out=error)
            error /= diagonal[col - start]
            if col + 1 < stop:
                self.work[col + 1 : stop].addr_(upper[col, col + 1 : stop], error, alpha=-1)
        self.loss += float(errors.square().sum(dtype=torch.float64))
        self.work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)

    def _round(self, col: int) -> Tensor:
        """What becomes of column ``col``: [rows]. Notes its codes."""
        column = self.work[col]
        if self.spec is None:
            values = column.clone()
        else:
            grid = self.grids[self.groups[col]]
            code = grid.codes(column[:, None])
            if self.pruned is not None:
                code.masked_fill_(self.pruned[col, :, None], 2 ** (self.spec.num_bits - 1))
            self.codes[col] = code[:, 0]
            values = grid.values(code)[:, 0]
        if self.pruned is not None:
            values.masked_fill_(self.pruned[col], 0)
        if self.spec is None:
            self.codes[col] = values
        if self.exclude is not None and self.residuals is not None:
            residual = (column - values).to(torch.float16).to(values.dtype) * self.exclude[col]
            self.residuals[col] = residual
            values += residual
        return values

    def _fit(self, col: int) -> None:
        """The grid of the group that begins at column ``col``."""
        assert self.spec is not None
        group, end = self.groups[col], col + 1
        while end < len(self.groups) and self.groups[end] == group:
            end += 1
        current = self.work[col:end]
        masked = None if self.exclude is None else self.exclude[col:end].T
        if self.pruned is not None:  # where the mask is yet to come: what it would be by now
            masked = (self._least(current, col) if self.how.prune else self.pruned[col:end]).T
        self.grids[group] = fit(current.T.contiguous(), self.spec, self.how.mse, masked)

    def _choose(self, col: int) -> None:
        """Which 2 of the 4 columns from ``col`` on become zero."""
        assert self.pruned is not None
        self.pruned[col : col + 4] = self._least(self.work[col : col + 4], col)

    def _least(self, columns: Tensor, start: int) -> Tensor:
        """2 of each 4 of ``columns`` [n, rows], which begin at ``start``: the least w^2 / diag(U)^2."""
        diagonal = self.factor.upper.diagonal()[start : start + len(columns)]
        saliency = (columns / diagonal[:, None]).square_().view(-1, 4, columns.shape[1])
        least = saliency.topk(2, dim=1, largest=False).indices
        return torch.zeros_like(saliency, dtype=torch.bool).scatter_(1, least, True).view(columns.shape)

    def result(self) -> Sweep:
        """Back in the checkpoint's order."""
        perm, g_idx = self.factor.perm, None
        codes, residuals = self.codes, self.residuals
        if perm is not None:
            place = torch.argsort(perm)
            codes = codes[place]
            residuals = None if residuals is None else residuals[place]
            found = self.factor.groups[place]
            if bool((found.diff() < 0).any()):
                g_idx = found.to(torch.int32)
        return Sweep(
            codes.T.contiguous(),
            [self.grids[group] for group in sorted(self.grids)],
            g_idx,
            self.loss,
            None if residuals is None else residuals.T.contiguous(),
        )
