"""The dense checkpoint that is quantized: read module by module, and block by block for calibration."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dispatch import Ops, Target
from ...kernels.layout import PackedWeight
from ..errors import CheckpointError, LayerError
from ..formats.dense import DenseFormat
from ..model.config import ModelConfig
from ..model.decoder import Attend, DecoderLayer, Rotary
from ..model.layers import Linear
from ..model.loader import load_part, load_slot
from ..model.plan import (
    EMBEDDING,
    LM_HEAD,
    Part,
    Slot,
    layer_plan,
    open_model,
    weight_plan,
)
from ..model_files import original_files
from .results import QuantizedBlock, Rescale

TARGET = Target("cpu", torch.float32)


class Source:
    """A dense model's folder, opened. Errors: CheckpointError, UnsupportedModelError, ConfigError."""

    def __init__(self, folder: Path) -> None:
        self.model = original_files(folder)
        self.config = ModelConfig.from_dict(self.model.config)
        self.files = open_model(self.model, DenseFormat(), weight_plan(self.config))

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
        """One module as stored. LayerError where it is not finite."""
        try:
            return load_part(self.files, DenseFormat(), slot, part)
        except CheckpointError as error:
            raise LayerError(error.message, layer=part.name) from error

    def embed(self, token_ids: Tensor, ops: Ops) -> Tensor:
        """[T, H] fp32 for ``token_ids`` [T]."""
        return ops.embedding(token_ids, self._dense(EMBEDDING), torch.float32)

    def head(self, ops: Ops) -> Callable[[Tensor], Tensor]:
        """The last block's output [T, H] -> logits [T, vocab], fp32 and differentiable."""
        norm, eps = self._dense("model.norm"), self.config.rms_norm_eps
        name = EMBEDDING if self.config.tie_word_embeddings else LM_HEAD
        weight = self.files.get(f"{name}.weight").float()
        return lambda hidden: F.linear(ops.rms_norm(hidden, norm, eps), weight)

    def _dense(self, name: str) -> Tensor:
        slot = next(slot for slot in weight_plan(self.config) if slot.name == name)
        tensor = load_slot(self.files, DenseFormat(), slot, TARGET)
        assert isinstance(tensor, Tensor)
        return tensor

    def block(self, layer: int, ops: Ops) -> "Block":
        """One decoder block in fp32."""
        prefix = f"model.layers.{layer}."
        weights: dict[str, Linear | Tensor] = {}
        linears: dict[str, ObservedWeight] = {}
        vectors: dict[str, Tensor] = {}
        stored: dict[str, torch.dtype] = {}
        slots = layer_plan(self.config, layer)
        for slot in slots:
            key = slot.name.removeprefix(prefix)
            if slot.kind == "linear":
                linears[slot.name] = ObservedWeight.of([self.read(slot, part) for part in slot.parts])
                weights[key] = Linear([linears[slot.name]])
            else:
                tensor = load_slot(self.files, DenseFormat(), slot, TARGET)
                assert isinstance(tensor, Tensor)
                weights[key] = vectors[slot.name] = tensor.clone()
                stored[slot.name] = self.files.get(f"{slot.name}.weight").dtype
        self.files.close()  # mapped pages that were read count as this process's memory
        return Block(DecoderLayer(self.config, layer, weights, ops), linears, vectors, stored, slots)


@dataclass(slots=True, eq=False)
class ObservedWeight:
    """A PackedLinear in fp32 that can be watched and whose rows can be replaced.

    weight: [out, in]; bias: [out] or None; watch: called with each input [T, in] and output [T, out].
    """

    weight: Tensor
    bias: Tensor | None
    watch: Callable[[Tensor, Tensor], None] | None = None

    @staticmethod
    def of(parts: list[PackedWeight]) -> "ObservedWeight":
        """Parts of one slot side by side along the outputs; copies."""
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
        y = F.linear(x, self.weight, self.bias)
        if self.watch is not None:
            self.watch(x, y)
        return y


@dataclass(slots=True, eq=False, weakref_slot=True)
class Block:
    """A decoder block with its linears and norms by slot name, which may be changed."""

    layer: DecoderLayer
    linears: dict[str, ObservedWeight]
    vectors: dict[str, Tensor]
    stored_dtypes: dict[str, torch.dtype]  # of the vectors, in the checkpoint
    slots: list[Slot]

    def __call__(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Tensor:
        """[T, H], the block's full input -> its full output."""
        output, residual = self.layer(hidden, None, rotary, attend)
        return output + residual

    def steps(self, hidden: Tensor, rotary: Rotary, attend: Attend) -> Iterator[tuple[str, Tensor]]:
        """The block's computation, which halts before each linear: (slot, its input [T, in]), in order.

        A weight may be changed until the next step is taken. Last comes ("", the block's output [T, H]).
        """
        layer, (qkv, o, gate_up, down) = self.layer, self.linears
        normed, residual = layer.attention_input(hidden, None)
        yield qkv, normed
        attended = layer.attention(normed, rotary, attend)
        del normed
        yield o, attended
        normed, residual = layer.mlp_input(layer.o_proj(attended), residual)
        del attended
        yield gate_up, normed
        active = layer.mlp(normed)
        del normed
        yield down, active
        yield "", layer.down_proj(active) + residual

    def modules(self) -> Iterator[tuple[Slot, Part, slice]]:
        """The checkpoint's linears, and which rows of their slot's weight they are."""
        for slot in self.slots:
            start = 0
            for part in slot.parts if slot.kind == "linear" else ():
                yield slot, part, slice(start, start + part.out_features)
                start += part.out_features

    def weights(self) -> dict[str, Tensor]:
        """[out, in] by module name: views, so that writing to one changes the block."""
        return {part.name: self.linears[slot.name].weight[rows] for slot, part, rows in self.modules()}

    def rescale(self, edit: Rescale) -> None:
        """Apply ``edit``."""
        rows = slice(edit.first_row, edit.first_row + len(edit.divisors))
        if edit.producer in self.vectors:
            self.vectors[edit.producer][rows] /= edit.divisors
        else:
            producer = self.linears[edit.producer]
            producer.weight[rows] /= edit.divisors[:, None]
            if producer.bias is not None:
                producer.bias[rows] /= edit.divisors
        self.linears[edit.consumer].weight *= edit.factors

    def put(self, done: QuantizedBlock) -> None:
        """Take over what became of this block: edits, then the quantized weights."""
        for edit in done.edits:
            self.rescale(edit)
        weights = self.weights()
        for module in done.modules:
            if module.weight is not None:
                weights[module.name].copy_(module.weight.dequantize())

    def changed(self, edits: tuple[Rescale, ...], quantized: Container[str]) -> dict[str, Tensor]:
        """Tensors of the checkpoint, by name, that ``edits`` changed and that are not in ``quantized``."""
        touched = {edit.producer for edit in edits} | {edit.consumer for edit in edits}
        found = {f"{name}.weight": vector for name, vector in self.vectors.items() if name in touched}
        for slot, part, rows in self.modules():
            linear = self.linears[slot.name]
            if slot.name in touched and part.name not in quantized:
                found[f"{part.name}.weight"] = linear.weight[rows].clone()
            if any(edit.producer == slot.name for edit in edits) and linear.bias is not None:
                found[f"{part.name}.bias"] = linear.bias[rows].clone()
        return found
