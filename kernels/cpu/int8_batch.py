"""AVX2's int8 kernel for 16 tokens and more: the codes of a strip of groups are unpacked once for all tokens.

Bit for bit what ``int8_tile`` computes: the same integers, scaled and added up in the same order.

A core of Zen 3 whose other thread is busy starts 3 to 4 instructions a cycle, not 6, and their number
decides. ``int8_tile`` takes 261 for a group of four tokens and 16 rows, 24 of them masks and shifts, 23 with
spilled registers; here they are 236, and 60 more for unpacking, once. Codes of 8 bit become int16: as nibbles
they take as many products and twice the epilogue.

In scratch, for each thread: codes, fp32 scales and zero points of the strip, and the totals of all tokens.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import words
from .activations import CHUNK
from .int8_tile import Tile, opaque
from .ir import F32, I8, I16, I32, Emitter
from .isa import AVX2, TILES
from .l16 import GROUP_BYTES
from .vectors import literal

TOKENS = TILES[AVX2][0]  # of a tile
MIN_TOKENS = 16  # fewer share less and have not been measured
# Groups. 4 bit, 64 tokens: 8 are 3 to 4 % slower, 32 are no faster, and with them codes, activations and the
# lines read ahead would fill the first cache.
STRIP = 16
_HALVES = 2  # of the 16 rows
_LINE = 64  # bytes: 16 fp32
_BYTES, _FLOATS = ir.VectorType(I8, 32), ir.VectorType(F32, 8)
_WORDS, _INTS = ir.VectorType(I16, 16), ir.VectorType(I32, 8)
_SCALES = STRIP * 16 * _LINE  # after the codes of 8 bit, the largest
_ZEROS = _SCALES + STRIP * _LINE
_WIDE_X = _ZEROS + STRIP * _LINE  # a tile's activations as int16, for 8 bit
TOTALS = _WIDE_X + STRIP * 64 * TOKENS
SCRATCH_BYTES = TOTALS + CHUNK * _LINE


def prefetched_lines(num_bits: int) -> int:
    """Cache lines of the next strip's codes that a tile asks for per group.

    Beside the products, so that memory works all the time; without them 4 bit at 16 tokens is 16 to 20 %
    slower. MIN_TOKENS // TOKENS tiles must do for a group's lines.
    """
    return -(-GROUP_BYTES[num_bits] // (64 * (MIN_TOKENS // TOKENS)))


def _vectors(num_bits: int) -> int:
    """Vectors of 8 rows that a group's codes are unpacked to."""
    return 16 if num_bits == 8 else 8


@intrinsic(prefer_literal=True)
def unpack_strip(
    typingctx: Any, num_bits: Any, asym: Any, args: Any, block: Any, group: Any, count: Any, scratch: Any
) -> Any:
    """Codes, scales and zero points of a block's ``count`` groups from ``group`` on, into scratch."""
    bits, has_zeros = literal(num_bits), bool(literal(asym))

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, block, group, count, scratch = arguments[2:]
        emit, kernel = Emitter(builder), Tile(builder, AVX2, bits, TOKENS)
        w, ws, wz, *_, groups = words(emit, args, 10)
        begin = builder.add(builder.mul(block, groups), group)
        with cgutils.for_range(builder, count) as loop:
            g = builder.add(begin, loop.index)
            line = emit.offset(scratch, emit.scaled(loop.index, _LINE))
            for base, place in [(ws, _SCALES), (wz, _ZEROS)][: 1 + has_zeros]:
                emit.prefetch(emit.offset(base, emit.scaled(g, 32), 32 * STRIP))
                for half in range(_HALVES):
                    rows = emit.offset(base, 2 * kernel.lanes * half)
                    emit.store(kernel.per_row(rows, g), emit.offset(line, place, 32 * half), 32)
            codes = emit.offset(w, emit.scaled(g, GROUP_BYTES[bits]))
            to = emit.offset(scratch, emit.scaled(loop.index, _LINE * _vectors(bits)))
            for half in range(_HALVES):
                places = [emit.offset(address, 32 * half) for address in (codes, to)]
                if bits == 8:
                    _unpack_wide(emit, 0 if has_zeros else 128, *places)
                else:
                    for quad, [vector] in enumerate(kernel.codes(places[0])):
                        emit.store(vector, emit.offset(places[1], _LINE * quad), 32)
        return context.get_dummy_value()

    return types.void(num_bits, asym, *([types.intp] * 5)), codegen


