"""Linear over weights with 2:4 sparsity, compressed: 4-bit codes or halves, by mma.sp.sync, in Gluon.

Of every four consecutive inputs two are kept, so a weight takes 3 bits (codes) or 9 (halves) with its
positions. mma.sp.m16n8k32 takes the kept values as an A fragment of 16 columns and the positions ("Sparse
matrix storage" in the PTX ISA) as its metadata. Triton has no such product: it is inline assembly over
whole fragments, whose layouts are pinned here. The register tensors are [NT, MT, 32 lanes, 4 steps of 32
inputs], MT tiles of 8 tokens.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .epilogue import finish
from .fragments import ROWS, STEP, row_pairs, unit_ptx


@gluon.constexpr_function
def sparse_ptx(bits, bf16, scales):
    """PTX of four MMAs, of 32 inputs each.

    Operands, MMAs fastest: 4 sums; words (1 of codes or 4 of halves for each MMA), metadata (4, by twos the
    same), activations (4 for each MMA), scales (4 and 4, if any), and 4 sums.
    """
    planes = 1 if bits == 4 else 4
    words, meta = 4, 4 + 4 * planes
    b = meta + 4
    s = b + 16
    c = s + (8 if scales else 0)
    kind = "bf16" if bf16 else "f16"
    lines = [".reg .b32 t, u, c, p, q, a0, a1, a2, a3;", ".reg .f32 d0, d1, d2, d3;"]
    lines += [f"mov.f32 d{i}, ${c + i};" for i in range(4)]
    a = ["a0", "a1", "a2", "a3"]
    for k in range(4):
        if bits == 4:
            rows = [[], [f"${s + k}", f"${s + 4 + k}"] if scales else []]
            lines += unit_ptx(4, bf16, a, [f"${words + k}"], rows)
        else:
            a = [f"${words + 4 * i + k}" for i in range(4)]
        right = ", ".join(f"${b + 4 * j + k}" for j in range(4))
        lines.append(
            f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
            f"{{d0, d1, d2, d3}}, {{{', '.join(a)}}}, {{{right}}}, {{d0, d1, d2, d3}}, "
            f"${meta + k}, {k % 2:#x};"
        )
    lines += [f"mov.f32 ${i}, d{i};" for i in range(4)]
    return "{ " + "\n".join(lines) + " }"


@gluon.constexpr_function
def sparse_constraints(bits, scales):
    """The register classes of ``sparse_ptx``'s operands."""
    integers = (4 if bits == 4 else 16) + 4 + 16 + (8 if scales else 0)
    return ",".join(["=f"] * 4 + ["r"] * integers + ["f"] * 4)


@gluon.constexpr_function
def lanes(values, warps):
    """Of [NT, MT, 32, values]: a warp has rows of 16 outputs, a lane its values."""
    return gl.BlockedLayout([1, 1, 1, values], [1, 1, 32, 1], [warps, 1, 1, 1], [3, 2, 1, 0])


@gluon.constexpr_function
def along(layout, axis):
    """The layout of one axis of four, for arange."""
    for other in (3, 2, 1, 0):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _axis(size: gl.constexpr, axis: gl.constexpr, layout: gl.constexpr):
    """arange(size) along ``axis`` of a 4-D tensor."""
    index = gl.arange(0, size, along(layout, axis))
    for other in gl.static_range(4):
        if other != axis:
            index = gl.expand_dims(index, other)
    return index


