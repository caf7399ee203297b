"""The transforms by name, and the places in a block where scales can move from one module to the next."""

from dataclasses import dataclass
from importlib import import_module
from typing import cast

import torch
from torch import Tensor

from ..model.config import ModelConfig
from .options import QuantizeOptions
from .pipeline import Transform
from .results import Rescale
from .source import Block

TRANSFORMS: dict[str, str] = {"awq": ".awq:AWQScaling", "smoothquant": ".smoothquant:SmoothQuant"}


def get_transform(options: QuantizeOptions, default: str = "none") -> Transform | None:
    """``options.transform``, set up; None: ``default``."""
    name = options.transform or default
    if name == "none":
        return None
    module, kind = TRANSFORMS[name].split(":")
    return cast(Transform, getattr(import_module(module, __package__), kind).from_options(options))


@dataclass(frozen=True, slots=True)
class Seam:
    """Where inputs of ``consumer`` (a linear slot) can be divided by whoever makes them.

    producer: a norm's or a linear slot's name; first_row: of its outputs that are meant. repeat: query heads
    that share a KV head: so many inputs of the consumer come from one output; head_dim: their size.
    """

    producer: str
    first_row: int
    consumer: str
    repeat: int = 1
    head_dim: int = 1

    def shared(self, scales: Tensor) -> Tensor:
        """``scales`` [K] of the consumer's inputs -> equal where one output feeds several: their means."""
        if self.repeat == 1:
            return scales
        heads = scales.view(-1, self.repeat, self.head_dim)
        return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)

    def edit(self, scales: Tensor, block: Block) -> Rescale:
        """Divide the outputs by ``scales`` [K], which are ``shared``, and multiply the inputs' weights.

        A norm is divided as its stored dtype can say it; the factors are what it was really divided by.
        """
        divisors = (
            scales if self.repeat == 1 else scales.view(-1, self.repeat, self.head_dim)[:, 0].reshape(-1)
        )
        vector = block.vectors.get(self.producer)
        if vector is not None:
            stored = block.stored_dtypes[self.producer]
            rounded = (vector / divisors).to(stored).float()
            usable = (rounded != 0) & torch.isfinite(rounded)
            divisors = torch.where(usable, vector / rounded, torch.ones_like(vector))
            scales = divisors
        return Rescale(self.producer, self.first_row, divisors, self.consumer, scales)


def seams(config: ModelConfig, index: int) -> list[Seam]:
    """All of the block ``index``, in the order of computation."""
    layer = f"model.layers.{index}"
    value_row = (config.num_heads + config.num_kv_heads) * config.head_dim
    repeat = config.num_heads // config.num_kv_heads
    return [
        Seam(f"{layer}.input_layernorm", 0, f"{layer}.self_attn.qkv_proj"),
        Seam(f"{layer}.self_attn.qkv_proj", value_row, f"{layer}.self_attn.o_proj", repeat, config.head_dim),
        Seam(f"{layer}.post_attention_layernorm", 0, f"{layer}.mlp.gate_up_proj"),
        Seam(f"{layer}.mlp.gate_up_proj", config.intermediate_size, f"{layer}.mlp.down_proj"),
    ]
