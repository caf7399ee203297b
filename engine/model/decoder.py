"""The decoder of the Llama family: Llama 2/3, Mistral, Qwen2, Qwen3, SmolLM.

Attention is an argument, and linears do what they like with their weights: serving, calibration and
scoring run this same code. Nothing is computed in place, so it is differentiable where its ops are.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ...kernels.dispatch import Ops
from .config import ModelConfig
from .layers import Linear, RotaryEmbedding

# (layer index, q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, Hq * D]
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Rotary = tuple[Tensor, Tensor]
Rotate = Callable[[Tensor, torch.dtype], Rotary]  # positions [T], dtype -> cos, sin


class DecoderLayer:
    """One block. ``weights`` are keyed relative to ``model.layers.N.``: norms are vectors, others Linears."""

    def __init__(
        self, config: ModelConfig, index: int, weights: Mapping[str, Linear | Tensor], ops: Ops
    ) -> None:
        self.index = index
        self.config = config
        self.ops = ops
        self.input_layernorm = _vector(weights, "input_layernorm")
        self.post_attention_layernorm = _vector(weights, "post_attention_layernorm")
        self.qkv_proj = _linear(weights, "self_attn.qkv_proj")
        self.o_proj = _linear(weights, "self_attn.o_proj")
        self.gate_up_proj = _linear(weights, "mlp.gate_up_proj")
        self.down_proj = _linear(weights, "mlp.down_proj")
        self.qk_norm = _qk_norm(config, weights) if config.qk_norm else None

    def __call__(
        self, hidden: Tensor, residual: Tensor | None, rotary: Rotary, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """hidden, residual: [T, H]; returns the block's output and the residual it is yet to be added to.

        ``residual`` None: ``hidden`` is the embedding, or any block's full input.
        """
        normed, residual = self.attention_input(hidden, residual)
        attended = self.attention(normed, rotary, attend)
        normed, residual = self.mlp_input(self.o_proj(attended), residual)
        return self.down_proj(self.mlp(normed)), residual

    def attention_input(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What ``qkv_proj`` reads, and the residual; both [T, H]."""
        eps, norm = self.config.rms_norm_eps, self.input_layernorm
        if residual is None:
            return self.ops.rms_norm(hidden, norm, eps), hidden
        return self.ops.add_rms_norm(hidden, residual, norm, eps)

    def mlp_input(self, attended: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What ``gate_up_proj`` reads, and the residual; both [T, H]. attended: [T, H] from ``o_proj``."""
        return self.ops.add_rms_norm(
            attended, residual, self.post_attention_layernorm, self.config.rms_norm_eps
        )

    def mlp(self, normed: Tensor) -> Tensor:
        """What ``down_proj`` reads: [T, H] -> [T, I]."""
        return self.ops.silu_and_mul(self.gate_up_proj(normed))

    def attention(self, normed: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """What ``o_proj`` reads: [T, H] -> [T, Hq * D]."""
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv = self.qkv_proj(normed).view(-1, heads + 2 * kv_heads, self.config.head_dim)
        qk = qkv[:, : heads + kv_heads]
        if self.qk_norm is not None:
            qk = self.ops.rms_norm(qk, self.qk_norm, self.config.rms_norm_eps)
        qk = self.ops.rope(qk, *rotary)
        return attend(self.index, qk[:, :heads], qk[:, heads:], qkv[:, heads + kv_heads :])


class Decoder:
    """The whole model over ``weights`` by slot name (see ``engine/model/plan.py``).

    ``model.embed_tokens``: [vocab, H] tensor of any float dtype; ``lm_head``: a Linear (a tied head is one
    over the embedding's weights); norms: vectors of ``dtype``, which activations have.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Linear | Tensor],
        ops: Ops,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = config
        self.ops = ops
        self.dtype = dtype
        self.embed_tokens = _vector(weights, "model.embed_tokens")
        self.norm = _vector(weights, "model.norm")
        self.lm_head = _linear(weights, "lm_head")
        self.rotary: Rotate = RotaryEmbedding(config, str(self.embed_tokens.device))
        self.layers = [
            DecoderLayer(config, index, _below(weights, f"model.layers.{index}."), ops)
            for index in range(config.num_layers)
        ]

    def __call__(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """token_ids, positions: [T] int64. Returns the final norm's output, [T, H]."""
        hidden = self.ops.embedding(token_ids, self.embed_tokens, self.dtype)
        residual = None
        rotary = self.rotary(positions, self.dtype)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, rotary, attend)
        normed, _ = self.ops.add_rms_norm(hidden, residual, self.norm, self.config.rms_norm_eps)
        return normed

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, vocab] fp32."""
        return self.lm_head(hidden).float()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all linears and the embedding (norms are left out)."""
        linears = [
            linear
            for layer in self.layers
            for linear in (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
        ]
        table = self.embed_tokens
        return sum(x.nbytes for x in [*linears, self.lm_head]) + table.numel() * table.element_size()


def causal_attend(config: ModelConfig, ops: Ops, lengths: Sequence[int]) -> Attend:
    """Attention within whole sequences of ``lengths``, without a cache: for calibration and scoring."""
    scale = 1 / math.sqrt(config.head_dim)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.causal_attention(q, k, v, scale, config.windows[layer], lengths)

    return attend


def _below(weights: Mapping[str, Linear | Tensor], prefix: str) -> dict[str, Linear | Tensor]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def _linear(weights: Mapping[str, Linear | Tensor], name: str) -> Linear:
    linear = weights[name]
    assert not isinstance(linear, Tensor), name
    return linear


def _vector(weights: Mapping[str, Linear | Tensor], name: str) -> Tensor:
    tensor = weights[name]
    assert isinstance(tensor, Tensor), name
    return tensor


def _qk_norm(config: ModelConfig, weights: Mapping[str, Linear | Tensor]) -> Tensor:
    """[Hq + Hkv, D]: q's norm for each query head, then k's for each KV head, so that one call does both."""
    q = _vector(weights, "self_attn.q_norm").expand(config.num_heads, -1)
    k = _vector(weights, "self_attn.k_norm").expand(config.num_kv_heads, -1)
    return torch.cat([q, k])
