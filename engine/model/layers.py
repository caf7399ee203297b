"""Where weights meet activations, and rotary positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.dispatch import Choice, PackedLinear, Target, WeightTraits, choose
from ...kernels.layout import PackedWeight
from .config import ModelConfig


class Linear:
    """One linear module: one packed weight, or several side by side whose outputs are concatenated.

    ``choices``: per packed weight, the kernel that took it and why better ones refused.
    """

    def __init__(self, parts: Sequence[PackedLinear], choices: Sequence[Choice] = ()) -> None:
        assert parts
        self.parts = tuple(parts)
        self.choices = tuple(choices)

    @staticmethod
    def build(weights: Sequence[PackedWeight], target: Target) -> "Linear":
        """Fuse neighbours where they allow it, and give each to the best kernel for ``target``."""
        fused = PackedWeight.cat(list(weights))
        choices = [choose("linear", target, weight=WeightTraits.of(weight)) for weight in fused]
        parts = [
            choice.implementation.repack(weight, target)
            for choice, weight in zip(choices, fused, strict=True)
        ]
        return Linear(parts, choices)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return sum(part.nbytes for part in self.parts)

    def forward(self, x: Tensor, context: object = None) -> Tensor:
        """[T, in_features] -> [T, out_features]. ``context`` is for adapters and experts; none exist yet."""
        if len(self.parts) == 1:
            return self.parts[0](x)
        return torch.cat([part(x) for part in self.parts], -1)

    __call__ = forward


class RotaryEmbedding:
    """Angles of rotary positions, computed per token: no table, so any length costs nothing.

    Dynamic NTK: beyond the trained length, a token's frequencies follow from its own position, as they do
    in transformers when tokens come one at a time; so they depend neither on chunks nor on other requests.
    """

    def __init__(self, config: ModelConfig, device: str = "cpu") -> None:
        self._rope = config.rope
        self._dim = config.head_dim
        exponents = torch.arange(0, self._dim, 2, dtype=torch.float32, device=device) / self._dim
        self._exponents = exponents
        self._frequencies = _frequencies(config, exponents)

    def __call__(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """positions: [T] int64. Returns cos, sin: [T, 1, D]; sin's first half is negated (see ``rope``)."""
        where = positions.to(torch.float32)[:, None]
        frequencies = self._dynamic(where) if self._rope.type == "dynamic" else self._frequencies
        angles = where * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._rope.attention_factor != 1.0:
            cos, sin = cos * self._rope.attention_factor, sin * self._rope.attention_factor
        return torch.cat((cos, cos), -1)[:, None].to(dtype), torch.cat((-sin, sin), -1)[:, None].to(dtype)

    def _dynamic(self, where: Tensor) -> Tensor:
        """[T, D/2]: frequencies at each position, for the base that its length asks for."""
        trained, factor = self._rope.original_max_position_embeddings, self._rope.factor
        length = (where + 1).clamp(min=trained)
        stretch = (factor * length / trained - (factor - 1)) ** (self._dim / (self._dim - 2))
        return 1.0 / (self._rope.theta * stretch) ** self._exponents


def _frequencies(config: ModelConfig, exponents: Tensor) -> Tensor:
    """[D/2] radians per position, the scaled types after ``modeling_rope_utils.py`` of transformers."""
    rope = config.rope
    plain = 1.0 / rope.theta**exponents
    if rope.type == "linear":
        return plain / rope.factor
    if rope.type == "llama3":
        trained = rope.original_max_position_embeddings
        wavelength = 2 * math.pi / plain
        # 1 where a wave turns often within the trained length (kept), 0 where seldom (divided by factor).
        keep = (trained / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = keep.clamp(0, 1)
        return (1 - keep) * plain / rope.factor + keep * plain
    if rope.type == "yarn":
        low, high = (_yarn_dimension(config, turns) for turns in (rope.beta_fast, rope.beta_slow))
        if rope.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, config.head_dim - 1)
        steps = torch.arange(config.head_dim // 2, dtype=torch.float32, device=exponents.device)
        ramp = ((steps - low) / (high - low if high != low else 0.001)).clamp(0, 1)
        return plain / rope.factor * ramp + plain * (1 - ramp)
    return plain


def _yarn_dimension(config: ModelConfig, turns: float) -> float:
    """The (fractional) dimension whose wave turns ``turns`` times within the trained length."""
    trained = config.rope.original_max_position_embeddings
    return config.head_dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(config.rope.theta))
