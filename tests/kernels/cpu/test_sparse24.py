"""int4 with 2:4 sparsity: bit-equal to the dense int4 kernel over the same weights, near float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu.compiled import compile_24, compile_low_bit, kernels_for
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.recorder import Recorder
from nybble.kernels.cpu.sparse24 import pack_24
from nybble.kernels.cpu.tape import Inputs
from nybble.kernels.dispatch import Target, WeightTraits, choose
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from torch import Tensor

FEATURES = cpu_features()
ISAS = [
    isa
    for isa in ("avx2", "vnni", "amx")
    if instruction_set(Target(cpu_features=FEATURES, cpu_kernels=isa)) == isa
]
pytestmark = pytest.mark.skipif(not ISAS, reason="the CPU has neither AVX2 nor AVX-512 VNNI")


def sparse_weight(rows: int, cols: int, group_size: int = 32, bias: bool = False) -> PackedWeight:
    """Random codes; of every four inputs, two to four (chosen at random) are zero."""
    rng = torch.Generator().manual_seed(rows * cols)
    spec = QuantSpec(4, group_size, True)
    codes = torch.randint(0, 16, (rows, -(-cols // 4), 4), generator=rng, dtype=torch.uint8)
    rank = torch.rand(codes.shape, generator=rng).argsort(2)
    codes[
        rank < torch.tensor([2, 2, 3, 4])[torch.randint(0, 4, codes.shape[:2], generator=rng)][..., None]
    ] = 8
    scales = (torch.rand(rows, spec.num_groups(cols), generator=rng) * 0.02 + 1e-3).half()
    values = codes.reshape(rows, -1)[:, :cols].contiguous()
    return PackedWeight(values, spec, scales, bias=torch.randn(rows, generator=rng) if bias else None)


def activations(tokens: int, cols: int) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("rows", "cols", "group_size", "bias"),
    [(40, 352, 32, False), (17, 100, 128, True), (1, 7, 32, False), (48, 72, 12, False), (64, 256, -1, True)],
)
def test_equals_float64_and_the_dense_kernel(
    isa: str, rows: int, cols: int, group_size: int, bias: bool
) -> None:
    weight = sparse_weight(rows, cols, group_size, bias)
    assert weight.is_24()
    linear, dense = compile_24(weight, isa), compile_low_bit(weight, isa, activations="int8")
    weights = weight.dequantize().double()
    for tokens in (1, 2, 3, 5, 8, 14, 64, 131):
        x = activations(tokens, cols)
        out = linear(x)
        assert torch.equal(out, dense(x))
        reference = x.double() @ weights.T + (0 if weight.bias is None else weight.bias.double())
        step = x.double().abs().amax(1, keepdim=True) / 127
        assert ((out - reference).abs() <= step / 2 * weights.abs().sum(1) + 1e-5).all()


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_codes_and_activations_do_not_saturate(isa: str) -> None:
    """All kept weights -8 and all activations at the end of their range: the widest integer sums."""
    codes = torch.full((16, 64), 8, dtype=torch.uint8)
    codes[:, ::4] = codes[:, 1::4] = 0
    codes[8:, 1::4] = 15
    weight = PackedWeight(codes, QuantSpec(4, 32, True), torch.ones(16, 2).half())
    for sign in (1.0, -1.0):
        x = torch.full((3, 64), sign)
        assert torch.allclose(compile_24(weight, isa)(x), x @ weight.dequantize().T, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_beside_other_weights_on_any_threads(isa: str, num_threads: int) -> None:
    """Dense and sparse weights over one x quantize it each in their layout; one has residuals besides."""
    overlay = SparseOverlay.of(torch.randn(21, 68) * (torch.rand(21, 68) < 0.1))
    parts = [
        compile_24(replace(sparse_weight(21, 68), outliers=overlay), isa),
        compile_low_bit(sparse_weight(5, 68), isa, activations="int8"),
        compile_24(sparse_weight(40, 68, bias=True), isa),
    ]
    x = activations(100, 68)
    inputs = Inputs(100)
    inputs.tokens[0] = 100
    recorder = Recorder(kernels_for(isa), inputs, num_threads)
    tape = recorder.finish(recorder.linear([part.weight for part in parts], x, activations="int8"))
    pool = Pool(num_threads)
    try:
        for _ in range(5):
            torch.from_numpy(tape.kept[0]).fill_(255)  # NaN in every type
            tape.run(pool)
    finally:
        pool.close()
    assert torch.equal(tape.output, torch.cat([part(x) for part in parts], 1))


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_is_the_same_bits_in_any_batch(isa: str) -> None:
    linear = compile_24(sparse_weight(40, 352), isa)
    x = activations(130, 352)
    whole = linear(x)
    for start, stop in ((0, 1), (3, 5), (5, 12), (100, 130)):
        assert torch.equal(linear(x[start:stop]), whole[start:stop])


def test_three_of_four_are_refused() -> None:
    weight = sparse_weight(40, 64)
    codes = weight.values.clone()
    codes[39, 4:8] = torch.tensor([1, 2, 3, 8])
    assert not replace(weight, values=codes).is_24()
    with pytest.raises(AssertionError, match="two of four"):
        pack_24(np.pad(codes.numpy(), ((0, 8), (0, 0)), constant_values=8))
    assert not replace(weight, g_idx=torch.tensor([1, 0] * 32, dtype=torch.int32)).is_24()
    asym = replace(weight, spec=QuantSpec(4, 32, False), zeros=torch.full((40, 2), 8, dtype=torch.uint8))
    assert not asym.is_24()


def test_the_table_chooses_it_and_it_holds_fewer_bytes() -> None:
    weight = sparse_weight(64, 256)
    target = Target(cpu_features=FEATURES, cpu_kernels="auto", cpu_activations="int8")
    choice = choose("linear", target, weight=WeightTraits.of(weight))
    assert choice.name == "cpu-int8-24"
    linear = choice.implementation.repack(weight, target)
    assert linear.nbytes == 64 * 256 // 8 * 3 + 64 * 8 * 2
    dense = replace(weight, values=torch.full_like(weight.values, 9))
    assert choose("linear", target, weight=WeightTraits.of(dense)).name == "cpu-int8"
    exact = replace(target, cpu_activations="fp32")
    assert choose("linear", exact, weight=WeightTraits.of(weight)).name == "cpu-fp32"