def _unpack_wide(emit: Emitter, middle: int, codes: ir.Value, to: ir.Value) -> None:
    """8-bit codes less ``middle`` as int16: a vector of each quad's inputs 0 and 1, then one of 2 and 3."""
    builder = emit.builder
    for quad in range(8):
        rows = emit.load(_INTS, emit.offset(codes, _LINE * quad))
        for part in range(2):
            pair = builder.lshr(rows, emit.constant(I32, 16, 8)) if part else rows
            low = builder.and_(pair, emit.constant(I32, 0xFF, 8))
            high = builder.and_(builder.shl(pair, emit.constant(I32, 8, 8)), emit.constant(I32, 0xFF0000, 8))
            values = builder.bitcast(builder.or_(low, high), _WORDS)
            values = builder.sub(values, emit.constant(I16, middle, 16))
            emit.store(values, emit.offset(to, _LINE * (2 * quad + part)), 32)


@intrinsic(prefer_literal=True)
def multiply_strip(
    typingctx: Any,
    num_bits: Any,
    asym: Any,
    args: Any,
    first: Any,
    group: Any,
    count: Any,
    scratch: Any,
    totals: Any,
    ahead: Any,
) -> Any:
    """Add the products of an unpacked strip and the tile of tokens at ``first`` to the tile's totals.

    ahead: where the lines begin that it prefetches, ``prefetched_lines`` for each of the ``count`` groups.
    """
    bits, has_zeros = literal(num_bits), bool(literal(asym))

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, first, group, count, scratch, totals, ahead = arguments[2:]
        emit = Emitter(builder)
        _, _, _, x8, xs, sums, _, _, _, groups = words(emit, args, 10)
        at = builder.add(builder.mul(first, groups), emit.scaled(group, TOKENS))
        x8, xs, sums = (
            emit.offset(base, emit.scaled(at, size)) for base, size in ((x8, 32), (xs, 4), (sums, 4))
        )
        if bits == 8:
            x8 = _widen(emit, x8, emit.offset(scratch, _WIDE_X), count)
        lines = prefetched_lines(bits)
        with cgutils.for_range(builder, count) as loop:
            for line in range(lines):
                emit.prefetch(emit.offset(ahead, emit.scaled(loop.index, _LINE * lines), _LINE * line))
            dots = _dots(emit, bits, loop.index, x8, scratch)
            _add_up(emit, bits, has_zeros, loop.index, dots, [xs, sums, scratch, totals])
        return context.get_dummy_value()

    return types.void(num_bits, asym, *([types.intp] * 7)), codegen


def _widen(emit: Emitter, x8: ir.Value, to: ir.Value, groups: ir.Value) -> ir.Value:
    """A tile's int8 as int16, at ``to``."""
    with cgutils.for_range(emit.builder, emit.scaled(groups, 2 * TOKENS)) as loop:
        narrow = emit.load(ir.VectorType(I8, 16), emit.offset(x8, emit.scaled(loop.index, 16)))
        emit.store(emit.builder.sext(narrow, _WORDS), emit.offset(to, emit.scaled(loop.index, 32)), 32)
    return to


def _dots(emit: Emitter, bits: int, g: ir.Value, x8: ir.Value, scratch: ir.Value) -> list[list[ir.Value]]:
    """Sums of a group's products by token and half: of int16 as ``Tile.total`` takes them; 8 bit: int32."""
    builder, kernel, count = emit.builder, Tile(emit.builder, AVX2, bits, TOKENS), _vectors(bits)
    parts = count // 8  # of a quad
    codes = emit.offset(scratch, emit.scaled(g, _LINE * count))
    x_group = emit.offset(x8, emit.scaled(g, 32 * TOKENS * parts))
    sums: list[list[list[ir.Value]]] = [[[] for _ in range(_HALVES)] for _ in range(TOKENS)]
    for step in range(count):
        quad, part = divmod(step, parts)
        kind = _WORDS if bits == 8 else _BYTES
        vectors = [emit.load(kind, emit.offset(codes, _LINE * step, 32 * h), 32) for h in range(_HALVES)]
        for m in range(TOKENS):
            place = 4 * (parts * (quad * TOKENS + m) + part)
            x = builder.bitcast(emit.splat(emit.load(I32, emit.offset(x_group, place), 4), 8), kind)
            for slot, vector in zip(sums[m], vectors, strict=True):
                if bits != 8:
                    kernel.accumulate(slot, [vector], x, quad)
                    continue
                product = emit.call("llvm.x86.avx2.pmadd.wd", _INTS, [vector, x])
                slot[:] = [opaque(builder, builder.add(slot[0], product)) if slot else product]
    return [[slot[0] for slot in halves] for halves in sums]


