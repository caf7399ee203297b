"""A tape model over random low-bit weights of every kind, without a checkpoint, and steps for it."""

from collections.abc import Sequence

import torch
from nybble.engine.model.config import ModelConfig
from nybble.engine.model.layers import Linear
from nybble.engine.model.plan import Slot, weight_plan
from nybble.engine.tape_model import TapeModel
from nybble.kernels.cpu.compiled import CompiledLinear, compile_24, compile_dense, compile_low_bit
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from nybble.kernels.paged import PagedSequence
from torch import Tensor

CONFIG = ModelConfig.from_dict(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 224,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 97,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
)
BLOCK, NUM_BLOCKS = 16, 32
# (sequence, tokens): prompts together; one more beside decoding; decoding; one alone.
STEPS = (
    ((0, 70), (1, 33), (2, 1)),
    ((0, 1), (3, 47), (2, 1), (1, 1)),
    ((0, 1), (1, 1), (2, 1), (3, 1)),
    ((3, 1),),
)


def low_bit_tape_model(isa: str, num_threads: int, activations: str = "int8") -> TapeModel:
    """Always the same weights."""
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Linear | Tensor] = {}
    for slot in weight_plan(CONFIG):
        if slot.kind == "linear":
            weights[slot.name] = Linear([_linear(slot, isa, activations, generator)])
        else:
            (part,) = slot.parts
            shape = (
                (part.out_features, part.in_features) if slot.kind == "embedding" else (part.out_features,)
            )
            weights[slot.name] = (slot.kind == "vector") + 0.3 * torch.randn(shape, generator=generator)
    return TapeModel(
        CONFIG, weights, CONFIG.kv_specs("float16"), (NUM_BLOCKS, BLOCK), num_threads, (160, 256)
    )


def _linear(slot: Slot, isa: str, activations: str, generator: torch.Generator) -> CompiledLinear:
    rows, cols = sum(part.out_features for part in slot.parts), slot.parts[0].in_features
    if slot.name == "lm_head":
        return compile_dense(
            PackedWeight(torch.randn(rows, cols, generator=generator).half()), isa, torch.float16
        )
    kind = slot.name.rpartition(".")[2]
    bits, symmetric, order, residuals = {
        "qkv_proj": (4, True, False, True),
        "o_proj": (3, False, True, False),
        "gate_up_proj": (4, True, False, False),
        "down_proj": (8, True, False, True),
    }[kind]
    spec = QuantSpec(bits, 32, symmetric, "group" if order else "none")
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    sparse = kind == "gate_up_proj" and activations == "int8"
    if kind == "gate_up_proj":
        codes.view(rows, -1, 4)[:, :, ::2] = 8
    scales = (torch.rand(rows, cols // 32, generator=generator) + 0.5) * 0.6 / 2**bits
    zeros = (
        None if symmetric else torch.randint(0, 2**bits, scales.shape, generator=generator, dtype=torch.uint8)
    )
    g_idx = (torch.arange(cols) // 32)[torch.randperm(cols, generator=generator)].int() if order else None
    overlay = torch.randn(rows, cols, generator=generator) * (
        torch.rand(rows, cols, generator=generator) < 0.02
    )
    weight = PackedWeight(
        codes, spec, scales.half(), zeros, g_idx, outliers=SparseOverlay.of(overlay) if residuals else None
    )
    return compile_24(weight, isa) if sparse else compile_low_bit(weight, isa, activations)


def run_steps(model: TapeModel) -> list[Tensor]:
    """Hidden states and logits of every step of STEPS, from an empty cache."""
    generator = torch.Generator().manual_seed(1)
    lengths = dict.fromkeys(range(4), 0)
    found: list[Tensor] = []
    for step in STEPS:
        sequences: list[PagedSequence] = []
        first = 0
        for index, count in step:
            sequences.append(PagedSequence(first, count, lengths[index], _table(index)))
            lengths[index] += count
            first += count
        tokens = torch.randint(0, CONFIG.vocab_size, (first,), generator=generator).tolist()
        model.forward(tokens, [sequences])
        logits = model.logits(_last_rows(sequences))
        known = torch.tensor(model.finite() + logits.finite + logits.largest)
        found += [model._body.output[:first].clone(), logits.values.clone(), known]
    return found


def _table(index: int) -> tuple[int, ...]:
    """Eight blocks for each of four sequences, scattered."""
    return tuple((index + 4 * place) * 7 % NUM_BLOCKS for place in range(8))


def _last_rows(sequences: Sequence[PagedSequence]) -> list[int]:
    return [s.first + s.count - 1 for s in sequences]
