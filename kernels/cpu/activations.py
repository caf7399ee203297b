"""Activations to int8: per token and group of 32 inputs, symmetric, rounded to nearest even; or to bf16.

x8 = rint(x * 127 / amax), xs = amax / 127, error at most amax / 254 per element. Written in tiles of tokens
as ``int8_tile`` reads them, those of 16 as ``amx_tile`` does (QUADS); sums = -(sum of the group's int8) *
offset. For 2:4 weights (OCTETS) tiles are int64 [K / 8, tokens], eight inputs of a token each, as x8 + 128.
PAIRS of bf16 are as ``bf16_linear`` reads them, without xs, and their sums are fp32.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import word
from .ir import BF16, F32, I8, I16, I32, I64, Emitter
from .isa import AMX, ROUNDED, TILES
from .vectors import literal, load_f32, load_i32, store_f32

CHUNK = 120  # tokens whose activations a GEMM keeps in cache; a multiple of every largest tile (8 and 4)
QUADS, OCTETS, PAIRS = 0, 1, 2
TOKENS = TILES[AMX][0]  # whose bytes are not in quads


@intrinsic(prefer_literal=True)
def _quantize_tile(
    typingctx: Any,
    isa: Any,
    form: Any,
    tokens: Any,
    left: Any,
    x: Any,
    ldx: Any,
    x8: Any,
    xs: Any,
    sums: Any,
    groups: Any,
    offset: Any,
) -> Any:
    """``tokens`` rows of fp32 at x (row stride ldx floats) into one tile; as many as some tile has.

    left: rows that are there, ``tokens`` or more; or one fewer, then the last is taken twice.
    """
    sizes, form_ = (*TILES[literal(isa)], 1), literal(form)
    rounded = ROUNDED[literal(isa)] if form_ == QUADS else ()

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        tokens, left, x, ldx, x8, xs, sums, groups, offset = arguments[2:]
        emit = Emitter(builder)
        lacks = builder.icmp_signed("<", left, tokens)
        whole, last = builder.not_(lacks), builder.sub(left, I64(1))
        for size, is_whole in [*((size, True) for size in sizes), *((size, False) for size in rounded)]:
            fits = builder.icmp_signed("==", tokens, I64(size))
            with (
                builder.if_then(builder.and_(fits, whole if is_whole else lacks)),
                cgutils.for_range(builder, groups) as loop,
            ):
                g = loop.index
                tile = [
                    emit.offset(base, emit.scaled(g, width * size))
                    for base, width in zip((x8, xs, sums), (64 if form_ == PAIRS else 32, 4, 4), strict=True)
                ]
                row = emit.offset(x, emit.scaled(g, 128))
                if size > 8 or not is_whole:
                    with cgutils.for_range(builder, I64(size)) as rows:
                        there = builder.icmp_signed("<", rows.index, left)
                        source = builder.mul(ldx, builder.select(there, rows.index, last))
                        start = emit.offset(row, emit.scaled(source, 4))
                        _quantize_group(emit, form_, size, rows.index, start, tile, offset)
                else:
                    for m in range(size):
                        start = emit.offset(row, emit.scaled(ldx, 4 * m))
                        _quantize_group(emit, form_, size, I64(m), start, tile, offset)
        return context.get_dummy_value()

    return types.void(isa, form, *([types.intp] * 9)), codegen


def _quantize_group(
    emit: Emitter,
    form: int,
    size: int,
    m: ir.Value,
    x: ir.Value,
    tile: list[ir.Value],
    offset: ir.Value,
) -> None:
    """32 inputs at x as a tile's token m; ``tile``: where the group's x8, xs and sums begin."""
    builder, (x8, xs, sums) = emit.builder, tile
    floats, ints = ir.VectorType(F32, 32), ir.VectorType(I32, 32)
    value = emit.load(floats, x, 4)
    xs, sums = emit.offset(xs, emit.scaled(m, 4)), emit.offset(sums, emit.scaled(m, 4))
    if form == PAIRS:
        total = _store_pairs(emit, value, emit.offset(x8, emit.scaled(m, 4)), 4 * size)
        emit.store(builder.fmul(total, builder.fneg(builder.sitofp(offset, F32))), sums, 4)
        return
    # As integers magnitudes have the same order, with NaN above all: it reaches the scale.
    magnitude = builder.and_(builder.bitcast(value, ints), emit.constant(I32, 0x7FFFFFFF, 32))
    top = builder.bitcast(emit.call("llvm.vector.reduce.umax.v32i32", I32, [magnitude]), F32)
    # A group of zeros keeps a scale that is not zero, so that 127 / amax stays finite.
    top = builder.select(builder.fcmp_ordered("<", top, F32(1e-20)), F32(1e-20), top)
    scaled = builder.fmul(value, emit.splat(builder.fdiv(F32(127.0), top), 32))
    rounded = builder.fptosi(emit.call("llvm.rint.v32f32", floats, [scaled]), ints)
    emit.store(builder.fmul(top, F32(1 / 127)), xs, 4)
    total = emit.call("llvm.vector.reduce.add.v32i32", I32, [rounded])
    emit.store(builder.neg(builder.mul(total, builder.trunc(offset, I32))), sums, 4)
    if form == OCTETS:
        rounded = builder.add(rounded, emit.constant(I32, 128, 32))
    bytes_ = builder.trunc(rounded, ir.VectorType(I8, 32))
    if size == TOKENS:
        emit.store(bytes_, emit.offset(x8, emit.scaled(m, 32)), 32)
        return
    quads = builder.bitcast(bytes_, ir.VectorType(I32, 8))
    # A token's words of the tile: quads [8, size], or octets [4, size] of two words.
    base = emit.offset(x8, emit.scaled(m, 8 if form == OCTETS else 4))
    for quad in range(8):
        place = quad // 2 * size * 2 + quad % 2 if form == OCTETS else quad * size
        emit.store(builder.extract_element(quads, I32(quad)), emit.offset(base, place * 4), 4)


def _store_pairs(emit: Emitter, value: ir.Value, base: ir.Value, stride: int) -> ir.Value:
    """32 fp32 as 16 pairs of bf16, ``stride`` bytes apart; returns the sum of what they became.

    Of each four the pairs are (0, 2) and (1, 3). NaN stays NaN. Summed by halves: in one order for any tile.
    """
    builder = emit.builder

    def part(vector: ir.Value, indices: list[int]) -> ir.Value:
        return builder.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, len(indices)), indices))

    halves = [part(value, list(range(start, start + 16))) for start in (16, 0)]
    rounded = emit.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", ir.VectorType(BF16, 32), halves)
    bits = builder.bitcast(rounded, ir.VectorType(I16, 32))
    order = [4 * quad + t for quad in range(8) for t in (0, 2, 1, 3)]
    pairs = builder.bitcast(part(bits, order), ir.VectorType(I32, 16))
    for index in range(16):
        emit.store(builder.extract_element(pairs, I32(index)), emit.offset(base, stride * index), 4)
    wide = builder.shl(builder.zext(bits, ir.VectorType(I32, 32)), emit.constant(I32, 16, 32))
    total = builder.bitcast(wide, ir.VectorType(F32, 32))
    for width in (16, 8, 4, 2, 1):
        total = builder.fadd(part(total, list(range(width))), part(total, list(range(width, 2 * width))))
    return builder.extract_element(total, I32(0))


def quantize_kernel(isa: int, form: int) -> Any:
    """The kernel for an instruction set's tiles. Rows are the unit of threads.

    args: x, ldx (floats), K, groups, address of the number of tokens, x8, xs, sums, offset,
    perm (int32 [32 * groups], -1: zero; or 0), scratch, scratch bytes per thread.
    """
    sizes, rounded = TILES[isa], (0, *(ROUNDED[isa] if form == QUADS else ()))
    word_bytes = 64 if form == PAIRS else 32  # of a group

    def quantize(args, thread, num_threads):
        x = word(args, 0)
        ldx = word(args, 1)
        size = word(args, 2)
        groups = word(args, 3)
        tokens = word(word(args, 4), 0)
        x8 = word(args, 5)
        xs = word(args, 6)
        sums = word(args, 7)
        offset = word(args, 8)
        perm = word(args, 9)
        scratch = word(args, 10) + thread * word(args, 11)
        first, last = row_share(tokens, thread, num_threads)
        copy = perm != 0 or size != groups * 32
        m = first
        while m < last:
            count = 1
            for rows in sizes:
                # The rows of all threads but the last one's are a multiple of every tile.
                if rows <= last - m or (rows in rounded and rows == last - m + 1):
                    count = rows
                    break
            row, ld = x + m * ldx * 4, ldx
            if copy:
                for i in range(min(count, last - m)):
                    gather_row(row + i * ldx * 4, size, groups * 32, perm, scratch + i * groups * 128)
                row, ld = scratch, groups * 32
            a, b, c = x8 + m * groups * word_bytes, xs + m * groups * 4, sums + m * groups * 4
            _quantize_tile(isa, form, count, last - m, row, ld, a, b, c, groups, offset)
            m += count

    return quantize


@njit(nogil=True, error_model="numpy")
def row_share(tokens, thread, num_threads):
    """The rows [first, last) of a thread, the same for every kernel that splits by rows.

    In steps of 16 rows, a multiple of every largest tile; few rows all fall to thread 0, the caller, which
    does not have to wake up.
    """
    steps = (tokens + 15) // 16
    first = (steps * thread + num_threads - 1) // num_threads
    last = (steps * (thread + 1) + num_threads - 1) // num_threads
    return min(tokens, first * 16), min(tokens, last * 16)


@njit(nogil=True, error_model="numpy")
def gather_row(x, width, places, perm, out):
    """One row in another order: place p takes input perm[p], or 0 where that is -1. No perm: as it is."""
    for p in range(places):
        source = p if p < width else -1
        if perm != 0:
            source = load_i32(perm + 4 * p)
        value = np.float32(0)
        if source >= 0:
            value = load_f32(x + 4 * source)
        store_f32(out + 4 * p, value)
