"""The known answers that kernels are asked for before they serve: right ones pass, a wrong one is named."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu import self_test
from nybble.kernels.cpu.compiled import CompiledLinear, compile_24, compile_dense, compile_low_bit
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.dispatch import Target
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay

ISA = instruction_set(Target(cpu_features=cpu_features(), cpu_kernels="auto"))
pytestmark = pytest.mark.skipif(ISA is None, reason="the CPU has neither AVX2 nor AVX-512 VNNI")


def low_bit(bits: int, asym: bool = False, cols: int = 64, outliers: bool = False) -> PackedWeight:
    codes = torch.full((16, cols), 2 ** (bits - 1), dtype=torch.uint8)
    scales = torch.ones(16, cols // 32).half()
    zeros = torch.ones(16, cols // 32, dtype=torch.uint8) if asym else None
    plain = PackedWeight(codes, QuantSpec(bits, 32, not asym), scales, zeros)
    return replace(plain, outliers=SparseOverlay.of(torch.eye(16, cols))) if outliers else plain


def served() -> list[CompiledLinear]:
    assert ISA is not None
    weights = [low_bit(2), low_bit(3, asym=True), low_bit(4, outliers=True), low_bit(8)]
    weights.append(low_bit(4, cols=65_568, outliers=True))
    linears = [compile_low_bit(weight, ISA, "int8") for weight in weights]
    linears.append(compile_low_bit(weights[2], ISA, "fp32"))
    dense = compile_dense(PackedWeight(torch.ones(16, 32).bfloat16()), ISA, torch.bfloat16)
    return [*linears, compile_24(low_bit(4), ISA), dense]


def test_every_kind_gives_the_known_answer() -> None:
    assert self_test.wrong_kernels(served()) == []


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", ["one", "many"])
def test_residuals_that_are_left_out_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tokens: str, bits: int
) -> None:
    assert ISA is not None
    made = self_test.compile_low_bit

    def without(weight: PackedWeight, isa: str, activations: str) -> Callable[[Any], Any]:
        linear, bare = made(weight, isa, activations), made(replace(weight, outliers=None), isa, activations)
        return lambda x: (bare if (len(x) == 1) == (tokens == "one") else linear)(x)

    served_here = [compile_low_bit(low_bit(bits, outliers=True), ISA, "int8")]
    assert self_test.wrong_kernels(served_here) == []
    monkeypatch.setattr(self_test, "compile_low_bit", without)
    assert self_test.wrong_kernels(served_here) == [f"{ISA} {bits}-bit sym dense int8 with outliers"]


@pytest.mark.parametrize("tokens", ["one", "many"])
def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch, tokens: str) -> None:
    """Wrong for one token only, or for several only, by a twentieth."""
    made = self_test.compile_low_bit

    def wrong(weight: PackedWeight, isa: str, activations: str) -> Callable[[Any], Any]:
        linear = made(weight, isa, activations)
        off = weight.outliers is not None and activations == "int8"
        return lambda x: linear(x) * (1.05 if off and (len(x) == 1) == (tokens == "one") else 1)

    monkeypatch.setattr(self_test, "compile_low_bit", wrong)
    assert self_test.wrong_kernels(served()) == [
        f"{ISA} 4-bit sym dense int8 with outliers",
        f"{ISA} 4-bit sym dense int8 with outliers, 32-bit columns",
    ]
