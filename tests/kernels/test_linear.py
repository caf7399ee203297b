"""Linear kernels against float64."""

import pytest
import torch
from nybble.kernels import reference
from nybble.kernels.cpu.linear import dense_fp16, dequant_fp16
from nybble.kernels.dispatch import PackedLinear, Target, WeightTraits, choose
from nybble.kernels.layout import PackedWeight, QuantSpec

FP16, FP32, BF16 = (Target("cpu", dtype) for dtype in (torch.float16, torch.float32, torch.bfloat16))


def dense(out_features: int = 96, in_features: int = 64, bias: bool = True) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    return PackedWeight(
        torch.randn(out_features, in_features, generator=generator),
        bias=torch.randn(out_features, generator=generator) if bias else None,
    )


def quantized() -> PackedWeight:
    generator = torch.Generator().manual_seed(1)
    return PackedWeight(
        torch.randint(0, 16, (48, 80), generator=generator, dtype=torch.uint8),
        QuantSpec(4, 32, False),
        (0.1 * torch.rand(48, 3, generator=generator)).half(),
        torch.randint(0, 16, (48, 3), generator=generator, dtype=torch.uint8),
    )


def build(weight: PackedWeight, target: Target) -> PackedLinear:
    packed: PackedLinear = choose("linear", target, weight=WeightTraits.of(weight)).implementation.repack(
        weight, target
    )
    return packed


def exact(weight: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    out = x.double() @ weight.dequantize(torch.float32).double().T
    return out if weight.bias is None else out + weight.bias.double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize(("target", "bound"), [(FP32, 1e-6), (FP16, 4e-4), (BF16, 8e-3)])
@pytest.mark.parametrize("weight", [dense(), dense(bias=False), dense(33, 100), quantized()])
def test_error_is_that_of_the_weights_precision(
    weight: PackedWeight, target: Target, bound: float, rows: int
) -> None:
    x = torch.randn(rows, weight.in_features, generator=torch.Generator().manual_seed(2))
    actual = build(weight, target)(x)
    assert actual.dtype == torch.float32
    assert actual.shape == (rows, weight.out_features)
    assert relative_error(actual, exact(weight, x)) < bound


def test_a_row_is_the_same_bits_whatever_else_is_in_the_batch() -> None:
    x = torch.randn(150, 64, generator=torch.Generator().manual_seed(3))
    packed = dense_fp16.repack(dense(), FP16)
    whole = packed(x)
    for rows in range(1, 150):
        assert torch.equal(packed(x[:rows]), whole[:rows]), rows


def test_what_fp16_would_overflow_is_computed_in_fp32() -> None:
    weight = dense()
    weight.values[3, 5] = 1e5
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    packed = build(weight, FP16)
    assert isinstance(packed, reference.DenseLinear)
    assert packed.weight.dtype == torch.float32
    assert relative_error(packed(x), exact(weight, x)) < 1e-6


def test_bytes_are_counted() -> None:
    assert build(dense(96, 64), FP16).nbytes == 96 * 64 * 2 + 96 * 4
    assert build(dense(96, 64), FP32).nbytes == 96 * 64 * 4 + 96 * 4
    assert build(dense(96, 64, bias=False), BF16).nbytes == 96 * 64 * 2


def test_half_precision_weights_are_exact_in_fp16() -> None:
    weight = PackedWeight(dense().values.half())
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    assert relative_error(build(weight, FP16)(x), exact(weight, x)) < 1e-6


def test_quantized_weights_keep_their_name() -> None:
    assert dequant_fp16.refuses(FP16, weight=WeightTraits.of(quantized())) is None
    assert dense_fp16.refuses(FP16, weight=WeightTraits.of(quantized())) is not None
