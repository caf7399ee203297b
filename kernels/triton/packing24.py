"""Weights with 2:4 sparsity as ``sparse24_linear`` reads them: kept values in fragment order, and positions.

words: int32 [N / 64, K / 128, planes, 4, 8 (g), 4 (t), 4 (steps of 32 inputs)]. 4-bit codes: one plane, words
       as in ``fragments`` over the 16 kept columns of a step. Halves: four planes, a fragment's registers.
meta:  int32 [N / 64, K / 128, 4, 8, 4, 2]: word w of lane (g, t) is for step 2 * w + t // 2: eight 2-bit
       positions of the kept values of row g (lower half) and g + 8, of the step's first (t even) or last 16
       inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import PackedWeight
from .fragments import ROWS, STEP
from .packing import arrange_inputs, by_part, narrowest, padded, part_of

_CHUNK = 1 << 22  # weights that are packed at once
# By which of four are not zero (bit i: the i-th): the positions that are kept, ascending.
_FIRST = (0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 2, 0, 1, 0)
_SECOND = (1, 1, 1, 1, 2, 2, 2, 1, 3, 3, 3, 1, 3, 2, 2, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Sparse24Weight:
    """A weight on its device. bits: 4 or 16; scales, group, order: as of ``packing.FragmentWeight``."""

    out_features: int
    in_features: int
    bits: int
    group: int
    words: Tensor
    meta: Tensor
    scales: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    @property
    def inputs(self) -> int:
        """K: inputs with padding."""
        return self.words.shape[1] * int(STEP.value)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (self.words, self.meta, self.scales, self.order, self.bias)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def pack24(weight: PackedWeight, device: torch.device | str, dtype: torch.dtype) -> Sparse24Weight:
    """The weight on ``device``. ``weight.is_24()`` must hold; values that are floats become ``dtype``."""
    group, scales, groups = 0, None, None
    if weight.spec is None:
        values, zero, bits = weight.values.to(dtype), 0, 16
        order = torch.arange(padded(weight.in_features, int(STEP.value)))
        order[weight.in_features :] = weight.in_features
    else:
        values, zero, bits = weight.values, 2 ** (weight.spec.num_bits - 1), 4
        group = part_of(weight)
        order, groups = arrange_inputs(weight, group)
        assert weight.scales is not None
        scales = by_part(narrowest(weight.scales), groups, device)
    trivial = torch.equal(order, torch.arange(weight.in_features))
    words, meta = _pack(values, zero, None if trivial else order, device)
    return Sparse24Weight(
        weight.out_features,
        weight.in_features,
        bits,
        group,
        words,
        meta,
        scales,
        None if trivial else order.to(device, torch.int32),
        None if weight.bias is None else weight.bias.to(device, torch.float32),
    )


def _pack(
    values: Tensor, zero: int, order: Tensor | None, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    length = values.shape[1] if order is None else len(order)
    at_once = max(1, _CHUNK // (64 * length)) * 64
    parts = []
    for first in range(0, len(values), at_once):
        rows = values[first : first + at_once].to(device)
        if order is not None:
            rows = torch.nn.functional.pad(rows, (0, 1), value=zero)[:, order.to(device)]
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % int(ROWS.value)), value=zero)
        parts.append(_pack_rows(rows, zero))
    return torch.cat([words for words, _ in parts]), torch.cat([meta for _, meta in parts])


def _pack_rows(values: Tensor, zero: int) -> tuple[Tensor, Tensor]:
    """Values [N, K], padded; N a multiple of 64 and K of 128."""
    steps = values.shape[1] // 128
    quads = values.view(-1, 4)
    which = ((quads != zero).long() << torch.arange(4, device=values.device)).sum(1)
    positions = torch.stack([torch.tensor(t, device=values.device)[which] for t in (_FIRST, _SECOND)], 1)
    assert ((quads != zero).sum(1) <= 2).all()
    # block nt hrow g | step k32 jk t e -> block step nt g t k32 | jk hrow e
    kept = quads.gather(1, positions).view(-1, 4, 2, 8, steps, 4, 2, 4, 2)
    kept = kept.permute(0, 4, 1, 3, 7, 5, 6, 2, 8).flatten(-3, -2)
    if kept.dtype == torch.uint8:
        shifts = (4 * torch.arange(4)[:, None] + 16 * torch.arange(2)).to(values.device, torch.int32)
        words = (kept.int() << shifts).sum((-1, -2)).int()[:, :, None]
    else:
        words = kept.contiguous().view(torch.int32)[..., 0].permute(0, 1, 6, 2, 3, 4, 5).contiguous()
    # block nt hrow g | step w b u | position -> block step nt g (b u) w | hrow
    fields = (positions.view(-1, 8) << 2 * torch.arange(8, device=values.device)).sum(1)
    fields = fields.view(-1, 4, 2, 8, steps, 2, 2, 2).permute(0, 4, 1, 3, 6, 7, 5, 2).flatten(4, 5)
    return words, _int32(fields[..., 0] | fields[..., 1] << 16)


def _int32(values: Tensor) -> Tensor:
    """The low 32 bits of int64."""
    return torch.where(values >= 1 << 31, values - (1 << 32), values).int().contiguous()
