"""Low-bit weights in L16 times bf16 activations, by AVX512-BF16: for CPUs that have it and models int8 hurts.

y[m, n] = sum over g of ws[n, g] * (sum_k (base + codes[n, k]) * x16[m, k] - (base + z[n, g]) * X[m, g])

X is the sum of the group's x16. Codes meet vdpbf16ps exactly: only activations are rounded, each by at most
2**-8 of itself. A bf16 has 8 significant bits, so base + code, with base 2**num_bits, is the bits of base or
the code shifted to their end: two instructions for 32 codes. 8-bit codes are converted instead (base 0).

Sums are fp32, within a group over pairs of inputs in one order, and groups are added in ascending order,
whatever the number of tokens in the tile (batch invariance).

A lane of L16 has the bytes of inputs 4q .. 4q + 3 of its row: as 16-bit halves, the even bytes are one pair
(4q, 4q + 2), the odd ones the other. Activations come in tiles of ``tokens`` rows: pairs of bf16 in that
order [K / 2, tokens] and fp32 [K / 32, tokens] -X times base + 2**(num_bits - 1) for symmetric weights, times
1 otherwise.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import isa
from .abi import word, words
from .activations import CHUNK
from .ir import BF16, F16, F32, I16, I32, I64, Emitter, emit_tiles
from .l16 import GROUP_BYTES
from .streams import FEW_TOKENS, emit_streams, prefetched_bytes, strips, tiles_for
from .vectors import literal

TILES = isa.TILES[isa.VNNI]
_BYTES, _HALVES = ir.VectorType(I32, 16), ir.VectorType(I16, 32)
_FLOATS, _PAIRS = ir.VectorType(F32, 16), ir.VectorType(BF16, 32)


def base(num_bits: int) -> int:
    """What is added to codes of ``num_bits``."""
    return 0 if num_bits == 8 else 2**num_bits


def _code_pairs(emit: Emitter, num_bits: int, address: ir.Value) -> list[ir.Value]:
    """base + the codes of a group, 16 vectors of bf16 pairs in the order of the activations' pairs."""
    builder = emit.builder
    if num_bits == 8:
        return [pair for quad in range(8) for pair in _converted(emit, emit.offset(address, 64 * quad))]
    vectors = [emit.load(_HALVES, emit.offset(address, 64 * j)) for j in range(num_bits)]
    magic = emit.constant(I16, (127 + num_bits) << 7, 32)
    lowest = 7 - num_bits  # where a code begins in the 7 bits of the mantissa

    def field(vector: ir.Value, start: int, width: int, place: int) -> ir.Value:
        """Bits [start, start + width) of each half, moved to ``place``."""
        distance = emit.constant(I16, abs(start - place), 32)
        moved = builder.lshr(vector, distance) if start > place else builder.shl(vector, distance)
        return builder.and_(moved, emit.constant(I16, (2**width - 1) << place, 32))

    def code(quad: int, odd: int) -> ir.Value:
        """Where ``l16`` keeps it."""
        index, place = divmod(quad, 3 if num_bits == 3 else 8 // num_bits)
        if num_bits != 3 or place < 2:
            return field(vectors[index], 8 * odd + num_bits * place, num_bits, lowest)
        low = field(vectors[index], 8 * odd + 6, 2, lowest)
        return builder.or_(low, field(vectors[2], 8 * odd + 6 + index, 1, lowest + 2))

    return [
        builder.bitcast(builder.or_(code(quad, odd), magic), _PAIRS) for quad in range(8) for odd in range(2)
    ]


def _converted(emit: Emitter, address: ir.Value) -> list[ir.Value]:
    """The two pairs of a quad of 8-bit codes. Integers up to 255 end in 16 zero bits as fp32."""
    builder = emit.builder
    words = emit.load(_BYTES, address)
    floats = []
    for t in range(4):
        shifted = builder.lshr(words, emit.constant(I32, 8 * t, 16)) if t else words
        code = builder.and_(shifted, emit.constant(I32, 255, 16))
        floats.append(builder.bitcast(builder.sitofp(code, _FLOATS), _BYTES))
    low = [builder.lshr(even, emit.constant(I32, 16, 16)) for even in floats[:2]]
    return [builder.bitcast(builder.or_(a, b), _PAIRS) for a, b in zip(low, floats[2:], strict=True)]


@intrinsic(prefer_literal=True)
def _tiles(
    typingctx: Any, num_bits: Any, asym: Any, args: Any, first: Any, end: Any, begin: Any, count: Any
) -> Any:
    """Blocks [first, end) of 16 rows times ``count`` rows of x16 from ``begin`` on; args of the kernel."""
    bits, has_zeros = literal(num_bits), bool(literal(asym))

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, first, end, begin, count = arguments[2:]
        emit = Emitter(builder)
        w, ws, wz, x16, sums, y, _, ldy, groups, _, accumulate = words(emit, args, 11)
        codes, per_row = emit.scaled(groups, GROUP_BYTES[bits]), emit.scaled(groups, 32)
        for counts, blocks in emit_streams(builder, count, (first, end), FEW_TOKENS):
            for tokens, number in emit_tiles(builder, count, tiles_for(TILES, counts)):
                m = builder.add(begin, number)
                at = builder.mul(m, groups)
                x = [emit.offset(base, emit.scaled(at, size)) for base, size in ((x16, 64), (sums, 4))]
                out = emit.offset(y, emit.scaled(builder.mul(m, ldy), 4))
                arrays = ((w, codes, 4), (ws, per_row, 2), (wz, per_row, 2), (out, I64(64), 4))
                rows = strips(emit, blocks, [0], 16, arrays)
                _emit_tile(emit, (bits, tokens, has_zeros), rows, [*x, ldy, groups, accumulate])
        return context.get_dummy_value()

    return types.void(num_bits, asym, *([types.intp] * 5)), codegen


def _emit_tile(
    emit: Emitter, traits: tuple[int, int, bool], rows: list[list[ir.Value]], arguments: list[ir.Value]
) -> None:
    """A few blocks times a tile of tokens into y; traits: bits, tokens, whether there are zero points.

    rows: ``strips`` of codes, scales, zero points and outputs.
    """
    (bits, count, has_zeros), builder = traits, emit.builder
    x16, sums, ldy, groups, accumulate = arguments
    totals = emit.running_sums(_FLOATS, len(rows), count)
    with cgutils.for_range(builder, groups) as loop:
        g = loop.index
        addresses = [emit.offset(w, emit.scaled(g, GROUP_BYTES[bits])) for w, *_ in rows]
        for address in addresses:
            for line in range(0, GROUP_BYTES[bits], 64):
                emit.prefetch(emit.offset(address, prefetched_bytes(len(rows)) + line))
        pairs_of_x = emit.offset(x16, emit.scaled(g, 64 * count))
        starts = [
            emit.splat(emit.load(F32, emit.offset(sums, emit.scaled(g, 4 * count), 4 * m), 4), 16)
            for m in range(count)
        ]
        for codes, (_, ws, wz, _), slots in zip(addresses, rows, totals, strict=True):
            dots = list(starts)
            if has_zeros:
                zeros = builder.fadd(_per_row(emit, wz, g), emit.constant(F32, float(base(bits)), 16))
                dots = [builder.fmul(zeros, start) for start in starts]
            for index, pair in enumerate(_code_pairs(emit, bits, codes)):
                for m in range(count):
                    x = emit.load(I32, emit.offset(pairs_of_x, 4 * (index * count + m)), 4)
                    operands = [dots[m], pair, builder.bitcast(emit.splat(x, 16), _PAIRS)]
                    dots[m] = emit.call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, operands)
            scale = _per_row(emit, ws, g)
            for total, dot in zip(slots, dots, strict=True):
                builder.store(emit.fma(scale, dot, builder.load(total)), total)
    for (*_, y), slots in zip(rows, totals, strict=True):
        for m, slot in enumerate(slots):
            emit.write_row(builder.load(slot), emit.offset(y, emit.scaled(ldy, 4 * m)), accumulate)


def _per_row(emit: Emitter, values: ir.Value, group: ir.Value) -> ir.Value:
    """A group's 16 scales or zero points as fp32."""
    address = emit.offset(values, emit.scaled(group, 32))
    return emit.builder.fpext(emit.load(ir.VectorType(F16, 16), address), _FLOATS)


def bf16_kernel(num_bits: int, asym: bool) -> Any:
    """The kernel for a bit width. Blocks of outputs are the unit of threads.

    args: codes, scales, zeros, x16, sums, y, address of the number of tokens, ldy (floats), groups, blocks,
    accumulate (0 or 1). Activations as ``activations.quantize_kernel`` writes them (``PAIRS``).
    """
    has_zeros = int(asym)  # a literal for ``_tiles``

    def bf16_linear(args, thread, num_threads):
        tokens = word(word(args, 6), 0)
        blocks = word(args, 9)
        first, end = blocks * thread // num_threads, blocks * (thread + 1) // num_threads
        for begin in range(0, tokens, CHUNK):
            _tiles(num_bits, has_zeros, args, first, end, begin, min(CHUNK, tokens - begin))

    return bf16_linear
