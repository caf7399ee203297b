"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, each error repaid by later columns.

The objective is tr((W - Q) H (W - Q)^T) for the Hessian H = 2 E[x x^T] of a linear's inputs x.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..model.config import ModelConfig
from .calibrate import Calibration
from .grid import Grid, fit, pack
from .hessian import HessianFactor, factorize
from .options import QuantizeOptions
from .pipeline import BATCH_TOKENS, QuantizedModule, Specs, blockwise
from .source import Source

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


@dataclass(frozen=True, slots=True)
class GPTQ:
    """damping: share of the Hessian's mean diagonal. mse: exponent of the search for ranges, 0: off."""

    damping: float = 0.01
    mse: float = 0.0
    statistics = "one Hessian [K, K] in fp32 per distinct input, four in a decoder block, one at a time"

    @classmethod
    def from_options(cls, options: QuantizeOptions) -> "GPTQ":
        """See Method."""
        return cls(options.damping, options.mse)

    def settings(self) -> dict[str, object]:
        """See Method; GPTQModel's names where it has them."""
        return {
            "damp_percent": self.damping,
            "mse": self.mse,
            "true_sequential": True,
            "static_groups": False,
            "act_group_aware": False,
        }

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """Hidden states and angles; a batch in a block; the block; five [K, K] and modules; all fp32."""
        hidden, ffn = config.hidden_size, config.intermediate_size
        heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        block = hidden * (2 * heads + 2 * kv_heads + 3 * ffn)
        widest = max(ffn, heads, hidden)
        kept = num_tokens * (hidden + 2 * config.head_dim)
        passing = min(num_tokens, BATCH_TOKENS) * (4 * hidden + 2 * heads + 2 * kv_heads + 4 * ffn)
        return 4 * (kept + passing + block + 5 * widest * (widest + hidden))

    def prepare(self, hessian: Tensor, spec: QuantSpec) -> HessianFactor:
        """See Rounder."""
        return factorize(hessian, spec, self.damping)

    def round(
        self, weight: Tensor, stats: HessianFactor, spec: QuantSpec, exclude: Tensor | None = None
    ) -> PackedWeight:
        """See Rounder."""
        return round_gptq(weight, stats, spec, self.mse, exclude)

    def run(self, source: Source, calibration: Calibration | None, specs: Specs) -> Iterator[QuantizedModule]:
        """See Method."""
        assert calibration is not None
        return blockwise(source, calibration, specs, self)
