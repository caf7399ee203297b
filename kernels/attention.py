"""Attention by torch's fused SDPA, for any device. Signatures: ``kernels/reference.py``.

K and V are never copied per query head: grouped heads fold into the query axis (decodes) or are a broadcast
view (chunks). Pages are gathered once per layer, K and V in one copy; a run of neighbouring pages is not
copied at all. The cache is [pages, block_size, 2, Hkv, D], so that a page's K and V lie together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .paged import AttentionPlan, PagedBatch


def kv_write(k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """See ``reference.kv_write``."""
    slots = cache.view(-1, *cache.shape[2:])
    slots[:, 0].index_copy_(0, slot_mapping, k.to(cache.dtype))
    slots[:, 1].index_copy_(0, slot_mapping, v.to(cache.dtype))


def paged_attention(q: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """See ``reference.paged_attention``."""
    num_tokens = q.shape[0]
    if len(plan.batches) == 1:
        return _attend(q, cache, plan.batches[0], scale).reshape(num_tokens, -1)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for batch in plan.batches:
        out[batch.rows] = _attend(q[batch.rows], cache, batch, scale)
    return out.view(num_tokens, -1)


def _attend(q: Tensor, cache: Tensor, batch: PagedBatch, scale: float) -> Tensor:
    """q: [B * Q, Hq, D] -> the same shape."""
    rows, num_heads, head_dim = q.shape
    num_kv_heads = cache.shape[3]
    if isinstance(batch.pages, int):
        pages = cache[batch.pages : batch.pages + batch.num_pages]
    else:
        pages = cache.view(cache.shape[0], -1).index_select(0, batch.pages)
    tokens = pages.view(batch.batch_size, -1, 2, num_kv_heads, head_dim)
    tokens = tokens[:, batch.skip : batch.skip + batch.length].to(q.dtype)
    k, v = tokens[:, :, 0], tokens[:, :, 1]
    if rows == batch.batch_size:
        grouped = q.reshape(rows, num_kv_heads, -1, head_dim)
        out = F.scaled_dot_product_attention(
            grouped, k.transpose(1, 2), v.transpose(1, 2), batch.mask, scale=scale
        )
        return out.reshape(rows, num_heads, head_dim)
    assert batch.batch_size == 1
    return _attend_chunk(q, k[0], v[0], batch.mask, batch.causal, scale)


def _attend_chunk(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """q: [Q, Hq, D]; k, v: [L, Hkv, D]; mask: [1, 1, Q, L]. KV heads are the batch, heads share one."""
    num_queries, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    groups = num_heads // num_kv_heads
    grouped = q.reshape(num_queries, num_kv_heads, groups, head_dim).permute(1, 2, 0, 3)
    k, v = (t.transpose(0, 1)[:, None].expand(-1, groups, -1, -1) for t in (k, v))
    out = F.scaled_dot_product_attention(grouped, k, v, mask, is_causal=causal, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(num_queries, num_heads, head_dim)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, lengths: Sequence[int]
) -> Tensor:
    """See ``reference.causal_attention``."""
    outs = []
    split = zip(*(torch.split(t, list(lengths)) for t in (q, k, v)), strict=True)
    for q_one, k_one, v_one in split:
        length = q_one.shape[0]
        mask = None
        if window is not None and window < length:
            ones = torch.ones(length, length, dtype=torch.bool, device=q.device)
            mask = ones.tril().triu(1 - window)[None, None]
        outs.append(_attend_chunk(q_one, k_one, v_one, mask, mask is None, scale))
    return torch.cat(outs).flatten(1)
