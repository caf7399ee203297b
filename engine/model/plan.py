"""Which modules the decoder has, which of the checkpoint's they come from, and what those must look like."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointError
from ..formats.base import FLOATS, Expected, Format
from ..formats.dense import DenseFormat
from ..formats.registry import open_tensors
from ..formats.safetensors_files import SafetensorsFiles, TensorInfo
from ..model_files import ModelFiles
from .config import ModelConfig

EMBEDDING = "model.embed_tokens"
LM_HEAD = "lm_head"
_MAX_NAMED = 12
# Buffers that old writers stored: they follow from the configuration.
_IGNORED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True, slots=True)
class Part:
    """One module of the checkpoint. A vector has ``in_features`` 0."""

    name: str
    out_features: int
    in_features: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Slot:
    """One module of ours, made of one or several parts side by side along the outputs."""

    name: str
    kind: Literal["linear", "vector", "embedding"]
    parts: tuple[Part, ...]


def weight_plan(config: ModelConfig) -> list[Slot]:
    """Every module of the decoder, in the order of its computation. A tied head's part is the embedding."""
    hidden, vocab = config.hidden_size, config.vocab_size
    slots = [Slot(EMBEDDING, "embedding", (Part(EMBEDDING, vocab, hidden),))]
    for index in range(config.num_layers):
        slots += layer_plan(config, index)
    slots.append(_vector("model.norm", hidden))
    head = EMBEDDING if config.tie_word_embeddings else LM_HEAD
    slots.append(Slot(LM_HEAD, "linear", (Part(head, vocab, hidden),)))
    return slots


def layer_plan(config: ModelConfig, index: int) -> list[Slot]:
    """The modules of ``model.layers.index``."""
    layer = f"model.layers.{index}"
    hidden, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_heads * dim, config.num_kv_heads * dim
    attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    qkv = tuple(
        Part(f"{attn}.{name}_proj", out, hidden, config.qkv_bias)
        for name, out in (("q", q), ("k", kv), ("v", kv))
    )
    gate_up = tuple(Part(f"{mlp}.{name}_proj", ffn, hidden, config.mlp_bias) for name in ("gate", "up"))
    norms = [_vector(f"{attn}.{name}_norm", dim) for name in ("q", "k")] if config.qk_norm else []
    return [
        _vector(f"{layer}.input_layernorm", hidden),
        Slot(f"{attn}.qkv_proj", "linear", qkv),
        *norms,
        Slot(f"{attn}.o_proj", "linear", (Part(f"{attn}.o_proj", hidden, q, config.o_bias),)),
        _vector(f"{layer}.post_attention_layernorm", hidden),
        Slot(f"{mlp}.gate_up_proj", "linear", gate_up),
        Slot(f"{mlp}.down_proj", "linear", (Part(f"{mlp}.down_proj", hidden, ffn, config.mlp_bias),)),
    ]


def _vector(name: str, size: int) -> Slot:
    return Slot(name, "vector", (Part(name, size, 0),))


def part_format(slot: Slot, part: Part, checkpoint_format: Format) -> Format:
    """The format that stores ``part``: embeddings, also as tied heads, are always dense."""
    if slot.kind != "linear" or part.name == EMBEDDING:
        return DenseFormat()
    return checkpoint_format


def part_tensors(slot: Slot, part: Part, checkpoint_format: Format) -> dict[str, Expected]:
    """The tensors of ``part``. CheckpointError if the format cannot hold its shape."""
    if slot.kind == "vector":
        return {f"{part.name}.weight": Expected(FLOATS, (part.out_features,))}
    stored = part_format(slot, part, checkpoint_format)
    return stored.tensors(part.name, part.out_features, part.in_features, part.bias)


def find_problems(
    slots: Iterable[Slot], checkpoint_format: Format, found: Mapping[str, TensorInfo]
) -> list[str]:
    """Every tensor that is missing, has another dtype or shape than expected, or is not the model's."""
    problems: list[str] = []
    consumed: set[str] = set()
    tied = False
    for slot in slots:
        for part in slot.parts:
            tied |= slot.name == LM_HEAD and part.name == EMBEDDING
            try:
                wanted = part_tensors(slot, part, checkpoint_format)
            except CheckpointError as error:
                problems.append(error.message)
                continue
            problems += _compare(wanted, found, consumed)
            consumed.update(wanted)
    for name, info in found.items():
        ignored = _IGNORED.fullmatch(name) or (tied and name == f"{LM_HEAD}.weight")
        if name not in consumed and not ignored:
            problems.append(f"unexpected tensor {name} ({info}), which this model has no place for")
    return problems


def _compare(
    wanted: Mapping[str, Expected], found: Mapping[str, TensorInfo], consumed: set[str]
) -> list[str]:
    problems: list[str] = []
    for name, expected in wanted.items():
        info = found.get(name)
        if name in consumed:
            continue
        if info is None:
            if expected.required:
                problems.append(f"missing tensor {name} (expected {expected})")
        elif info.dtype not in expected.dtypes or info.shape != expected.shape:
            problems.append(f"tensor {name} in {info.path.name}: expected {expected}, found {info}")
    return problems


def open_model(files: ModelFiles, checkpoint_format: Format, slots: Iterable[Slot]) -> SafetensorsFiles:
    """The tensors of a model's folder. CheckpointError names the first that ``find_problems`` finds."""
    tensors = open_tensors(files, checkpoint_format)
    problems = find_problems(slots, checkpoint_format, tensors.tensors)
    if not problems:
        return tensors
    tensors.close()
    more = len(problems) - _MAX_NAMED
    named = "; ".join(problems[:_MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")
    raise CheckpointError(
        f"{files.folder}: the checkpoint does not fit its config.json: {named} (nybble check lists all)"
    )
