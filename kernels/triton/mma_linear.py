"""Low-bit linear over mma.sync, in Gluon: every layout is written down, and a packing that does not match the
fragments is a compile error. For NVIDIA from sm_80; decode everywhere, prefill where there is no wgmma.

out[m, n] = sum_k weight[n, k] x[m, k]: weights are the MMA's operand A, unpacked in the registers of the lane
that copied them; activations are operand B. Both come through shared memory by cp.async, several steps ahead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from .epilogue import finish
from .fragments import ROWS, STEP, row_integers, row_pairs, unpack, vector, vectors, words_per_unit


@gluon.constexpr_function
def word_layout(vector, warps):
    """Of words [KB, NT, 8 (g), 4 (t), V]: a warp has whole rows of fragments."""
    return gl.BlockedLayout([1, 1, 1, 1, vector], [1, 1, 8, 4, 1], [1, warps, 1, 1, 1], [4, 3, 2, 1, 0])


@gluon.constexpr_function
def along(layout, axis):
    """The layout of one axis of five, for arange."""
    for other in (4, 3, 2, 1, 0):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.constexpr_function
def mma_layout(warps):
    """Of sums [BN, BM]: each warp has rows of 16 outputs and every token."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])


@gluon.jit
def _axis(size: gl.constexpr, axis: gl.constexpr, layout: gl.constexpr):
    """arange(size) along ``axis`` of a 5-D tensor."""
    index = gl.arange(0, size, along(layout, axis))
    for other in gl.static_range(5):
        if other != axis:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit
def _words_at(words, pn, steps, begin, BITS: gl.constexpr, NT: gl.constexpr, WARPS: gl.constexpr):
    """Where the first plane's words of a step lie: [KB, NT, 8, 4, V]."""
    V: gl.constexpr = vector(BITS)
    L: gl.constexpr = word_layout(V, WARPS)
    nt = pn * NT + _axis(NT, 1, L)
    at = words + (nt // 4 * steps + begin) * (256 * BITS) + nt % 4 * (32 * V)
    at += _axis(vectors(BITS), 0, L) * (words_per_unit(BITS) * 128 * V)
    return at + _axis(8, 2, L) * (4 * V) + _axis(4, 3, L) * V + _axis(V, 4, L)


@gluon.jit
def _x_at(x, pm, M, K, begin, BM: gl.constexpr, WARPS: gl.constexpr):
    """Where a step's activations lie: [BM, STEP], and which tokens there are: [BM, 1]."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    m = gl.expand_dims(pm * BM + gl.arange(0, BM, gl.SliceLayout(1, L)), 1)
    k = begin * STEP + gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, L)), 0)
    return x + m.to(gl.int64) * K + k, m < M


@gluon.jit
def _copy(words_at, words_to, x_at, x_to, tokens, slot, live, BITS: gl.constexpr):
    """Start copying one step's words and activations, if there is such a step."""
    if live:
        for plane in gl.static_range(words_per_unit(BITS)):
            at = words_at + plane * (128 * vector(BITS))
            to = words_to[plane].index(slot)
            async_copy.async_copy_global_to_shared(to, at, eviction_policy="evict_first")
        to = x_to.index(slot)
        async_copy.async_copy_global_to_shared(to, x_at, mask=tokens, eviction_policy="evict_last")
    async_copy.commit_group()


@gluon.jit
def _weights(
    words_in, slot, scales_at, zeros_at, BITS: gl.constexpr, PART: gl.constexpr, PARTS: gl.constexpr,
    ZEROS: gl.constexpr, SCALE: gl.constexpr, dt: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Part ``PART`` of ``PARTS`` of a step as operand A: [BN, STEP / PARTS]."""
    KB: gl.constexpr = vectors(BITS)
    V: gl.constexpr = vector(BITS)
    KBP: gl.constexpr = max(1, KB // PARTS)
    VP: gl.constexpr = V * KB // KBP // PARTS
    zeros = ()
    scales = ()
    if ZEROS:
        zeros = row_integers(zeros_at)
    if SCALE:
        scales = row_pairs(scales_at, dt)
    units = ()
    for plane in gl.static_range(words_per_unit(BITS)):
        memory = words_in[plane].index(slot)
        memory = memory.slice(PART * KB // PARTS, KBP, 0).slice(PART * VP % V, VP, 4)
        units = units + (memory.load(word_layout(VP, WARPS)),)
    tile = unpack(units, zeros, scales, BITS, dt, True)
    return gl.convert_layout(tile, gl.DotOperandLayout(0, mma_layout(WARPS), 2), assert_trivial=True)


@gluon.jit(do_not_specialize=["M", "splits", "num_bias"])
def mma_linear(
    x, words, scales, zeros, bias, starts, values, rows, cols, out, partial, locks,
    M, N, K, splits, num_bias,
    BITS: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, SPARSE: gl.constexpr,
    SCALE_WEIGHTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """x: [M, K], K a multiple of 128; words ... cols: see ``packing``; out: [M, N].

    partial: fp32, splits * BM * BN for each tile; locks: int32 zeros, one for each tile; num_bias: N, or 0.
    GROUP: 32, 64, 128, or 0 for one group over the whole row. SCALE_WEIGHTS: scale the weights, which rounds
    them, instead of the sums of each group. Grid: (tiles of N, splits, tiles of M).
    """
    dt: gl.constexpr = x.dtype.element_ty
    pn = gl.program_id(0)
    pm = gl.program_id(2)
    per = gl.cdiv(K // STEP, splits)
    begin = gl.program_id(1) * per
    count = gl.minimum(K // STEP, begin + per) - begin
    words_at = _words_at(words, pn, K // STEP, begin, BITS, BN // 16, WARPS)
    x_at, tokens = _x_at(x, pm, M, K, begin, BM, WARPS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    shape: gl.constexpr = [STAGES, vectors(BITS), BN // 16, 8, 4, vector(BITS)]
    words_in = ()
    for _ in gl.static_range(words_per_unit(BITS)):
        words_in = words_in + (gl.allocate_shared_memory(gl.int32, shape, flat),)
    x_in = gl.allocate_shared_memory(dt, [STAGES, BM, STEP], gl.SwizzledSharedLayout(8, 1, 8, [1, 0]))
    for stage in gl.static_range(STAGES - 1):
        at = words_at + stage * (256 * BITS)
        _copy(at, words_in, x_at + stage * STEP, x_in, tokens, stage, stage < count, BITS)
    first = gl.zeros([BN, BM], gl.float32, mma_layout(WARPS))
    if SPARSE:  # while the first steps are on their way
        first = _sparse_sum(x, starts, values, rows, cols, pn, pm, splits, M, K, BM, BN, WARPS)
    acc = _sum(
        first, x_in, words_in, x_at + (STAGES - 1) * STEP, words_at + (STAGES - 1) * (256 * BITS), tokens,
        count, scales, zeros, pn, N, begin, BITS, GROUP, ZEROS, SCALE_WEIGHTS, BM, BN, STAGES, WARPS,
    )  # fmt: skip
    LO: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, WARPS], [0, 1])
    acc = gl.convert_layout(acc, LO)
    n = gl.arange(0, BN, gl.SliceLayout(1, LO))
    m = gl.arange(0, BM, gl.SliceLayout(0, LO))
    tile = pm * gl.num_programs(0) + pn
    finish(acc, n, m, tile, pn * BN, pm * BM, out, bias, partial, locks, M, N, splits, num_bias)


@gluon.jit
def _sum(
    first_sum, x_in, words_in, x_at, words_at, tokens, count, scales, zeros, pn, N, begin,
    BITS: gl.constexpr, GROUP: gl.constexpr, ZEROS: gl.constexpr, SCALE_WEIGHTS: gl.constexpr,
    BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """``first_sum`` and the sums [BN, BM] of ``count`` steps from ``begin``. *_at: what is copied next."""
    L: gl.constexpr = mma_layout(WARPS)
    PARTS: gl.constexpr = STEP // GROUP if GROUP else 1  # the inputs of a part share scales
    LP: gl.constexpr = word_layout(max(1, min(vector(BITS), vector(BITS) * vectors(BITS) // PARTS)), WARPS)
    padded = gl.cdiv(N, ROWS) * ROWS
    first = pn * BN + (begin * PARTS * padded if GROUP else 0)
    scales_at = scales + (first + gl.arange(0, BN, gl.SliceLayout(1, L)))
    fragment_row = first + _axis(BN // 16, 1, LP) * 16 + _axis(8, 2, LP)
    pairs_at = scales + fragment_row
    zeros_at = zeros + fragment_row
    LATER: gl.constexpr = GROUP == 0 and not SCALE_WEIGHTS  # one scale for all: it is applied at the end
    acc = gl.zeros([BN, BM], gl.float32, L) if LATER else first_sum
    slot = 0
    for step in range(count):
        async_copy.wait_group(STAGES - 2)
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        _copy(words_at, words_in, x_at, x_in, tokens, free, step + (STAGES - 1) < count, BITS)
        words_at += 256 * BITS
        x_at += STEP
        for part in gl.static_range(PARTS):
            at = part * padded
            a = _weights(
                words_in, slot, pairs_at + at, zeros_at + at, BITS, part, PARTS, ZEROS, SCALE_WEIGHTS,
                x_in.dtype, WARPS,
            )  # fmt: skip
            b = x_in.index(slot).permute([1, 0]).slice(part * (STEP // PARTS), STEP // PARTS, 0)
            b = b.load(gl.DotOperandLayout(1, L, 2))
            if SCALE_WEIGHTS or GROUP == 0:
                acc = mma_v2(a, b, acc)
            else:
                total = mma_v2(a, b, gl.zeros([BN, BM], gl.float32, L))
                acc += total * gl.expand_dims(gl.load(scales_at + at).to(gl.float32), 1)
        if GROUP:
            scales_at += PARTS * padded
            pairs_at += PARTS * padded
            zeros_at += PARTS * padded
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    if LATER:
        acc = acc * gl.expand_dims(gl.load(scales_at).to(gl.float32), 1) + first_sum
    return acc


@gluon.constexpr_function
def sparse_layout(warps):
    """Of sums [NT, 16, BM]: those of ``mma_layout`` by groups of 16 outputs."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@gluon.constexpr_function
def along3(layout, axis):
    """The layout of one axis of three, for arange."""
    for other in (2, 1, 0):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _axis3(size: gl.constexpr, axis: gl.constexpr, layout: gl.constexpr):
    """arange(size) along ``axis`` of a 3-D tensor."""
    index = gl.arange(0, size, along3(layout, axis))
    for other in gl.static_range(3):
        if other != axis:
            index = gl.expand_dims(index, other)
    return index


@gluon.constexpr_function
def entry_layout(fragments, warps):
    """Of entries [NT, 4 (t), 8]: a lane has 8 that follow each other, the same for all g."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4]]
    while warps << (len(registers) - 3) < fragments:
        registers.append([warps << (len(registers) - 3), 0, 0])
    lanes = [[0, 1, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    of_warps = [[1 << bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, of_warps, [], [fragments, 4, 8])


@gluon.jit
def _entries(at, live, layout: gl.constexpr):
    """Entries [NT, 4, 8] as they meet columns of A and rows of B: [NT, 32]. Any order would do."""
    NT: gl.constexpr = at.shape[0]
    found = gl.reshape(gl.load(at, mask=live, other=0), [NT, 4, 2, 2, 2])
    found = gl.reshape(gl.permute(found, [0, 2, 3, 1, 4]), [NT, 32])
    return gl.convert_layout(found, layout, assert_trivial=True)


@gluon.jit
def _sparse_sum(
    x, starts, values, rows, cols, pn, pm, splits, M, K,
    BM: gl.constexpr, BN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The overlay's part of the sums: [BN, BM].

    Chunks of 32 entries for each 16 outputs, as MMAs: A has an entry's value in its row, B the activations
    that the entries meet. Splits take chunks in turn. Blocks differ in chunks.
    """
    NT: gl.constexpr = BN // 16
    L: gl.constexpr = sparse_layout(WARPS)
    LE: gl.constexpr = entry_layout(NT, WARPS)
    LA: gl.constexpr = gl.DotOperandLayout(0, L, 2)
    LB: gl.constexpr = gl.DotOperandLayout(1, L, 2)
    COLUMNS: gl.constexpr = 0xFFFF if cols.dtype.element_ty == gl.int16 else 0x7FFFFFFF
    acc = gl.zeros([NT, 16, BM], gl.float32, L)
    starts += pn * (NT // 4)
    most = 0
    for block in gl.static_range(NT // 4):
        most = gl.maximum(most, gl.load(starts + block + 1) - gl.load(starts + block))
    nt = _axis3(NT, 0, LE)
    first = gl.load(starts + nt // 4)
    count = gl.load(starts + nt // 4 + 1) - first
    entry = first * 128 + nt % 4 * 32 + _axis3(4, 1, LE) * 8 + _axis3(8, 2, LE)
    row = _axis3(16, 1, LA)
    token = pm * BM + _axis3(BM, 2, LB)
    x_at = x + token.to(gl.int64) * K
    for chunk in range(gl.program_id(1), most, splits):
        live = chunk < count
        value = gl.expand_dims(_entries(values + (entry + chunk * 128), live, gl.SliceLayout(1, LA)), 1)
        of_row = gl.expand_dims(_entries(rows + (entry + chunk * 128), live, gl.SliceLayout(1, LA)), 1)
        a = gl.where(of_row.to(gl.int32) == row, value, 0.0)
        col = gl.expand_dims(_entries(cols + (entry + chunk * 128), live, gl.SliceLayout(2, LB)), 2)
        b = gl.load(x_at + (col.to(gl.int32) & COLUMNS), mask=token < M, other=0.0)
        acc = mma_v2(a, b, acc)
    return gl.convert_layout(gl.reshape(acc, [BN, BM]), mma_layout(WARPS), assert_trivial=True)