def _add_up(
    emit: Emitter, bits: int, asym: bool, g: ir.Value, dots: list[list[ir.Value]], places: list[ir.Value]
) -> None:
    """Scale a group's sums and add them to the totals; places: xs, sums, scratch, totals."""
    xs, sums, scratch, totals = places
    builder, kernel = emit.builder, Tile(emit.builder, AVX2, bits, TOKENS)
    per_token, line = emit.scaled(g, 4 * TOKENS), emit.offset(scratch, emit.scaled(g, _LINE))
    row_scales, zeros = (
        [emit.load(_FLOATS, emit.offset(line, place, 32 * h), 32) for h in range(_HALVES)]
        for place in (_SCALES, _ZEROS)
    )
    nothing = emit.constant(I32, 0, 8)
    for m in range(TOKENS):
        scale = emit.splat(emit.load(F32, emit.offset(xs, per_token, 4 * m), 4), 8)
        start = emit.splat(emit.load(I32, emit.offset(sums, per_token, 4 * m), 4), 8)
        for h in range(_HALVES):
            value = dots[m][h] if bits == 8 else kernel.total([dots[m][h]], nothing if asym else start)
            value = builder.sitofp(value, _FLOATS)
            if asym:
                value = emit.fma(zeros[h], builder.sitofp(start, _FLOATS), value)
            place = emit.offset(totals, _LINE * m + 32 * h)
            total = emit.fma(builder.fmul(row_scales[h], scale), value, emit.load(_FLOATS, place, 32))
            emit.store(total, place, 32)


@intrinsic
def clear_totals(typingctx: Any, totals: Any, count: Any) -> Any:
    """Zero the totals of ``count`` tokens."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        emit = Emitter(builder)
        with cgutils.for_range(builder, emit.scaled(arguments[1], _HALVES)) as loop:
            place = emit.offset(arguments[0], emit.scaled(loop.index, 32))
            emit.store(emit.constant(F32, 0.0, 8), place, 32)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def prefetch_rows(typingctx: Any, args: Any, block: Any, first: Any) -> Any:
    """Ask for the lines of y that a block and a tile of tokens will be written to."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, block, first = arguments
        emit = Emitter(builder)
        *_, y, _, ldy = words(emit, args, 9)
        row = emit.offset(y, emit.scaled(block, _LINE), emit.scaled(builder.mul(first, ldy), 4))
        for m in range(TOKENS):
            emit.prefetch(emit.offset(row, emit.scaled(ldy, 4 * m)), write=True)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def write_totals(typingctx: Any, args: Any, block: Any, first: Any, count: Any, totals: Any) -> Any:
    """The totals of a block and ``count`` tokens from ``first`` on, to y."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, block, first, count, totals = arguments
        emit = Emitter(builder)
        *_, y, _, ldy, _, _, accumulate = words(emit, args, 12)
        y = emit.offset(y, emit.scaled(block, _LINE), emit.scaled(builder.mul(first, ldy), 4))
        with cgutils.for_range(builder, count) as loop:
            row = emit.offset(y, emit.scaled(builder.mul(loop.index, ldy), 4))
            line = emit.offset(totals, emit.scaled(loop.index, _LINE))
            for h in range(_HALVES):
                total = emit.load(_FLOATS, emit.offset(line, 32 * h), 32)
                emit.write_row(total, emit.offset(row, 32 * h), accumulate)
        return context.get_dummy_value()

    return types.void(*([types.intp] * 5)), codegen
