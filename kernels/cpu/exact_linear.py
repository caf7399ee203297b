"""Linears with fp32 activations: the exact mode of low-bit weights, and dense fp16, bf16 and fp32 weights.

A block is 16 output rows. Low-bit weights are in L16; dense ones are [N / 16, K, 16] of their own type. Every
output is two running sums over even and odd inputs, in order, added at the end, whatever the number of tokens
in the tile (batch invariance).
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import word
from .activations import CHUNK
from .int8_tile import VNNI, _Tile
from .ir import F16, F32, I32, I64
from .l16 import GROUP_BYTES
from .vectors import ELEMENT_BYTES, literal, load_floats

DENSE = 0  # num_bits of a dense weight; its type is the storage kind


def _code_vectors(kernel: _Tile, address: ir.Value, scale: ir.Value, zero: ir.Value) -> list[ir.Value]:
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
def exact_tile(
    typingctx: Any,
    isa: Any,
    num_bits: Any,
    kind: Any,
    tokens: Any,
    asym: Any,
    w: Any,
    ws: Any,
    wz: Any,
    x: Any,
    ldx: Any,
    y: Any,
    ldy: Any,
    groups: Any,
    accumulate: Any,
) -> Any:
    """One block times ``tokens`` rows of fp32 x (row stride ldx) into y. Groups of 32 inputs."""
    isa_, bits, code, count, has_zeros = (literal(t) for t in (isa, num_bits, kind, tokens, asym))
    signature = types.void(isa, num_bits, kind, tokens, asym, *([types.intp] * 9))

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        kernel = _Tile(builder, isa_, bits, count)
        for half in range(16 // kernel.lanes):
            _emit_exact(kernel, half, code, bool(has_zeros), arguments[5:])
        return context.get_dummy_value()

    return signature, codegen


def _emit_exact(kernel: _Tile, half: int, kind: int, asym: bool, arguments: list[ir.Value]) -> None:
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
        with builder.if_else(builder.icmp_signed("!=", accumulate, I64(0))) as (then, otherwise):
            with then:
                emit.store(builder.fadd(value, emit.load(vector, address, 4)), address, 4)
            with otherwise:
                emit.store(value, address, 4)


def exact_kernel(isa: int, num_bits: int, kind: int, asym: bool) -> Any:
    """The kernel for low-bit codes, or for dense values (``num_bits`` DENSE) of a storage kind.

    args: values, scales, zeros, x, ldx (floats), address of the number of tokens, y, ldy, groups, blocks,
    accumulate (0 or 1). Blocks of outputs are the unit of threads.
    """
    big, small = (6, 2) if isa == VNNI else (3, 1)
    zp = int(asym)  # a literal for ``exact_tile``
    block_bytes = 32 * 16 * ELEMENT_BYTES[kind] if num_bits == DENSE else GROUP_BYTES[num_bits]

    @njit(nogil=True, error_model="numpy")
    def block(w, ws, wz, x, ldx, count, y, ldy, groups, accumulate):
        m = 0
        while m < count:
            a = x + m * ldx * 4
            out = y + m * ldy * 4
            if m + big <= count:
                exact_tile(isa, num_bits, kind, big, zp, w, ws, wz, a, ldx, out, ldy, groups, accumulate)
                m += big
            elif m + small <= count:
                exact_tile(isa, num_bits, kind, small, zp, w, ws, wz, a, ldx, out, ldy, groups, accumulate)
                m += small
            else:
                exact_tile(isa, num_bits, kind, 1, zp, w, ws, wz, a, ldx, out, ldy, groups, accumulate)
                m += 1

    def exact(args, thread, num_threads):
        values = word(args, 0)
        scales = word(args, 1)
        zeros = word(args, 2)
        x = word(args, 3)
        ldx = word(args, 4)
        tokens = word(word(args, 5), 0)
        y = word(args, 6)
        ldy = word(args, 7)
        groups = word(args, 8)
        blocks = word(args, 9)
        accumulate = word(args, 10)
        for m in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - m)
            for n in range(blocks * thread // num_threads, blocks * (thread + 1) // num_threads):
                w = values + n * groups * block_bytes
                ws = scales + n * groups * 32
                wz = zeros + n * groups * 32
                out = y + (m * ldy + n * 16) * 4
                block(w, ws, wz, x + m * ldx * 4, ldx, count, out, ldy, groups, accumulate)

    return exact
