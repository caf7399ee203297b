"""Sparse residuals over compiled linears: against float64, and bit-equal in any batch, on any threads."""

from dataclasses import replace

import pytest
import torch
from nybble.engine.hardware import cpu_features
from nybble.kernels.cpu.compiled import CompiledLinear, compile_low_bit, kernels_for
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.cpu.overlay import RESIDUALS
from nybble.kernels.cpu.overlay_slices import pack_overlay
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.recorder import Recorder
from nybble.kernels.cpu.tape import Inputs
from nybble.kernels.dispatch import Target
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
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
BATCHES = (1, 2, 3, 8, 10, 24, 29, 131)


def residuals(rows: int, cols: int, density: float) -> Tensor:
    """Mostly zeros; row 0 has no entry, the last one is full where there are more than two rows."""
    generator = torch.Generator().manual_seed(rows * cols)
    dense = torch.randn(rows, cols, generator=generator) * 0.3
    dense *= torch.rand(rows, cols, generator=generator) < density
    dense[0] = 0
    if rows > 2:
        dense[-1] = torch.randn(cols, generator=generator) * 0.3 + 1
    return dense.half().float()


def quantized(rows: int, cols: int, bits: int = 4, order: bool = False) -> PackedWeight:
    generator = torch.Generator().manual_seed(bits)
    spec = QuantSpec(bits, 32, True, "group" if order else "none")
    codes = torch.randint(0, 2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, spec.num_groups(cols), generator=generator) * 0.02 + 1e-3).half()
    g_idx = (torch.arange(cols) // 32)[torch.randperm(cols, generator=generator)].int() if order else None
    return PackedWeight(codes, spec, scales, None, g_idx)


def with_outliers(plain: PackedWeight, dense: Tensor) -> PackedWeight:
    return PackedWeight(
        plain.values, plain.spec, plain.scales, plain.zeros, plain.g_idx, plain.bias, SparseOverlay.of(dense)
    )


def inputs_of(tokens: int, cols: int) -> Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize(("isa", "activations"), MODES)
@pytest.mark.parametrize(
    ("bits", "order", "rows", "cols", "density"),
    [
        (4, False, 40, 352, 0.02),
        (4, True, 33, 100, 0.3),
        (2, False, 17, 7, 0.5),
        (3, True, 64, 70_000, 0.0005),
        (8, True, 1, 33, 0.5),
        (8, False, 48, 256, 0.0),
    ],
)
def test_equals_float64(
    isa: str, activations: str, bits: int, order: bool, rows: int, cols: int, density: float
) -> None:
    """What the overlay adds to the plain linear, which has its own test, is the residuals' product."""
    plain, dense = quantized(rows, cols, bits, order), residuals(rows, cols, density)
    without = compile_low_bit(plain, isa, activations)
    linear = compile_low_bit(with_outliers(plain, dense), isa, activations)
    for tokens in BATCHES if cols < 1000 else (1, 11):
        x = inputs_of(tokens, cols)
        reference = without(x).double() + x.double() @ dense.double().T
        bound = 1e-6 * (x.double().abs() @ dense.double().abs().T + reference.abs() + 1e-3)
        assert ((linear(x) - reference).abs() <= bound).all()
        assert torch.equal(linear(x)[:, 0], without(x)[:, 0])


@pytest.mark.parametrize(("isa", "activations"), MODES)
def test_a_row_is_the_same_bits_in_any_batch(isa: str, activations: str) -> None:
    linear = compile_low_bit(with_outliers(quantized(50, 356), residuals(50, 356, 0.03)), isa, activations)
    x = inputs_of(131, 356)
    whole = linear(x)
    for start, stop in ((0, 1), (3, 5), (5, 8), (9, 20), (24, 58), (100, 131)):
        assert torch.equal(linear(x[start:stop]), whole[start:stop])


def has_kernel_of_one_token(linear: CompiledLinear, activations: str) -> bool:
    recorder = Recorder(kernels_for(linear.isa), Inputs(1), 1)
    recorder.linear([linear.weight], torch.zeros(1, linear.weight.in_features), activations)
    return bool(recorder._calls[-1].args[RESIDUALS] != 0)


@pytest.mark.parametrize(("isa", "activations"), MODES)
def test_which_linears_take_one_token_beside_their_residuals(isa: str, activations: str) -> None:
    linear = compile_low_bit(with_outliers(quantized(64, 128), residuals(64, 128, 0.05)), isa, activations)
    assert has_kernel_of_one_token(linear, activations) == (isa != "avx2" and activations == "int8")


@pytest.mark.skipif("vnni" not in ISAS, reason="the CPU lacks AVX-512 VNNI")
@pytest.mark.parametrize("asym", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_token_beside_the_linear_is_the_same_bits_as_two_behind_it(bits: int, asym: bool) -> None:
    """Four blocks at once and one; fewer groups than blocks; fewer entries than groups, and more."""
    for rows, cols, density in ((205, 416, 0.02), (140, 416, 0.5), (205, 64, 0.2), (64, 2048, 0.005)):
        plain = quantized(rows, cols, bits)
        if asym:
            zeros = torch.full(plain.scales.shape, 2 ** (bits - 1) - 1, dtype=torch.uint8)
            plain = replace(plain, spec=QuantSpec(bits, 32, False), zeros=zeros)
        linear = compile_low_bit(with_outliers(plain, residuals(rows, cols, density)), "vnni", "int8")
        x = inputs_of(2, cols)
        assert has_kernel_of_one_token(linear, "int8")
        assert torch.equal(torch.cat([linear(x[:1]), linear(x[1:])]), linear(x))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 5, 100])
