"""Bits, groups and outliers per module under a budget: each bit goes where it saves the most.

Ours throughout. The harm of a module's rounding is taken to grow with its weights' squared error, by a factor
that the post-quantization integral of a first run measured: the mass, sum |p_i|, over the squared error
there. (The signed sum, which is the loss change itself, is a worse guide: it may be negative where errors
cancel.)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.layout import QuantSpec
from ..formats.gptq import GPTQFormat
from .grid import round_nearest
from .outliers import largest

BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, 512)
SHARES = (0.0, 0.0025, 0.005, 0.01)  # of outliers
SAMPLED_ROWS = 64  # about so many of a module, on which errors are measured
VALUE_BITS = 16  # of a residual; its column takes 16 too, or 32 where 16 are not enough
ROW_BITS = 32  # where a row's residuals begin
INDEX_BITS = 32  # which group an input is in


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to quantize a module. outliers: share of its weights that stay exact.

    bits: of its codes, scales, zeros and residuals in all; loss: what it is expected to cost.
    """

    spec: QuantSpec
    outliers: float
    bits: float
    loss: float


def residual_bits(in_: int) -> int:
    """What one residual in a row of ``in_`` weights takes: itself and its column."""
    return VALUE_BITS + (16 if in_ <= 1 << 16 else 32)


def stored_bits(out: int, in_: int, spec: QuantSpec, outliers: float = 0.0, overlay: bool = False) -> float:
    """What a module [out, in] takes in a checkpoint, with ``outliers`` of its weights as residuals.

    The format stores zeros for symmetric weights too, and for every input the number of its group. overlay:
    other residuals are to come, which are not counted, but the beginnings of their rows are.
    """
    groups = out * spec.num_groups(in_) * (16 + spec.num_bits)
    total: float = out * in_ * spec.num_bits + groups + in_ * INDEX_BITS
    if outliers or overlay:
        total += outliers * out * in_ * residual_bits(in_) + (out + 1) * ROW_BITS
    return total


def candidates(weight: Tensor, spec: QuantSpec, mse: float, overlay: bool = False) -> Iterator[Choice]:
    """Every way that the format can store ``weight`` [out, in]; ``loss`` is its squared error by rounding to
    nearest. spec: what they have in common (symmetry), and one of them. overlay: see ``stored_bits``."""
    out, in_ = weight.shape
    sample = weight[:: max(1, out // SAMPLED_ROWS)]
    specs = [replace(spec, num_bits=bits, group_size=size) for bits in BITS for size in GROUP_SIZES]
    for found in dict.fromkeys([spec, *specs]):
        if found != spec and found.group_size > in_:
            continue
        if GPTQFormat(found).expressible(out, in_, found) is not None:
            continue
        for share in SHARES:
            error = _squared_error(sample, found, mse, largest(sample, share)) * out / len(sample)
            yield Choice(found, share, stored_bits(out, in_, found, share, overlay), error)


def _squared_error(weight: Tensor, spec: QuantSpec, mse: float, exclude: Tensor | None) -> float:
    """Of rounding to nearest; where groups divide the rows, with a row for each: all are fitted at once."""
    if spec.group_size > 0 and weight.shape[1] % spec.group_size == 0:
        weight = weight.reshape(-1, spec.group_size)
        exclude = None if exclude is None else exclude.reshape(weight.shape)
        spec = replace(spec, group_size=-1)
    packed = round_nearest(weight, spec, mse, exclude)
    return float((packed.dequantize() - weight).square().sum(dtype=torch.float64))


def scaled(choices: Sequence[Choice], mass: float, spec: QuantSpec) -> list[Choice]:
    """``choices`` with losses in the unit of ``mass``, which is what ``spec`` without outliers cost."""
    reference = next(c.loss for c in choices if c.spec == spec and not c.outliers)
    return [replace(c, loss=c.loss * mass / reference if reference else 0.0) for c in choices]


def allocate(choices: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """The choice of every module, all together within ``budget`` bits, with about the least sum of losses.

    Starts from each module's smallest choice and takes, while it fits, the exchange that saves the most loss
    per bit; on each module's lower convex hull this is optimal but for the last exchange. Raises ValueError
    where not even the smallest choices fit.
    """
    hulls = {name: _hull(found) for name, found in choices.items()}
    at = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].bits for hull in hulls.values())
    if left < 0:
        raise ValueError(f"the least is {budget - left:.0f} bits, the budget {budget:.0f}")
    exchanges = [
        ((hull[i].loss - hull[i + 1].loss) / (hull[i + 1].bits - hull[i].bits), name, i + 1)
        for name, hull in hulls.items()
        for i in range(len(hull) - 1)
    ]
    for _, name, index in sorted(exchanges, key=lambda exchange: -exchange[0]):
        cost = hulls[name][index].bits - hulls[name][at[name]].bits
        if index > at[name] and cost <= left:
            at[name], left = index, left - cost
    return {name: hull[at[name]] for name, hull in hulls.items()}


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those on the lower convex hull of loss over bits, from the smallest to the one with the least loss."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], choice):
            hull.pop()
        if hull and hull[-1].bits == choice.bits:
            continue
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    return (b.loss - a.loss) / (b.bits - a.bits)
