"""int4 weights with 2:4 sparsity times int8 activations, for any number of tokens.

Of every four consecutive inputs at most two codes differ from zero; those two are kept, 4 bits each, with
2-bit positions: three quarters of the dense bytes. Blocks of 16 rows x groups of 32 inputs as in L16; an
*octet* j (0..3) is eight inputs, two quads, of which four codes are kept: one lane of an int8 dot product,
which needs the same four of eight activations. A byte shuffle within 16-byte lanes selects them.

vector  byte 4 * r + t (row r of 16; t 0, 1: kept of the octet's first quad, t 2, 3: of its second)
0, 1    codes of octet 0 (low nibble) and 1 (high), of octets 2 and 3
2       positions in the quad, octet j at bits 2j and 2j + 1

Activations are stored as x8 + 128, because the dot product takes unsigned times signed: 128 * (sum of the
kept weights) is taken off, once a group for all tokens. The integers, the order of the groups and thus every
bit of the result are those of ``int8_tile`` over the same weights.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from .abi import word, words
from .activations import CHUNK
from .ir import F16, F32, I8, I16, I32, I64, Emitter, emit_tiles
from .isa import TILES, VNNI
from .l16 import GROUP, ROWS
from .streams import FEW_TOKENS, emit_streams, prefetched_bytes, strips, tiles_for
from .vectors import literal

GROUP_BYTES_24 = 192
ZERO = 8  # the code of a weight that is zero
_OCTETS = 4


def _kept_positions() -> NDArray[np.uint8]:
    """[256, 4]: for an octet's codes that are not zero (bit i: input i), the positions kept in its quads."""
    quad = []
    for mask in range(16):
        kept = [i for i in range(4) if mask >> i & 1]
        kept += [i for i in range(4) if i not in kept]
        quad.append(sorted(kept[:2]))
    return np.array([quad[mask & 15] + quad[mask >> 4] for mask in range(256)], np.uint8)


