"""The inner kernel: 16 output rows x a few tokens, low-bit weights in L16 times int8 activations.

y[m, n] = sum over groups g of ws[n, g] * xs[m, g] * (sum_k codes[n, k] * x8[m, k] - z[n, g] * sum_k x8[m, k])

Each output is summed over the groups in ascending order whatever the number of tokens in the tile, and the
integer sums are exact: a token's result does not depend on its neighbours (batch invariance).
Activations come in tiles of ``tokens`` rows: x8 int32 [K / 4, tokens] (a quad of int8 each), xs fp32
[K / 32, tokens], sums int32 [K / 32, tokens] = -(sum of the group's int8) times 2**(num_bits - 1) for
symmetric weights, times 1 otherwise.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import words
from .ir import F16, F32, I8, I16, I32, I64, Emitter, emit_tiles
from .isa import AVX2, ROUNDED, TILES, VNNI
from .l16 import GROUP_BYTES
from .streams import emit_streams, prefetched_bytes, streams_of, strips, tiles_for
from .vectors import literal


class Tile:
    """Emits the pieces of a tile for one instruction set and bit width."""

    left: ir.Value | None = None  # tokens from the first on, if there may be one fewer than the tile has

    def __init__(self, builder: ir.IRBuilder, isa: int, num_bits: int, tokens: int) -> None:
        self.emit = Emitter(builder)
        self.builder = builder
        self.isa, self.num_bits, self.tokens = isa, num_bits, tokens
        self.lanes = 16 if isa == VNNI else 8  # output rows in a register
        self.int_vector = ir.VectorType(I32, self.lanes)
        self.float_vector = ir.VectorType(F32, self.lanes)
        self.byte_vector = ir.VectorType(I8, 4 * self.lanes)

    def passes(self) -> list[list[int]]:
        """The halves of the rows that are computed at once: as many as registers hold the sums of."""
        if self.isa == VNNI:
            return [[0]]
        # 8 bit has two sums for each output, see ``codes``.
        return [[0], [1]] if self.num_bits == 8 and self.tokens > 2 else [[0, 1]]

    def codes(self, address: ir.Value, whole: bool = False) -> Iterator[list[ir.Value]]:
        """The codes of the group's 8 quads as unsigned bytes; ``address`` includes the half's offset.

        8 bit on AVX2, unless ``whole``: low and high nibbles. pmaddubsw of 255 * 127 pairs would saturate.
        """
        emit = self.emit
        if self.num_bits == 8:
            for quad in range(8):
                vector = emit.load(self.byte_vector, emit.offset(address, 64 * quad))
                if whole or self.isa == VNNI:
                    yield [vector]
                else:
                    yield [self._field(vector, 0, 4), self._field(vector, 4, 4)]
            return
        if self.num_bits == 3:
            yield from self._codes_3(address)
            return
        per_byte = 8 // self.num_bits
        for quad in range(8):
            index, place = divmod(quad, per_byte)
            if place == 0:
                vector = emit.load(self.byte_vector, emit.offset(address, 64 * index))
            yield [self._field(vector, self.num_bits * place, self.num_bits)]

    def _codes_3(self, address: ir.Value) -> Iterator[list[ir.Value]]:
        """3 bit: quads 2 and 5 are split over two vectors."""
        vectors = [
            self.emit.load(self.byte_vector, self.emit.offset(address, 64 * index)) for index in range(3)
        ]
        for quad in range(8):
            index, place = divmod(quad, 3)
            if place < 2:
                yield [self._field(vectors[index], 3 * place, 3)]
            else:
                high = self.emit.masked(self.emit.shifted_bytes(vectors[2], 4 + index), 4)
                yield [self.builder.or_(self._field(vectors[index], 6, 2), high)]

    def _field(self, vector: ir.Value, start: int, width: int) -> ir.Value:
        """Bits [start, start + width) of each byte."""
        return self.emit.masked(self.emit.shifted_bytes(vector, start), (1 << width) - 1)

    def accumulate(self, sums: list[ir.Value], codes: list[ir.Value], x: ir.Value, quad: int) -> None:
        """Add codes * x; ``sums`` as ``total`` takes them."""
        if self.isa == VNNI:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
            slot = quad % len(sums)
            sums[slot] = self.emit.call(name, self.int_vector, [sums[slot], codes[0], x])
            return
        words = ir.VectorType(I16, 2 * self.lanes)
        for slot, code in enumerate(codes):
            # At most 8 * 2 * 15 * 127 = 30480: sixteen products of a group fit 16 bits.
            pairs = self.emit.call("llvm.x86.avx2.pmadd.ub.sw", words, [code, x])
            if slot == len(sums):
                sums.append(pairs)
            else:
                sums[slot] = opaque(self.builder, self.builder.add(sums[slot], pairs))

    def begin(self, start: ir.Value) -> list[ir.Value]:
        """Sums of nothing. One token has too few independent ones to hide vpdpbusd's latency: two each."""
        if self.isa == AVX2:
            return []
        return [start] if self.tokens > 2 else [start, ir.Constant(self.int_vector, [0] * self.lanes)]

    def per_row(self, base: ir.Value, g: ir.Value) -> ir.Value:
        """Scales or zero points of a group, as fp32."""
        address = self.emit.offset(base, self.emit.scaled(g, 32))
        return self.builder.fpext(self.emit.load(ir.VectorType(F16, self.lanes), address), self.float_vector)

    def total(self, sums: list[ir.Value], start: ir.Value) -> ir.Value:
        """One int32 per output row, exact."""
        if self.isa == VNNI:
            return sums[0] if len(sums) == 1 else self.builder.add(sums[0], sums[1])
        ones = self.emit.constant(I16, 1, 2 * self.lanes)
        name = "llvm.x86.avx2.pmadd.wd"
        total = [self.emit.call(name, self.int_vector, [value, ones]) for value in sums]
        if len(total) == 2:
            high = self.builder.shl(total[1], self.emit.constant(I32, 4, self.lanes))
            total[0] = self.builder.add(total[0], high)
        return self.builder.add(start, total[0])


