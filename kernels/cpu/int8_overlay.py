"""One token through a low-bit linear and its residuals at once: the residuals' gathers while weights come.

The linear waits for memory most of the time, the residuals for their gathers. Behind the linear these cost
their whole time, beside its groups about half where memory binds (docs/kernels.md has figures). The sums are
those of ``int8_tile`` and ``overlay``, bit by bit.
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
from .isa import VNNI
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
            with cgutils.for_range(builder, share) as inner:
                yield builder.add(first, inner.index)
                sums.step(inner.index)  # whether it is still one of its steps or not: no branch to mispredict
            with cgutils.for_range(builder, builder.sub(sums.steps(), share)) as left:
                sums.step(builder.add(share, left.index))
            for half, value in enumerate(sums.finish()):
                at = builder.add(builder.mul(outer.index, I64(2)), I64(half))
                builder.store(value, self._place(self._sums, at))

    def _place(self, array: ir.Value, index: ir.Value) -> ir.Value:
        return self._emit.builder.gep(array, [I64(0), index])

    def sums(self, index: int) -> list[ir.Value]:
        """Of the pass's block ``index``, after the pass: as ``BlockSums.finish`` gives them."""
        load = self._emit.builder.load
        return [load(self._place(self._sums, I64(2 * index + half))) for half in range(2)]


def one_token_kernel(num_bits: int, asym: bool, wide: bool) -> Any:
    """The kernel for a bit width and a kind of columns, on AVX-512 VNNI. args: of ``overlay_kernel``."""
    has_zeros, is_wide, blocks_at, linear_at = int(asym), int(wide), 7, 8 * LINEAR

    def int8_one_token(args, thread, num_threads):
        blocks = word(args, blocks_at)
        first, end = blocks * thread // num_threads, blocks * (thread + 1) // num_threads
        _one_token(num_bits, has_zeros, is_wide, args, args + linear_at, first, end)

    return int8_one_token


@intrinsic(prefer_literal=True)
def _one_token(
    typingctx: Any,
    num_bits: Any,
    asym: Any,
    wide: Any,
    args: Any,
    linear: Any,
    first: Any,
    end: Any,
) -> Any:
    """Blocks [first, end) of 16 rows. args: the residuals'; linear: those of ``int8_linear``."""
    bits, has_zeros, wide_ = literal(num_bits), bool(literal(asym)), literal(wide)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, linear, first, end = arguments[3:]
        emit = Emitter(builder)
        x, *_, y, _, _ = words(emit, args, 8)
        arrays = words(emit, args, RESIDUALS)[8:]
        kernel = Tile(builder, VNNI, bits, 1)
        for _, blocks in emit_streams(builder, I64(1), (first, end), _STREAMS):
            beside = _Beside(emit, blocks, lambda block: BlockSums(emit, wide_, arrays, x, block))
            emit_passes(kernel, words(emit, linear, 12), blocks, I64(0), has_zeros, beside.each_group)
            for i, block in enumerate(blocks):
                add_to_rows(emit, emit.offset(y, emit.scaled(block, 4 * ROWS)), beside.sums(i))
        return context.get_dummy_value()

    return types.void(num_bits, asym, wide, *([types.intp] * 4)), codegen
