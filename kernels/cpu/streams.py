"""How a thread walks over its blocks of rows: several at once, each in a part of its share of its own.

A core that reads one stream of addresses waits for memory longer than it must: it has few lines under way,
and the hardware's prefetchers follow each stream for itself. On Emerald Rapids a loop that only reads has
15 GB/s with one stream, 17 with two, 19 with four and hardly more with eight.
"""

from collections.abc import Iterator, Sequence

from llvmlite import ir
from numba.core import cgutils

from .ir import I64, Emitter, compiled_for_zen
from .isa import AVX2, VNNI

# Bytes ahead of the read, all streams of a thread together: the hardware's own prefetcher stops at 4 KiB
# pages. One stream at one token: 2048 is 8 % (int4) to 20 % (int2, 2:4) slower than 6144 and 12288 no faster
# (Zen 4). Four streams: 1024 to 4096 each are alike (Emerald Rapids).
AHEAD_ONE, _AHEAD_ALL = 6144, 8192
# Levels of ``emit_streams``: what of tokens and blocks fits the registers. With more tokens products bind,
# and two blocks share the loads of activations: at 16 tokens 17 % faster on Emerald Rapids, at 64 6 to 12 %,
# but 4 to 10 % slower on Zen 4, whose loads are as fast as its products.
ANY = 1 << 30
FEW_TOKENS = ((2, 4),)
_INT8 = {AVX2: ((1, 4), (2, 2)), VNNI: ((4, 4), (ANY, 2))}
_INT8_ZEN = _INT8 | {VNNI: ((4, 4), (8, 2))}


def streams_of(isa: int) -> tuple[tuple[int, int], ...]:
    """Levels of ``int8_tile``."""
    return (_INT8_ZEN if compiled_for_zen() else _INT8)[isa]


def tiles_for(sizes: Sequence[int], counts: tuple[int, int], rounded: Sequence[int] = ()) -> list[int]:
    """Those of ``sizes`` (largest first) and 1 into which counts[0] to counts[1] tokens are cut.

    No other need be emitted. ``rounded``: see ``emit_tiles``.
    """
    taken = set()
    for count in range(counts[0], min(counts[1], counts[0] + 2 * max(sizes)) + 1):
        for size in (*sizes, 1):
            number = (count + int(size in rounded)) // size
            if number > 0:
                taken.add(size)
                count -= number * size
    return sorted(taken, reverse=True)


def prefetched_bytes(at_once: int) -> int:
    """How far ahead each of ``at_once`` streams asks for its bytes."""
    return AHEAD_ONE if at_once == 1 else _AHEAD_ALL // at_once


def emit_streams(
    builder: ir.IRBuilder,
    count: ir.Value,
    share: tuple[ir.Value, ir.Value],
    levels: Sequence[tuple[int, int]],
) -> Iterator[tuple[tuple[int, int], list[ir.Value]]]:
    """Loops over the blocks [share[0], share[1]); the body is emitted for every level, and for one stream.

    levels: (most tokens, blocks at once), fewest tokens first; the first that has room for ``count`` tokens
    is taken. Yields the numbers of tokens that come to the body, least and most, and the blocks of one pass.
    """
    first, end = share
    start = cgutils.alloca_once(builder, I64)
    builder.store(first, start)
    least = 1
    for most, at_once in levels:
        fits = builder.and_(
            builder.icmp_signed("<=", I64(least), count), builder.icmp_signed("<=", count, I64(most))
        )
        with builder.if_then(fits):
            step = builder.sdiv(builder.sub(end, first), I64(at_once))
            with cgutils.for_range(builder, step) as loop:
                block = builder.add(first, loop.index)
                yield (
                    (least, most),
                    [builder.add(block, builder.mul(step, I64(i))) for i in range(at_once)],
                )
            builder.store(builder.add(first, builder.mul(step, I64(at_once))), start)
        least = most + 1
    rest = builder.load(start)
    with cgutils.for_range(builder, builder.sub(end, rest)) as loop:
        yield (1, ANY), [builder.add(rest, loop.index)]


def strips(
    emit: Emitter,
    blocks: Sequence[ir.Value],
    halves: Sequence[int],
    lanes: int,
    arrays: Sequence[tuple[ir.Value, ir.Value, int]],
) -> list[list[ir.Value]]:
    """Addresses, one in each array, of the rows that a register holds: halves of a block follow one another.

    arrays: (where block 0 begins, bytes of a block, bytes from a row to the next one).
    """
    return [
        [
            emit.offset(base, emit.builder.mul(block, block_bytes), row_bytes * lanes * half)
            for base, block_bytes, row_bytes in arrays
        ]
        for block in blocks
        for half in halves
    ]
