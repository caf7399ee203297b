"""AWQ (Lin et al., arXiv 2306.00978): inputs that are large in use get finer steps, by scales at no cost.

Inputs j of a linear are divided by s_j, which the module before takes over, and its columns multiplied. With
x the mean magnitude of the inputs and w the mean of the weights' shares of their group's largest, candidates
are s = x^r / w^(1 - r) for r on a grid (``duo``), or x^r. The paper's code takes the r with the least squared
error of the parent module's outputs on the text; ours (cheaper, and exact for the linears themselves) that of
the linears' outputs, tr((W - Q) H (W - Q)^T). Then ranges are searched by the same measure, group by group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..model.config import ModelConfig
from .activations import InputStats
from .grid import Grid, StaysDenseError, fit_by, pack, restore, round_nearest
from .options import QuantizeOptions
from .pipeline import Recipe, ToRound
from .results import Rescale, Specs
from .rounding import matrix_bytes
from .source import Block
from .transforms import Seam, get_transform, seams
from .work import Work

EPSILON = 1e-4


@dataclass(frozen=True, slots=True)
class AWQScaling:
    """A Transform. steps: points of the grid over r in 0..1. duo: whether weights count."""

    steps: int = 20
    duo: bool = True
    statistics = "Hessian and mean magnitude of every linear's inputs, a decoder block at a time"

    @classmethod
    def from_options(cls, options: QuantizeOptions) -> "AWQScaling":
        """As asked for."""
        return cls(options.awq_steps)

    def settings(self) -> dict[str, object]:
        """See Transform."""
        return {"transform": "awq", "awq_steps": self.steps, "awq_duo_scaling": self.duo}

    def prepare(self, block: Block, stats: Mapping[str, InputStats], specs: Specs) -> tuple[Rescale, ...]:
        """See Transform. A seam whose linears all stay dense is left alone."""
        found = []
        for seam in seams(block.layer.config, block.layer.index):
            linears = [
                (block.linears[slot.name].weight[rows], specs[part.name])
                for slot, part, rows in block.modules()
                if slot.name == seam.consumer and part.name in specs
            ]
            scales = self._search(seam, linears, stats[seam.consumer]) if linears else None
            if scales is not None:
                found.append(seam.edit(scales, block))
        return tuple(found)

    def _search(
        self, seam: Seam, linears: list[tuple[Tensor, QuantSpec]], stats: InputStats
    ) -> Tensor | None:
        """The best scales [K]; None: 1 is best."""
        magnitude = stats.mean_abs.clamp(min=EPSILON)
        share = _mean_share(linears)
        best, least = None, _loss(linears, None, stats.hessian)
        for step in range(self.steps):
            ratio = (step + 1) / self.steps
            scales = magnitude**ratio
            if self.duo:
                scales = scales / (share ** (1 - ratio) + EPSILON)
            scales = seam.shared(scales.clamp(min=EPSILON))
            scales = scales / (scales.max() * scales.min()).sqrt()
            loss = _loss(linears, scales, stats.hessian)
            if loss < least:
                best, least = scales, loss
        return best


def _mean_share(linears: list[tuple[Tensor, QuantSpec]]) -> Tensor:
    """[K]: the mean over all rows of |w| / the largest |w| of its group."""
    total = torch.zeros(linears[0][0].shape[1])
    for weight, spec in linears:
        size = weight.shape[1] if spec.group_size == -1 else spec.group_size
        for start in range(0, weight.shape[1], size):
            part = weight[:, start : start + size].abs()
            total[start : start + size] += (part / part.amax(1, keepdim=True).clamp(min=1e-12)).sum(0)
    return total / sum(len(weight) for weight, _ in linears)


def _loss(linears: list[tuple[Tensor, QuantSpec]], scales: Tensor | None, hessian: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T) over ``linears`` rounded to nearest with ``scales``; inf: cannot be."""
    total = 0.0
    for weight, spec in linears:
        try:
            scaled = weight if scales is None else weight * scales
            difference = scaled - round_nearest(scaled, spec).dequantize()
        except StaysDenseError:
            return float("inf")
        if scales is not None:
            difference /= scales
        total += float(((difference @ hessian) * difference).sum())
    return total


@dataclass(frozen=True, slots=True)
class ClippedRTN:
    """Round to nearest with each group's range searched by the error of the outputs.

    mse: exponent of the plain search instead (0: the outputs' error; their Hessian's block of the group).
    """

    mse: float = 0.0
    statistics = "one Hessian [K, K] in fp32 per distinct input, one at a time"
    needs_inputs = True
    rows_independent = True

    def settings(self) -> dict[str, object]:
        """See Rounder."""
        return {"mse": self.mse, "awq_clip": self.mse == 0}

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """Eight of the widest slot's weight."""
        return matrix_bytes(config, squares=0, weights=8)

    def begin(self, work: Work) -> None:
        """Nothing."""

    def prepare(self, hessian: Tensor | None, spec: QuantSpec) -> Tensor:
        """The Hessian as it is."""
        assert hessian is not None
        return hessian

    def round(self, module: ToRound, stats: Tensor) -> PackedWeight:
        """See Rounder."""
        weight, spec = module.weight, module.spec
        if self.mse > 0:
            return round_nearest(weight, spec, self.mse, module.exclude)
        size = weight.shape[1] if spec.group_size == -1 else spec.group_size
        codes: list[Tensor] = []
        grids: list[Grid] = []
        for start in range(0, weight.shape[1], size):
            group = slice(start, start + size)
            part = weight[:, group]
            if module.exclude is not None:
                part = part.masked_fill(module.exclude[:, group], 0)
            grids.append(fit_by(part, spec, partial(_energy, stats[group, group])))
            codes.append(grids[-1].codes(weight[:, group]).to(torch.uint8))
        return restore(weight, pack(torch.cat(codes, 1), grids, spec), module.exclude)


def _energy(hessian: Tensor, difference: Tensor) -> Tensor:
    """[rows, 1]: d H d^T of each row d."""
    return ((difference @ hessian) * difference).sum(1, keepdim=True)


def recipe(options: QuantizeOptions) -> Recipe:
    """--method awq."""
    options.refuse_actorder("it rounds every weight by itself")
    return Recipe(ClippedRTN(options.mse), get_transform(options, "awq"), options.true_sequential)
