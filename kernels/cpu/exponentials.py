"""exp and what needs it, in vectors of 16 fp32: gating, and the weights of a softmax.

LLVM does not vectorise loops over raw addresses (any two may overlap), so these are vectors by hand: 2.4 ns
an element became 0.2.
"""

import struct
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir import F32, I32, Emitter
from .vectors import literal

LANES = 16
_LOG2_E, _LN_2_HIGH, _LN_2_LOW = 1.4426950408889634, 0.693359375, -2.12194440e-4
# Cephes' expf: exp(r) = 1 + r + r**2 * p(r) for |r| <= ln(2) / 2.
_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def _f32(value: float) -> float:
    """The nearest fp32, as llvmlite wants its constants."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def emit_exp(emit: Emitter, x: ir.Value) -> ir.Value:
    """exp of a vector of fp32: relative error below 2e-7 in [-87, 88], 0 below, exp(88) above."""
    builder, vector, lanes = emit.builder, x.type, x.type.count

    def constant(value: float) -> ir.Value:
        return emit.constant(F32, _f32(value), lanes)

    tiny = builder.fcmp_ordered("<", x, constant(-87.0))
    x = builder.select(tiny, constant(-87.0), x)
    x = builder.select(builder.fcmp_ordered(">", x, constant(88.0)), constant(88.0), x)
    whole = emit.call(f"llvm.rint.v{lanes}f32", vector, [builder.fmul(x, constant(_LOG2_E))])
    # Cody and Waite: ln 2 in two parts, so that the reduced argument keeps its low bits.
    rest = emit.fma(whole, constant(-_LN_2_HIGH), x)
    rest = emit.fma(whole, constant(-_LN_2_LOW), rest)
    value = constant(_POLYNOMIAL[0])
    for coefficient in _POLYNOMIAL[1:]:
        value = emit.fma(value, rest, constant(coefficient))
    value = builder.fadd(emit.fma(value, builder.fmul(rest, rest), rest), constant(1.0))
    exponent = builder.add(builder.fptosi(whole, ir.VectorType(I32, lanes)), emit.constant(I32, 127, lanes))
    power = builder.bitcast(builder.shl(exponent, emit.constant(I32, 23, lanes)), vector)
    return builder.select(tiny, constant(0.0), builder.fmul(value, power))


@intrinsic
def exp_f32(typingctx: Any, x: Any) -> Any:
    """exp of one fp32, see ``emit_exp``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        emit = Emitter(builder)
        return builder.extract_element(emit_exp(emit, emit.splat(arguments[0], 1)), I32(0))

    return types.float32(types.float32), codegen


@intrinsic(prefer_literal=True)
def silu_mul(typingctx: Any, lanes: Any, gate: Any, up: Any, out: Any) -> Any:
    """out = silu(gate) * up for ``lanes`` (a literal) fp32 at addresses."""
    count = literal(lanes)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        emit, vector = Emitter(builder), ir.VectorType(F32, count)
        gate, up = (emit.load(vector, address, 4) for address in arguments[1:3])
        bottom = builder.fadd(emit.constant(F32, 1.0, count), emit_exp(emit, builder.fneg(gate)))
        emit.store(builder.fmul(builder.fdiv(gate, bottom), up), arguments[3], 4)
        return context.get_dummy_value()

    return types.void(lanes, types.intp, types.intp, types.intp), codegen


@intrinsic
def row_max(typingctx: Any, row: Any, vectors: Any, least: Any) -> Any:
    """The largest of ``least`` and of 16 * vectors fp32 at ``row``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        row, vectors, least = arguments
        emit, vector = Emitter(builder), ir.VectorType(F32, LANES)
        best = cgutils.alloca_once(builder, vector)
        builder.store(emit.splat(least, LANES), best)
        with cgutils.for_range(builder, vectors) as loop:
            value = emit.load(vector, emit.offset(row, emit.scaled(loop.index, 4 * LANES)), 4)
            known = builder.load(best)
            builder.store(builder.select(builder.fcmp_ordered(">", value, known), value, known), best)
        return emit.call("llvm.vector.reduce.fmax.v16f32", F32, [builder.load(best)])

    return types.float32(types.intp, types.intp, types.float32), codegen


@intrinsic
def softmax_weights(typingctx: Any, row: Any, vectors: Any, scale: Any, best: Any) -> Any:
    """row = exp(row * scale - best) for 16 * vectors fp32; returns their sum (lane by lane, then across)."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        row, vectors, scale, best = arguments
        emit, vector = Emitter(builder), ir.VectorType(F32, LANES)
        total = cgutils.alloca_once(builder, vector)
        builder.store(emit.constant(F32, 0.0, LANES), total)
        factor, shift = emit.splat(scale, LANES), emit.splat(builder.fneg(best), LANES)
        with cgutils.for_range(builder, vectors) as loop:
            address = emit.offset(row, emit.scaled(loop.index, 4 * LANES))
            weight = emit_exp(emit, emit.fma(emit.load(vector, address, 4), factor, shift))
            emit.store(weight, address, 4)
            builder.store(builder.fadd(builder.load(total), weight), total)
        lanes = builder.load(total)
        half = LANES // 2
        while half:
            order = [(lane + half) % LANES for lane in range(LANES)]
            moved = builder.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(I32, LANES), order))
            lanes = builder.fadd(lanes, moved)
            half //= 2
        return builder.extract_element(lanes, I32(0))

    return types.float32(types.intp, types.intp, types.float32, types.float32), codegen


@intrinsic
def scale_row(typingctx: Any, row: Any, vectors: Any, factor: Any, out: Any) -> Any:
    """out = row * factor for 16 * vectors fp32; out may be row."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        row, vectors, factor, out = arguments
        emit, vector = Emitter(builder), ir.VectorType(F32, LANES)
        factors = emit.splat(factor, LANES)
        with cgutils.for_range(builder, vectors) as loop:
            at = emit.scaled(loop.index, 4 * LANES)
            value = emit.load(vector, emit.offset(row, at), 4)
            emit.store(builder.fmul(value, factors), emit.offset(out, at), 4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32, types.intp), codegen
