"""Low-bit weights in L16 times int8 activations, for any number of tokens."""

from typing import Any

from .abi import word
from .activations import CHUNK
from .int8_tile import AVX2, VNNI, tile
from .l16 import GROUP_BYTES

# Tokens of a register tile, largest first, then 1. Four times both halves of a block fill AVX2's registers.
# On AVX-512 more than eight gain nothing, nor do two blocks at once (Zen 4: 4 to 10 % slower).
TILES = {VNNI: (8, 4, 2), AVX2: (4, 3, 2)}


def int8_kernel(isa: int, num_bits: int, asym: bool) -> Any:
    """The kernel for a bit width. Blocks of outputs are the unit of threads.

    args: codes, scales, zeros, x8, xs, sums, y, address of the number of tokens, ldy (floats), groups,
    blocks, accumulate (0 or 1). Activations as ``activations.quantize_kernel`` writes them.
    """
    block_bytes = GROUP_BYTES[num_bits]
    big, mid, small = TILES[isa]
    zp = int(asym)  # a literal for ``tile``

    def int8_linear(args, thread, num_threads):
        codes = word(args, 0)
        scales = word(args, 1)
        zeros = word(args, 2)
        x8 = word(args, 3)
        xs = word(args, 4)
        sums = word(args, 5)
        y = word(args, 6)
        tokens = word(word(args, 7), 0)
        ldy = word(args, 8)
        groups = word(args, 9)
        blocks = word(args, 10)
        accumulate = word(args, 11)
        for begin in range(0, tokens, CHUNK):
            end = min(tokens, begin + CHUNK)
            for n in range(blocks * thread // num_threads, blocks * (thread + 1) // num_threads):
                w = codes + n * groups * block_bytes
                ws = scales + n * groups * 32
                wz = zeros + n * groups * 32
                m = begin
                while m < end:
                    a = x8 + m * groups * 32
                    b = xs + m * groups * 4
                    c = sums + m * groups * 4
                    out = y + (m * ldy + n * 16) * 4
                    if m + big <= end:
                        tile(isa, num_bits, big, zp, w, ws, wz, a, b, c, out, ldy, groups, accumulate)
                        m += big
                    elif m + mid <= end:
                        tile(isa, num_bits, mid, zp, w, ws, wz, a, b, c, out, ldy, groups, accumulate)
                        m += mid
                    elif m + small <= end:
                        tile(isa, num_bits, small, zp, w, ws, wz, a, b, c, out, ldy, groups, accumulate)
                        m += small
                    else:
                        tile(isa, num_bits, 1, zp, w, ws, wz, a, b, c, out, ldy, groups, accumulate)
                        m += 1

    return int8_linear