def test_threads_and_poisoned_memory_do_not_change_a_bit(isa: str, tokens: int) -> None:
    parts = [
        compile_low_bit(with_outliers(quantized(21, 68), residuals(21, 68, 0.1)), isa, "int8"),
        compile_low_bit(quantized(5, 68, 2), isa, "int8"),
        compile_low_bit(with_outliers(quantized(40, 68, 3), residuals(40, 68, 0.1)), isa, "int8"),
    ]
    x = inputs_of(tokens, 68)
    alone = torch.cat([part(x) for part in parts], 1)
    for num_threads in (1, 2, 4):
        assert torch.equal(run_parts(parts, x, num_threads), alone)


def run_parts(parts: list[CompiledLinear], x: Tensor, num_threads: int) -> Tensor:
    """Over a tape whose buffers hold NaN, and rows of x behind the last that hold NaN."""
    room = x.shape[0] + 9
    inputs = Inputs(room)
    inputs.tokens[0] = x.shape[0]
    rows = torch.full((room, x.shape[1]), float("nan"))
    rows[: x.shape[0]] = x
    recorder = Recorder(kernels_for(parts[0].isa), inputs, num_threads)
    tape = recorder.finish(recorder.linear([part.weight for part in parts], rows, activations="int8"))
    arena = torch.from_numpy(tape.kept[0])
    pool = Pool(num_threads)
    try:
        for _ in range(5):
            arena.fill_(255)  # NaN in every type
            tape.run(pool)
    finally:
        pool.close()
    assert tape.output[x.shape[0] :].isnan().all()  # nothing is written behind the last token
    return tape.output[: x.shape[0]].clone()


def test_heavy_rows_are_not_padded_nor_do_they_pad_others() -> None:
    dense = torch.zeros(64, 2048)
    dense[:, ::200] = 1.0
    dense[3], dense[40] = 1.0, 1.0
    packed = pack_overlay(SparseOverlay.of(dense), 2048)
    assert packed is not None
    assert len(packed.values) + len(packed.tail_values) == int((dense != 0).sum()) + 8
    assert packed.lengths.max() == 2 * 11 + 8
    assert len(packed.tail_values) == 2 * (2048 - 30)


def test_fused_and_cut_weights_keep_their_residuals() -> None:
    first = with_outliers(quantized(24, 64), residuals(24, 64, 0.1))
    second, third = quantized(8, 64), with_outliers(quantized(40, 64), residuals(40, 64, 0.2))
    (fused,) = PackedWeight.cat([first, second, third])
    parts = [first, second, third]
    assert torch.equal(fused.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert torch.equal(fused.rows(5, 50).dequantize(), fused.dequantize()[5:50])
    assert fused.rows(24, 32).dequantize().equal(second.dequantize())
    assert fused.rows(24, 32).outliers is None
    entries = int((residuals(24, 64, 0.1) != 0).sum())
    assert first.storage_bytes - quantized(24, 64).storage_bytes == 4 * 25 + entries * (2 + 2)


def test_no_entries_cost_nothing() -> None:
    assert pack_overlay(SparseOverlay.empty(40), 64) is None


@pytest.mark.parametrize(("isa", "activations"), MODES)
@pytest.mark.parametrize("tokens", [1, 2, 30])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_padding_that_reads_what_is_not_finite_spoils_no_output_that_was_sound(
    isa: str, activations: str, tokens: int, broken: float
) -> None:
    """Slots without an entry read some input of a token, whose outputs the linear has already made so."""
    plain = quantized(50, 356)
    linear = compile_low_bit(with_outliers(plain, residuals(50, 356, 0.03)), isa, activations)
    x = inputs_of(tokens, 356)
    expected = linear(x)
    row = min(1, tokens - 1)
    x[row, 0] = broken
    found = linear(x)
    assert not found[row].isfinite().any()
    assert not compile_low_bit(plain, isa, activations)(x)[row].isfinite().any()
    expected[row] = found[row] = 0
    assert torch.equal(found, expected)
