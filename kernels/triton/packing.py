"""From a ``PackedWeight`` to the layout of the GPU linears: words in fragment order, scales by group.

words: int32 [N / 64, K / 128, KB, planes, 4, 8 (g), 4 (t), V]: blocks of 64 outputs x 128 inputs in turn.
       Bits  KB  planes  V   A lane's words of one fragment's rows and one plane lie together, V of them.
       2     1   1       4   A unit is one word of each plane; fields as in ``fragments``.
       3     1   3       2
       4     2   1       4
       8     2   2       4
scales: fp16 (bf16 or fp32 where fp16 loses) [parts, N]; zeros: uint8 [parts, N], up to 2**bits. A part is
       ``group`` inputs: 32, 64 or 128, with larger groups repeated; ``group`` 0 is one part over all inputs.

overlay: residuals in chunks of 128 entries for each block of outputs, 32 for each 16 outputs, zero-padded:
       values (the activations' type), rows (uint8, of 16), cols (int16 as uint16, or int32) [chunks, 4, 32];
       starts: int32 [N / 64 + 1], the blocks' first chunks.

Inputs are sorted by group, each group padded to whole parts, all of them to 128; outputs are padded to 64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import PackedWeight, SparseOverlay
from .fragments import ROWS, STEP, fields, fragments_per_unit, vector, vectors, words_per_unit

_CHUNK = 1 << 24  # codes that are packed at once


@dataclass(frozen=True, slots=True, eq=False)
class FragmentOverlay:
    """Sparse residuals of a weight. Tensors: see above."""

    starts: Tensor
    values: Tensor
    rows: Tensor
    cols: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As kernels take them."""
        return (self.starts, self.values, self.rows, self.cols)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors)


@dataclass(frozen=True, slots=True, eq=False)
class FragmentWeight:
    """A quantized weight on its device. Tensors: see above.

    order: int32 [K], which input stands where, ``in_features`` for none; None where inputs need not move.
    """

    out_features: int
    in_features: int
    bits: int
    group: int
    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    overlay: FragmentOverlay | None = None

    @property
    def inputs(self) -> int:
        """K: inputs with padding."""
        return self.words.shape[1] * int(STEP.value)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        tensors = (self.words, self.scales, self.zeros, self.order, self.bias)
        held = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return held + (0 if self.overlay is None else self.overlay.nbytes)


