"""Sketch B against its definition, gradients of whole sequences by transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.quantize import gradients
from nybble.engine.quantize.calibrate import Calibration
from nybble.engine.quantize.gradients import own_tokens
from nybble.engine.quantize.kronecker import Sketches, sketch_bytes
from nybble.engine.quantize.source import Source
from nybble.engine.quantize.work import Work
from nybble.kernels.layout import QuantSpec
from tiny_sequences import SEQUENCES


def test_factors_are_means_over_sequences(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the text's own tokens in place of drawn ones, so that both see the same."""
    monkeypatch.setattr("nybble.engine.quantize.kronecker.Sampled", lambda seed: own_tokens)
    monkeypatch.setattr(gradients, "KEPT_BYTES", 1)
    folder, model = make_model("qwen2", num_hidden_layers=2)
    with Source(folder) as source:
        specs = {part.name: QuantSpec(4, 32, True) for _, part in source.parts() if "gate" not in part.name}
        work = Work.on(source, specs, Calibration(SEQUENCES, "random", ""), tmp_path / "work")
        seen: list[tuple[object, ...]] = []
        sketches = Sketches(tmp_path / "sketch")
        sketches.gather(Work(**{**_fields(work), "progress": lambda *event: seen.append(event)}), 0)
        expected = {name: [torch.zeros(n, n) for n in _shape(model, name)] for name in specs}
        model.requires_grad_(True)
        for sequence in SEQUENCES:
            ids = torch.tensor([sequence])
            model.zero_grad()
            torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
            ).backward()
            for name, (outputs, inputs) in expected.items():
                gradient = model.get_submodule(name).weight.grad
                outputs += gradient @ gradient.T / (len(SEQUENCES) * gradient.shape[1])
                inputs += gradient.T @ gradient / (len(SEQUENCES) * gradient.shape[0])
        for name, pair in expected.items():
            for found, wanted in zip(sketches(name), pair, strict=True):
                torch.testing.assert_close(found, wanted, rtol=2e-3, atol=1e-4 * float(wanted.abs().max()))
        assert seen[-1] == ("sketch", len(SEQUENCES), len(SEQUENCES))
        shapes = [_shape(model, name) for name in specs]
        assert sketch_bytes(source.config, specs) == sum(4 * (m * m + n * n) for m, n in shapes)
        seen.clear()
        sketches.gather(work, 0)  # they are there


def _fields(work: Work) -> dict[str, Any]:
    return {name: getattr(work, name) for name in work.__dataclass_fields__}


def _shape(model: Any, name: str) -> tuple[int, int]:
    rows, cols = model.get_submodule(name).weight.shape
    return rows, cols
