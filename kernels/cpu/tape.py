"""A tape: a flat list of kernel calls over fixed memory, replayed without Python between its kernels.

Batch size, positions, slots and block tables are data (``Inputs``) that the calls read through pointers, so
one tape serves every step. It is to the CPU what a CUDA graph is to a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba.core.ccallback import CFunc
from torch import Tensor

from .l16 import padded
from .paged_attention import SPAN_WORDS
from .pool import RECORD_WORDS, Pool

BY_ROWS, BY_COLUMNS, BY_HEADS = 0, 1, 2  # how a call splits its work among threads
_ALIGN = 64  # bytes: a cache line


class Scratch:
    """Stands, in a call's arguments, for memory that every call may overwrite: a part for each thread."""


class ScratchBytes:
    """Stands for the bytes of a thread's part. One size for all calls: threads may be at different ones."""


@dataclass(frozen=True, slots=True)
class Call:
    """args: ints, meta tensors (buffers of the arena), kernels, or objects with memory (tensors, arrays).

    follows: it needs, of the call before it, only what its own thread did: no barrier between the two.
    """

    kernel: Any
    args: tuple[Any, ...]
    split: int
    follows: bool = False


class GroupInputs:
    """Where the step's tokens are in one KV group: fill the arrays, set ``num_spans[0]``.

    slots: int64 [max_tokens], block * block_size + offset; spans: int64 [max_tokens, SPAN_WORDS], see
    ``paged_attention``.
    """

    def __init__(self, max_tokens: int) -> None:
        self.slots = np.zeros(max_tokens, np.int64)
        self.spans = np.zeros((max_tokens, SPAN_WORDS), np.int64)
        self.num_spans = np.zeros(1, np.int64)


class Inputs:
    """What a replay reads: set ``tokens[0]``, fill the arrays. token_ids, positions: int64 [max_tokens]."""

    def __init__(self, max_tokens: int, num_groups: int = 1) -> None:
        self.max_tokens = max_tokens
        self.tokens = np.zeros(1, np.int64)
        self.token_ids = np.zeros(max_tokens, np.int64)
        self.positions = np.zeros(max_tokens, np.int64)
        self.groups = [GroupInputs(max_tokens) for _ in range(num_groups)]


@dataclass(frozen=True, slots=True)
class Tape:
    """records: int64 [calls, RECORD_WORDS]; output: [max_tokens, width] fp32, overwritten by every run.

    address: of the records; numpy takes 3 us to tell.
    """

    records: Any
    address: int
    output: Tensor
    arena_bytes: int
    kept: tuple[Any, ...]  # what the records point to

    def run(self, pool: Pool) -> None:
        """Replay."""
        pool.run(self.address, len(self.records))


def build_tape(calls: Sequence[Call], output: Tensor, scratch_bytes: int, num_threads: int) -> Tape:
    """Place the buffers in one arena, sharing memory between those whose lives do not overlap.

    scratch_bytes: of one thread, whole cache lines.
    """
    lives, sizes = _lives(calls, output)
    places, total = _place(lives, sizes)
    arena, base = _aligned(total)
    scratch, scratch_base = _aligned(scratch_bytes * num_threads)

    def address(arg: Any) -> int:
        if isinstance(arg, int):
            return arg
        if isinstance(arg, CFunc):
            assert arg.address is not None
            return arg.address
        if isinstance(arg, Scratch):
            return scratch_base
        if isinstance(arg, ScratchBytes):
            return scratch_bytes
        if isinstance(arg, Tensor):
            if arg.is_meta:
                return base + places[_storage(arg)] + int(arg.storage_offset()) * arg.element_size()
            return arg.data_ptr()
        return int(arg.ctypes.data)

    words = [np.array([address(arg) for arg in call.args], np.int64) for call in calls]
    records = np.zeros((len(calls), RECORD_WORDS), np.int64)
    for index, (call, args) in enumerate(zip(calls, words, strict=True)):
        records[index, :3] = call.kernel.address, args.ctypes.data, _barrier_after(calls, index)
    start = places[_storage(output)] + base - arena.ctypes.data
    whole = torch.from_numpy(arena)[start : start + sizes[_storage(output)]].view(torch.float32)
    result = whole.view(output.shape[0], -1)[:, : output.shape[1]]
    return Tape(records, records.ctypes.data, result, total, (arena, scratch, words, tuple(calls)))


def _lives(calls: Sequence[Call], output: Tensor) -> tuple[dict[int, list[int]], dict[int, int]]:
    """First and last use of every buffer, and its bytes. Uses are counted between barriers.

    Within a run of row-wise calls threads are at different ones, so a buffer may not take the place of one
    that an earlier call of the same run reads.
    """
    lives: dict[int, list[int]] = {}
    sizes: dict[int, int] = {}
    epoch = 0
    for index, call in enumerate(calls):
        for arg in call.args:
            if isinstance(arg, Tensor) and arg.is_meta:
                key = _storage(arg)
                lives.setdefault(key, [epoch, epoch])[1] = epoch
                sizes[key] = arg.untyped_storage().nbytes()
        epoch += _barrier_after(calls, index)
    lives[_storage(output)][1] = epoch
    return lives, sizes


def _barrier_after(calls: Sequence[Call], index: int) -> bool:
    """Whether threads must meet after a call: not between two that split their work alike."""
    if index + 1 == len(calls):
        return True
    if calls[index + 1].follows:
        return False
    return not (calls[index].split == calls[index + 1].split == BY_ROWS)


def _place(lives: dict[int, list[int]], sizes: dict[int, int]) -> tuple[dict[int, int], int]:
    """First-fit offsets for buffers by their lives; returns them and the arena's size."""
    places: dict[int, int] = {}
    for key, (first, last) in sorted(lives.items(), key=lambda item: item[1][0]):
        at = 0
        for start, other in sorted((start, other) for other, start in places.items()):
            if lives[other][1] < first or last < lives[other][0]:
                continue
            if at + sizes[key] <= start:
                break
            at = max(at, padded(start + sizes[other], _ALIGN))
        places[key] = at
    return places, max((start + sizes[key] for key, start in places.items()), default=0)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _aligned(num_bytes: int) -> tuple[Any, int]:
    memory = np.empty(num_bytes + _ALIGN, np.uint8)
    return memory, padded(memory.ctypes.data, _ALIGN)
