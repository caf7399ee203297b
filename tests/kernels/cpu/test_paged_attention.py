"""The compiled paged attention against float64, over poisoned pages."""

import numpy as np
import pytest
import torch
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu.compiled import kernels_for
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.cpu.paged_attention import SPAN_ROWS
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.recorder import PagedCache, Recorder
from nybble.kernels.cpu.tape import Inputs
from nybble.kernels.dispatch import Target
from torch import Tensor

ISA = instruction_set(Target(cpu_features=cpu_features(), cpu_kernels="auto"))
pytestmark = pytest.mark.skipif(ISA is None, reason="the CPU has neither AVX2 nor AVX-512 VNNI")
NUM_BLOCKS = 96


class Paged:
    """Sequences of random keys and values in pages of NaN, one chunk of queries each."""

    def __init__(self, heads: tuple[int, int], head_dim: int, dtype: torch.dtype, block_size: int) -> None:
        self.heads, self.kv_heads = heads
        self.head_dim, self.block_size = head_dim, block_size
        shape = (NUM_BLOCKS, self.kv_heads, block_size // 16, head_dim, 16)
        self.keys = torch.full(shape, float("nan"), dtype=dtype)
        self.values = torch.full((NUM_BLOCKS, self.kv_heads, block_size, head_dim), float("nan"), dtype=dtype)
        self.free = torch.randperm(NUM_BLOCKS).tolist()

    def add(self, length: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """A block table for ``length`` tokens, and keys and values [length, kv_heads, head_dim]."""
        table = np.array([self.free.pop() for _ in range(-(-length // self.block_size))], np.int32)
        k = torch.randn(length, self.kv_heads, self.head_dim).to(self.keys.dtype)
        v = torch.randn(length, self.kv_heads, self.head_dim).to(self.keys.dtype)
        return table, k, v

    def write(self, table: np.ndarray, k: Tensor, v: Tensor, stop: int) -> None:
        """Put tokens [0, stop) in the pages."""
        for t in range(stop):
            block, offset = int(table[t // self.block_size]), t % self.block_size
            self.keys[block, :, offset // 16, :, offset % 16] = k[t]
            self.values[block, :, offset] = v[t]


def attend(q: Tensor, k: Tensor, v: Tensor, position: int, window: int | None) -> Tensor:
    """float64, one query at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(q.shape[0]):
        end = position + row + 1
        low = 0 if window is None else max(0, end - window)
        for head in range(q.shape[1]):
            keys, values = k[low:end, head // group].double(), v[low:end, head // group].double()
            weights = torch.softmax(keys @ q[row, head].double() / q.shape[2] ** 0.5, 0)
            out[row, head] = weights @ values
    return out


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "block_size", "window"),
    [
        ((4, 2), 64, torch.float32, 16, None),
        ((4, 2), 64, torch.float16, 32, None),
        ((7, 1), 64, torch.float32, 32, 50),
        ((6, 2), 80, torch.float16, 16, 130),
        ((3, 3), 128, torch.float32, 64, 16),
    ],
)
def test_equals_float64(
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    block_size: int,
    window: int | None,
    num_threads: int,
) -> None:
    assert ISA is not None
    torch.manual_seed(0)
    chunks = [(0, 1), (5, 1), (200, 1), (0, 17), (120, 40), (127, 3)]  # (tokens before, new tokens)
    pages = Paged(heads, head_dim, dtype, block_size)
    sequences = [pages.add(start + count) for start, count in chunks]
    total = sum(count for _, count in chunks)
    q = torch.randn(total, heads[0], head_dim)
    new_k, new_v = (
        torch.cat([s[i][start:].float() for s, (start, _) in zip(sequences, chunks, strict=True)])
        for i in (1, 2)
    )
    inputs = Inputs(total)
    inputs.tokens[0] = total
    group = inputs.groups[0]
    row = spans = 0
    for (start, count), (table, k, v) in zip(chunks, sequences, strict=True):
        pages.write(table, k, v, start)
        for offset in range(count):
            position = start + offset
            group.slots[row + offset] = table[position // block_size] * block_size + position % block_size
        for offset in range(0, count, SPAN_ROWS):
            rows = min(SPAN_ROWS, count - offset)
            group.spans[spans] = row + offset, rows, start + offset, table.ctypes.data
            spans += 1
        row += count
    group.num_spans[0] = spans
    recorder = Recorder(kernels_for(ISA), inputs, num_threads)
    cache = PagedCache(pages.keys, pages.values, block_size, 0, window)
    pool = Pool(num_threads)
    tape = recorder.finish(recorder.attend(cache, q, new_k, new_v))
    tape.run(pool)
    pool.close()
    out = tape.output.view(total, heads[0], head_dim)
    row = 0
    for (start, count), (_, k, v) in zip(chunks, sequences, strict=True):
        reference = attend(q[row : row + count], k, v, start, window)
        assert (out[row : row + count] - reference).abs().max() < 5e-6
        row += count