def pack_24(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes [N, K] (N % 16 == 0, K % 32 == 0) with at most two of four not ZERO, to [N / 16, K / 32, 192]."""
    rows, cols = codes.shape
    masks = np.packbits(codes != ZERO, axis=1, bitorder="little")
    positions = _kept_positions()[masks]  # [N, K / 8, 4]
    octets = codes.reshape(rows, cols // 8, 8)
    kept = np.take_along_axis(octets, positions + np.array([0, 0, 4, 4], np.uint8), axis=2)
    assert np.count_nonzero(kept != ZERO) == np.count_nonzero(codes != ZERO), "more than two of four"
    shape = (rows // ROWS, ROWS, cols // GROUP, _OCTETS, 4)
    values = kept.reshape(shape).transpose(0, 2, 3, 1, 4)  # block, group, octet, row, t
    places = positions.reshape(shape).transpose(0, 2, 3, 1, 4)
    plane = places[:, :, 0] | places[:, :, 1] << 2 | places[:, :, 2] << 4 | places[:, :, 3] << 6
    packed = np.concatenate([values[:, :, 0::2] | values[:, :, 1::2] << 4, plane[:, :, None]], axis=2)
    return np.ascontiguousarray(packed).reshape(rows // ROWS, cols // GROUP, GROUP_BYTES_24)


class _Tile:
    """Emits one tile: 16 rows x ``tokens`` for one instruction set."""

    def __init__(self, builder: ir.IRBuilder, isa: int, tokens: int) -> None:
        self.emit, self.builder = Emitter(builder), builder
        self.isa, self.tokens = isa, tokens
        self.lanes = 16 if isa == VNNI else 8
        self.ints, self.floats = ir.VectorType(I32, self.lanes), ir.VectorType(F32, self.lanes)
        self.bytes = ir.VectorType(I8, 4 * self.lanes)
        self.words = ir.VectorType(I16, 2 * self.lanes)

    @property
    def unit(self) -> float:
        """What a weight of 1 is as a byte: VNNI leaves it in the high nibble, one operation less a vector."""
        return 16.0 if self.isa == VNNI else 1.0

    def weights(self, address: ir.Value) -> list[ir.Value]:
        """The kept weights of the four octets times ``unit``, signed bytes."""
        emit, builder = self.emit, self.builder
        lanes = 4 * self.lanes
        out = []
        for octet in range(_OCTETS):
            vector = emit.load(self.bytes, emit.offset(address, 64 * (octet // 2)))
            if self.isa == VNNI:
                high = vector if octet % 2 else emit.shifted_bytes(vector, -4)
                out.append(builder.xor(emit.masked(high, 0xF0), emit.constant(I8, 0x80, lanes)))
            else:
                low = emit.masked(emit.shifted_bytes(vector, 4 * (octet % 2)), 15)
                out.append(builder.sub(low, emit.constant(I8, ZERO, lanes)))
        return out

    def selectors(self, address: ir.Value) -> list[ir.Value]:
        """Per octet, for every byte of ``weights`` the activation of the octet that it meets."""
        plane = self.emit.load(self.bytes, self.emit.offset(address, 128))
        base = self.builder.bitcast(self.emit.constant(I32, 0x04040000, self.lanes), self.bytes)
        shifted = [self.emit.shifted_bytes(plane, 2 * octet) for octet in range(_OCTETS)]
        return [self.builder.or_(self.emit.masked(s, 3), base) for s in shifted]

    def start(self, weights: list[ir.Value]) -> ir.Value:
        """Minus 128 times the sum of the kept weights: what storing x8 + 128 adds."""
        offset = self.emit.constant(I8, 128, 4 * self.lanes)
        total = self.emit.constant(*((I32, 0, self.lanes) if self.isa == VNNI else (I16, 0, 2 * self.lanes)))
        nothing = total
        for weight in weights:
            total = self._accumulate(total, offset, weight)
        return self.builder.sub(nothing, total)

    def dot(self, start: ir.Value, weights: list[ir.Value], chosen: list[ir.Value]) -> ir.Value:
        """The integer sums of a group, times ``unit``, from ``start``."""
        total = start
        for weight, activations in zip(weights, chosen, strict=True):
            total = self._accumulate(total, activations, weight)
        if self.isa == VNNI:
            return total
        ones = self.emit.constant(I16, 1, 2 * self.lanes)
        return self.emit.call("llvm.x86.avx2.pmadd.wd", self.ints, [total, ones])

    def _accumulate(self, total: ir.Value, activations: ir.Value, weight: ir.Value) -> ir.Value:
        if self.isa == VNNI:
            return self.emit.call(
                f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}", self.ints, [total, activations, weight]
            )
        # At most 4 * 2 * 255 * 8 = 16320 from a start of at most 8192: fits 16 bits.
        pairs = self.emit.call("llvm.x86.avx2.pmadd.ub.sw", self.words, [activations, weight])
        return self.builder.add(total, pairs)

    def select(self, address: ir.Value, selector: ir.Value) -> ir.Value:
        """The octet of activations at an address, shuffled."""
        octet = self.emit.splat(self.emit.load(I64, address, 8), self.lanes // 2)
        name = "llvm.x86.avx512.pshuf.b.512" if self.isa == VNNI else "llvm.x86.avx2.pshuf.b"
        return self.emit.call(name, self.bytes, [self.builder.bitcast(octet, self.bytes), selector])


@intrinsic(prefer_literal=True)
def _tiles_24(typingctx: Any, isa: Any, args: Any, first: Any, end: Any, begin: Any, count: Any) -> Any:
    """Blocks [first, end) of 16 rows times ``count`` rows of x8 from ``begin`` on; args of the kernel."""
    isa_ = literal(isa)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, first, end, begin, count = arguments[1:]
        emit = Emitter(builder)
        w, ws, x8, xs, y, _, ldy, groups, _, accumulate = words(emit, args, 10)
        codes, per_row = emit.scaled(groups, GROUP_BYTES_24), emit.scaled(groups, 32)
        for counts, blocks in emit_streams(builder, count, (first, end), FEW_TOKENS):
            for tokens, number in emit_tiles(builder, count, tiles_for(TILES[isa_], counts)):
                m = builder.add(begin, number)
                at = builder.mul(m, groups)
                x = [emit.offset(base, emit.scaled(at, size)) for base, size in ((x8, 32), (xs, 4))]
                out = emit.offset(y, emit.scaled(builder.mul(m, ldy), 4))
                kernel = _Tile(builder, isa_, tokens)
                arrays = ((w, codes, 4), (ws, per_row, 2), (out, I64(64), 4))
                halves = list(range(16 // kernel.lanes))
                for part in [halves] if tokens == 1 else [[half] for half in halves]:
                    rows = strips(emit, blocks, part, kernel.lanes, arrays)
                    _emit_pass(kernel, rows, len(blocks), [*x, ldy, groups, accumulate])
        return context.get_dummy_value()

    return types.void(isa, *([types.intp] * 5)), codegen


def _emit_pass(kernel: _Tile, rows: list[list[ir.Value]], num_blocks: int, arguments: list[ir.Value]) -> None:
    """rows: ``strips`` of codes, scales and outputs, of so many blocks."""
    x8, xs, ldy, groups, accumulate = arguments
    builder, emit, tokens, lanes = kernel.builder, kernel.emit, kernel.tokens, kernel.lanes
    totals = emit.running_sums(kernel.floats, len(rows), tokens)
    with cgutils.for_range(builder, groups) as loop:
        g = loop.index
        codes = [emit.offset(w, emit.scaled(g, GROUP_BYTES_24)) for w, *_ in rows]
        for address in codes[:: len(rows) // num_blocks]:
            for line in range(0, GROUP_BYTES_24, 64):
                emit.prefetch(emit.offset(address, prefetched_bytes(num_blocks) + line), keep=tokens > 1)
        x_group = emit.offset(x8, emit.scaled(g, 32 * tokens))
        for at, (_, ws, _), slots in zip(codes, rows, totals, strict=True):
            weights, selectors = kernel.weights(at), kernel.selectors(at)
            start = kernel.start(weights)
            scales = emit.load(ir.VectorType(F16, lanes), emit.offset(ws, emit.scaled(g, 32)))
            row_scale = builder.fpext(scales, kernel.floats)
            row_scale = builder.fmul(row_scale, emit.constant(F32, 1 / kernel.unit, lanes))
            for m, slot in enumerate(slots):
                chosen = [
                    kernel.select(emit.offset(x_group, (octet * tokens + m) * 8), selector)
                    for octet, selector in enumerate(selectors)
                ]
                value = builder.sitofp(kernel.dot(start, weights, chosen), kernel.floats)
                scale = emit.splat(
                    emit.load(F32, emit.offset(xs, emit.scaled(g, 4 * tokens), 4 * m), 4), lanes
                )
                factor = builder.fmul(row_scale, scale)
                builder.store(emit.fma(factor, value, builder.load(slot)), slot)
    for (*_, y), slots in zip(rows, totals, strict=True):
        for m, slot in enumerate(slots):
            emit.write_row(builder.load(slot), emit.offset(y, emit.scaled(ldy, 4 * m)), accumulate)


def kernel_24(isa: int) -> Any:
    """The kernel. Blocks of outputs are the unit of threads.

    args: codes, scales, x8 (+ 128, in octets), xs, y, address of the number of tokens, ldy (floats), groups,
    blocks, accumulate (0 or 1).
    """

    def int4_24(args, thread, num_threads):
        tokens = word(word(args, 5), 0)
        blocks = word(args, 8)
        first, end = blocks * thread // num_threads, blocks * (thread + 1) // num_threads
        for begin in range(0, tokens, CHUNK):
            _tiles_24(isa, args, first, end, begin, min(CHUNK, tokens - begin))

    return int4_24
