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

from .abi import call_kernel, word, words
from .activations import CHUNK
from .ir import Emitter
from .l16 import ROWS
from .overlay_gather import BlockSums, add_to_rows
from .overlay_tiles import DIRECT, TILE, add_tiles
from .vectors import literal, load_i32

# Words of the arguments: the residuals' own, then the two kernels, then the linear's.
RESIDUALS, LINEAR = 16, 18


@intrinsic(prefer_literal=True)
def _add_gathered(typingctx: Any, wide: Any, args: Any, block: Any, token: Any) -> Any:
    """y += the sums of a block's 16 rows, for one token; args of the kernel."""
    wide_ = literal(wide)

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        _, args, block, token = arguments
        emit = Emitter(builder)
        x, ldx, _, _, _, y, ldy, _, *arrays = words(emit, args, RESIDUALS)
        x = emit.offset(x, emit.scaled(builder.mul(token, ldx), 4))
        y = emit.offset(y, emit.scaled(builder.mul(token, ldy), 4), emit.scaled(block, 4 * ROWS))
        sums = BlockSums(emit, wide_, arrays, x, block)
        with cgutils.for_range(builder, sums.steps()) as loop:
            sums.step(loop.index)
        add_to_rows(emit, y, sums.finish())
        return context.get_dummy_value()

    return types.void(wide, *([types.intp] * 3)), codegen


def overlay_kernel(wide: bool) -> Any:
    """A linear, and its weight's residuals added to y. Blocks of outputs are the unit of threads.

    args: x, ldx (floats), K, xt (as ``tiles_kernel`` writes it), address of the number of tokens, y,
    ldy (floats), blocks, the arrays of ``OverlayWeight``, the kernel of one token (``int8_overlay``, or 0),
    the linear's kernel and its arguments.
    """
    is_wide, one_at, linear_at, linear_args = int(wide), RESIDUALS, RESIDUALS + 1, 8 * LINEAR

    def linear_and_overlay(args, thread, num_threads):
        tokens = word(word(args, 4), 0)
        blocks = word(args, 7)
        starts = word(args, 8)
        if tokens == 1 and word(args, one_at) != 0:
            call_kernel(word(args, one_at), args, thread, num_threads)
            return
        call_kernel(word(args, linear_at), args + linear_args, thread, num_threads)
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

    return linear_and_overlay
