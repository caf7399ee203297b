"""Linears with fp32 activations: the exact mode of low-bit weights, and dense fp16, bf16 and fp32 weights.

A block is 16 output rows. Low-bit weights are in L16; dense ones are [N / 16, K, 16] of their own type. Every
output is two running sums over even and odd inputs, in order, added at the end, whatever the number of tokens
in the tile (batch invariance).
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import word, words
from .activations import CHUNK
from .int8_tile import Tile
from .ir import F16, F32, I32, I64, Emitter, emit_tiles
from .isa import VNNI
from .l16 import GROUP_BYTES
from .vectors import ELEMENT_BYTES, literal, load_floats

DENSE = 0  # num_bits of a dense weight; its type is the storage kind


def _code_vectors(kernel: Tile, address: ir.Value, scale: ir.Value, zero: ir.Value) -> list[ir.Value]:
    """The 32 inputs of a group as fp32 vectors over the rows: (code - zero) * scale."""
    emit, builder, lanes = kernel.emit, kernel.builder, kernel.lanes
    vectors = []
    for (quad,) in kernel.codes(address, whole=True):
        words = builder.bitcast(quad, kernel.int_vector)
        for t in range(4):
            shifted = builder.lshr(words, emit.constant(I32, 8 * t, lanes)) if t else words
            code = builder.and_(shifted, emit.constant(I32, 255, lanes))
            value = builder.sitofp(code, kernel.float_vector)
            vectors.append(builder.fmul(builder.fsub(value, zero), scale))
    return vectors


@intrinsic(prefer_literal=True)
def _exact_tiles(
    typingctx: Any,
    isa: Any,
    num_bits: Any,
    kind: Any,
    asym: Any,
    args: Any,
    block: Any,
    begin: Any,
    count: Any,
) -> Any:
    """One block times ``count`` rows of fp32 x from ``begin`` on; args of the kernel. Groups of 32 inputs."""
    isa_, bits, code, has_zeros = (literal(t) for t in (isa, num_bits, kind, asym))
    block_bytes = 32 * 16 * ELEMENT_BYTES[code] if bits == DENSE else GROUP_BYTES[bits]

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, block, begin, count = arguments[4:]
        emit = Emitter(builder)
        w, ws, wz, x, ldx, _, y, ldy, groups, _, accumulate = words(emit, args, 11)
        at = builder.mul(block, groups)
        w = emit.offset(w, emit.scaled(at, block_bytes))
        ws, wz = (emit.offset(base, emit.scaled(at, 32)) for base in (ws, wz))
        y = emit.offset(y, emit.scaled(block, 64))
        for tokens, first in emit_tiles(builder, count, (6, 2) if isa_ == VNNI else (3,)):
            m = emit.scaled(builder.add(begin, first), 4)
            a, out = emit.offset(x, builder.mul(m, ldx)), emit.offset(y, builder.mul(m, ldy))
            kernel = Tile(builder, isa_, bits, tokens)
            for half in range(16 // kernel.lanes):
                rest = [w, ws, wz, a, ldx, out, ldy, groups, accumulate]
                _emit_exact(kernel, half, code, bool(has_zeros), rest)
        return context.get_dummy_value()

    return types.void(isa, num_bits, kind, asym, *([types.intp] * 4)), codegen


def _emit_exact(kernel: Tile, half: int, kind: int, asym: bool, arguments: list[ir.Value]) -> None:
    w, ws, wz, x, ldx, y, ldy, groups, accumulate = arguments
    builder, emit, tokens, lanes = kernel.builder, kernel.emit, kernel.tokens, kernel.lanes
    vector = kernel.float_vector
    zero = ir.Constant(vector, [0.0] * lanes)
    totals = {(m, p): cgutils.alloca_once_value(builder, zero) for m in range(tokens) for p in range(2)}
    for slot in totals.values():
        builder.store(zero, slot)
    with cgutils.for_range(builder, groups) as loop:
        g = loop.index
        if kernel.num_bits == DENSE:
            size = ELEMENT_BYTES[kind]
            base = emit.offset(w, emit.scaled(g, 32 * 16 * size), half * lanes * size)
            columns = [load_floats(emit, kind, lanes, emit.offset(base, 16 * size * k)) for k in range(32)]
        else:
            address = emit.offset(w, emit.scaled(g, GROUP_BYTES[kernel.num_bits]), 4 * lanes * half)
            per_row = [emit.scaled(g, 32), I64(2 * lanes * half)]
            halves = ir.VectorType(F16, lanes)
            scale = builder.fpext(emit.load(halves, emit.offset(ws, *per_row)), vector)
            if asym:
                zeros = builder.fpext(emit.load(halves, emit.offset(wz, *per_row)), vector)
            else:
                zeros = emit.constant(F32, float(2 ** (kernel.num_bits - 1)), lanes)
            columns = _code_vectors(kernel, address, scale, zeros)
        for m in range(tokens):
            row = emit.offset(x, emit.scaled(ldx, 4 * m), emit.scaled(g, 128))
            sums = [builder.load(totals[m, p]) for p in range(2)]
            for k, column in enumerate(columns):
                value = emit.splat(emit.load(F32, emit.offset(row, 4 * k), 4), lanes)
                sums[k % 2] = emit.fma(value, column, sums[k % 2])
            for p in range(2):
                builder.store(sums[p], totals[m, p])
    for m in range(tokens):
        address = emit.offset(y, emit.scaled(ldy, 4 * m), 4 * lanes * half)
        value = builder.fadd(builder.load(totals[m, 0]), builder.load(totals[m, 1]))
        emit.write_row(value, address, accumulate)


def exact_kernel(isa: int, num_bits: int, kind: int, asym: bool) -> Any:
    """The kernel for low-bit codes, or for dense values (``num_bits`` DENSE) of a storage kind.

    args: values, scales, zeros, x, ldx (floats), address of the number of tokens, y, ldy, groups, blocks,
    accumulate (0 or 1). Blocks of outputs are the unit of threads.
    """
    has_zeros = int(asym)  # a literal for ``_exact_tiles``

    def exact(args, thread, num_threads):
        tokens = word(word(args, 5), 0)
        blocks = word(args, 9)
        for begin in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - begin)
            for n in range(blocks * thread // num_threads, blocks * (thread + 1) // num_threads):
                _exact_tiles(isa, num_bits, kind, has_zeros, args, n, begin, count)

    return exact
