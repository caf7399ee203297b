"""Sparse residuals on top of a low-bit linear: y[m, n] += sum over j of values[n, j] * x[m, cols[n, j]].

Activations are the fp32 ones, in the checkpoint's order, whatever the linear's mode and its order of inputs.
Every output is one chain of fused multiply-adds over its row's entries in order, then one addition to y: the
same bits for any number of tokens and threads. Two ways of vectorising the same chains: over the 16 rows of a
block, gathering x (one or two tokens), and over 8 tokens, reading x from tiles of [K, 8] (more tokens, see
``overlay_tiles``). Threads take blocks as the linear does, so that no barrier is between the two.

Lanes that have no entry at a step multiply some other input of the token by zero: NaN where that is not
finite. It changes nothing that the linear beneath does not do already: there every output of a token meets
all of its inputs, so that one which is not finite makes them all so (tested); no other token is reached.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .abi import word, words
from .activations import CHUNK
from .ir import F32, I8, I16, I32, I64, Emitter, gathers_are_fast
from .l16 import ROWS
from .overlay_slices import LANES, Slice
from .overlay_tiles import DIRECT, TILE, add_tiles
from .vectors import literal, load_i32


@intrinsic(prefer_literal=True)
def _add_gathered(typingctx: Any, wide: Any, args: Any, block: Any, token: Any) -> Any:
    """y += the sums of a block's 16 rows, for one token; args of the kernel."""
    wide_ = literal(wide)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, args, block, token = arguments
        emit, vector = Emitter(builder), ir.VectorType(F32, LANES)
        x, ldx, _, _, _, y, ldy, _, *arrays = words(emit, args, 16)
        x = emit.offset(x, emit.scaled(builder.mul(token, ldx), 4))
        y = emit.offset(y, emit.scaled(builder.mul(token, ldy), 4), emit.scaled(block, 4 * ROWS))
        slices = [Slice(emit, wide_, arrays, emit.offset(emit.scaled(block, 2), i)) for i in range(2)]
        totals = emit.running_sums(vector, len(slices))
        for part in slices:
            part.begin()
        first, second = (part.length(0) for part in slices)
        steps = builder.select(builder.icmp_signed("<", first, second), second, first)
        with cgutils.for_range(builder, steps) as loop:
            for part, total in zip(slices, totals, strict=True):
                weights, cols = part.step(loop.index)
                builder.store(emit.fma(weights, _gather(part, x, cols), builder.load(total)), total)
        for i, (part, total) in enumerate(zip(slices, totals, strict=True)):
            _add_tails(part, x, total)
            out = emit.offset(y, 4 * LANES * i)
            value = part.by_rows(builder.load(total))
            emit.store(builder.fadd(emit.load(vector, out, 4), value), out, 4)
        return context.get_dummy_value()

    return types.void(wide, *([types.intp] * 3)), codegen


def _add_tails(part: Slice, x: ir.Value, total: ir.Value) -> None:
    """What the rows of a slice have beyond its steps, if any of them has: lane after lane."""
    emit, builder = part.emit, part.builder
    (first, _), (_, last) = part.tail(0), part.tail(LANES - 1)
    with builder.if_then(builder.icmp_signed("<", first, last), likely=False):
        lane_total = cgutils.alloca_once(builder, F32)
        for lane in range(LANES):
            builder.store(builder.extract_element(builder.load(total), I32(lane)), lane_total)
            first, last = part.tail(lane)
            with cgutils.for_range(builder, builder.sub(last, first)) as loop:
                at = builder.add(first, loop.index)
                place = emit.offset(x, emit.scaled(part.column(part.tail_cols, at), 4))
                operands = [part.tail_value(at), emit.load(F32, place, 4), builder.load(lane_total)]
                builder.store(emit.call("llvm.fma.f32", F32, operands), lane_total)
            changed = builder.insert_element(builder.load(total), builder.load(lane_total), I32(lane))
            builder.store(changed, total)


def _gather(part: Slice, x: ir.Value, cols: ir.Value) -> ir.Value:
    """x at the next 8 columns."""
    emit, builder, wide, vector = part.emit, part.builder, part.wide, ir.VectorType(F32, LANES)
    if gathers_are_fast():
        places = emit.load(ir.VectorType(I32 if wide else I16, LANES), cols, 2)
        places = places if wide else builder.zext(places, ir.VectorType(I32, LANES))
        base = builder.inttoptr(x, ir.PointerType(I8))
        every = builder.bitcast(emit.constant(I32, -1, LANES), vector)
        zero = emit.constant(F32, 0.0, LANES)
        return emit.call("llvm.x86.avx2.gather.d.ps.256", vector, [zero, base, places, every, I8(4)])
    gathered = ir.Constant(vector, ir.Undefined)
    for lane in range(LANES):
        at = emit.scaled(part.column(cols, I64(lane)), 4)
        gathered = builder.insert_element(gathered, emit.load(F32, emit.offset(x, at), 4), I32(lane))
    return gathered


def overlay_kernel(wide: bool) -> Any:
    """Adds a weight's residuals to y. Blocks of outputs are the unit of threads, as in the linears.

    args: x, ldx (floats), K, xt (as ``tiles_kernel`` writes it), address of the number of tokens, y,
    ldy (floats), blocks, the arrays of ``OverlayWeight``.
    """
    is_wide = int(wide)

    def overlay(args, thread, num_threads):
        tokens = word(word(args, 4), 0)
        blocks = word(args, 7)
        starts = word(args, 8)
        for begin in range(0, tokens, CHUNK):
            end = min(tokens, begin + CHUNK)
            for n in range(blocks * thread // num_threads, blocks * (thread + 1) // num_threads):
                if load_i32(starts + 8 * n) == load_i32(starts + 8 * n + 8):
                    continue  # a row with a tail has entries before it
                m = begin
                while m < end:
                    count = end - m
                    if count <= DIRECT:
                        _add_gathered(is_wide, args, n, m)
                        m += 1
                    elif count < 3 * TILE:
                        for i in range(2 * n, 2 * n + 2):
                            add_tiles(1, is_wide, args, i, m, count)
                        m += TILE
                    else:
                        for i in range(2 * n, 2 * n + 2):
                            add_tiles(3, is_wide, args, i, m, 3 * TILE)
                        m += 3 * TILE

    return overlay
