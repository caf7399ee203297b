"""A packed weight as a dense matrix, overlay included: for many tokens, where a dense product pays."""

import triton
import triton.language as tl

from .fragments import ROWS, STEP
from .tile_linear import addresses, weights


@triton.jit
def dequantize(
    words, scales, zeros, out, N, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """out: [N padded to 64, K] fp16 or bf16, rounded once. Grid: (N / 64, K / 128)."""
    PART: tl.constexpr = GROUP if GROUP else STEP
    step = tl.program_id(1)
    padded = tl.cdiv(N, ROWS) * ROWS
    first = step * (STEP // PART) * padded if GROUP else 0
    at, row = addresses(words, tl.program_id(0), N, K // STEP, step, BITS, GROUP, ROWS // 16)
    codes = weights(at, scales, zeros + first + row, BITS, ZEROS, False, out.dtype.element_ty, ASM)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, STEP)[None, :]
    scale = tl.load(scales + first + k // PART * padded + n).to(tl.float32)
    to = out + n.to(tl.int64) * K + step * STEP + k
    tl.store(to, (codes.to(tl.float32) * scale).to(out.dtype.element_ty))


@triton.jit
def add_overlay(starts, values, rows, cols, out, K):
    """Add a block's entries to out: [N padded to 64, K]. Grid: (N / 64,)."""
    COLUMNS: tl.constexpr = 0xFFFF if cols.dtype.element_ty == tl.int16 else 0x7FFFFFFF
    block = tl.program_id(0)
    entry = tl.arange(0, 128)
    for chunk in range(tl.load(starts + block), tl.load(starts + block + 1)):
        at = chunk * 128 + entry
        value = tl.load(values + at)
        row = block * ROWS + entry // 32 * 16 + tl.load(rows + at).to(tl.int32)
        to = out + row.to(tl.int64) * K + (tl.load(cols + at).to(tl.int32) & COLUMNS)
        # Padding is zero and stands where an entry may: it must not write.
        dense = tl.load(to, mask=value != 0, other=0.0).to(tl.float32)
        tl.store(to, (dense + value.to(tl.float32)).to(out.dtype.element_ty), mask=value != 0)


@triton.jit
def expand24(
    words, meta, scales, out, N, K, BITS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """A 2:4 weight of ``packing24`` as a dense matrix: each element finds its place. out, grid: as above."""
    dt: tl.constexpr = out.dtype.element_ty
    PART: tl.constexpr = GROUP if GROUP else STEP
    padded = tl.cdiv(N, ROWS) * ROWS
    r = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, STEP)[None, :]
    block = tl.program_id(0) * (K // STEP) + tl.program_id(1)
    lane = r // 16 * 32 + r % 8 * 4  # of t = 0
    step = k // 32
    upper = r % 16 // 8
    fields = tl.load(meta + block * 256 + (lane + step % 2 * 2 + k % 32 // 16) * 2 + step // 2)
    fields = fields >> (16 * upper + k % 16 // 4 * 4)
    second = (fields >> 2 & 3) == k % 4
    column = k % 32 // 4 * 2 + second.to(tl.int32)
    register = column // 8 * 2 + upper
    at = lane * 4 + column % 8 // 2 * 4 + step
    if BITS == 4:
        word = tl.load(words + block * 512 + at)
        code = (word >> (4 * register + column % 2 * 16) & 15) - 8
        first = tl.program_id(1) * (STEP // PART) * padded if GROUP else 0
        scale = tl.load(scales + first + k // PART * padded + tl.program_id(0) * ROWS + r)
        value = (code.to(tl.float32) * scale.to(tl.float32)).to(dt)
    else:
        word = tl.load(words + block * 2048 + register * 512 + at)
        value = (word >> (column % 2 * 16)).to(tl.int16).to(dt, bitcast=True)
    value = tl.where(second | ((fields & 3) == k % 4), value, 0.0)
    to = out + (tl.program_id(0) * ROWS + r).to(tl.int64) * K + tl.program_id(1) * STEP + k
    tl.store(to, value)
