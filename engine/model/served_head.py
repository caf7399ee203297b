"""The output head as ``--lm-head-bits`` has it served: rounded when it is loaded."""

from dataclasses import replace

from ...kernels.layout import PackedWeight, QuantSpec
from ..config import EngineConfig
from ..quantize.grid import round_nearest
from .loader import RoundHead

GROUP_SIZE = 32


def head_rounder(config: EngineConfig) -> RoundHead | None:
    """Rounds a dense head to ``config.lm_head_bits`` in groups of GROUP_SIZE, symmetric; None: leave it."""
    if config.lm_head_bits is None:
        return None
    spec = QuantSpec(config.lm_head_bits, GROUP_SIZE, symmetric=True)

    def round_head(head: PackedWeight) -> PackedWeight:
        return replace(round_nearest(head.dequantize(), spec), bias=head.bias)

    return round_head
