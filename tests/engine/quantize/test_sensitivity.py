"""The post-quantization integral: exact on a float64 transformer, and over a real one by blocks."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nybble.engine.quantize.calibrate import Calibration
from nybble.engine.quantize.gradients import GradientModel, Towards
from nybble.engine.quantize.grid import round_nearest
from nybble.engine.quantize.pipeline import Recipe
from nybble.engine.quantize.rtn import RTN
from nybble.engine.quantize.sensitivity import (
    Rule,
    Sensitivity,
    changes,
    integrate,
    layer_sums,
    nodes,
    summed,
)
from nybble.engine.quantize.source import Source
from nybble.engine.quantize.store import Store
from nybble.engine.quantize.work import Work
from nybble.kernels.layout import QuantSpec
from tiny_sequences import SEQUENCES
from torch import Tensor

Weights = dict[str, Tensor]


def toy_weights() -> Weights:
    """Two blocks of width 16, float64."""
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=random, dtype=torch.float64) / cols**0.5

    shapes = {"q": (16, 16), "k": (16, 16), "v": (16, 16), "o": (16, 16), "up": (64, 16), "down": (16, 32)}
    return {f"{layer}.{name}": matrix(*shape) for layer in range(2) for name, shape in shapes.items()}


def toy_loss(weights: Weights) -> Tensor:
    """Mean next-token loss of a transformer with norms, causal attention and gated units."""
    random = torch.Generator().manual_seed(1)
    table = torch.randn(40, 16, generator=random, dtype=torch.float64)
    ids = torch.randint(0, 40, (24,), generator=random)
    mask = torch.full((24, 24), float("-inf"), dtype=torch.float64).triu(1)
    hidden = table[ids]
    for layer in range(2):
        normed = F.rms_norm(hidden, (16,))
        q, k, v = (normed @ weights[f"{layer}.{name}"].T for name in "qkv")
        hidden = hidden + ((q @ k.T / 4 + mask).softmax(-1) @ v) @ weights[f"{layer}.o"].T
        gate, up = (F.rms_norm(hidden, (16,)) @ weights[f"{layer}.up"].T).chunk(2, -1)
        hidden = hidden + (F.silu(gate) * up) @ weights[f"{layer}.down"].T
    return F.cross_entropy(F.rms_norm(hidden, (16,))[:-1] @ table.T, ids[1:])


def toy_gradients(weights: Weights) -> Weights:
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    toy_loss(leaves).backward()
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def between(start: Weights, end: Weights, place: float) -> Weights:
    return {name: torch.lerp(weight, end[name], place) for name, weight in start.items()}


def signed_sum(start: Weights, end: Weights, num_intervals: int, rule: Rule) -> float:
    total = 0.0
    for place, share in nodes(num_intervals, rule):
        gradients = toy_gradients(between(start, end, place))
        total += share * sum(summed(g * (end[n] - start[n])).signed for n, g in gradients.items())
    return total


@pytest.fixture(scope="module")
def toy() -> tuple[Weights, Weights, float]:
    """Weights, the same rounded to 3 bits, and what that does to the loss."""
    start = toy_weights()
    end = {n: round_nearest(w, QuantSpec(3, 8, False)).dequantize(torch.float64) for n, w in start.items()}
    return start, end, float(toy_loss(end) - toy_loss(start))


@pytest.mark.parametrize("rule", ["midpoint", "trapezoid"])
def test_error_falls_with_the_square(rule: Rule, toy: tuple[Weights, Weights, float]) -> None:
    start, end, change = toy
    assert abs(change) > 1e-3
    errors = [abs(signed_sum(start, end, n, rule) - change) for n in (4, 8, 16, 32)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.15)
    assert errors[-1] < 1e-3 * abs(change)
    assert errors[1] < 0.01 * abs(change)


@pytest.mark.parametrize("rule", ["midpoint", "trapezoid"])
@pytest.mark.parametrize("num_intervals", [1, 2, 7])
def test_a_quadratic_is_integrated_exactly(rule: Rule, num_intervals: int) -> None:
    def slope(place: float) -> float:
        return 3 + 10 * place

    found = sum(share * slope(place) for place, share in nodes(num_intervals, rule))
    assert found == pytest.approx(8, rel=1e-14)
    assert sum(share for _, share in nodes(num_intervals, rule)) == pytest.approx(1, rel=1e-14)


def test_small_steps_cost_what_the_slope_says(toy: tuple[Weights, Weights, float]) -> None:
    """F(w + s d) - F(w) = a s + b s^2 with a = <grad F, d>."""
    start, end, _ = toy
    gradients = toy_gradients(start)
    slope = sum(float((g * (end[n] - start[n])).sum()) for n, g in gradients.items())
    origin = float(toy_loss(start))

    def cost(place: float) -> float:
        return float(toy_loss(between(start, end, place))) - origin

    assert cost(1e-4) / 1e-4 == pytest.approx(slope, rel=0.01)
    curvature = (cost(1e-3) - slope * 1e-3) / 1e-6
    assert cost(0.02) == pytest.approx(slope * 0.02 + curvature * 4e-4, rel=0.01)


def quantized(source: Source, folder: Path, bits: int) -> tuple[Work, Any]:
    specs = {part.name: QuantSpec(bits, 32, False) for _, part in source.parts()}
    work = Work.on(source, specs, Calibration(SEQUENCES, "random", ""), folder / "work")
    return work, Recipe(RTN(0.0)).run(work)


def with_sensitivity(
    folder: Path, scratch: Path, num_intervals: int, check: Callable[[Work, Sensitivity], None]
) -> None:
    with Source(folder) as source, Store() as store:
        work, stage = quantized(source, scratch, 4)
        check(work, integrate(work, stage, store, nodes(num_intervals), len(SEQUENCES)))


def test_signed_sum_is_the_loss_change(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("qwen2")

    def check(work: Work, found: Sensitivity) -> None:
        model = GradientModel(work)
        change = model.loss(Towards(found.stage, 1.0)) - model.loss()
        scores = found.modules()
        assert sum(score.signed for score in scores.values()) == pytest.approx(change, rel=0.01)
        assert sum(score.mass for score in scores.values()) > abs(change)
        layers = layer_sums(scores)
        assert list(layers) == [f"model.layers.{index}" for index in range(3)]
        assert sum(s.signed for s in layers.values()) == pytest.approx(
            sum(s.signed for s in scores.values()), rel=1e-9
        )
        assert len(found.losses) == 32

    with_sensitivity(folder, tmp_path, 32, check)


def test_gradients_are_averaged_on_the_way(make_model: Any, tmp_path: Path) -> None:
    """Against transformers with the weights of each node put in."""
    folder, model = make_model("llama", num_hidden_layers=2)

    def check(work: Work, found: Sensitivity) -> None:
        ends = {name: (start.clone(), end) for name, start, end in changes(work, found.stage)}
        expected = {name: torch.zeros_like(start) for name, (start, _) in ends.items()}
        model.requires_grad_(True)
        for place, share in nodes(3):
            for name, (start, end) in ends.items():
                model.get_submodule(name).weight.data.copy_(torch.lerp(start, end, place))
            model.zero_grad()
            total = torch.zeros(())
            for sequence in SEQUENCES:
                ids = torch.tensor([sequence])
                total = total + F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
            (total / sum(len(s) - 1 for s in SEQUENCES)).backward()
            for name, gradient in expected.items():
                gradient += share * model.get_submodule(name).weight.grad
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found.gradients[name], gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max())
            )

    with_sensitivity(folder, tmp_path, 3, check)
