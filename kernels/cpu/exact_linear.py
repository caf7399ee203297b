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
from .ir import F32, I32, I64, Emitter, emit_tiles
from .isa import AVX2, VNNI
from .l16 import GROUP_BYTES
from .streams import emit_streams, prefetched_bytes, strips, tiles_for
from .vectors import ELEMENT_BYTES, literal, load_floats

_TILES = {AVX2: (3,), VNNI: (6, 2)}  # of tokens
_LEVELS = ((1, 4),)  # of ``emit_streams``
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
    first: Any,
    end: Any,
    begin: Any,
    count: Any,
) -> Any:
    """Blocks [first, end) times ``count`` rows of fp32 x from ``begin`` on; args of the kernel.

    Groups of 32 inputs.
    """
    isa_, bits, code, has_zeros = (literal(t) for t in (isa, num_bits, kind, asym))
    block_bytes = 32 * 16 * ELEMENT_BYTES[code] if bits == DENSE else GROUP_BYTES[bits]

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, first, end, begin, count = arguments[4:]
        emit = Emitter(builder)
        w, ws, wz, x, ldx, _, y, ldy, groups, _, accumulate = words(emit, args, 11)
        values, per_row = emit.scaled(groups, block_bytes), emit.scaled(groups, 32)
        row_bytes = ELEMENT_BYTES[code] if bits == DENSE else 4
        for counts, blocks in emit_streams(builder, count, (first, end), _LEVELS):
            for tokens, number in emit_tiles(builder, count, tiles_for(_TILES[isa_], counts)):
                m = emit.scaled(builder.add(begin, number), 4)
                a, out = emit.offset(x, builder.mul(m, ldx)), emit.offset(y, builder.mul(m, ldy))
                kernel = Tile(builder, isa_, bits, tokens)
                arrays = ((w, values, row_bytes), (ws, per_row, 2), (wz, per_row, 2), (out, I64(64), 4))
                halves = range(16 // kernel.lanes)
                for part in [halves] if len(blocks) > 1 else [[half] for half in halves]:
                    rows = strips(emit, blocks, part, kernel.lanes, arrays)
                    rest = [a, ldx, ldy, groups, accumulate]
                    _emit_exact(kernel, (rows, len(blocks)), (code, block_bytes, bool(has_zeros)), rest)
        return context.get_dummy_value()

    return types.void(isa, num_bits, kind, asym, *([types.intp] * 5)), codegen


def _emit_exact(
    kernel: Tile,
    where: tuple[list[list[ir.Value]], int],
    traits: tuple[int, int, bool],
    arguments: list[ir.Value],
) -> None:
    """where: ``strips`` of values, scales, zero points and outputs, and of how many blocks.

    traits: storage kind, bytes of a block's group, whether there are zero points.
    """
    (rows, num_blocks), (kind, group_bytes, asym) = where, traits
    x, ldx, ldy, groups, accumulate = arguments
    builder, emit, tokens = kernel.builder, kernel.emit, kernel.tokens
    totals = emit.running_sums(kernel.float_vector, len(rows), tokens, 2)
    with cgutils.for_range(builder, groups) as loop:
        g = loop.index
        addresses = [emit.offset(w, emit.scaled(g, group_bytes)) for w, *_ in rows]
        for address in addresses[:: len(rows) // num_blocks]:
            for line in range(0, group_bytes, 64):
                emit.prefetch(emit.offset(address, prefetched_bytes(num_blocks) + line))
        for address, (_, ws, wz, _), slots in zip(addresses, rows, totals, strict=True):
            if kernel.num_bits == DENSE:
                size = 16 * ELEMENT_BYTES[kind]
                columns = [
                    load_floats(emit, kind, kernel.lanes, emit.offset(address, size * k)) for k in range(32)
                ]
            else:
                middle = float(2 ** (kernel.num_bits - 1))
                zeros = kernel.per_row(wz, g) if asym else emit.constant(F32, middle, kernel.lanes)
                columns = _code_vectors(kernel, address, kernel.per_row(ws, g), zeros)
            for m in range(tokens):
                row = emit.offset(x, emit.scaled(ldx, 4 * m), emit.scaled(g, 128))
                sums = [builder.load(slot) for slot in slots[m]]
                for k, column in enumerate(columns):
                    value = emit.splat(emit.load(F32, emit.offset(row, 4 * k), 4), kernel.lanes)
                    sums[k % 2] = emit.fma(value, column, sums[k % 2])
                for total, slot in zip(sums, slots[m], strict=True):
                    builder.store(total, slot)
    for (*_, y), slots in zip(rows, totals, strict=True):
        for m, (even, odd) in enumerate(slots):
            value = builder.fadd(builder.load(even), builder.load(odd))
            emit.write_row(value, emit.offset(y, emit.scaled(ldy, 4 * m)), accumulate)


def exact_kernel(isa: int, num_bits: int, kind: int, asym: bool) -> Any:
    """The kernel for low-bit codes, or for dense values (``num_bits`` DENSE) of a storage kind.

    args: values, scales, zeros, x, ldx (floats), address of the number of tokens, y, ldy, groups, blocks,
    accumulate (0 or 1). Blocks of outputs are the unit of threads.
    """
    has_zeros = int(asym)  # a literal for ``_exact_tiles``

    def exact(args, thread, num_threads):
        tokens = word(word(args, 5), 0)
        blocks = word(args, 9)
        first, end = blocks * thread // num_threads, blocks * (thread + 1) // num_threads
        for begin in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - begin)
            _exact_tiles(isa, num_bits, kind, has_zeros, args, first, end, begin, count)

    return exact
