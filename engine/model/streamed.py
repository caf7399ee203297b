"""A model of any checkpoint format in fp32, one decoder block in memory: for exact scores of any size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dispatch import Ops, Target
from ..formats.registry import format_of
from ..model_files import ModelFiles
from .config import ModelConfig
from .decoder import DecoderLayer, causal_attend
from .layers import Linear, RotaryEmbedding
from .loader import load_part, load_slot
from .plan import LM_HEAD, Slot, layer_plan, open_model, weight_plan

TARGET = Target("cpu", torch.float32)
HEAD_ROWS = 8192  # of a head that is stored in half precision: so many are in fp32 at once

Layer = Callable[[Tensor, Sequence[int]], Tensor]  # ([T, H], lengths of the sequences, sum T) -> [T, H]


@dataclass(frozen=True, slots=True)
class _Dense:
    """A PackedLinear: weight [out, in] fp32, bias [out] or None."""

    weight: Tensor
    bias: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class StreamedModel:
    """The model in ``folder``, opened. Errors: CheckpointError, UnsupportedModelError, ConfigError."""

    def __init__(self, folder: Path) -> None:
        files = ModelFiles(folder)
        self.config = ModelConfig.from_dict(files.config)
        self.format = format_of(files)
        self._ops = Ops.resolve(TARGET)
        self._rotary = RotaryEmbedding(self.config)
        self._slots = {slot.name: slot for slot in weight_plan(self.config)}
        self.files = open_model(files, self.format, self._slots.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()

    @property
    def quant_method(self) -> str:
        """The format's name."""
        return self.format.quant_method + (" with residuals" if self.format.extra_files else "")

    @property
    def num_layers(self) -> int:
        """Decoder blocks."""
        return self.config.num_layers

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.config.vocab_size

    @property
    def num_params(self) -> int:
        """Parameters of the model when dense."""
        parts = {part.name: part for slot in self._slots.values() for part in slot.parts}
        return sum(p.out_features * (max(p.in_features, 1) + p.bias) for p in parts.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.files.tensors.values())

    def embedding(self) -> Callable[[Tensor], Tensor]:
        """Token ids [T] -> [T, H]; holds the table as it is stored."""
        table = load_slot(self.files, self.format, self._slots["model.embed_tokens"], TARGET)
        assert isinstance(table, Tensor)
        return lambda token_ids: self._ops.embedding(token_ids, table, torch.float32)

    def layer(self, index: int) -> Layer:
        """Decoder block ``index``."""
        prefix = f"model.layers.{index}."
        weights: dict[str, Linear | Tensor] = {}
        for slot in layer_plan(self.config, index):
            loaded = (
                self._linear(slot)
                if slot.kind == "linear"
                else load_slot(self.files, self.format, slot, TARGET)
            )
            weights[slot.name.removeprefix(prefix)] = loaded
        self.files.close()  # mapped pages that were read count as this process's memory
        block = DecoderLayer(self.config, index, weights, self._ops)

        def run(hidden: Tensor, lengths: Sequence[int]) -> Tensor:
            positions = torch.cat([torch.arange(length) for length in lengths])
            attend = causal_attend(self.config, self._ops, lengths)
            output, residual = block(hidden, None, self._rotary(positions), attend)
            return output + residual

        return run

    def _linear(self, slot: Slot) -> Linear:
        parts = []
        for part in slot.parts:
            weight = load_part(self.files, self.format, slot, part)
            bias = None if weight.bias is None else weight.bias.float()
            parts.append(_Dense(weight.dequantize(), bias))
        return Linear(parts)

    def weights(self, index: int) -> dict[str, Tensor]:
        """The weights [out, in] fp32 of block ``index``'s linears, by module."""
        found = {
            part.name: load_part(self.files, self.format, slot, part).dequantize()
            for slot in layer_plan(self.config, index)
            if slot.kind == "linear"
            for part in slot.parts
        }
        self.files.close()
        return found

    def head(self) -> Callable[[Tensor], Tensor]:
        """The last block's output [T, H] -> log-probabilities [T, vocab] fp32."""
        norm = load_slot(self.files, self.format, self._slots["model.norm"], TARGET)
        assert isinstance(norm, Tensor)
        slot = self._slots[LM_HEAD]
        (part,) = slot.parts
        packed = load_part(self.files, self.format, slot, part)
        weight = packed.values if packed.spec is None else packed.dequantize()

        def logprobs(hidden: Tensor) -> Tensor:
            normed = self._ops.rms_norm(hidden, norm, self.config.rms_norm_eps)
            logits = [F.linear(normed, rows.float()) for rows in torch.split(weight, HEAD_ROWS)]
            return torch.cat(logits, -1).log_softmax(-1)

        return logprobs
