"""Sparse residuals for one token: ``overlay`` over the 16 rows of a block, x gathered by columns."""

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .ir import F32, I8, I16, I32, I64, Emitter, gathers_are_fast
from .overlay_slices import LANES, Slice

# Bytes ahead of the read of columns and of values. They come in pieces of some hundred bytes, a block's, of
# which the hardware's prefetcher makes little: one token of 8192 x 2048 pays 48 us for 0.5 %, without 58.
_AHEAD = 1024


class BlockSums:
    """Emits the sums of a block's entries times x: ``begin``, steps from 0 on, ``finish``."""

    def __init__(self, emit: Emitter, wide: int, arrays: list[ir.Value], x: ir.Value, block: ir.Value):
        """arrays: addresses of ``OverlayWeight.arrays``; x: of the token's inputs."""
        self._emit, self._builder, self._x = emit, emit.builder, x
        self._slices = [Slice(emit, wide, arrays, emit.offset(emit.scaled(block, 2), i)) for i in range(2)]
        self._totals = emit.running_sums(ir.VectorType(F32, LANES), 2)
        for part in self._slices:
            part.begin()

    def steps(self) -> ir.Value:
        """Of the longer slice. Further ones add zeros."""
        first, second = (part.length(0) for part in self._slices)
        return self._builder.select(self._builder.icmp_signed("<", first, second), second, first)

    def step(self, index: ir.Value) -> None:
        """The entry ``index`` of every row."""
        emit, builder = self._emit, self._builder
        for i, (part, total) in enumerate(zip(self._slices, self._totals, strict=True)):
            weights, cols, values = part.step(index)
            if i == 0:  # the second slice lies behind the first
                emit.prefetch(emit.offset(cols, _AHEAD))
                emit.prefetch(emit.offset(values, _AHEAD))
            builder.store(emit.fma(weights, _gather(part, self._x, cols), builder.load(total)), total)

    def finish(self) -> list[ir.Value]:
        """After the last step: two vectors of 8 fp32, in the order of the rows."""
        for part, total in zip(self._slices, self._totals, strict=True):
            _add_tails(part, self._x, total)
        return [
            part.by_rows(self._builder.load(total))
            for part, total in zip(self._slices, self._totals, strict=True)
        ]


def add_to_rows(emit: Emitter, y: ir.Value, sums: list[ir.Value]) -> None:
    """y[0:16] += what ``BlockSums.finish`` returned."""
    for i, value in enumerate(sums):
        out = emit.offset(y, 4 * LANES * i)
        emit.store(emit.builder.fadd(emit.load(value.type, out, 4), value), out, 4)


def _add_tails(part: Slice, x: ir.Value, total: ir.Value) -> None:
    """What the rows of a slice have beyond its steps, if any of them has: lane after lane."""
    emit, builder = part.emit, part.builder
    (first, _), (_, last) = part.tail(0), part.tail(LANES - 1)
    with builder.if_then(builder.icmp_signed("<", first, last), likely=False):
        lane_total = cgutils.alloca_once(builder, F32)
        for lane in range(LANES):
            builder.store(builder.extract_element(builder.load(total), I32(lane)), lane_total)
            first, last = part.tail(lane)
            with cgutils.for_range(builder, builder.sub(last, first)) as loop:
                at = builder.add(first, loop.index)
                place = emit.offset(x, emit.scaled(part.column(part.tail_cols, at), 4))
                operands = [part.tail_value(at), emit.load(F32, place, 4), builder.load(lane_total)]
                builder.store(emit.call("llvm.fma.f32", F32, operands), lane_total)
            changed = builder.insert_element(builder.load(total), builder.load(lane_total), I32(lane))
            builder.store(changed, total)


def _gather(part: Slice, x: ir.Value, cols: ir.Value) -> ir.Value:
    """x at the next 8 columns."""
    emit, builder, wide, vector = part.emit, part.builder, part.wide, ir.VectorType(F32, LANES)
    if gathers_are_fast():
        places = emit.load(ir.VectorType(I32 if wide else I16, LANES), cols, 2)
        places = places if wide else builder.zext(places, ir.VectorType(I32, LANES))
        base = builder.inttoptr(x, ir.PointerType(I8))
        every = builder.bitcast(emit.constant(I32, -1, LANES), vector)
        zero = emit.constant(F32, 0.0, LANES)
        return emit.call("llvm.x86.avx2.gather.d.ps.256", vector, [zero, base, places, every, I8(4)])
    gathered = ir.Constant(vector, ir.Undefined)
    for lane in range(LANES):
        at = emit.scaled(part.column(cols, I64(lane)), 4)
        gathered = builder.insert_element(gathered, emit.load(F32, emit.offset(x, at), 4), I32(lane))
    return gathered
