"""One token through a low-bit linear and its residuals at once: the residuals' gathers while weights come.

The linear waits for memory most of the time, the residuals for their gathers. Behind the linear these cost
their whole time; here a few stand beside every group of it. The sums are those of ``int8_tile`` and
``overlay``, bit by bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import word, words
from .int8_tile import Tile, emit_passes
from .ir import F32, I64, Emitter
from .l16 import ROWS
from .overlay import LINEAR, RESIDUALS
from .overlay_gather import BlockSums, add_to_rows
from .overlay_slices import LANES
from .streams import emit_streams
from .vectors import literal

_STREAMS = ((1, 4),)


class _Beside:
    """The residuals of a pass's blocks: of each in turn, beside its part of the groups."""

    def __init__(
        self, emit: Emitter, blocks: list[ir.Value], sums_of: Callable[[ir.Value], BlockSums]
    ) -> None:
        self._emit, self._blocks, self._sums_of = emit, blocks, sums_of
        self._vector = ir.VectorType(F32, LANES)
        count = len(blocks)
        self._ids = cgutils.alloca_once(emit.builder, ir.ArrayType(I64, count))
        self._sums = cgutils.alloca_once(emit.builder, ir.ArrayType(self._vector, 2 * count))

    @contextmanager
    def each_group(self, builder: ir.IRBuilder, groups: ir.Value) -> Iterator[ir.Value]:
        """See ``emit_passes``."""
        count = len(self._blocks)
        for i, block in enumerate(self._blocks):
            builder.store(block, self._place(self._ids, I64(i)))
        with cgutils.for_range(builder, I64(count)) as outer:
            first = builder.sdiv(builder.mul(groups, outer.index), I64(count))
            end = builder.sdiv(builder.mul(groups, builder.add(outer.index, I64(1))), I64(count))
            share = builder.sub(end, first)
            sums = self._sums_of(builder.load(self._place(self._ids, outer.index)))
            steps = sums.steps()
            one_or_more = builder.select(builder.icmp_signed(">", share, I64(0)), share, I64(1))
            each = builder.sdiv(builder.add(steps, builder.sub(one_or_more, I64(1))), one_or_more)
            done = cgutils.alloca_once(builder, I64)
            builder.store(I64(0), done)
            with cgutils.for_range(builder, share) as inner:
                yield builder.add(first, inner.index)
                self._some(sums, done, each, steps)
            self._some(sums, done, steps, steps)
            for half, value in enumerate(sums.finish()):
                at = builder.add(builder.mul(outer.index, I64(2)), I64(half))
                builder.store(value, self._place(self._sums, at))

    def _some(self, sums: BlockSums, done: ir.Value, most: ir.Value, steps: ir.Value) -> None:
        """As many steps, if there are so many left."""
        builder = self._emit.builder
        first = builder.load(done)
        left = builder.sub(steps, first)
        count = builder.select(builder.icmp_signed("<", most, left), most, left)
        with cgutils.for_range(builder, count) as loop:
            sums.step(builder.add(first, loop.index))
        builder.store(builder.add(first, count), done)

    def _place(self, array: ir.Value, index: ir.Value) -> ir.Value:
        return self._emit.builder.gep(array, [I64(0), index])

    def sums(self, index: int) -> list[ir.Value]:
        """Of the pass's block ``index``, after the pass: as ``BlockSums.finish`` gives them."""
        load = self._emit.builder.load
        return [load(self._place(self._sums, I64(2 * index + half))) for half in range(2)]


def one_token_kernel(isa: int, num_bits: int, asym: bool, wide: bool) -> Any:
    """The kernel for a bit width and a kind of columns. args: those of ``overlay_kernel``."""
    has_zeros, is_wide, blocks_at, linear_at = int(asym), int(wide), 7, 8 * LINEAR

    def int8_one_token(args, thread, num_threads):
        blocks = word(args, blocks_at)
        first, end = blocks * thread // num_threads, blocks * (thread + 1) // num_threads
        _one_token(isa, num_bits, has_zeros, is_wide, args, args + linear_at, first, end)

    return int8_one_token


@intrinsic(prefer_literal=True)
def _one_token(
    typingctx: Any,
    isa: Any,
    num_bits: Any,
    asym: Any,
    wide: Any,
    args: Any,
    linear: Any,
    first: Any,
    end: Any,
) -> Any:
    """Blocks [first, end) of 16 rows. args: the residuals'; linear: those of ``int8_linear``."""
    isa_, bits, has_zeros, wide_ = literal(isa), literal(num_bits), bool(literal(asym)), literal(wide)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, linear, first, end = arguments[4:]
        emit = Emitter(builder)
        x, *_, y, _, _ = words(emit, args, 8)
        arrays = words(emit, args, RESIDUALS)[8:]
        kernel = Tile(builder, isa_, bits, 1)
        for _, blocks in emit_streams(builder, I64(1), (first, end), _STREAMS):
            beside = _Beside(emit, blocks, lambda block: BlockSums(emit, wide_, arrays, x, block))
            emit_passes(kernel, words(emit, linear, 12), blocks, I64(0), has_zeros, beside.each_group)
            for i, block in enumerate(blocks):
                add_to_rows(emit, emit.offset(y, emit.scaled(block, 4 * ROWS)), beside.sums(i))
        return context.get_dummy_value()

    return types.void(isa, num_bits, asym, wide, *([types.intp] * 4)), codegen
