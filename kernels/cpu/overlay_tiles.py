"""Sparse residuals for more than a few tokens: ``overlay`` over tiles of 8 tokens, x as [K, 8]."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import word, words
from .activations import row_share
from .ir import F32, I32, I64, Emitter
from .overlay_slices import LANES, Slice
from .vectors import literal, load_f32, store_f32

TILE = 8  # tokens of an activation tile
DIRECT = 2  # as many tokens or fewer are gathered: a tile costs about as much as three of them
_TOKENS = ir.VectorType(F32, TILE)


def _lane(builder: ir.IRBuilder, vector: ir.Value, lane: int) -> ir.Value:
    """One lane of a vector of 8 in all lanes."""
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, 8), [lane] * 8))


def _transpose(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """8 vectors of 8 fp32, transposed."""

    def shuffle(a: ir.Value, b: ir.Value, mask: list[int]) -> ir.Value:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, 8), mask))

    low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
    pairs = [shuffle(rows[i], rows[i + 1], mask) for i in (0, 2, 4, 6) for mask in (low, high)]
    low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
    fours = [
        [shuffle(pairs[i + j], pairs[i + j + 2], mask) for j in (0, 1) for mask in (low, high)]
        for i in (0, 4)
    ]
    low, high = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
    return [shuffle(a, b, mask) for mask in (low, high) for a, b in zip(*fours, strict=True)]


@intrinsic
def _transpose_rows(typingctx: Any, x: Any, ldx: Any, count: Any, chunks: Any, out: Any) -> Any:
    """out[k, 0:8] = x[0:8, k] for 8 * chunks inputs; rows from ``count`` on repeat the last."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        x, ldx, count, chunks, out = arguments
        emit = Emitter(builder)
        last = builder.sub(count, I64(1))
        starts = []
        for i in range(TILE):
            row = builder.select(builder.icmp_signed("<", I64(i), last), I64(i), last)
            starts.append(emit.offset(x, emit.scaled(builder.mul(row, ldx), 4)))
        with cgutils.for_range(builder, chunks) as loop:
            at = emit.scaled(loop.index, 32)
            rows = [emit.load(ir.VectorType(F32, 8), emit.offset(start, at), 4) for start in starts]
            for i, column in enumerate(_transpose(builder, rows)):
                emit.store(column, emit.offset(out, emit.scaled(at, 8), 32 * i), 4)
        return context.get_dummy_value()

    return types.void(*([types.intp] * 5)), codegen


def tiles_kernel() -> Any:
    """Activations in tiles of 8 tokens, [K, 8] each, where ``overlay_kernel`` reads tiles. Split by rows.

    args: x, ldx (floats), K, address of the number of tokens, out.
    """

    def tiles(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        size = word(args, 2)
        tokens = word(word(args, 3), 0)
        out = word(args, 4)
        first, last = row_share(tokens, thread, num_threads)
        for m in range(first, last, TILE):
            count = min(TILE, last - m)
            if count > DIRECT:
                row = x + m * ldx * 4
                tile = out + m * size * 4
                _transpose_rows(row, ldx, count, size // TILE, tile)
                for k in range(size // TILE * TILE, size):
                    for i in range(TILE):
                        value = load_f32(row + (min(i, count - 1) * ldx + k) * 4)
                        store_f32(tile + (k * TILE + i) * 4, value)

    return tiles


@intrinsic(prefer_literal=True)
def add_tiles(
    typingctx: Any,
    tiles: Any,
    wide: Any,
    args: Any,
    index: Any,
    begin: Any,
    tokens: Any,
) -> Any:
    """y += the sums of slice ``index``, for ``tokens`` of 8 * tiles from ``begin`` on; args of the kernel."""
    count, wide_ = literal(tiles), literal(wide)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, index, begin, tokens = arguments[2:]
        emit = Emitter(builder)
        _, _, size, xt, _, y, ldy, _, *arrays = words(emit, args, 16)
        row_bytes = emit.scaled(size, 4)  # of a token
        starts = [emit.offset(xt, builder.mul(emit.offset(begin, TILE * t), row_bytes)) for t in range(count)]
        walk = Slice(emit, wide_, arrays, index)
        totals = emit.running_sums(_TOKENS, LANES, count)

        def add(lane: int, weight: ir.Value, place: ir.Value) -> None:
            at = emit.scaled(place, 4 * TILE)
            for start, total in zip(starts, totals[lane], strict=True):
                x = emit.load(_TOKENS, emit.offset(start, at), 4)
                builder.store(emit.fma(weight, x, builder.load(total)), total)

        together = 8 if count == 1 else 4  # lanes at once: enough chains to hide latency, in 16 registers
        for part in (range(i, i + together) for i in range(0, LANES, together)):
            walk.begin()
            with cgutils.for_range(builder, walk.length(part[0])) as loop:
                weights, here, _ = walk.step(loop.index)
                for lane in part:
                    add(lane, _lane(builder, weights, lane), walk.column(here, I64(lane)))
        for lane in range(LANES):
            first, last = walk.tail(lane)
            with cgutils.for_range(builder, builder.sub(last, first)) as loop:
                at = builder.add(first, loop.index)
                add(lane, emit.splat(walk.tail_value(at), TILE), walk.column(walk.tail_cols, at))
        y = emit.offset(y, emit.scaled(builder.mul(begin, ldy), 4), emit.scaled(index, 4 * LANES))
        for t in range(count):
            sums = _transpose(builder, [builder.load(totals[lane][t]) for lane in range(LANES)])
            _write(emit, [walk.by_rows(of_token) for of_token in sums], TILE * t, (y, ldy, tokens))
        return context.get_dummy_value()

    return types.void(tiles, wide, *([types.intp] * 4)), codegen


def _write(emit: Emitter, sums: list[ir.Value], begin: int, out: tuple[ir.Value, ...]) -> None:
    """Add to y those of a tile's tokens that are there; out: y, ldy, tokens."""
    builder, (y, ldy, tokens) = emit.builder, out
    for token, of_token in enumerate(sums, begin):
        with builder.if_then(builder.icmp_signed("<", I64(token), tokens)):
            address = emit.offset(y, emit.scaled(ldy, 4 * token))
            emit.store(builder.fadd(emit.load(_TOKENS, address, 4), of_token), address, 4)
