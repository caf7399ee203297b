"""Low-bit linear over the matrix unit the compiler finds: wgmma (sm_90), tcgen05 (sm_100), MFMA (gfx942).

Weights are unpacked as in ``mma_linear``, a step of 128 inputs at a time. Triton chooses layouts: on sm_90
the packed order is that of wgmma's A operand in registers, elsewhere the tile goes through shared memory.
"""

import triton
import triton.language as tl

from .epilogue import finish
from .fragments import (
    ROWS,
    STEP,
    fragments_per_unit,
    row_integers,
    row_pairs,
    unpack,
    vector,
    vectors,
    words_per_unit,
)  # fmt: skip


@triton.jit
def _place(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """(pn, pm) of a program: GROUP_M tiles of tokens pass over the same weights before the next weights."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    band = pid // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    rest = pid % (GROUP_M * tiles_n)
    return rest // height, band * GROUP_M + rest % height


@triton.jit
def addresses(words, pn, N, steps, begin, BITS: tl.constexpr, GROUP: tl.constexpr, NT: tl.constexpr):
    """Where the first plane's words of a step lie, and its row in scales and zeros: [KB, NT, 8, 4, V]."""
    V: tl.constexpr = vector(BITS)
    kb = tl.arange(0, vectors(BITS))[:, None, None, None, None]
    nt = pn * NT + tl.arange(0, NT)[None, :, None, None, None]
    g = tl.arange(0, 8)[None, None, :, None, None]
    t = tl.arange(0, 4)[None, None, None, :, None]
    v = tl.arange(0, V)[None, None, None, None, :]
    at = words + (nt // 4 * steps + begin) * (256 * BITS) + nt % 4 * (32 * V)
    at += kb * (words_per_unit(BITS) * 128 * V) + g * (4 * V) + t * V + v
    row = nt * 16 + g
    if GROUP != 0 and GROUP < STEP:
        unit = kb * V + v
        row += unit * (16 * fragments_per_unit(BITS)) // GROUP * (tl.cdiv(N, ROWS) * ROWS)
    return at, row


@triton.jit
def weights(
    words_at, pairs_at, zeros_at, BITS: tl.constexpr, ZEROS: tl.constexpr, SCALE: tl.constexpr,
    dt: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """A step's weights [BN, STEP]."""
    units = ()
    for plane in tl.static_range(words_per_unit(BITS)):
        at = words_at + plane * (128 * vector(BITS))
        units = units + (tl.load(at, eviction_policy="evict_first"),)
    zeros = ()
    scales = ()
    if ZEROS:
        zeros = row_integers(zeros_at)
    if SCALE:
        scales = row_pairs(pairs_at, dt)
    return unpack(units, zeros, scales, BITS, dt, ASM)


@triton.jit
def _sparse_sum(
    x, starts, values, rows, cols, pn, pm, splits, M, K, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """As in ``mma_linear``: the overlay's part of the sums, [BN, BM]."""
    NT: tl.constexpr = BN // 16
    COLUMNS: tl.constexpr = 0xFFFF if cols.dtype.element_ty == tl.int16 else 0x7FFFFFFF
    nt = tl.arange(0, NT)[:, None, None]
    first = tl.load(starts + pn * (NT // 4) + nt // 4)
    end = tl.load(starts + pn * (NT // 4) + nt // 4 + 1)
    most = tl.max(end - first)
    row = tl.arange(0, 16)[None, :, None]
    token = pm * BM + tl.arange(0, BM)[None, None, :]
    acc = tl.zeros((NT, 16, BM), tl.float32)
    for chunk in range(tl.program_id(1), most, splits):
        live = first + chunk < end
        at = (first + chunk) * 128 + nt % 4 * 32
        at_a = at + tl.arange(0, 32)[None, None, :]
        at_b = at + tl.arange(0, 32)[None, :, None]
        value = tl.load(values + at_a, mask=live, other=0.0)
        a = tl.where(tl.load(rows + at_a, mask=live, other=0) == row, value, 0.0)
        col = tl.load(cols + at_b, mask=live, other=0).to(tl.int32) & COLUMNS
        b = tl.load(x + token.to(tl.int64) * K + col, mask=token < M, other=0.0)
        acc = tl.dot(a, b, acc)
    return tl.reshape(acc, (BN, BM))


@triton.jit(do_not_specialize=["M", "splits", "num_bias"])
def tile_linear(
    x, words, scales, zeros, bias, starts, values, rows, cols, out, partial, locks,
    M, N, K, splits, num_bias,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, SPARSE: tl.constexpr,
    SCALE_WEIGHTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Arguments as of ``mma_linear``. Without SCALE_WEIGHTS ``GROUP`` must be 128 or 0. ASM: PTX unpacks.

    Grid: (tiles of N * tiles of M, splits).
    """
    dt: tl.constexpr = x.dtype.element_ty
    PARTS: tl.constexpr = STEP // GROUP if GROUP else 1
    tl.static_assert(SCALE_WEIGHTS or PARTS == 1)
    pn, pm = _place(M, N, BM, BN, 8)
    per = tl.cdiv(K // STEP, splits)
    begin = tl.program_id(1) * per
    end = tl.minimum(K // STEP, begin + per)
    padded = tl.cdiv(N, ROWS) * ROWS
    words_at, row = addresses(words, pn, N, K // STEP, begin, BITS, GROUP, BN // 16)
    n = tl.arange(0, BN)
    m = tl.arange(0, BM)
    first = begin * PARTS * padded if GROUP else 0
    scales_at = scales + first + pn * BN + n
    pairs_at = scales + first + row
    zeros_at = zeros + first + row
    token = pm * BM + m
    live = (token < M)[:, None]
    x_at = x + token.to(tl.int64)[:, None] * K + (begin * STEP + tl.arange(0, STEP))[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in tl.range(begin, end, num_stages=STAGES):
        w = weights(words_at, pairs_at, zeros_at, BITS, ZEROS, SCALE_WEIGHTS, dt, ASM)
        xs = tl.load(x_at, mask=live, other=0.0, eviction_policy="evict_last")
        if SCALE_WEIGHTS or GROUP == 0:
            acc = tl.dot(w, tl.trans(xs), acc)
        else:
            acc += tl.dot(w, tl.trans(xs)) * tl.load(scales_at).to(tl.float32)[:, None]
        words_at += 256 * BITS
        x_at += STEP
        if GROUP:
            scales_at += PARTS * padded
            pairs_at += PARTS * padded
            zeros_at += PARTS * padded
    if GROUP == 0 and not SCALE_WEIGHTS:
        acc *= tl.load(scales_at).to(tl.float32)[:, None]
    if SPARSE:
        acc += _sparse_sum(x, starts, values, rows, cols, pn, pm, splits, M, K, BM, BN)
    tile = pm * tl.cdiv(N, BN) + pn
    finish(acc, n, m, tile, pn * BN, pm * BM, out, bias, partial, locks, M, N, splits, num_bias)