def opaque(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The value (a vector or an address), of which LLVM then knows nothing. It costs no instruction.

    LLVM makes trees of long integer sums, whose leaves it then spills.
    """
    same = ir.FunctionType(value.type, [value.type])
    kind = "v" if isinstance(value.type, ir.VectorType) else "r"
    return builder.asm(same, "", f"={kind},0", [value], False)


@intrinsic(prefer_literal=True)
def int8_tiles(
    typingctx: Any,
    isa: Any,
    num_bits: Any,
    asym: Any,
    args: Any,
    first: Any,
    end: Any,
    begin: Any,
    count: Any,
) -> Any:
    """Blocks [first, end) of 16 rows times ``count`` rows of x8 from ``begin`` on.

    args: of ``int8_linear``.
    """
    isa_, bits, has_zeros = literal(isa), literal(num_bits), bool(literal(asym))

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        args, first, end, begin, count = arguments[3:]
        emit = Emitter(builder)
        linear = words(emit, args, 12)
        for counts, blocks in emit_streams(builder, count, (first, end), streams_of(isa_)):
            sizes, rounded = tiles_for(TILES[isa_], counts, ROUNDED[isa_]), ROUNDED[isa_]
            for tokens, number in emit_tiles(builder, count, sizes, rounded):
                kernel = Tile(builder, isa_, bits, tokens)
                if tokens in rounded:
                    kernel.left = builder.sub(count, number)
                emit_passes(kernel, linear, blocks, builder.add(begin, number), has_zeros)
        return context.get_dummy_value()

    return types.void(isa, num_bits, asym, *([types.intp] * 5)), codegen


@contextmanager
def _each_group(builder: ir.IRBuilder, groups: ir.Value) -> Iterator[ir.Value]:
    """The groups of a pass, one after the other."""
    with cgutils.for_range(builder, groups) as loop:
        yield loop.index


def emit_passes(
    kernel: Tile,
    args: list[ir.Value],
    blocks: list[ir.Value],
    first_token: ir.Value,
    asym: bool,
    each_group: Callable[[ir.IRBuilder, ir.Value], AbstractContextManager[ir.Value]] = _each_group,
) -> None:
    """The tile's tokens from ``first_token`` on times some blocks. args: the 12 of ``int8_linear``.

    each_group: a pass's loops over the groups in ascending order; other work may stand in them.
    """
    builder, emit = kernel.builder, kernel.emit
    w, ws, wz, x8, xs, sums, y, _, ldy, groups, _, accumulate = args
    codes, per_row = emit.scaled(groups, GROUP_BYTES[kernel.num_bits]), emit.scaled(groups, 32)
    at = builder.mul(first_token, groups)
    x = [emit.offset(base, emit.scaled(at, size)) for base, size in ((x8, 32), (xs, 4), (sums, 4))]
    out = emit.offset(y, emit.scaled(builder.mul(first_token, ldy), 4))
    arrays = ((w, codes, 4), (ws, per_row, 2), (wz, per_row, 2), (out, I64(64), 4))
    for halves in kernel.passes():
        rows = strips(emit, blocks, halves, kernel.lanes, arrays)
        _emit_pass(kernel, rows, len(blocks), asym, (*x, ldy, accumulate), each_group(builder, groups))


def _emit_pass(
    kernel: Tile,
    rows: list[list[ir.Value]],
    num_blocks: int,
    asym: bool,
    arguments: tuple[ir.Value, ...],
    each_group: AbstractContextManager[ir.Value],
) -> None:
    """rows: ``strips`` of codes, scales, zero points and outputs, of so many blocks."""
    x8, xs, sums, ldy, accumulate = arguments
    builder, emit, tokens, lanes = kernel.builder, kernel.emit, kernel.tokens, kernel.lanes
    nothing = ir.Constant(kernel.int_vector, [0] * lanes)
    totals = _totals(kernel, len(rows))
    with each_group as g:
        weights = [emit.offset(w, emit.scaled(g, GROUP_BYTES[kernel.num_bits])) for w, *_ in rows]
        for address in weights[:: len(rows) // num_blocks]:
            for line in range(0, GROUP_BYTES[kernel.num_bits], 64):
                emit.prefetch(emit.offset(address, prefetched_bytes(num_blocks) + line), keep=tokens > 1)
        x_group = emit.offset(x8, emit.scaled(g, 32 * tokens))
        per_token = emit.scaled(g, 4 * tokens)
        starts = [
            emit.splat(emit.load(I32, emit.offset(sums, per_token, 4 * m), 4), lanes) for m in range(tokens)
        ]
        dots = [[kernel.begin(nothing if asym else start) for _ in rows] for start in starts]
        # Quad by quad: a broadcast quad of activations serves all rows, and few codes are alive at a time.
        codes = [kernel.codes(address) for address in weights]
        for quad, of_rows in enumerate(zip(*codes, strict=True)):
            for m in range(tokens):
                x = emit.splat(emit.load(I32, emit.offset(x_group, (quad * tokens + m) * 4), 4), lanes)
                for dot, code in zip(dots[m], of_rows, strict=True):
                    kernel.accumulate(dot, code, builder.bitcast(x, kernel.byte_vector), quad)
        row_scales = [kernel.per_row(ws, g) for _, ws, _, _ in rows]
        zeros = [kernel.per_row(wz, g) for _, _, wz, _ in rows] if asym else []
        for m, start in enumerate(starts):
            scale = emit.splat(emit.load(F32, emit.offset(xs, per_token, 4 * m), 4), lanes)
            for i, row_scale in enumerate(row_scales):
                value = kernel.total(dots[m][i], nothing if asym else start)
                value = builder.sitofp(value, kernel.float_vector)
                if asym:
                    value = emit.fma(zeros[i], builder.sitofp(start, kernel.float_vector), value)
                total = emit.fma(builder.fmul(row_scale, scale), value, builder.load(totals[m][i]))
                builder.store(total, totals[m][i])
    for m in range(tokens):
        is_sure = kernel.left is None or m + 1 < tokens
        with nullcontext() if is_sure else builder.if_then(builder.icmp_signed("<", I64(m), kernel.left)):
            for (*_, y), slot in zip(rows, totals[m], strict=True):
                emit.write_row(builder.load(slot), emit.offset(y, emit.scaled(ldy, 4 * m)), accumulate)


def _totals(kernel: Tile, rows: int) -> list[list[ir.Value]]:
    """Pointers to the sums over groups, zeroed, by token and rows of a register.

    AVX2's 16 registers hold the sums within a group, these are in memory. Left to itself LLVM spills the
    wrong ones (four tokens: 120 GOP/s instead of 245).
    """
    builder, count = kernel.builder, kernel.tokens * rows
    if kernel.isa == VNNI:
        pointers = [cgutils.alloca_once(builder, kernel.float_vector) for _ in range(count)]
    else:
        memory = cgutils.alloca_once(builder, ir.ArrayType(kernel.float_vector, count))
        memory.align = 4 * kernel.lanes
        address = opaque(builder, builder.ptrtoint(memory, I64))
        kind = ir.PointerType(kernel.float_vector)
        places = [kernel.emit.offset(address, 4 * kernel.lanes * i) for i in range(count)]
        pointers = [builder.inttoptr(place, kind) for place in places]
    for pointer in pointers:
        builder.store(kernel.emit.constant(F32, 0.0, kernel.lanes), pointer)
    return [pointers[m * rows : (m + 1) * rows] for m in range(kernel.tokens)]
