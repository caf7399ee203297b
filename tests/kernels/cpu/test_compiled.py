"""Compiled linears against float64: every bit width, zero point, group, order, shape and instruction set."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu.compiled import CompiledLinear, compile_dense, compile_low_bit, kernels_for
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.recorder import Recorder
from nybble.kernels.cpu.tape import Inputs
from nybble.kernels.dispatch import Target
from nybble.kernels.layout import PackedWeight, QuantSpec
from torch import Tensor

FEATURES = cpu_features()
ISAS = [
    isa
    for isa in ("avx2", "vnni", "amx")
    if instruction_set(Target(cpu_features=FEATURES, cpu_kernels=isa)) == isa
]
BF16 = "vnni" in ISAS and "avx512_bf16" in FEATURES
MODES = [(isa, activations) for isa in ISAS for activations in ("int8", "fp32")] + [("vnni", "bf16")] * BF16
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU has neither AVX2 nor AVX-512 VNNI")


@dataclass(frozen=True)
class Case:
    """One weight. ``group_size`` need not divide K, nor be a multiple of 32."""

    num_bits: int
    symmetric: bool
    group_size: int
    act_order: bool
    out_features: int = 40
    in_features: int = 352
    bias: bool = False


def make_weight(case: Case, seed: int = 0) -> PackedWeight:
    rng = torch.Generator().manual_seed(seed)
    spec = QuantSpec(case.num_bits, case.group_size, case.symmetric, "group" if case.act_order else "none")
    rows, cols, groups = case.out_features, case.in_features, spec.num_groups(case.in_features)
    order = None
    if case.act_order:
        size = cols if case.group_size == -1 else case.group_size
        order = (torch.arange(cols) // size)[torch.randperm(cols, generator=rng)].int()
    top = 2**case.num_bits
    return PackedWeight(
        torch.randint(0, top, (rows, cols), generator=rng, dtype=torch.uint8),
        spec,
        (torch.rand(rows, groups, generator=rng) * 0.02 + 1e-3).half(),
        None if case.symmetric else torch.randint(0, top, (rows, groups), generator=rng, dtype=torch.uint8),
        order,
        torch.randn(rows, generator=rng) if case.bias else None,
    )


def expected(weight: PackedWeight, x: Tensor) -> Tensor:
    """In float64, from the definition of the weights."""
    out = x.double() @ weight.dequantize(torch.float32).double().T
    return out if weight.bias is None else out + weight.bias.double()


def int8_bound(weight: PackedWeight, x: Tensor) -> Tensor:
    """The largest error of int8 activations: half a step of the widest group an input can fall into.

    Groups are formed in the weight's order, so a group's amax is at most the row's: a step is amax / 127.
    """
    step = x.double().abs().amax(1, keepdim=True) / 127
    return step / 2 * weight.dequantize(torch.float32).double().abs().sum(1) + 1e-5


def bf16_bound(weight: PackedWeight, x: Tensor) -> Tensor:
    """The largest error of bf16 activations, 2**-8 of each, and of 40 sums in fp32."""
    assert weight.scales is not None
    assert weight.spec is not None
    rounding = x.double().abs() @ weight.dequantize(torch.float32).double().abs().T / 2**8
    largest = 2 ** (weight.spec.num_bits + 2) * weight.scales.double().amax(1)
    return rounding + 40 / 2**24 * largest * x.double().abs().sum(1, keepdim=True)


CASES = [
    Case(bits, symmetric, group, order)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group in (32, 128, -1)
    for order in (False, True)
] + [
    Case(4, False, 48, True, out_features=17, in_features=100, bias=True),
    Case(3, True, 20, False, out_features=1, in_features=33),
    Case(2, False, 64, False, out_features=31, in_features=7, bias=True),
    Case(8, True, 256, True, out_features=64, in_features=256),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_low_bit_equals_float64(case: Case, isa: str) -> None:
    weight = make_weight(case)
    exact, fast = (compile_low_bit(weight, isa, activations) for activations in ("fp32", "int8"))
    for tokens in (1, 2, 3, 7, 8, 64, 131):
        x = torch.randn(tokens, case.in_features, generator=torch.Generator().manual_seed(tokens))
        reference = expected(weight, x)
        scale = reference.abs().max()
        assert ((exact(x) - reference).abs() / scale).max() < 1e-5
        assert ((fast(x) - reference).abs() <= int8_bound(weight, x)).all()


@pytest.mark.skipif(not BF16, reason="the CPU lacks AVX512-BF16")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_activations_are_rounded_to_bf16(case: Case) -> None:
    weight = make_weight(case)
    linear = compile_low_bit(weight, "vnni", "bf16")
    for tokens in (1, 2, 3, 7, 8, 64, 131):
        x = torch.randn(tokens, case.in_features, generator=torch.Generator().manual_seed(tokens))
        x[-1] *= 1e6
        assert ((linear(x) - expected(weight, x)).abs() <= bf16_bound(weight, x)).all()
        rounded = expected(weight, x.bfloat16().float())
        assert ((linear(x) - rounded).abs() <= 1e-5 * rounded.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dense_equals_float64(dtype: torch.dtype, isa: str) -> None:
    weight = PackedWeight(torch.randn(50, 75).to(dtype), bias=torch.randn(50))
    linear = compile_dense(weight, isa, dtype)
    for tokens in (1, 2, 5, 6, 7, 130):
        x = torch.randn(tokens, 75)
        reference = expected(weight, x)
        assert ((linear(x) - reference).abs() / reference.abs().max()).max() < 1e-5


@pytest.mark.parametrize(("isa", "activations"), MODES)
def test_a_row_is_the_same_bits_in_any_batch(isa: str, activations: str) -> None:
    linear = compile_low_bit(make_weight(Case(4, False, 128, True)), isa, activations)
    x = torch.randn(130, 352)
    whole = linear(x)
    for start, stop in ((0, 1), (3, 4), (5, 12), (100, 130)):
        assert torch.equal(linear(x[start:stop]), whole[start:stop])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_many_tokens_have_the_bits_of_few(num_bits: int, symmetric: bool, isa: str) -> None:
    """Other kernels compute 16 tokens and more: over whole strips of groups, a shorter one, and a bias."""
    weight = make_weight(Case(num_bits, symmetric, 32, False, 40, 1100, bias=True))
    linear = compile_low_bit(weight, isa, "int8")
    x = torch.randn(139, 1100, generator=torch.Generator().manual_seed(1)) * 3
    alone = torch.cat([linear(row[None]) for row in x])
    assert ((alone - expected(weight, x)).abs() <= int8_bound(weight, x)).all()
    for tokens in (15, 16, 18, 19, 23, 64, 120, 136, 139):
        assert torch.equal(linear(x[:tokens]), alone[:tokens])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_threads_and_parts_side_by_side_do_not_change_a_bit(isa: str, num_threads: int) -> None:
    """Parts of odd sizes share a row of outputs: padding of one may not stay in another's columns."""
    parts = [
        compile_low_bit(make_weight(Case(4, True, 32, False, 20, 64), 1), isa, "int8"),
        compile_low_bit(make_weight(Case(3, False, 64, True, 5, 64, bias=True), 2), isa, "int8"),
        compile_dense(PackedWeight(torch.randn(33, 64)), isa, torch.float32),
    ]
    x = torch.randn(100, 64)
    outputs = run_parts(parts, x, num_threads)
    column = 0
    for part in parts:
        width = part.weight.out_features
        assert torch.equal(outputs[:, column : column + width], part(x))
        column += width


