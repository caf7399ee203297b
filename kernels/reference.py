"""Every op in plain torch: the oracle of faster kernels, and the path where none exists. Differentiable.

Shapes: T tokens of a step (all sequences, one after another), H hidden, Hq and Hkv heads, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import Target, WeightTraits
from .layout import PackedWeight
from .paged import AttentionPlan

_FP16_MAX = 65504.0


@dataclass(frozen=True, slots=True, eq=False)
class DenseLinear:
    """weight: [out, in]; bias: [out] or None, both of the dtype that is computed in."""

    weight: Tensor
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return sum(t.numel() * t.element_size() for t in (self.weight, self.bias) if t is not None)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out] of x's dtype."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class _DenseKernel:
    """torch's own linear over the weights as floats."""

    name = "torch"

    def refuses(self, target: Target, *, weight: WeightTraits) -> str | None:
        """Never: everything has a float form."""
        return None

    def repack(self, weight: PackedWeight, target: Target) -> DenseLinear:
        """Float weights of the target's dtype. fp32 where fp16 is slow (a CPU) or would overflow."""
        dtype = target.dtype
        if dtype == torch.float16 and (target.is_cpu or not WeightTraits.of(weight).max_abs <= _FP16_MAX):
            dtype = torch.float32
        bias = None if weight.bias is None else weight.bias.to(target.device, dtype)
        return DenseLinear(weight.dequantize(torch.float32).to(target.device, dtype), bias)


linear = _DenseKernel()


def sparse_product(x: Tensor, matrix: Tensor, out_features: int, bias: Tensor | None) -> Tensor:
    """x: [T, K]; matrix: [N, K], of every four consecutive inputs at most two not zero, both fp16 or bf16.

    bias: fp32 [out_features]. Gives [T, out_features]: rows of the matrix from there on are padding.
    """
    return F.linear(x, matrix[:out_features], None if bias is None else bias.to(x.dtype))


def embedding(token_ids: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """token_ids: [T] int64; table: [vocab, H] of any float dtype. Returns [T, H] of ``dtype``."""
    return F.embedding(token_ids, table).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last axis, the mean in fp32.

    x: [..., N]; weight: [N], or [heads, N] for another one per head.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both [T, H]."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of each head. x: [T, heads, D]; cos, sin: [T, 1, D].

    ``sin`` comes with its first half negated, so that the rotation is x * cos + swap_halves(x) * sin.
    """
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up. x: [T, 2 * I], the gate's outputs first. Returns [T, I]."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def kv_write(k: Tensor, v: Tensor, cache: Tensor, slot_mapping: Tensor) -> None:
    """Put k, v: [T, Hkv, D] at slots [T] of cache: [pages, block_size, 2, Hkv, D], in place."""
    slots = cache.view(-1, *cache.shape[2:])
    for row, slot in enumerate(slot_mapping.tolist()):
        slots[slot, 0] = k[row]
        slots[slot, 1] = v[row]


def paged_attention(q: Tensor, cache: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    """Causal attention of q: [T, Hq, D] over pages that hold the new tokens already. Returns [T, Hq * D]."""
    out = torch.empty_like(q)
    for s in plan.sequences:
        pages = cache[torch.tensor(s.block_table, device=cache.device)]
        tokens = pages.flatten(0, 1)[: s.start + s.count].to(q.dtype)
        rows = slice(s.first, s.first + s.count)
        out[rows] = _attend(q[rows], tokens[:, 0], tokens[:, 1], scale, plan.window)
    return out.flatten(1)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, lengths: Sequence[int]
) -> Tensor:
    """Causal attention within whole sequences of ``lengths`` (their sum is T). Returns [T, Hq * D]."""
    split = zip(*(torch.split(t, list(lengths)) for t in (q, k, v)), strict=True)
    return torch.cat([_attend(q, k, v, scale, window) for q, k, v in split]).flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q: [Q, Hq, D], the last Q of the L tokens of k, v: [L, Hkv, D]. Returns [Q, Hq, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1).transpose(0, 1) for t in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)).float() * scale
    key = torch.arange(k.shape[1], device=q.device)
    query = key[-q.shape[0] :, None]
    hidden = key > query
    if window is not None:
        hidden |= key <= query - window
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(0, 1)
