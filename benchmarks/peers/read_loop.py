"""A loop that only reads: the machine's read bandwidth, as its threads reach it.

Four streams a thread, with prefetches: one stream alone has a fifth less (Emerald Rapids).
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from nybble.kernels.cpu.abi import compile_kernel, word
from nybble.kernels.cpu.ir import I32, I64, Emitter
from nybble.kernels.cpu.pool import RECORD_WORDS, Pool

_STREAMS, _LINES, _AHEAD = 4, 4, 2048  # lines of a stream at a time; bytes that it asks for ahead


@intrinsic
def _read_lines(typingctx: Any, address: Any, lines: Any, out: Any) -> Any:
    """Or of ``lines`` cache lines (a multiple of 16), to out."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        address, lines, out = arguments
        emit = Emitter(builder)
        vector = ir.VectorType(I32, 16)
        of_stream = builder.sdiv(lines, I64(_STREAMS))
        starts = [emit.offset(address, builder.mul(of_stream, I64(64 * i))) for i in range(_STREAMS)]
        slots = [cgutils.alloca_once(builder, vector) for _ in range(_STREAMS * _LINES)]
        for slot in slots:
            builder.store(emit.constant(I32, 0, 16), slot)
        with cgutils.for_range(builder, builder.sdiv(of_stream, I64(_LINES))) as loop:
            for i, slot in enumerate(slots):
                at = emit.offset(starts[i // _LINES], emit.scaled(loop.index, 64 * _LINES), 64 * (i % _LINES))
                emit.prefetch(emit.offset(at, _AHEAD))
                builder.store(builder.or_(builder.load(slot), emit.load(vector, at, 64)), slot)
        total = builder.load(slots[0])
        for slot in slots[1:]:
            total = builder.or_(total, builder.load(slot))
        emit.store(total, out, 4)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


def _read_kernel(args, thread, num_threads):  # type: ignore[no-untyped-def]
    """args: address, lines, out."""
    share = word(args, 1) // num_threads // 16 * 16
    _read_lines(word(args, 0) + thread * share * 64, share, word(args, 2) + thread * 64)


class ReadLoop:
    """Memory of ``num_bytes``, written once, so that every page is real. Call it to read all of it."""

    def __init__(self, pool: Pool, num_bytes: int) -> None:
        self._pool = pool
        self._memory = np.ones(num_bytes + 64, np.uint8)
        self._out = np.zeros(64 * pool.num_threads, np.uint8)
        self._kernel = compile_kernel(_read_kernel)
        start = self._memory.ctypes.data + -self._memory.ctypes.data % 64
        self._words = np.array([start, num_bytes // 64, self._out.ctypes.data], np.int64)
        self._records = np.zeros((1, RECORD_WORDS), np.int64)
        self._records[0, :3] = self._kernel.address, self._words.ctypes.data, 1

    def __call__(self) -> None:
        self._out[:] = 0
        self._pool.run(self._records.ctypes.data, 1)
        assert (self._out[:64] == 1).all()  # a contended pool has one thread read all
