"""Sparse residuals for one token: ``overlay`` over the 16 rows of a block, x gathered by columns."""

from llvmlite import ir
from numba.core import cgutils

from .ir import F32, I1, I8, I16, I32, I64, Emitter, gathers_are_fast
from .l16 import ROWS
from .overlay_slices import LANES, Slice

# Bytes ahead of the read of columns and of values. They come in pieces of some hundred bytes, a block's, of
# which the hardware's prefetcher makes little: 0.5 % of 8192 x 2048 take 48 us behind int2, without 58.
_AHEAD = 1024


class BlockSums:
    """Emits the sums of a block's entries times x: steps from 0 on, then ``finish``."""

    def __init__(
        self, emit: Emitter, wide: int, arrays: list[ir.Value], x: ir.Value, block: ir.Value
    ) -> None:
        """arrays: addresses of ``OverlayWeight.arrays``; x: of the token's inputs."""
        self._emit, self._builder, self._x = emit, emit.builder, x
        self._slices = [Slice(emit, wide, arrays, emit.offset(emit.scaled(block, 2), i)) for i in range(2)]
        self._total = emit.running_sums(ir.VectorType(F32, ROWS))
        for part in self._slices:
            part.begin()

    def steps(self) -> ir.Value:
        """Of the longer slice. Further ones add zeros."""
        first, second = (part.length(0) for part in self._slices)
        return self._builder.select(self._builder.icmp_signed("<", first, second), second, first)

    def step(self, index: ir.Value) -> None:
        """The entry ``index`` of every row."""
        emit, builder = self._emit, self._builder
        weights, cols, values = zip(*(part.step(index) for part in self._slices), strict=True)
        for address in (cols[0], values[0]):  # the second slice lies behind the first
            emit.prefetch(emit.offset(address, _AHEAD))
        x = _gather(self._slices, self._x, cols)
        total = emit.fma(_side_by_side(builder, *weights), x, builder.load(self._total))
        builder.store(total, self._total)

    def finish(self) -> list[ir.Value]:
        """After the last step: two vectors of 8 fp32, in the order of the rows."""
        total = self._builder.load(self._total)
        found = []
        for i, part in enumerate(self._slices):
            lanes = ir.Constant(ir.VectorType(I32, LANES), [LANES * i + lane for lane in range(LANES)])
            slot = cgutils.alloca_once(self._builder, ir.VectorType(F32, LANES))
            self._builder.store(self._builder.shuffle_vector(total, total, lanes), slot)
            _add_tails(part, self._x, slot)
            found.append(part.by_rows(self._builder.load(slot)))
        return found


def _side_by_side(builder: ir.IRBuilder, first: ir.Value, second: ir.Value) -> ir.Value:
    """Two vectors of 8 as one of 16."""
    lanes = ir.Constant(ir.VectorType(I32, 2 * LANES), list(range(2 * LANES)))
    return builder.shuffle_vector(first, second, lanes)


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


def _gather(slices: list[Slice], x: ir.Value, cols: tuple[ir.Value, ...]) -> ir.Value:
    """x at the next 8 columns of each slice."""
    emit, builder, wide = slices[0].emit, slices[0].builder, slices[0].wide
    if gathers_are_fast():
        # One gather of 16 instead of two of 8: fewer instructions around it, 4 % of one token's int2 linear.
        loaded = [emit.load(ir.VectorType(I32 if wide else I16, LANES), at, 2) for at in cols]
        places = _side_by_side(builder, *loaded)
        places = places if wide else builder.zext(places, ir.VectorType(I32, ROWS))
        base = builder.inttoptr(x, ir.PointerType(I8))
        every, zero = ir.Constant(ir.VectorType(I1, ROWS), [1] * ROWS), emit.constant(F32, 0.0, ROWS)
        operands = [zero, base, places, every, I32(4)]
        return emit.call("llvm.x86.avx512.mask.gather.dps.512", zero.type, operands)
    gathered = ir.Constant(ir.VectorType(F32, ROWS), ir.Undefined)
    for i, (part, at) in enumerate(zip(slices, cols, strict=True)):
        for lane in range(LANES):
            place = emit.offset(x, emit.scaled(part.column(at, I64(lane)), 4))
            gathered = builder.insert_element(gathered, emit.load(F32, place, 4), I32(LANES * i + lane))
    return gathered