@gluon.jit
def _at(
    base, pn, steps, begin, NT: gl.constexpr, VALUES: gl.constexpr, BLOCK: gl.constexpr, WARPS: gl.constexpr
):
    """Where a step's words of each lane lie: [NT, 1, 32, VALUES]; BLOCK: words of 64 outputs and a step."""
    L: gl.constexpr = lanes(VALUES, WARPS)
    nt = pn * NT + _axis(NT, 0, L)
    at = base + (nt // 4 * steps + begin) * BLOCK + nt % 4 * (32 * VALUES)
    return at + _axis(32, 2, L) * VALUES + _axis(VALUES, 3, L)


@gluon.jit
def _copy(
    words_at, meta_at, x_at, words_to, meta_to, x_to, tokens, slot, live, PLANES: gl.constexpr
):  # fmt: skip
    """Start copying one step's words, positions and activations, if there is such a step."""
    if live:
        for plane in gl.static_range(PLANES):
            to = words_to[plane].index(slot)
            async_copy.async_copy_global_to_shared(to, words_at + plane * 512, eviction_policy="evict_first")
        async_copy.async_copy_global_to_shared(meta_to.index(slot), meta_at, eviction_policy="evict_first")
        async_copy.async_copy_global_to_shared(
            x_to.index(slot), x_at, mask=tokens, eviction_policy="evict_last"
        )
    async_copy.commit_group()


@gluon.jit
def _x_at(x, pm, M, K, begin, BM: gl.constexpr, WARPS: gl.constexpr):
    """Where a step's activations lie: [BM, STEP], and which tokens there are: [BM, 1]."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    m = gl.expand_dims(pm * BM + gl.arange(0, BM, gl.SliceLayout(1, L)), 1)
    k = begin * STEP + gl.expand_dims(gl.arange(0, STEP, gl.SliceLayout(0, L)), 0)
    return x + m.to(gl.int64) * K + k, m < M


@gluon.jit
def _activations(memory, BM: gl.constexpr, WARPS: gl.constexpr):
    """The four registers of operand B for each step of 32 inputs: int32 [1, MT, 32, 4] each."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    L: gl.constexpr = lanes(4, WARPS)
    b = memory.permute([1, 0]).load(gl.DotOperandLayout(1, MMA, 2)).to(gl.int16, bitcast=True)
    # step j t e | mt g -> mt g t step | j e
    b = gl.permute(gl.reshape(b, [4, 4, 4, 2, BM // 8, 8]), [4, 5, 2, 0, 1, 3])
    low, high = gl.split(b)
    pair = (low.to(gl.int32) & 0xFFFF) | (high.to(gl.int32) << 16)
    even, odd = gl.split(gl.reshape(pair, [BM // 8, 8, 4, 4, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    out = ()
    for register in gl.static_range(4):
        whole = (first, second, third, fourth)[register]
        out = out + (gl.convert_layout(gl.reshape(whole, [1, BM // 8, 32, 4]), L, assert_trivial=True),)
    return out


@gluon.jit
def _twice(values, L: gl.constexpr):
    """[..., 2] -> [..., 4] in layout L, each value twice."""
    NT: gl.constexpr = values.shape[0]
    return gl.convert_layout(gl.reshape(gl.join(values, values), [NT, 1, 32, 4]), L, assert_trivial=True)


@gluon.jit
def _sum(
    x_in, words_in, meta_in, x_at, words_at, meta_at, tokens, count, scales, pn, N, begin,
    BITS: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """The sums [NT, MT, 32, 4] over ``count`` steps from ``begin``. *_at: what is to be copied next."""
    L: gl.constexpr = lanes(4, WARPS)
    dt: gl.constexpr = x_in.dtype
    NT: gl.constexpr = BN // 16
    PLANES: gl.constexpr = 1 if BITS == 4 else 4
    SCALE: gl.constexpr = BITS == 4 and (GROUP == 32 or GROUP == 64)
    ptx: gl.constexpr = sparse_ptx(BITS, dt == gl.bfloat16, SCALE)
    classes: gl.constexpr = sparse_constraints(BITS, SCALE)
    padded = gl.cdiv(N, ROWS) * ROWS
    PARTS: gl.constexpr = STEP // GROUP if GROUP else 1
    first = pn * BN + (begin * PARTS * padded if GROUP else 0)
    L2: gl.constexpr = lanes(2, WARPS)
    row = first + _axis(NT, 0, L2) * 16 + _axis(32, 2, L2) // 4 + _axis(2, 3, L2) * 8
    fragment_row = first + _axis(NT, 0, L) * 16 + _axis(32, 2, L) // 4
    fragment_row += _axis(4, 3, L) * PARTS // 4 * padded
    acc = gl.zeros([NT, BM // 8, 32, 4], gl.float32, L)
    slot = 0
    for step in range(count):
        async_copy.wait_group(STAGES - 2)
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        live = step + (STAGES - 1) < count
        _copy(words_at, meta_at, x_at, words_in, meta_in, x_in, tokens, free, live, PLANES)
        words_at += PLANES * 512
        meta_at += 256
        x_at += STEP
        units = ()
        for plane in gl.static_range(PLANES):
            units = units + (words_in[plane].index(slot).load(L),)
        units = units + (_twice(meta_in.index(slot).load(L2), L),)
        units = units + _activations(x_in.index(slot), BM, WARPS)
        if SCALE:
            units = units + row_pairs(scales + fragment_row, dt)
        if SCALE or GROUP == 0:
            acc = gl.inline_asm_elementwise(
                ptx, classes, units + (acc,), dtype=gl.float32, is_pure=True, pack=4
            )
        else:
            empty = gl.zeros([NT, BM // 8, 32, 4], gl.float32, L)
            total = gl.inline_asm_elementwise(
                ptx, classes, units + (empty,), dtype=gl.float32, is_pure=True, pack=4
            )
            acc += total * _twice(gl.load(scales + row).to(gl.float32), L)
        if GROUP:
            row += PARTS * padded
            fragment_row += PARTS * padded
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    if GROUP == 0 and BITS == 4:
        acc *= _twice(gl.load(scales + row).to(gl.float32), L)
    return acc


@gluon.jit(do_not_specialize=["M", "splits", "num_bias"])
def sparse24_linear(
    x, words, meta, scales, bias, out, partial, locks, M, N, K, splits, num_bias,
    BITS: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """x: [M, K]; words, meta: see ``packing24``; the others as of ``mma_linear``.

    BITS: 4, or 16 (words are halves, scales are not read). Grid: (tiles of N, splits, tiles of M).
    """
    PLANES: gl.constexpr = 1 if BITS == 4 else 4
    NT: gl.constexpr = BN // 16
    pn = gl.program_id(0)
    pm = gl.program_id(2)
    steps = K // STEP
    per = gl.cdiv(steps, splits)
    begin = gl.program_id(1) * per
    count = gl.minimum(steps, begin + per) - begin
    words_at = _at(words, pn, steps, begin, NT, 4, PLANES * 512, WARPS)
    meta_at = _at(meta, pn, steps, begin, NT, 2, 256, WARPS)
    x_at, tokens = _x_at(x, pm, M, K, begin, BM, WARPS)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    words_in = ()
    for _ in gl.static_range(PLANES):
        words_in = words_in + (gl.allocate_shared_memory(gl.int32, [STAGES, NT, 1, 32, 4], flat),)
    meta_in = gl.allocate_shared_memory(gl.int32, [STAGES, NT, 1, 32, 2], flat)
    x_in = gl.allocate_shared_memory(
        x.dtype.element_ty, [STAGES, BM, STEP], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    )
    for stage in gl.static_range(STAGES - 1):
        _copy(
            words_at, meta_at, x_at, words_in, meta_in, x_in, tokens, stage, stage < count, PLANES
        )  # fmt: skip
        words_at += PLANES * 512
        meta_at += 256
        x_at += STEP
    acc = _sum(
        x_in, words_in, meta_in, x_at, words_at, meta_at, tokens, count, scales, pn, N, begin,
        BITS, GROUP, BM, BN, STAGES, WARPS,
    )  # fmt: skip
    # nt mt | g t | hrow e -> nt hrow g | mt t e
    acc = gl.permute(gl.reshape(acc, [NT, BM // 8, 8, 4, 2, 2]), [0, 4, 2, 1, 3, 5])
    LO: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, WARPS], [0, 1])
    acc = gl.convert_layout(gl.reshape(acc, [BN, BM]), LO)
    n = gl.arange(0, BN, gl.SliceLayout(1, LO))
    m = gl.arange(0, BM, gl.SliceLayout(0, LO))
    tile = pm * gl.num_programs(0) + pn
    finish(acc, n, m, tile, pn * BN, pm * BM, out, bias, partial, locks, M, N, splits, num_bias)
