"""Low-bit weights in L16 times int8 activations, for any number of tokens.

Kernels' args: codes, scales, zeros, x8, xs, sums, y, address of the number of tokens, ldy (floats), groups,
blocks, accumulate (0 or 1). Activations as ``activations.quantize_kernel`` writes them for the instruction
set. Blocks of outputs are the unit of threads.
"""

from typing import Any

from .abi import word
from .activations import CHUNK
from .amx_tile import BLOCKS, SYMMETRIC, TILES, TOKENS, amx_tiles, configure_tiles, release_tiles
from .int8_tile import int8_tiles
from .isa import VNNI


def int8_kernel(isa: int, num_bits: int, asym: bool) -> Any:
    """The kernel for a bit width."""
    has_zeros = int(asym)  # a literal for ``int8_tiles``

    def int8_linear(args, thread, num_threads):
        tokens = word(word(args, 7), 0)
        blocks = word(args, 10)
        for begin in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - begin)
            for n in range(blocks * thread // num_threads, blocks * (thread + 1) // num_threads):
                int8_tiles(isa, num_bits, has_zeros, args, n, begin, count)

    return int8_linear


def amx_kernel(num_bits: int, kind: int) -> Any:
    """The kernel for a bit width and a kind of zero points: AMX for every 16 tokens, VNNI for those left.

    Two more args: scratch, scratch bytes per thread (SCRATCH_BYTES of ``amx_tile``).
    """
    has_zeros = int(kind != SYMMETRIC)

    def int8_amx(args, thread, num_threads):
        tokens = word(word(args, 7), 0)
        blocks = word(args, 10)
        scratch = word(args, 12) + thread * word(args, 13)
        end = blocks * (thread + 1) // num_threads
        if tokens >= TOKENS:
            configure_tiles()
        for begin in range(0, tokens, TILES * TOKENS):
            count = min(TILES * TOKENS, tokens - begin)
            tiles, left = count // TOKENS, count % TOKENS
            for n in range(blocks * thread // num_threads, end, BLOCKS):
                few = min(BLOCKS, end - n)
                if tiles > 0:
                    amx_tiles(num_bits, kind, args, n, few, begin, tiles, scratch)
                if left > 0:
                    for i in range(n, n + few):
                        int8_tiles(VNNI, num_bits, has_zeros, args, i, begin + count - left, left)
        if tokens >= TOKENS:
            release_tiles()

    return int8_amx
