"""Activations as a packed weight wants them: inputs in its order, padded with zeros."""

import triton
import triton.language as tl


@triton.jit
def arrange(x, order, out, K_IN, K, BLOCK: tl.constexpr):
    """out[m, k] = x[m, order[k]], zero where order[k] is K_IN. x: [M, K_IN]; out: [M, K].

    Grid: (blocks of K, M).
    """
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.program_id(1).to(tl.int64)
    source = tl.load(order + k, mask=k < K, other=K_IN)
    value = tl.load(x + m * K_IN + source, mask=source < K_IN, other=0.0)
    tl.store(out + m * K + k, value, mask=k < K)
