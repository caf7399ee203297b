"""The layout of sparse residuals (``overlay``), and the walk over it.

A slice is 8 rows, longest first (a *lane* each). Step j has the j-th entry of every row that is longer, side
by side and unpadded ("jagged diagonals": Y. Saad, Krylov subspace methods on supercomputers, 1989): 0.5 % of
2048 inputs are 10 a row, and padded to the longest of 16 they were 17. What a row has beyond twice the
slice's median (and 8) is its tail, in CSR: a heavy row lengthens its own chain only, 4 cycles an entry. A
full row of 14336 inputs costs its thread about 20 us per 24 tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numpy.typing import NDArray

from ..layout import SparseOverlay
from .ir import F16, F32, I8, I16, I32, I64, Emitter
from .l16 import ROWS, padded

LANES = 8  # rows of a slice
_LONGEST = 2**16 - 1


@dataclass(frozen=True, slots=True, eq=False)
class OverlayWeight:
    """Slices of 8 rows, two for each block of 16.

    starts: int32 [slices + 1], a slice's first entry; lengths: uint16 [slices, 8], a lane's entries, falling;
    lanes: uint8 [slices, 8], the lane of each row; cols (uint16, or int32 where K > 65536) and values (fp16):
    [entries + 8]; tails: int32 [8 * slices + 1], by lanes, into tail_cols, tail_values.
    """

    starts: NDArray[np.int32]
    lengths: NDArray[np.uint16]
    lanes: NDArray[np.uint8]
    cols: NDArray[Any]
    values: NDArray[np.float16]
    tails: NDArray[np.int32]
    tail_cols: NDArray[Any]
    tail_values: NDArray[np.float16]

    @property
    def wide(self) -> bool:
        """Whether columns take 32 bits."""
        return self.cols.dtype == np.int32

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """As the kernel takes them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(array.nbytes for array in self.arrays)


