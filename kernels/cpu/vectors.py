"""Vector intrinsics that the non-GEMM kernels share: conversions, dot products, axpy, exp."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .ir import F16, F32, I16, I32, I64, Emitter

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
ELEMENT_BYTES = {FLOAT32: 4, FLOAT16: 2, BFLOAT16: 2}


def load_floats(emit: Emitter, kind: int, lanes: int, address: ir.Value) -> ir.Value:
    """``lanes`` values of a storage kind as fp32."""
    vector = ir.VectorType(F32, lanes)
    if kind == FLOAT32:
        return emit.load(vector, address, 4)
    if kind == FLOAT16:
        return emit.builder.fpext(emit.load(ir.VectorType(F16, lanes), address, 2), vector)
    # bf16 is the upper half of fp32.
    raw = emit.builder.zext(emit.load(ir.VectorType(I16, lanes), address, 2), ir.VectorType(I32, lanes))
    return emit.builder.bitcast(emit.builder.shl(raw, emit.constant(I32, 16, lanes)), vector)


def literal(value: Any) -> int:
    """The value of a literal numba type."""
    return int(value.literal_value)


@intrinsic
def load_f32(typingctx: Any, address: Any) -> Any:
    """The fp32 at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return Emitter(builder).load(F32, arguments[0], 4)

    return types.float32(types.intp), codegen


@intrinsic
def store_f32(typingctx: Any, address: Any, value: Any) -> Any:
    """Store an fp32 at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        Emitter(builder).store(arguments[1], arguments[0], 4)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


@intrinsic
def load_i32(typingctx: Any, address: Any) -> Any:
    """The int32 at an address."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        return builder.sext(Emitter(builder).load(I32, arguments[0], 4), I64)

    return types.int64(types.intp), codegen


@intrinsic(prefer_literal=True)
def load_kind(typingctx: Any, kind: Any, address: Any) -> Any:
    """One value of a storage kind (a literal) as fp32."""
    code = literal(kind)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        emit = Emitter(builder)
        return builder.extract_element(load_floats(emit, code, 1, arguments[1]), I32(0))

    return types.float32(kind, types.intp), codegen


@intrinsic(prefer_literal=True)
def store_kind(typingctx: Any, kind: Any, address: Any, value: Any) -> Any:
    """Store an fp32 as a storage kind (fp32 or fp16), rounded to nearest even."""
    code = literal(kind)
    assert code != BFLOAT16

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        emit = Emitter(builder)
        value = arguments[2]
        emit.store(value if code == FLOAT32 else builder.fptrunc(value, F16), arguments[1], 2)
        return context.get_dummy_value()

    return types.void(kind, types.intp, types.float32), codegen


@intrinsic(prefer_literal=True)
def scores(
    typingctx: Any, heads: Any, kind: Any, q: Any, ldq: Any, page: Any, head_dim: Any, out: Any, ldo: Any
) -> Any:
    """out[h, 0:16] = sum over d of q[h, d] * page[d, 0:16]; strides in floats; page of a storage kind."""
    count, code = literal(heads), literal(kind)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, _, q, ldq, page, head_dim, out, ldo = arguments
        emit = Emitter(builder)
        zero = ir.Constant(ir.VectorType(F32, 16), [0.0] * 16)
        totals = [cgutils.alloca_once_value(builder, zero) for _ in range(count)]
        for total in totals:
            builder.store(zero, total)
        with cgutils.for_range(builder, head_dim) as loop:
            keys = load_floats(
                emit, code, 16, emit.offset(page, emit.scaled(loop.index, 16 * ELEMENT_BYTES[code]))
            )
            for h, total in enumerate(totals):
                address = emit.offset(q, emit.scaled(ldq, 4 * h), emit.scaled(loop.index, 4))
                query = emit.splat(emit.load(F32, address, 4), 16)
                builder.store(emit.fma(query, keys, builder.load(total)), total)
        for h, total in enumerate(totals):
            emit.store(builder.load(total), emit.offset(out, emit.scaled(ldo, 4 * h)), 4)
        return context.get_dummy_value()

    return types.void(heads, kind, *([types.intp] * 6)), codegen


@intrinsic(prefer_literal=True)
def weighted_sum(
    typingctx: Any,
    heads: Any,
    width: Any,
    kind: Any,
    p: Any,
    ldp: Any,
    values: Any,
    ldv: Any,
    count: Any,
    out: Any,
    ldo: Any,
) -> Any:
    """out[h, 0:width] += sum over t < count of p[h, t] * values[t, 0:width]; width a multiple of 16."""
    rows, columns, code = literal(heads), literal(width), literal(kind)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, _, _, p, ldp, values, ldv, count, out, ldo = arguments
        emit = Emitter(builder)
        vector = ir.VectorType(F32, 16)
        totals = {}
        for h in range(rows):
            for c in range(columns // 16):
                address = emit.offset(out, emit.scaled(ldo, 4 * h), 64 * c)
                slot = cgutils.alloca_once(builder, vector)
                builder.store(emit.load(vector, address, 4), slot)
                totals[h, c] = (slot, address)
        size = ELEMENT_BYTES[code]
        with cgutils.for_range(builder, count) as loop:
            row = emit.offset(values, emit.scaled(builder.mul(ldv, loop.index), size))
            parts = [
                load_floats(emit, code, 16, emit.offset(row, 16 * size * c)) for c in range(columns // 16)
            ]
            for h in range(rows):
                address = emit.offset(p, emit.scaled(ldp, 4 * h), emit.scaled(loop.index, 4))
                weight = emit.splat(emit.load(F32, address, 4), 16)
                for c, part in enumerate(parts):
                    slot = totals[h, c][0]
                    builder.store(emit.fma(weight, part, builder.load(slot)), slot)
        for slot, address in totals.values():
            emit.store(builder.load(slot), address, 4)
        return context.get_dummy_value()

    return types.void(heads, width, kind, *([types.intp] * 7)), codegen