def run_parts(parts: list[CompiledLinear], x: Tensor, num_threads: int) -> Tensor:
    inputs = Inputs(x.shape[0])
    inputs.tokens[0] = x.shape[0]
    recorder = Recorder(kernels_for(parts[0].isa), inputs, num_threads)
    tape = recorder.finish(recorder.linear([part.weight for part in parts], x, activations="int8"))
    pool = Pool(num_threads)
    try:
        for _ in range(20):
            tape.output.fill_(float("nan"))
            tape.run(pool)
    finally:
        pool.close()
    return tape.output.clone()


@pytest.mark.parametrize("isa", ISAS)
def test_zero_rows_and_large_values_stay_finite(isa: str) -> None:
    linear = compile_low_bit(make_weight(Case(4, True, 32, False)), isa, "int8")
    x = torch.zeros(3, 352)
    x[1] = 3e38
    x[2] = 1e-30
    out = linear(x)
    assert torch.equal(out[0], torch.zeros(40))
    assert np.isfinite(out[2].numpy()).all()


@pytest.mark.parametrize(("isa", "activations"), MODES)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_reaches_no_other_token(
    isa: str, activations: str, broken: float
) -> None:
    """Whoever looks at the outputs must see it: int8 has no NaN, so its scale carries it."""
    linear = compile_low_bit(make_weight(Case(4, True, 32, True)), isa, activations)
    x = torch.randn(21, 352)
    expected = linear(x)
    x[5, 17] = broken
    found = linear(x)
    assert not found[5].isfinite().any()
    expected[5] = found[5] = 0
    assert torch.equal(found, expected)