def padded(size: int, multiple: int) -> int:
    """``size`` rounded up."""
    return -(-size // multiple) * multiple


def pack(weight: PackedWeight, device: torch.device | str, dtype: torch.dtype) -> FragmentWeight:
    """The weight in fragment order on ``device``, for activations of ``dtype`` (fp16 or bf16).

    Zero points must be whole numbers from 0 to 2**bits (8 bits: 255): ``WeightTraits.whole_zeros``.
    """
    spec = weight.spec
    assert spec is not None and weight.scales is not None
    part = part_of(weight)
    # Three-bit units hold 64 inputs, which must share their zeros.
    bits = 4 if spec.num_bits == 3 and part == 32 else spec.num_bits
    order, groups = arrange_inputs(weight, part)
    trivial = torch.equal(order, torch.arange(weight.in_features))
    zeros = weight.zeros
    if zeros is None and bits != spec.num_bits:
        zeros = torch.full_like(weight.scales, 2 ** (spec.num_bits - 1), dtype=torch.uint8)
    return FragmentWeight(
        weight.out_features,
        weight.in_features,
        bits,
        part,
        pack_words(weight.values, None if trivial else order, bits, device),
        by_part(narrowest(weight.scales), groups, device),
        None if zeros is None else by_part(zeros.to(torch.uint8), groups, device),
        None if trivial else order.to(device, torch.int32),
        None if weight.bias is None else weight.bias.to(device, torch.float32),
        None if weight.outliers is None else _pack_overlay(weight.outliers, order, device, dtype),
    )


def _counts(weight: PackedWeight) -> Tensor:
    """Inputs of each group."""
    assert weight.spec is not None
    groups = weight.group_of_inputs().cpu()
    return groups.bincount(minlength=weight.spec.num_groups(weight.in_features))


def part_of(weight: PackedWeight) -> int:
    """The largest part that pads the inputs no more than the smallest does; 0 for a single group."""
    counts = _counts(weight)
    if len(counts) == 1:
        return 0
    for part in (128, 64):
        total = int((-(-counts // part) * part).sum())
        if padded(total, STEP.value) == padded(int((-(-counts // 32) * 32).sum()), STEP.value):
            return part
    return 32


def arrange_inputs(weight: PackedWeight, part: int) -> tuple[Tensor, Tensor]:
    """Which input stands where [K] (``in_features``: none), and which group each part belongs to."""
    group = weight.group_of_inputs().cpu()
    if part == 0:
        places, total, groups = torch.arange(len(group)), len(group), torch.zeros(1, dtype=torch.int64)
        by_group = places
    else:
        counts = _counts(weight)
        parts = -(-counts // part)
        by_group = group.argsort(stable=True)
        starts = (parts.cumsum(0) - parts) * part - (counts.cumsum(0) - counts)
        places = torch.arange(len(group)) + starts[group[by_group]]
        total = int(parts.sum()) * part
        groups = torch.repeat_interleave(torch.arange(len(counts)), parts)
        rest = (padded(total, STEP.value) - total) // part
        groups = torch.cat([groups, groups[-1:].expand(rest)])
    order = torch.full((padded(total, STEP.value),), weight.in_features)
    order[places] = by_group
    return order, groups


def by_part(values: Tensor, groups: Tensor, device: torch.device | str) -> Tensor:
    """[out, groups] -> [parts, out padded], zero where padded."""
    out = values.new_zeros(len(groups), padded(len(values), ROWS.value), device=device)
    out[:, : len(values)] = values.to(device).T[groups.to(device)]
    return out


def narrowest(scales: Tensor) -> Tensor:
    """The scales in the first type of fp16, bf16, fp32 that holds them exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(scales.to(dtype).float(), scales.float()):
            return scales.to(dtype)
    return scales.float()


def pack_words(codes: Tensor, order: Tensor | None, bits: int, device: torch.device | str) -> Tensor:
    """Codes [out, in] uint8 to words as above; ``order``: [K], ``in`` for none, None: as they are."""
    length = codes.shape[1] if order is None else len(order)
    blocks = padded(len(codes), ROWS.value) // ROWS.value
    planes, kb, v = words_per_unit(bits), vectors(bits), vector(bits)
    words = torch.empty(
        blocks, length // STEP.value, kb, planes, 4, 8, 4, v, dtype=torch.int32, device=device
    )
    at_once = max(1, _CHUNK // (ROWS.value * length))
    for first in range(0, blocks, at_once):
        rows = codes[first * ROWS.value : (first + at_once) * ROWS.value].to(device)
        if order is not None:
            rows = torch.nn.functional.pad(rows, (0, 1))[:, order.to(device)]
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % ROWS.value))
        words[first : first + at_once] = _pack_rows(rows, bits)
    return words


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Codes [N, K], padded, to words [N / 64, K / 128, KB, planes, 4, 8, 4, V]."""
    f = fragments_per_unit(bits)
    # block nt hrow g | step kb v f jk t e
    split = codes.view(-1, 4, 2, 8, codes.shape[1] // STEP.value, vectors(bits), vector(bits), f, 2, 4, 2)
    # -> block step kb nt g t v | f jk hrow e
    units = split.permute(0, 4, 5, 1, 3, 9, 6, 7, 8, 2, 10).int().flatten(-4, -2)
    planes = [torch.zeros_like(units[..., 0, 0]) for _ in range(words_per_unit(bits))]
    for register, (word, first) in enumerate(fields(bits)):
        for half in range(2):
            planes[word] |= units[..., register, half] << (first + 16 * half)
    if bits == 3:
        for bit in range(3):
            for half in range(2):
                planes[bit] |= (units[..., 15, half] >> bit & 1) << (15 + 16 * half)
    return torch.stack(planes, 3)


def _pack_overlay(
    overlay: SparseOverlay, order: Tensor, device: torch.device | str, dtype: torch.dtype
) -> FragmentOverlay:
    """Sort entries by groups of 16 rows; place entry ``i`` of a group in its block's chunk ``i // 32``."""
    counts = overlay.rowptr.diff().long().cpu()
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    place = torch.empty(int(order.max()) + 1, dtype=torch.int64)
    place[order] = torch.arange(len(order))
    cols = place[overlay.cols.cpu().long()]
    blocks = padded(len(counts), ROWS.value) // ROWS.value
    by_group = torch.bincount(rows // 16, minlength=4 * blocks)
    chunks = (-(-by_group // 32)).view(blocks, 4).amax(1)
    starts = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
    # CSR's rows ascend, so the entries of a group follow each other.
    within = torch.arange(len(rows)) - (by_group.cumsum(0) - by_group)[rows // 16]
    at = ((starts[rows // 64] + within // 32) * 4 + rows // 16 % 4) * 32 + within % 32
    shape = (int(starts[-1]), 4, 32)
    narrow = torch.int16 if len(order) <= 1 << 16 else torch.int32
    values, row, col = (torch.zeros(shape, dtype=t) for t in (dtype, torch.uint8, torch.int64))
    values.view(-1)[at] = overlay.values.cpu().to(dtype)
    row.view(-1)[at] = (rows % 16).to(torch.uint8)
    col.view(-1)[at] = cols
    return FragmentOverlay(
        starts.int().to(device), values.to(device), row.to(device), col.to(narrow).to(device)
    )
