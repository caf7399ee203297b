"""Scales that move between modules leave what a block computes as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.model.decoder import causal_attend
from nybble.engine.model.layers import RotaryEmbedding
from nybble.engine.quantize.activations import gather_stats, make_batches
from nybble.engine.quantize.awq import AWQScaling
from nybble.engine.quantize.calibrate import Calibration
from nybble.engine.quantize.results import Rescale
from nybble.engine.quantize.smoothquant import SmoothQuant
from nybble.engine.quantize.source import TARGET, Block, Source
from nybble.engine.quantize.transforms import seams
from nybble.kernels.dispatch import Ops
from nybble.kernels.layout import QuantSpec
from torch import Tensor

OPS = Ops.resolve(TARGET)
SEQUENCES = Calibration(((5, 6, 7, 8, 9, 30, 31), (40, 41, 42, 100, 101)), "", "")


def output(source: Source, block: Block, hidden: Tensor) -> Tensor:
    rotary = RotaryEmbedding(source.config)(torch.arange(len(hidden)))
    return block(hidden, rotary, causal_attend(source.config, OPS, [len(hidden)]))


def hidden_states() -> Tensor:
    return torch.randn(12, 64, generator=torch.Generator().manual_seed(2))


def random_edits(source: Source, block: Block) -> list[Rescale]:
    generator = torch.Generator().manual_seed(3)
    edits = []
    for seam in seams(source.config, block.layer.index):
        inputs = block.linears[seam.consumer].weight.shape[1]
        scales = seam.shared(torch.rand(inputs, generator=generator) * 4 + 0.2)
        edits.append(seam.edit(scales, block))
    return edits


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
    ],
)
def test_edits_change_nothing(
    model_type: str, fields: dict[str, Any], make_model: Any, tmp_path: Path
) -> None:
    """All four seams, with grouped heads, biases and norms of queries and keys."""
    folder, _ = make_model(model_type, **fields)
    with Source(folder) as source:
        block = source.block(1, OPS)
        before = output(source, block, hidden_states())
        edits = random_edits(source, block)
        assert len(edits) == 4
        for edit in edits:
            block.rescale(edit)
        torch.testing.assert_close(output(source, block, hidden_states()), before, rtol=1e-4, atol=1e-4)
        untouched = source.block(1, OPS)
        for name, weight in block.weights().items():
            assert not torch.equal(weight, untouched.weights()[name]), name
        changed = block.changed(tuple(edits), quantized=set())
        norms = [f"model.layers.1.{name}_layernorm.weight" for name in ("input", "post_attention")]
        assert set(norms) < set(changed)
        quantized = block.changed(tuple(edits), quantized=set(block.weights()))
        biases = [f"model.layers.1.self_attn.{n}_proj.bias" for n in "qkv" if model_type == "qwen2"]
        assert set(quantized) == {*norms, *biases}


def test_stored_norms_are_what_was_reckoned_with(make_model: Any, tmp_path: Path) -> None:
    """A norm in bf16 is divided by what bf16 can say, and the weights make up for exactly that."""
    folder, model = make_model("llama")
    model.to(torch.bfloat16).save_pretrained(folder)
    with Source(folder) as source:
        block = source.block(0, OPS)
        edits = random_edits(source, block)
        for edit in edits:
            block.rescale(edit)
        for vector in block.vectors.values():
            torch.testing.assert_close(vector.to(torch.bfloat16).float(), vector, rtol=1e-6, atol=0)


def test_an_input_that_a_norm_shuts_off_is_left_alone(make_model: Any, tmp_path: Path) -> None:
    folder, model = make_model("llama")
    model.model.layers[0].input_layernorm.weight.data[7] = 0
    model.save_pretrained(folder)
    with Source(folder) as source:
        block = source.block(0, OPS)
        before = output(source, block, hidden_states())
        for edit in random_edits(source, block):
            assert bool(torch.isfinite(edit.factors).all())
            assert bool(torch.isfinite(edit.divisors).all())
            block.rescale(edit)
        torch.testing.assert_close(output(source, block, hidden_states()), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transform", [AWQScaling(), SmoothQuant(), SmoothQuant(0.8)])
def test_transforms_keep_the_function(transform: Any, make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    with Source(folder) as source:
        block = source.block(0, OPS)
        before = output(source, block, hidden_states())
        stats = gather_stats(block, make_batches(source, SEQUENCES, OPS))
        specs = {name: QuantSpec(3, 16, True) for name in block.weights()}
        edits = transform.prepare(block, stats, specs)
        assert edits
        for edit in edits:
            assert float(edit.factors.max() / edit.factors.min()) > 1.1
            block.rescale(edit)
        torch.testing.assert_close(output(source, block, hidden_states()), before, rtol=1e-3, atol=1e-3)


def test_smoothquant_evens_out(make_model: Any, tmp_path: Path) -> None:
    """With alpha 1 all of the inputs' range is gone into the weights: every input's largest is 1."""
    folder, _ = make_model("llama", num_key_value_heads=4)
    with Source(folder) as source:
        block = source.block(0, OPS)
        batches = make_batches(source, SEQUENCES, OPS)
        stats = gather_stats(block, batches)
        for edit in SmoothQuant(1.0).prepare(block, stats, {}):
            block.rescale(edit)
        for slot, found in gather_stats(block, batches).items():
            torch.testing.assert_close(found.max_abs, torch.ones_like(found.max_abs), msg=slot)
