"""Activations to int8: per token and group of 32 inputs, symmetric, rounded to nearest even.

x8 = rint(x * 127 / amax), xs = amax / 127, error at most amax / 254 per element. Written in tiles of tokens
as ``int8_tile.tile`` reads them; sums = -(sum of the group's int8) * offset. For 2:4 weights ("octets"),
tiles are int64 [K / 8, tokens], eight inputs of a token each, as x8 + 128.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import word
from .ir import F32, I8, I32, Emitter
from .vectors import literal, load_f32, load_i32, store_f32

CHUNK = 120  # tokens whose activations a GEMM keeps in cache; a multiple of every largest tile (8 and 3)


@intrinsic(prefer_literal=True)
def _quantize_tile(
    typingctx: Any,
    tokens: Any,
    octets: Any,
    x: Any,
    ldx: Any,
    x8: Any,
    xs: Any,
    sums: Any,
    groups: Any,
    offset: Any,
) -> Any:
    """``tokens`` rows of fp32 at x (row stride ldx floats) into one tile."""
    count, in_octets = literal(tokens), literal(octets)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, _, x, ldx, x8, xs, sums, groups, offset = arguments
        emit = Emitter(builder)
        floats, ints = ir.VectorType(F32, 32), ir.VectorType(I32, 32)
        with cgutils.for_range(builder, groups) as loop:
            g = loop.index
            for m in range(count):
                value = emit.load(floats, emit.offset(x, emit.scaled(g, 128), emit.scaled(ldx, 4 * m)), 4)
                magnitude = emit.call("llvm.fabs.v32f32", floats, [value])
                top = emit.call("llvm.vector.reduce.fmax.v32f32", F32, [magnitude])
                # A group of zeros keeps a scale that is not zero, so that 127 / amax stays finite.
                top = builder.select(builder.fcmp_ordered(">", top, F32(1e-20)), top, F32(1e-20))
                scaled = builder.fmul(value, emit.splat(builder.fdiv(F32(127.0), top), 32))
                rounded = builder.fptosi(emit.call("llvm.rint.v32f32", floats, [scaled]), ints)
                at = [emit.scaled(g, 4 * count), 4 * m]
                emit.store(builder.fmul(top, F32(1 / 127)), emit.offset(xs, *at), 4)
                total = emit.call("llvm.vector.reduce.add.v32i32", I32, [rounded])
                emit.store(
                    builder.neg(builder.mul(total, builder.trunc(offset, I32))), emit.offset(sums, *at), 4
                )
                if in_octets:
                    rounded = builder.add(rounded, emit.constant(I32, 128, 32))
                quads = builder.bitcast(builder.trunc(rounded, ir.VectorType(I8, 32)), ir.VectorType(I32, 8))
                base = emit.offset(x8, emit.scaled(g, 32 * count))
                for quad in range(8):
                    word_ = builder.extract_element(quads, I32(quad))
                    place = (quad // 2 * count + m) * 2 + quad % 2 if in_octets else quad * count + m
                    emit.store(word_, emit.offset(base, place * 4), 4)
        return context.get_dummy_value()

    return types.void(tokens, octets, *([types.intp] * 7)), codegen


def quantize_kernel(tiles: tuple[int, int, int], octets: bool) -> Any:
    """The kernel for an instruction set's tile sizes (largest first, then 1). Rows are the unit of threads.

    args: x, ldx (floats), K, groups, address of the number of tokens, x8, xs, sums, offset,
    perm (int32 [32 * groups], -1: zero; or 0), scratch, scratch bytes per thread.
    """
    big, mid, small = tiles
    kind = int(octets)

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
            room = min(last, (m // CHUNK + 1) * CHUNK) - m
            count = 1
            if room >= big:
                count = big
            elif room >= mid:
                count = mid
            elif room >= small:
                count = small
            row, ld = x + m * ldx * 4, ldx
            if copy:
                for i in range(count):
                    gather_row(row + i * ldx * 4, size, groups * 32, perm, scratch + i * groups * 128)
                row, ld = scratch, groups * 32
            a, b, c = x8 + m * groups * 32, xs + m * groups * 4, sums + m * groups * 4
            if count == big:
                _quantize_tile(big, kind, row, ld, a, b, c, groups, offset)
            elif count == mid:
                _quantize_tile(mid, kind, row, ld, a, b, c, groups, offset)
            elif count == small:
                _quantize_tile(small, kind, row, ld, a, b, c, groups, offset)
            else:
                _quantize_tile(1, kind, row, ld, a, b, c, groups, offset)
            m += count

    return quantize


@njit(nogil=True, error_model="numpy")
def row_share(tokens, thread, num_threads):
    """The rows [first, last) of a thread, the same for every kernel that splits by rows.

    In steps of 24 rows, a multiple of every register tile; few rows all fall to thread 0, the caller,
    which does not have to wake up.
    """
    steps = (tokens + 23) // 24
    first = (steps * thread + num_threads - 1) // num_threads
    last = (steps * (thread + 1) + num_threads - 1) // num_threads
    return min(tokens, first * 24), min(tokens, last * 24)


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
