"""How a tile of sums becomes outputs: the same for Triton's and Gluon's kernels."""

import triton
import triton.language as tl


@triton.jit
def finish(
    acc, n, m, tile, first_n, first_m, out, bias, partial, locks, M, N, splits, num_bias,
):  # fmt: skip
    """Sum the splits' sums in their order, add the bias, store to out: [M, N].

    acc: [BN, BM] fp32; n, m: indices within the tile in acc's layout; partial: fp32 [tiles, splits, BM, BN];
    locks: int32 [tiles], zeros; num_bias: N, or 0 for none. The program that comes last does it, and leaves
    the lock at zero: the result does not depend on the order of programs, and a CUDA graph can be replayed.
    """
    BN: tl.constexpr = acc.shape[0]
    BM: tl.constexpr = acc.shape[1]
    row = first_n + n
    token = first_m + m
    kept = (row < N)[:, None] & (token < M)[None, :]
    last = True
    if splits > 1:
        mine = partial + tile.to(tl.int64) * (splits * BM * BN) + (n[:, None] + m[None, :] * BN)
        tl.store(mine + tl.program_id(1) * (BM * BN), acc)
        tl.debug_barrier()
        last = tl.atomic_add(locks + tile, 1, sem="acq_rel") == splits - 1
        if last:
            acc = tl.load(mine, cache_modifier=".cg")
            for split in range(1, splits):
                acc += tl.load(mine + split * (BM * BN), cache_modifier=".cg")
            tl.store(locks + tile, 0)
    if last:
        acc += tl.load(bias + row, mask=row < num_bias, other=0.0)[:, None]
        to = out + token.to(tl.int64)[None, :] * N + row[:, None]
        tl.store(to, acc.to(out.dtype.element_ty), mask=kept)
