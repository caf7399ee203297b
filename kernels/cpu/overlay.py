"""Sparse residuals on top of a low-bit linear: y[m, n] += sum over j of values[n, j] * x[m, cols[n, j]].

Activations are the fp32 ones, in the checkpoint's order, whatever the linear's mode and its order of inputs.
Every output is one chain of fused multiply-adds over its row's entries in order, then one addition to y: the
same bits for any number of tokens and threads. Two ways of vectorising the same chains: over the 16 rows of a
block, gathering x (one or two tokens), and over 8 tokens, reading x from tiles of [K, 8] (more tokens).

Layout: a block of 16 rows keeps its first ``width`` entries of each row side by side, [width, 16], padded
with zeros (sliced ELL: no branch per row). What a row has beyond its block's width is its tail, in CSR: a
heavy row lengthens its own chain only, 4 cycles an entry. Threads take the blocks as the linear does, so that
no barrier is between the two; a full row of 14336 inputs costs its thread about 20 us per 24 tokens.

Padding multiplies a token's input 0 by zero: NaN where that is not finite. It changes nothing that the linear
beneath does not do already: there every output of a token meets all of its inputs, so that one which is not
finite makes them all so (tested); no other token is reached.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from ..layout import SparseOverlay
from .abi import word
from .activations import CHUNK, row_share
from .ir import F16, F32, I16, I32, I64, Emitter
from .isa import VNNI
from .l16 import ROWS, padded
from .vectors import literal, load_f32, load_i32, store_f32

TILE = 8  # tokens of an activation tile
DIRECT = 2  # as many tokens or fewer are gathered: a tile costs about as much as three of them


@dataclass(frozen=True, slots=True, eq=False)
class OverlayWeight:
    """pointers: int32 [blocks + 1], in vectors of 16 entries; cols (uint16, or int32 where K > 65536) and
    values (fp16): [vectors, 16];
    tails: int32 [padded N + 1] into tail_cols, tail_values.
    """

    pointers: NDArray[np.int32]
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
        return (self.pointers, self.cols, self.values, self.tails, self.tail_cols, self.tail_values)

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
    out_features = len(rowptr) - 1
    rows = padded(out_features, ROWS)
    counts = np.zeros(rows, np.int64)
    counts[:out_features] = np.diff(rowptr)
    by_block = counts.reshape(-1, ROWS)
    # Twice the median: ordinary rows fit, and a few heavy ones do not pad the others.
    widths = np.minimum(by_block.max(1), 2 * np.median(by_block, axis=1).astype(np.int64) + 8)
    pointers = np.concatenate([[0], widths.cumsum()])
    inside = np.minimum(by_block, widths[:, None]).reshape(-1)
    row = np.repeat(np.arange(rows), counts)
    index = np.arange(len(cols)) - rowptr[row]
    near = index < inside[row]
    kind = np.int32 if in_features > 1 << 16 else np.uint16
    places = (pointers[row // ROWS] + index) * ROWS + row % ROWS
    slots = int(pointers[-1]) * ROWS
    packed_cols, packed_values = np.zeros(slots, kind), np.zeros(slots, np.float16)
    packed_cols[places[near]], packed_values[places[near]] = cols[near], values[near]
    tails = np.concatenate([[0], (counts - inside).cumsum()])
    return OverlayWeight(
        pointers.astype(np.int32),
        packed_cols,
        packed_values,
        tails.astype(np.int32),
        cols[~near].astype(kind),
        values[~near],
    )


def _column(emit: Emitter, wide: int, address: ir.Value, index: ir.Value) -> ir.Value:
    """cols[index] as a 64-bit integer."""
    size, element = (4, I32) if wide else (2, I16)
    return emit.builder.zext(emit.load(element, emit.offset(address, emit.scaled(index, size)), size), I64)


def _lane(builder: ir.IRBuilder, vector: ir.Value, lane: int) -> ir.Value:
    """One lane of a vector of 8 in all lanes."""
    return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, 8), [lane] * 8))


@intrinsic(prefer_literal=True)
def _gather_block(
    typingctx: Any, isa: Any, wide: Any, x: Any, cols: Any, values: Any, width: Any, out: Any
) -> Any:
    """out[0:16] = sums over a block's entries inside its width, for one token."""
    isa_, wide_ = literal(isa), literal(wide)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, _, x, cols, values, width, out = arguments
        emit = Emitter(builder)
        lanes = 16 if isa_ == VNNI else 8
        vector, size = ir.VectorType(F32, lanes), 4 if wide_ else 2
        zero = emit.constant(F32, 0.0, lanes)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(16 // lanes)]
        for total in totals:
            builder.store(zero, total)
        with cgutils.for_range(builder, width) as loop:
            for half, total in enumerate(totals):
                at = emit.offset(emit.scaled(loop.index, 16), half * lanes)
                gathered = _gather(emit, wide_, x, emit.offset(cols, emit.scaled(at, size)), lanes)
                weight = emit.load(ir.VectorType(F16, lanes), emit.offset(values, emit.scaled(at, 2)), 2)
                weight = builder.fpext(weight, vector)
                builder.store(emit.fma(weight, gathered, builder.load(total)), total)
        for half, total in enumerate(totals):
            emit.store(builder.load(total), emit.offset(out, 4 * lanes * half), 4)
        return context.get_dummy_value()

    return types.void(isa, wide, *([types.intp] * 5)), codegen


def _gather(emit: Emitter, wide: int, x: ir.Value, cols: ir.Value, lanes: int) -> ir.Value:
    """x at the next ``lanes`` columns. By scalar loads: gather instructions are slower (measured: Zen 5)."""
    gathered = ir.Constant(ir.VectorType(F32, lanes), ir.Undefined)
    for lane in range(lanes):
        at = emit.scaled(_column(emit, wide, cols, I64(lane)), 4)
        gathered = emit.builder.insert_element(gathered, emit.load(F32, emit.offset(x, at), 4), I32(lane))
    return gathered


@intrinsic
def _add_block(typingctx: Any, sums: Any, y: Any) -> Any:
    """y[0:16] += sums[0:16]."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        emit = Emitter(builder)
        values = [emit.load(ir.VectorType(F32, 16), address, 4) for address in arguments]
        emit.store(builder.fadd(*values), arguments[1], 4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic(prefer_literal=True)
def _tail_entry(typingctx: Any, wide: Any, cols: Any, values: Any, index: Any, x: Any, total: Any) -> Any:
    """values[index] * x[cols[index]] + total."""
    wide_ = literal(wide)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, cols, values, index, x, total = arguments
        emit = Emitter(builder)
        value = builder.fpext(emit.load(F16, emit.offset(values, emit.scaled(index, 2)), 2), F32)
        activation = emit.load(F32, emit.offset(x, emit.scaled(_column(emit, wide_, cols, index), 4)), 4)
        return emit.call("llvm.fma.f32", F32, [value, activation, total])

    return types.float32(wide, *([types.intp] * 4), types.float32), codegen


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
def _add_tiles(
    typingctx: Any,
    tiles: Any,
    wide: Any,
    xt: Any,
    tile_bytes: Any,
    cols: Any,
    values: Any,
    width: Any,
    tails: Any,
    tail_cols: Any,
    tail_values: Any,
    y: Any,
    ldy: Any,
    tokens: Any,
) -> Any:
    """y[0:tokens, 0:8] += the sums of 8 rows; ``tokens`` of 8 * tiles. Pointers to the first row's."""
    count, wide_ = literal(tiles), literal(wide)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, _, xt, tile_bytes, cols, values, width, tails, tail_cols, tail_values, y, ldy, tokens = arguments
        emit = Emitter(builder)
        vector, zero = ir.VectorType(F32, TILE), emit.constant(F32, 0.0, TILE)
        starts = [emit.offset(xt, emit.scaled(tile_bytes, t)) for t in range(count)]
        totals = [[cgutils.alloca_once_value(builder, zero) for _ in starts] for _ in range(8)]

        def add(row: int, weight: ir.Value, column: ir.Value) -> None:
            at = emit.scaled(column, 4 * TILE)
            for start, total in zip(starts, totals[row], strict=True):
                x = emit.load(vector, emit.offset(start, at), 4)
                builder.store(emit.fma(weight, x, builder.load(total)), total)

        together = 8 if count == 1 else 4  # rows at once: enough chains to hide latency, in 16 registers
        for part in (range(i, i + together) for i in range(0, 8, together)):
            for total in (total for row in part for total in totals[row]):
                builder.store(zero, total)
            with cgutils.for_range(builder, width) as loop:
                slot = emit.scaled(loop.index, ROWS)
                halves = emit.load(ir.VectorType(F16, 8), emit.offset(values, emit.scaled(slot, 2)), 2)
                weights = builder.fpext(halves, vector)
                for row in part:
                    add(row, _lane(builder, weights, row), _column(emit, wide_, cols, emit.offset(slot, row)))
        for row in range(8):
            first = builder.zext(emit.load(I32, emit.offset(tails, 4 * row), 4), I64)
            last = builder.zext(emit.load(I32, emit.offset(tails, 4 * row + 4), 4), I64)
            with cgutils.for_range(builder, builder.sub(last, first)) as loop:
                index = builder.add(first, loop.index)
                value = emit.load(F16, emit.offset(tail_values, emit.scaled(index, 2)), 2)
                weight = emit.splat(builder.fpext(value, F32), TILE)
                add(row, weight, _column(emit, wide_, tail_cols, index))
        for t in range(count):
            columns = _transpose(builder, [builder.load(totals[row][t]) for row in range(8)])
            for i, column in enumerate(columns):
                token = TILE * t + i
                with builder.if_then(builder.icmp_signed("<", I64(token), tokens)):
                    address = emit.offset(y, emit.scaled(ldy, 4 * token))
                    emit.store(builder.fadd(emit.load(vector, address, 4), column), address, 4)
        return context.get_dummy_value()

    return types.void(tiles, wide, *([types.intp] * 11)), codegen


def overlay_kernel(isa: int, wide: bool) -> Any:
    """Adds a weight's residuals to y. Blocks of outputs are the unit of threads, as in the linears.

    args: x, ldx (floats), K, xt (as ``tiles_kernel`` writes it), address of the number of tokens, y,
    ldy (floats), blocks, the arrays of ``OverlayWeight``, scratch, scratch bytes per thread (64).
    """
    col_bytes = 4 if wide else 2
    is_wide = int(wide)

    def overlay(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        size = word(args, 2)
        xt = word(args, 3)
        tokens = word(word(args, 4), 0)
        y = word(args, 5)
        ldy = word(args, 6)
        blocks = word(args, 7)
        pointers = word(args, 8)
        tail_cols = word(args, 12)
        tail_values = word(args, 13)
        sums = word(args, 14) + thread * word(args, 15)
        for begin in range(0, tokens, CHUNK):
            end = min(tokens, begin + CHUNK)
            for n in range(blocks * thread // num_threads, blocks * (thread + 1) // num_threads):
                start = load_i32(pointers + 4 * n)
                width = load_i32(pointers + 4 * n + 4) - start
                if width == 0:
                    continue
                cols = word(args, 9) + start * ROWS * col_bytes
                values = word(args, 10) + start * ROWS * 2
                tails = word(args, 11) + n * ROWS * 4
                m = begin
                while m < end:
                    out = y + (m * ldy + n * ROWS) * 4
                    if end - m > DIRECT:
                        tile, tile_bytes = xt + m * size * 4, size * TILE * 4
                        count = end - m
                        for half in range(0, ROWS, 8):
                            a, b = cols + half * col_bytes, values + half * 2
                            c, d = tails + half * 4, out + half * 4
                            e, f = tail_cols, tail_values
                            if count >= 3 * TILE:
                                _add_tiles(3, is_wide, tile, tile_bytes, a, b, width, c, e, f, d, ldy, 24)
                            else:
                                _add_tiles(1, is_wide, tile, tile_bytes, a, b, width, c, e, f, d, ldy, count)
                        m += 3 * TILE if count >= 3 * TILE else TILE
                    else:
                        row = x + m * ldx * 4
                        _gather_block(isa, is_wide, row, cols, values, width, sums)
                        if load_i32(tails) != load_i32(tails + 4 * ROWS):
                            for r in range(ROWS):
                                total = load_f32(sums + 4 * r)
                                for j in range(load_i32(tails + 4 * r), load_i32(tails + 4 * r + 4)):
                                    total = _tail_entry(is_wide, tail_cols, tail_values, j, row, total)
                                store_f32(sums + 4 * r, total)
                        _add_block(sums, out)
                        m += 1

    return overlay
