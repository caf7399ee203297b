"""AWQ: scales for inputs that matter, ranges for outputs that matter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from layers_to_round import correlated, proxy_loss
from nybble.engine.errors import ConfigError
from nybble.engine.quantize.awq import AWQScaling, ClippedRTN
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.methods import get_method
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.quantize.pipeline import ToRound
from nybble.kernels.layout import QuantSpec
from tiny_models import load_decoder, our_logits, transformers_logits
from torch import Tensor


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranges_by_the_outputs_error(bits: int, symmetric: bool) -> None:
    weight, hessian = correlated(32, 144)
    spec = QuantSpec(bits, 64, symmetric)
    rounder = ClippedRTN()
    packed = rounder.round(ToRound("", weight, spec), rounder.prepare(hessian, spec))
    blocks = torch.zeros_like(hessian)  # what the search minimises: no terms between groups
    for start in range(0, 144, 64):
        blocks[start : start + 64, start : start + 64] = hessian[start : start + 64, start : start + 64]
    for other in (round_nearest(weight, spec), round_nearest(weight, spec, 2.4)):
        assert proxy_loss(weight, packed, blocks) < proxy_loss(weight, other, blocks)


def test_excluded_weights_come_back_exactly() -> None:
    weight, hessian = correlated(8, 64)
    weight[:, 3] = 40.0
    exclude = torch.zeros_like(weight, dtype=torch.bool)
    exclude[:, 3] = True
    spec = QuantSpec(4, 32, True)
    packed = ClippedRTN().round(ToRound("", weight, spec, exclude), hessian)
    torch.testing.assert_close(packed.dequantize(torch.float64)[:, 3], weight[:, 3], rtol=1e-3, atol=1e-3)
    assert float(packed.scales.max()) < 1  # type: ignore[union-attr]
    assert len(packed.outliers.values) == 8  # type: ignore[union-attr]


def test_what_is_written_computes_what_it_should(make_model: Any, tmp_path: Path) -> None:
    """At 8 bits the scaled model is still the original: edited norms and weights are in the checkpoint."""
    folder, model = make_model("qwen2", intermediate_size=80)  # down_proj stays dense, and is edited
    options = QuantizeOptions(
        str(folder), str(tmp_path / "out"), method="awq", bits=8, group_size=32, num_samples=8, seq_len=32
    )
    summary = quantize(options, lambda *_: None, lambda _: None)
    assert len(summary["dense"]) == 3
    assert summary["meta"]["transform"] == "awq"
    ids = torch.arange(5, 60)
    expected = transformers_logits(model, ids)
    found = our_logits(load_decoder(tmp_path / "out"), ids)
    assert relative(found, expected) < 0.1  # 8 bits in a random model; a norm left as it was: above 0.9


@pytest.mark.parametrize("transform", ["awq", "smoothquant"])
def test_other_rounders_take_transforms(transform: str, make_model: Any, tmp_path: Path) -> None:
    folder, model = make_model("llama")
    options = QuantizeOptions(
        str(folder),
        str(tmp_path / "out"),
        transform=transform,  # type: ignore[arg-type]
        bits=8,
        group_size=32,
        num_samples=8,
        seq_len=32,
    )
    quantize(options, lambda *_: None, lambda _: None)
    ids = torch.arange(5, 60)
    expected = transformers_logits(model, ids)
    found = our_logits(load_decoder(tmp_path / "out"), ids)
    assert relative(found, expected) < 0.1  # 8 bits in a random model; a norm left as it was: above 0.9


def test_it_has_no_order() -> None:
    with pytest.raises(ConfigError, match="--actorder gar: awq has no order"):
        get_method(QuantizeOptions("a", "b", method="awq", actorder="gar"))
    assert AWQScaling.from_options(QuantizeOptions("a", "b", method="awq", awq_steps=5)).steps == 5
