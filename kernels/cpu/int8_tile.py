"""The inner kernel: 16 output rows x a few tokens, low-bit weights in L16 times int8 activations.

y[m, n] = sum over groups g of ws[n, g] * xs[m, g] * (sum_k codes[n, k] * x8[m, k] - z[n, g] * sum_k x8[m, k])

Each output is summed over the groups in ascending order whatever the number of tokens in the tile, and the
integer sums are exact: a token's result does not depend on its neighbours (batch invariance).
Activations come in tiles of ``tokens`` rows: x8 int32 [K / 4, tokens] (a quad of int8 each), xs fp32
[K / 32, tokens], sums int32 [K / 32, tokens] = -(sum of the group's int8) times 2**(num_bits - 1) for
symmetric weights, times 1 otherwise.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir import F16, F32, I8, I16, I32, I64, Emitter
from .l16 import GROUP_BYTES

AVX2, VNNI = 0, 1
# Ahead of the read: the hardware's own prefetcher stops at 4 KiB pages. Measured at one token, 2048 is 8 %
# (int4) to 20 % (int2, 2:4) slower and 12288 no faster.
PREFETCH_BYTES = 6144


class _Tile:
    """Emits one tile for one instruction set and bit width."""

    def __init__(self, builder: ir.IRBuilder, isa: int, num_bits: int, tokens: int) -> None:
        self.emit = Emitter(builder)
        self.builder = builder
        self.isa, self.num_bits, self.tokens = isa, num_bits, tokens
        self.lanes = 16 if isa == VNNI else 8  # output rows in a register
        self.int_vector = ir.VectorType(I32, self.lanes)
        self.float_vector = ir.VectorType(F32, self.lanes)
        self.byte_vector = ir.VectorType(I8, 4 * self.lanes)

    def quads(self, address: ir.Value) -> list[ir.Value]:
        """The codes of the group's 8 quads as unsigned bytes; ``address`` includes the half's offset."""
        emit = self.emit
        if self.num_bits == 8:
            return [emit.load(self.byte_vector, emit.offset(address, 64 * j)) for j in range(8)]
        bits = 2 if self.num_bits == 3 else self.num_bits
        per_byte = 8 // bits
        vectors = [emit.load(self.byte_vector, emit.offset(address, 64 * j)) for j in range(8 // per_byte)]
        mask = (1 << bits) - 1
        low = [emit.masked(emit.shifted_bytes(v, bits * i), mask) for v in vectors for i in range(per_byte)]
        if self.num_bits != 3:
            return low
        plane = emit.load(self.byte_vector, emit.offset(address, 128))
        high = [emit.masked(emit.shifted_bytes(plane, quad - 2), 4) for quad in range(8)]
        return [self.builder.or_(a, b) for a, b in zip(low, high, strict=True)]

    def dot(self, quads: list[ir.Value], activations: list[ir.Value], start: ir.Value) -> ir.Value:
        """start + sum over the 8 quads of codes * activations, per output row; exact_linear."""
        if self.isa == VNNI:
            return self._dot_vnni(quads, activations, start)
        if self.num_bits == 8:
            # A byte is 16 * high + low: pmaddubsw of 255 * 127 pairs would saturate, nibbles cannot.
            low = self._dot_avx2([self.emit.masked(q, 15) for q in quads], activations)
            high = self._dot_avx2(
                [self.emit.masked(self.emit.shifted_bytes(q, 4), 15) for q in quads], activations
            )
            high = self.builder.shl(high, self.emit.constant(I32, 4, self.lanes))
            return self.builder.add(start, self.builder.add(low, high))
        return self.builder.add(start, self._dot_avx2(quads, activations))

    def _dot_vnni(self, quads: list[ir.Value], activations: list[ir.Value], start: ir.Value) -> ir.Value:
        # One token has too few independent sums to hide vpdpbusd's latency: use two.
        sums = [start] if self.tokens > 2 else [start, ir.Constant(self.int_vector, [0] * self.lanes)]
        name = f"llvm.x86.avx512.vpdpbusd.{32 * self.lanes}"
        for index, (quad, x) in enumerate(zip(quads, activations, strict=True)):
            slot = index % len(sums)
            sums[slot] = self.emit.call(name, self.int_vector, [sums[slot], quad, x])
        return sums[0] if len(sums) == 1 else self.builder.add(sums[0], sums[1])

    def _dot_avx2(self, quads: list[ir.Value], activations: list[ir.Value]) -> ir.Value:
        words = ir.VectorType(I16, 2 * self.lanes)
        total: ir.Value | None = None
        for quad, x in zip(quads, activations, strict=True):
            # At most 8 * 2 * 15 * 127 = 30480: sixteen products of a group fit 16 bits.
            pairs = self.emit.call("llvm.x86.avx2.pmadd.ub.sw", words, [quad, x])
            total = pairs if total is None else self.builder.add(total, pairs)
        assert total is not None
        ones = self.emit.constant(I16, 1, 2 * self.lanes)
        return self.emit.call("llvm.x86.avx2.pmadd.wd", self.int_vector, [total, ones])


def _literal(value: Any) -> int:
    return int(value.literal_value)


@intrinsic(prefer_literal=True)
def tile(
    typingctx: Any,
    isa: Any,
    num_bits: Any,
    tokens: Any,
    asym: Any,
    w: Any,
    ws: Any,
    wz: Any,
    x8: Any,
    xs: Any,
    sums: Any,
    y: Any,
    ldy: Any,
    groups: Any,
    accumulate: Any,
) -> Any:
    """One 16-row block of weights times ``tokens`` activation rows into y (row stride ldy floats)."""
    if not all(isinstance(t, types.IntegerLiteral) for t in (isa, num_bits, tokens, asym)):
        return None
    constants = [_literal(t) for t in (isa, num_bits, tokens, asym)]
    pointer = types.intp
    signature = types.void(isa, num_bits, tokens, asym, *([pointer] * 10))

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        kernel = _Tile(builder, *constants[:3])
        halves = 1 if kernel.isa == VNNI else 2
        # Few tokens: both halves in one pass over the weights; many: registers are short, one half at a time.
        together = [list(range(halves))] if kernel.tokens == 1 else [[half] for half in range(halves)]
        for part in together:
            _emit_pass(kernel, part, bool(constants[3]), arguments[4:])
        return context.get_dummy_value()

    return signature, codegen


def _emit_pass(kernel: _Tile, halves: list[int], asym: bool, arguments: list[ir.Value]) -> None:
    w, ws, wz, x8, xs, sums, y, ldy, groups, accumulate = arguments
    builder, emit, tokens, lanes = kernel.builder, kernel.emit, kernel.tokens, kernel.lanes
    zero = ir.Constant(kernel.float_vector, [0.0] * lanes)
    totals = {(h, m): cgutils.alloca_once_value(builder, zero) for h in halves for m in range(tokens)}
    for slot in totals.values():
        builder.store(zero, slot)
    group_bytes = GROUP_BYTES[kernel.num_bits]
    with cgutils.for_range(builder, groups) as loop:
        g = loop.index
        weights = emit.offset(w, emit.scaled(g, group_bytes))
        for line in range(0, group_bytes, 64):
            emit.prefetch(emit.offset(weights, PREFETCH_BYTES + line))
        x_group = emit.offset(x8, emit.scaled(g, 32 * tokens))
        per_token = emit.scaled(g, 4 * tokens)
        quads = {h: kernel.quads(emit.offset(weights, 4 * lanes * h)) for h in halves}
        for m in range(tokens):
            start = emit.splat(emit.load(I32, emit.offset(sums, per_token, 4 * m), 4), lanes)
            scale = emit.splat(emit.load(F32, emit.offset(xs, per_token, 4 * m), 4), lanes)
            activations = [
                builder.bitcast(
                    emit.splat(emit.load(I32, emit.offset(x_group, (q * tokens + m) * 4), 4), lanes),
                    kernel.byte_vector,
                )
                for q in range(8)
            ]
            for h in halves:
                nothing = ir.Constant(kernel.int_vector, [0] * lanes)
                dots = kernel.dot(quads[h], activations, nothing if asym else start)
                value = builder.sitofp(dots, kernel.float_vector)
                vector = ir.VectorType(F16, lanes)
                per_row = [emit.scaled(g, 32), I64(2 * lanes * h)]
                if asym:
                    zeros = builder.fpext(emit.load(vector, emit.offset(wz, *per_row)), kernel.float_vector)
                    value = emit.fma(zeros, builder.sitofp(start, kernel.float_vector), value)
                row_scale = builder.fpext(emit.load(vector, emit.offset(ws, *per_row)), kernel.float_vector)
                factor = builder.fmul(row_scale, scale)
                builder.store(emit.fma(factor, value, builder.load(totals[h, m])), totals[h, m])
    for (h, m), slot in totals.items():
        address = emit.offset(y, emit.scaled(ldy, 4 * m), 4 * lanes * h)
        value = builder.load(slot)
        with builder.if_else(builder.icmp_signed("!=", accumulate, I64(0))) as (then, otherwise):
            with then:
                emit.store(builder.fadd(value, emit.load(kernel.float_vector, address, 4)), address, 4)
            with otherwise:
                emit.store(value, address, 4)
