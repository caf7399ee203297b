"""The dense checkpoint that is quantized: read module by module, and block by block for calibration."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dispatch import Ops, Target
from ...kernels.layout import PackedWeight
from ..errors import ConfigError
from ..formats.dense import DenseFormat
from ..formats.safetensors_files import SafetensorsFiles
from ..model.config import ModelConfig
from ..model.decoder import Attend, DecoderLayer, Rotary
from ..model.layers import Linear
from ..model.loader import load_part, load_slot
from ..model.plan import EMBEDDING, Part, Slot, find_problems, layer_plan, problems_error, weight_plan
from ..model_files import ModelFiles

TARGET = Target("cpu", torch.float32)


class Source:
    """A dense model's folder, opened. Errors: CheckpointError, UnsupportedModelError, ConfigError."""

    def __init__(self, folder: Path) -> None:
        self.model = ModelFiles(folder)
        if self.model.quantize_config is not None:
            method = self.model.quantize_config.get("quant_method", "gptq")
            raise ConfigError(f"MODEL {folder}: is quantized already ({method}); give the original")
        self.config = ModelConfig.from_dict(self.model.config)
        self.files = SafetensorsFiles(folder)
        problems = find_problems(weight_plan(self.config), DenseFormat(), self.files.tensors)
        if problems:
            self.files.close()
            raise problems_error(folder, problems)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()

    def linear_slots(self, layer: int) -> list[Slot]:
        """The linears of one decoder block, in the order of their computation."""
        return [slot for slot in layer_plan(self.config, layer) if slot.kind == "linear"]

    def parts(self) -> Iterator[tuple[Slot, Part]]:
        """All modules that may be quantized, in order: the decoder blocks' linears."""
        for layer in range(self.config.num_layers):
            for slot in self.linear_slots(layer):
                for part in slot.parts:
                    yield slot, part

    def read(self, slot: Slot, part: Part) -> PackedWeight:
        """One module as stored. CheckpointError where it is not finite."""
        return load_part(self.files, DenseFormat(), slot, part)

    def embed(self, token_ids: Tensor, ops: Ops) -> Tensor:
        """[T, H] fp32 for ``token_ids`` [T]."""
        slot = next(slot for slot in weight_plan(self.config) if slot.name == EMBEDDING)
        table = load_slot(self.files, DenseFormat(), slot, TARGET)
        assert isinstance(table, Tensor)
        return ops.embedding(token_ids, table, torch.float32)

    def block(self, layer: int, ops: Ops) -> "Block":
        """One decoder block in fp32."""
        prefix = f"model.layers.{layer}."
        weights: dict[str, Linear | Tensor] = {}
        linears: dict[str, ObservedWeight] = {}
        for slot in layer_plan(self.config, layer):
            if slot.kind == "linear":
                linears[slot.name] = ObservedWeight.of([self.read(slot, part) for part in slot.parts])
                weights[slot.name.removeprefix(prefix)] = Linear([linears[slot.name]])
            else:
                weights[slot.name.removeprefix(prefix)] = load_slot(self.files, DenseFormat(), slot, TARGET)
        return Block(DecoderLayer(self.config, layer, weights, ops), linears)


@dataclass(slots=True, eq=False)
class ObservedWeight:
    """A PackedLinear in fp32 whose inputs can be watched and whose rows can be replaced.

    weight: [out, in]; bias: [out] or None; observe: called with each input [T, in].
    """

    weight: Tensor
    bias: Tensor | None
    observe: Callable[[Tensor], None] | None = field(default=None)

    @staticmethod
    def of(parts: list[PackedWeight]) -> "ObservedWeight":
        """Parts of one slot side by side along the outputs."""
        biases = [part.bias.float() for part in parts if part.bias is not None]
        assert len(biases) in (0, len(parts))
        weight = torch.cat([part.values.float() for part in parts])
        return ObservedWeight(weight, torch.cat(biases) if biases else None)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        if self.observe is not None:
            self.observe(x)
        return F.linear(x, self.weight, self.bias)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Block:
    """A decoder block and its linears by slot name."""

    layer: DecoderLayer
    linears: dict[str, ObservedWeight]

    def __call__(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """[T, H], the block's full input -> its full output."""
        output, residual = self.layer(hidden, None, rotary, attend)
        return output + residual
