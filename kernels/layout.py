"""The one form in which a linear's weights meet: checkpoint formats make it, kernels repack it."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a linear is quantized: codes of ``num_bits``, one scale per ``group_size`` inputs of a row.

    ``group_size`` -1 is one group over the whole row. It need not divide the row: the last group is
    then shorter. ``actorder`` "group" means that ``g_idx`` may be any assignment of inputs to groups.
    ``least_zero``: whoever makes the codes uses no zero point below it, 0 or 1.
    """

    num_bits: int
    group_size: int
    symmetric: bool
    actorder: Literal["none", "group"] = "none"
    least_zero: int = 0

    def num_groups(self, in_features: int) -> int:
        """Groups in a row of ``in_features``."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


@dataclass(frozen=True, slots=True)
class SparseOverlay:
    """Residuals that are added to a quantized weight, by row (CSR).

    rowptr: [out_features + 1] int32, ascending from 0; cols: [entries] int32 or uint16, ascending within a
    row, in the checkpoint's order of inputs; values: [entries] fp16.
    """

    rowptr: Tensor
    cols: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        assert self.rowptr.dtype == torch.int32
        assert self.cols.dtype in (torch.int32, torch.uint16)
        assert self.values.dtype == torch.float16
        assert self.cols.shape == self.values.shape == (int(self.rowptr[-1]),)

    @staticmethod
    def of(residuals: Tensor) -> "SparseOverlay":
        """The entries of a dense matrix that are not zero, as fp16."""
        values = residuals.to(torch.float16)
        rows, cols = values.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(values))
        rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
        narrow = torch.uint16 if residuals.shape[1] <= 1 << 16 else torch.int32
        return SparseOverlay(rowptr, cols.to(narrow), values[rows, cols])

    @staticmethod
    def empty(out_features: int) -> "SparseOverlay":
        """Of no entries."""
        none = torch.zeros(0)
        return SparseOverlay(torch.zeros(out_features + 1, dtype=torch.int32), none.int(), none.half())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.rowptr, self.cols, self.values))

    def add_to(self, dense: Tensor) -> None:
        """Add to [out_features, in_features], in place."""
        counts = self.rowptr.diff().long()
        rows = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        dense.index_put_((rows, self.cols.long()), self.values.to(dense.dtype), accumulate=True)

    def rows(self, start: int, stop: int) -> "SparseOverlay":
        """The outputs [start, stop)."""
        cut = slice(int(self.rowptr[start]), int(self.rowptr[stop]))
        rowptr = self.rowptr[start : stop + 1] - self.rowptr[start]
        return SparseOverlay(rowptr, self.cols[cut], self.values[cut])

    @staticmethod
    def cat(a: "SparseOverlay", b: "SparseOverlay") -> "SparseOverlay":
        """Along the outputs."""
        rowptr = torch.cat([a.rowptr, b.rowptr[1:] + a.rowptr[-1]])
        cols = (a.cols, b.cols) if a.cols.dtype == b.cols.dtype else (a.cols.int(), b.cols.int())
        return SparseOverlay(rowptr, torch.cat(cols), torch.cat([a.values, b.values]))


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One linear layer's weights (or several fused along the outputs), before a kernel repacks them.

    values: [out_features, in_features]; floats (fp32, fp16, bf16) where ``spec`` is None, else uint8 codes.
    scales: [out_features, num_groups], fp16 or fp32 (bf16 as found).
    zeros:  [out_features, num_groups], uint8 (or float) zero points; None: 2**(num_bits - 1).
    g_idx:  [in_features] int32, group of each input in the checkpoint's order; None: ``arange // size``.
    bias:   [out_features], float.
    outliers: residuals of single weights; quantized weights only.

    Weight = scales[:, g] * (codes - zeros[:, g]) + outliers with g = g_idx[k].
    """

    values: Tensor
    spec: QuantSpec | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    g_idx: Tensor | None = None
    bias: Tensor | None = None
    outliers: SparseOverlay | None = None

    def __post_init__(self) -> None:
        rows, cols = self.values.shape
        if self.spec is None:
            assert self.scales is None and self.zeros is None and self.g_idx is None
            assert self.outliers is None
        else:
            groups = self.spec.num_groups(cols)
            assert self.values.dtype == torch.uint8
            assert self.scales is not None and tuple(self.scales.shape) == (rows, groups)
            assert self.zeros is None or tuple(self.zeros.shape) == (rows, groups)
            assert self.g_idx is None or tuple(self.g_idx.shape) == (cols,)
        assert self.bias is None or tuple(self.bias.shape) == (rows,)
        assert self.outliers is None or tuple(self.outliers.rowptr.shape) == (rows + 1,)

    @property
    def out_features(self) -> int:
        """Rows."""
        return int(self.values.shape[0])

    @property
    def in_features(self) -> int:
        """Columns: the axis that the matrix product sums over."""
        return int(self.values.shape[1])

    @property
    def storage_bytes(self) -> int:
        """Bytes of the weights as a checkpoint packs them (codes at ``num_bits`` each)."""
        if self.spec is None:
            total = self.values.numel() * self.values.element_size()
        else:
            total = -(-self.values.numel() * self.spec.num_bits // 8)
        for tensor in (self.scales, self.zeros, self.g_idx, self.bias):
            total += 0 if tensor is None else tensor.numel() * tensor.element_size()
        return total + (0 if self.outliers is None else self.outliers.nbytes)

    def group_of_inputs(self) -> Tensor:
        """[in_features] int64: the group of each input."""
        assert self.spec is not None
        if self.g_idx is not None:
            return self.g_idx.long()
        size = self.in_features if self.spec.group_size == -1 else self.spec.group_size
        return torch.arange(self.in_features, device=self.values.device) // size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as floats, [out_features, in_features]. Exact in fp32 for fp16 scales."""
        if self.spec is None:
            return self.values.to(dtype)
        assert self.scales is not None
        group = self.group_of_inputs()
        if self.zeros is None:
            centred = self.values.float() - float(2 ** (self.spec.num_bits - 1))
        else:
            centred = self.values.float() - self.zeros.float()[:, group]
        weights = self.scales.float()[:, group] * centred
        if self.outliers is not None:
            self.outliers.add_to(weights)
        return weights.to(dtype)

    def is_24(self) -> bool:
        """Whether ``why_not_24`` finds nothing."""
        return self.why_not_24() is None

    def why_not_24(self) -> str | None:
        """None where it is int4, symmetric, and of every 4 consecutive inputs at most 2 codes are not zero.

        Inputs must be in their groups' order, and groups of whole fours. Nearly free where it is not so: the
        first rows tell.
        """
        spec = self.spec
        if spec is None or spec.num_bits != 4 or self.zeros is not None:
            return "it is not symmetric with 4 bits"
        group = self.group_of_inputs()
        if bool((group.diff() < 0).any()) or bool((group.bincount()[:-1] % 4).any()):
            return "its groups are not of whole fours in the order of the inputs"
        for start, rows in ((0, self.values[:16]), (16, self.values[16:])):
            kept = torch.nn.functional.pad(rows != 8, (0, -rows.shape[1] % 4))
            counts = kept.view(len(rows), kept.shape[1] // 4, 4).sum(2, dtype=torch.uint8)
            if bool((counts > 2).any()):
                row, quad = (counts > 2).nonzero()[0].tolist()
                found = int(counts[row, quad])
                return f"row {start + row} has {found} weights in inputs {4 * quad} to {4 * quad + 3}"
        return None

    def rows(self, start: int, stop: int) -> "PackedWeight":
        """The outputs [start, stop): a tensor-parallel slice, or one part of a fused weight.

        Without ``outliers`` where none of them has any.
        """
        cut = slice(start, stop)
        outliers = None if self.outliers is None else self.outliers.rows(start, stop)
        return replace(
            self,
            values=self.values[cut],
            scales=None if self.scales is None else self.scales[cut],
            zeros=None if self.zeros is None else self.zeros[cut],
            bias=None if self.bias is None else self.bias[cut],
            outliers=outliers if outliers is not None and len(outliers.values) else None,
        )

    def fuses_with(self, other: "PackedWeight") -> bool:
        """Whether both can be one matrix: same inputs, bits, groups and order of inputs."""
        if self.spec is None or other.spec is None:
            return (
                self.spec is other.spec
                and self.in_features == other.in_features
                and (self.values.dtype == other.values.dtype)
            )
        if (self.spec.num_bits, self.spec.group_size) != (other.spec.num_bits, other.spec.group_size):
            return False
        if self.in_features != other.in_features:
            return False
        if self.g_idx is None or other.g_idx is None:
            return self.g_idx is other.g_idx
        return torch.equal(self.g_idx, other.g_idx)

    @staticmethod
    def cat(parts: list["PackedWeight"]) -> list["PackedWeight"]:
        """Fuse neighbours along the outputs where ``fuses_with`` allows; parts that differ stay apart."""
        fused: list[PackedWeight] = []
        for part in parts:
            if fused and fused[-1].fuses_with(part):
                fused[-1] = _cat_pair(fused[-1], part)
            else:
                fused.append(part)
        return fused


def _cat_pair(a: PackedWeight, b: PackedWeight) -> PackedWeight:
    spec = a.spec
    zeros: Tensor | None = None
    if spec is not None and (a.zeros is not None or b.zeros is not None):
        spec = replace(spec, symmetric=False)
        zeros = torch.cat([_explicit_zeros(a), _explicit_zeros(b)])
    bias: Tensor | None = None
    if a.bias is not None or b.bias is not None:
        bias = torch.cat([_explicit_bias(a), _explicit_bias(b)])
    scales = None if a.scales is None or b.scales is None else torch.cat([a.scales, b.scales])
    outliers: SparseOverlay | None = None
    if a.outliers is not None or b.outliers is not None:
        outliers = SparseOverlay.cat(
            a.outliers or SparseOverlay.empty(a.out_features),
            b.outliers or SparseOverlay.empty(b.out_features),
        )
    return PackedWeight(torch.cat([a.values, b.values]), spec, scales, zeros, a.g_idx, bias, outliers)


def _explicit_zeros(weight: PackedWeight) -> Tensor:
    if weight.zeros is not None:
        return weight.zeros
    assert weight.spec is not None and weight.scales is not None
    return torch.full_like(weight.scales, 2 ** (weight.spec.num_bits - 1), dtype=torch.uint8)


def _explicit_bias(weight: PackedWeight) -> Tensor:
    if weight.bias is not None:
        return weight.bias
    return torch.zeros(weight.out_features, dtype=torch.float32)