def pack_overlay(overlay: SparseOverlay, in_features: int) -> OverlayWeight | None:
    """Lay out; None if there are no entries."""
    cols, values = overlay.cols.numpy(), overlay.values.numpy()
    if not len(cols):
        return None
    rowptr = overlay.rowptr.numpy().astype(np.int64)
    counts = np.zeros(padded(len(rowptr) - 1, ROWS), np.int64)
    counts[: len(rowptr) - 1] = np.diff(rowptr)
    slices = counts.reshape(-1, LANES)
    # Twice the median: ordinary rows fit, and a few heavy ones do not lengthen the others' loop.
    widths = np.minimum(2 * np.median(slices, axis=1).astype(np.int64) + LANES, _LONGEST)
    inside = np.minimum(slices, widths[:, None])
    rows_by_lane = np.argsort(-slices, axis=1, kind="stable")
    lanes = np.argsort(rows_by_lane, axis=1)
    order = (rows_by_lane + LANES * np.arange(len(slices))[:, None]).reshape(-1)  # the row of each lane
    # Entry by entry, the rows in the order of their lanes.
    lane = np.repeat(np.arange(len(order)), counts[order])
    step = np.arange(len(cols)) - np.repeat(np.cumsum(counts[order]) - counts[order], counts[order])
    source = rowptr[np.minimum(order, len(rowptr) - 1)][lane] + step
    near = step < inside.reshape(-1)[order][lane]
    jagged = np.lexsort((lane[near], step[near], lane[near] // LANES))
    kind = np.int32 if in_features > 1 << 16 else np.uint16
    after = np.zeros(LANES, np.int64)  # what the last step of the last slice reads beyond its own entries

    return OverlayWeight(
        np.concatenate([[0], inside.sum(1).cumsum()]).astype(np.int32),
        np.take_along_axis(inside, rows_by_lane, 1).astype(np.uint16),
        lanes.astype(np.uint8),
        np.concatenate([cols[source[near][jagged]], after]).astype(kind),
        np.concatenate([values[source[near][jagged]], after]).astype(np.float16),
        np.concatenate([[0], (slices - inside).reshape(-1)[order].cumsum()]).astype(np.int32),
        cols[source[~near]].astype(kind),
        values[source[~near]],
    )


class Slice:
    """Emits the walk over a slice's steps. arrays: addresses of ``OverlayWeight.arrays``."""

    def __init__(self, emit: Emitter, wide: int, arrays: list[ir.Value], index: ir.Value) -> None:
        self.emit, self.builder, self.wide = emit, emit.builder, wide
        starts, lengths, lanes, cols, values, tails, self.tail_cols, self.tail_values = arrays
        first = emit.zext(emit.load(I32, emit.offset(starts, emit.scaled(index, 4)), 4))
        self._cols = emit.offset(cols, emit.scaled(first, 4 if wide else 2))
        self._values = emit.offset(values, emit.scaled(first, 2))
        self._lengths = emit.offset(lengths, emit.scaled(index, 2 * LANES))
        self._lanes = emit.offset(lanes, emit.scaled(index, LANES))
        self.tails = emit.offset(tails, emit.scaled(index, 4 * LANES))
        halves = emit.load(ir.VectorType(I16, LANES), self._lengths, 2)
        self._longer = self.builder.zext(halves, ir.VectorType(I32, LANES))
        self._at = cgutils.alloca_once(self.builder, I64)

    def length(self, lane: int) -> ir.Value:
        """Steps in which a lane has an entry; later lanes have no more."""
        return self.emit.zext(self.emit.load(I16, self.emit.offset(self._lengths, 2 * lane), 2))

    def begin(self) -> None:
        """Before the first step."""
        self.builder.store(I64(0), self._at)

    def step(self, index: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The lanes' values (0 where they have none), where their columns lie and the values; moves on.

        A step beyond the longest lane gives zeros, at columns of the next slice or behind the last.
        """
        emit, builder = self.emit, self.builder
        at = builder.load(self._at)
        now = emit.splat(builder.trunc(index, I32), LANES)
        there = builder.icmp_signed(">", self._longer, now)
        values = emit.offset(self._values, emit.scaled(at, 2))
        halves = emit.load(ir.VectorType(F16, LANES), values, 2)
        weights = builder.fpext(halves, ir.VectorType(F32, LANES))
        weights = builder.select(there, weights, emit.constant(F32, 0.0, LANES))
        count = emit.zext(builder.ctpop(builder.bitcast(there, I8)))
        builder.store(builder.add(at, count), self._at)
        return weights, emit.offset(self._cols, emit.scaled(at, 4 if self.wide else 2)), values

    def column(self, columns: ir.Value, index: ir.Value) -> ir.Value:
        """columns[index]."""
        size, element = (4, I32) if self.wide else (2, I16)
        return self.emit.zext(
            self.emit.load(element, self.emit.offset(columns, self.emit.scaled(index, size)), size)
        )

    def by_rows(self, by_lanes: ir.Value) -> ir.Value:
        """8 fp32 in the order of the slice's rows."""
        bytes_ = self.emit.load(ir.VectorType(I8, LANES), self._lanes)
        places = self.builder.zext(bytes_, ir.VectorType(I32, LANES))
        return self.emit.call("llvm.x86.avx2.permps", by_lanes.type, [by_lanes, places])

    def tail(self, lane: int) -> tuple[ir.Value, ir.Value]:
        """The first of a lane's entries behind its steps, and one behind the last."""
        return tuple(
            self.emit.zext(self.emit.load(I32, self.emit.offset(self.tails, 4 * (lane + i)), 4))
            for i in range(2)
        )

    def tail_value(self, index: ir.Value) -> ir.Value:
        """As fp32."""
        half = self.emit.load(F16, self.emit.offset(self.tail_values, self.emit.scaled(index, 2)), 2)
        return self.builder.fpext(half, F32)
