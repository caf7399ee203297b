"""Low-bit weights in L16 times int8 activations, for any number of tokens.

Kernels' args: codes, scales, zeros, x8, xs, sums, y, address of the number of tokens, ldy (floats), groups,
blocks, accumulate (0 or 1). Activations as ``activations.quantize_kernel`` writes them for the instruction
set. Blocks of outputs are the unit of threads.
"""

from typing import Any

from . import int8_batch
from .abi import word
from .activations import CHUNK
from .amx_tile import BLOCKS, SYMMETRIC, TILES, TOKENS, amx_tiles, configure_tiles, release_tiles
from .int8_tile import int8_tiles
from .isa import AVX2, VNNI
from .l16 import GROUP_BYTES


def vnni_kernel(num_bits: int, asym: bool) -> Any:
    """The kernel for a bit width on AVX-512 VNNI."""
    has_zeros = int(asym)  # a literal for ``int8_tiles``

    def int8_vnni(args, thread, num_threads):
        tokens = word(word(args, 7), 0)
        blocks = word(args, 10)
        first, end = blocks * thread // num_threads, blocks * (thread + 1) // num_threads
        for begin in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - begin)
            int8_tiles(VNNI, num_bits, has_zeros, args, first, end, begin, count)

    return int8_vnni


def avx2_kernel(num_bits: int, asym: bool) -> Any:
    """The kernel for a bit width on AVX2: MIN_TOKENS and more share the unpacking of codes, fewer do not.

    Two more args: scratch, scratch bytes per thread (SCRATCH_BYTES of ``int8_batch``).
    """
    has_zeros = int(asym)
    group_bytes, lines = GROUP_BYTES[num_bits], int8_batch.prefetched_lines(num_bits)
    tile, longest, least = int8_batch.TOKENS, int8_batch.STRIP, int8_batch.MIN_TOKENS
    at_totals = int8_batch.TOTALS

    def int8_avx2(args, thread, num_threads):
        tokens = word(word(args, 7), 0)
        groups = word(args, 9)
        blocks = word(args, 10)
        scratch = word(args, 12) + thread * word(args, 13)
        totals = scratch + at_totals
        first, end = blocks * thread // num_threads, blocks * (thread + 1) // num_threads
        for begin in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - begin)
            many = count // tile * tile if count >= least else 0
            n = first
            while n < end:
                at_once = 1 if many else end - n
                if many:
                    int8_batch.clear_totals(totals, many)
                    for g in range(0, groups, longest):
                        strip = min(longest, groups - g)
                        int8_batch.unpack_strip(num_bits, has_zeros, args, n, g, strip, scratch)
                        following = word(args, 0) + (n * groups + g + strip) * group_bytes
                        for m in range(0, many, tile):
                            token, to = begin + m, totals + m * 64
                            if g + strip == groups:
                                int8_batch.prefetch_rows(args, n, token)
                            # The first tiles ask for the codes of the next strip, later ones for nothing new.
                            asked = m // tile * strip * lines * 64
                            ahead = following + asked if asked < strip * group_bytes else scratch
                            int8_batch.multiply_strip(
                                num_bits, has_zeros, args, token, g, strip, scratch, to, ahead
                            )
                    int8_batch.write_totals(args, n, begin, many, totals)
                if many < count:
                    int8_tiles(AVX2, num_bits, has_zeros, args, n, n + at_once, begin + many, count - many)
                n += at_once

    return int8_avx2


def amx_kernel(num_bits: int, kind: int) -> Any:
    """The kernel for a bit width and a kind of zero points: AMX for every 16 tokens, VNNI for those left.

    Two more args: scratch, scratch bytes per thread (SCRATCH_BYTES of ``amx_tile``).
    """
    has_zeros = int(kind != SYMMETRIC)

    def int8_amx(args, thread, num_threads):
        tokens = word(word(args, 7), 0)
        blocks = word(args, 10)
        scratch = word(args, 12) + thread * word(args, 13)
        first, end = blocks * thread // num_threads, blocks * (thread + 1) // num_threads
        if tokens >= TOKENS:
            configure_tiles()
        for begin in range(0, tokens, TILES * TOKENS):
            count = min(TILES * TOKENS, tokens - begin)
            tiles, left = count // TOKENS, count % TOKENS
            n = first
            while n < end:
                few = end - n
                if tiles > 0:
                    few = min(BLOCKS, few)
                    amx_tiles(num_bits, kind, args, n, few, begin, tiles, scratch)
                if left > 0:
                    int8_tiles(VNNI, num_bits, has_zeros, args, n, n + few, begin + count - left, left)
                n += few
        if tokens >= TOKENS:
            release_tiles()

    return int8_amx
