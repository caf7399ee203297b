"""Which single weights stay exact: how many per module, and which."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.layout import PackedWeight
from .grid import HALF_MAX, overlay

MAX_DENSITY = 64  # a row may hold so many times the mean number of residuals: kernels share out rows
MAX_SHARE = 0.1  # of a module's weights


def adaptive_shares(
    means: Mapping[str, float], sizes: Mapping[str, int], share: float, temperature: float
) -> dict[str, float]:
    """The share of each module's weights that stays exact; over all modules it is ``share``.

    Proportional to means^(1 / temperature), where ``means`` are mean sensitivities per weight; ``math.inf``
    is the same share everywhere. None is above MAX_SHARE; what that cuts off goes to the others in
    proportion. Ours: of the paper's Algorithm 1 only the name and its purpose are known.
    """
    power = 0.0 if math.isinf(temperature) else 1 / temperature
    wanted = {name: max(mean, 0.0) ** power for name, mean in means.items()}
    shares = dict.fromkeys(means, 0.0)
    left, open_ = share * sum(sizes.values()), {name for name in means if wanted[name] > 0}
    while open_ and left > 0:
        unit = left / sum(sizes[name] * wanted[name] for name in means if name in open_)
        full = [name for name in means if name in open_ and unit * wanted[name] >= MAX_SHARE]
        for name in full or [name for name in means if name in open_]:
            shares[name] = MAX_SHARE if full else unit * wanted[name]
            left -= shares[name] * sizes[name]
            open_.discard(name)
    return shares


def largest(weight: Tensor, share: float) -> Tensor | None:
    """[out, in] bool: the ``share`` of largest magnitude; None: none."""
    count = round(share * weight.numel())
    if count == 0:
        return None
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[weight.abs().flatten().topk(count).indices] = True
    return mask.view_as(weight)


def threshold(scores: Iterable[Tensor], count: int) -> float:
    """The ``count``-th largest of all entries of all ``scores``; twice ``count`` of them in memory.

    Infinite where ``count`` is 0; the least where there are fewer.
    """
    if count == 0:
        return math.inf
    best = torch.zeros(0)
    for part in scores:
        best = torch.cat([best, part.flatten().topk(min(count, part.numel())).values])
        best = best.topk(min(count, len(best))).values
    return float(best[-1])


def capped(scores: Tensor, least: float, share: float) -> Tensor:
    """[out, in] bool: scores of at least ``least``, in each row at most MAX_DENSITY times ``share`` of it."""
    room = min(scores.shape[1], max(1, math.ceil(MAX_DENSITY * share * scores.shape[1])))
    best = scores.topk(room, 1)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, best.indices, best.values >= least)


def kept(packed: PackedWeight) -> Tensor:
    """[out, in] bool: the weights that have residuals."""
    mask = torch.zeros(packed.values.shape, dtype=torch.bool)
    if packed.outliers is not None:
        rows = torch.repeat_interleave(torch.arange(len(mask)), packed.outliers.rowptr.diff().long())
        mask[rows, packed.outliers.cols.long()] = True
    return mask


def detach(packed: PackedWeight, weight: Tensor, picked: Tensor) -> PackedWeight:
    """``packed`` with those ``picked`` [out, in] put back to ``weight`` (to fp16), beside what it kept.

    The codes stay as they are, so what is stored is the residual: a reader adds it and needs no mask. Where
    fp16 cannot hold that, the weight stays rounded.
    """
    dense = replace(packed, outliers=None).dequantize()
    target = torch.where(picked, weight, packed.dequantize())
    residuals = (target - dense) * (picked | kept(packed))
    return replace(packed, outliers=overlay(residuals.masked_fill(residuals.abs() > HALF_MAX, 0)))
