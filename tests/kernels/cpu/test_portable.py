"""Packed weights in plain torch: exact weights, fp32 products, no numba and no fbgemm on the way."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.hardware import cpu_features
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.records import SamplingParams
from nybble.kernels.cpu.portable import PortableLinear, low_bit
from nybble.kernels.dispatch import Target, WeightTraits, choose, resolve
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from tiny_models import tiny_transformer
from tiny_tokenizer import write_tokenizer

PORTABLE = Target("cpu", torch.float16, cpu_kernels="portable", cpu_activations="int8")
SHAPES = [(40, 352, 32), (40, 352, -1), (17, 100, 48), (1, 33, 20), (31, 7, 64), (300, 1028, 257)]


def make_weight(bits: int, symmetric: bool, order: bool, shape: tuple[int, int, int]) -> PackedWeight:
    """With bias and residuals."""
    rng = torch.Generator().manual_seed(bits)
    rows, cols, group_size = shape
    spec = QuantSpec(bits, group_size, symmetric, "group" if order else "none")
    groups, top = spec.num_groups(cols), 2**bits
    g_idx = torch.arange(cols) // (cols if group_size == -1 else group_size)
    sparse = torch.randn(rows, cols, generator=rng) * (torch.rand(rows, cols, generator=rng) < 0.05)
    return PackedWeight(
        torch.randint(0, top, (rows, cols), generator=rng, dtype=torch.uint8),
        spec,
        (torch.rand(rows, groups, generator=rng) * 0.02 + 1e-3).half(),
        None if symmetric else torch.randint(0, top, (rows, groups), generator=rng, dtype=torch.uint8),
        g_idx[torch.randperm(cols, generator=rng)].int() if order else None,
        torch.randn(rows, generator=rng),
        SparseOverlay.of(sparse),
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(
    bits: int, symmetric: bool, order: bool, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nybble.kernels.cpu.portable._TILE_BYTES", 4096)  # tiles of 16 outputs
    weight = make_weight(bits, symmetric, order, shape)
    linear = low_bit.repack(weight, PORTABLE)
    dense = weight.dequantize()
    assert torch.equal(linear._weights(0, shape[0]), dense)
    assert weight.bias is not None
    x = torch.randn(61, shape[1], generator=torch.Generator().manual_seed(0))
    reference = x.double() @ dense.double().T + weight.bias.double()
    assert ((linear(x) - reference).abs() / reference.abs().max()).max() < 1e-6
    plain = replace(weight, outliers=None, bias=None)
    assert torch.equal(low_bit.repack(plain, PORTABLE)._weights(0, shape[0]), plain.dequantize())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="measured with MKL only")
def test_a_row_is_the_same_bits_in_any_batch() -> None:
    linear = low_bit.repack(make_weight(4, True, False, (300, 1028, 257)), PORTABLE)
    x = torch.randn(300, 1028)
    whole = linear(x)
    for start, stop in ((0, 1), (3, 5), (4, 7), (5, 12), (9, 100), (100, 228), (1, 300)):
        assert torch.equal(linear(x[start:stop]), whole[start:stop]), (start, stop)


def test_weights_stay_packed() -> None:
    weight = make_weight(3, False, False, (64, 512, 32))
    packed: PortableLinear = low_bit.repack(weight, PORTABLE)
    assert sum(plane.nbytes for plane in packed.planes) == 64 * 512 * 3 // 8
    assert packed.nbytes == weight.storage_bytes


def test_who_takes_low_bit_weights_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    traits = WeightTraits(8, 32, QuantSpec(4, 32, True), torch.uint8, 1.0)
    forced = choose("linear", PORTABLE, weight=traits)
    assert forced.name == "portable"
    asked = "--cpu-kernels portable was asked for"
    assert [dict(forced.refused)[name] for name in ("cpu-int8", "dequant-fp16")] == [asked] * 2
    dense = replace(traits, spec=None, dtype=torch.float16)
    assert choose("linear", PORTABLE, weight=dense).name == "torch"

    exact = Target("cpu", torch.float32, frozenset({"sse4_2"}), "auto")
    choice = choose("linear", exact, weight=traits)
    assert choice.name == "portable"
    assert "the CPU lacks" in dict(choice.refused)["cpu-fp32"]
    assert "float32" in dict(choice.refused)["dequant-fp16"]
    without = SimpleNamespace(supported_engines=["qnnpack"])  # as on such a CPU
    monkeypatch.setattr("torch.backends.quantized", without)
    half = replace(exact, dtype=torch.float16, cpu_activations="int8")
    assert choose("linear", half, weight=traits).name == "portable"
    monkeypatch.undo()
    avx2 = replace(exact, cpu_features=frozenset({"avx2", "fma", "f16c"}))
    assert choose("linear", avx2, weight=traits).name == "cpu-fp32"
    monkeypatch.setitem(sys.modules, "numba", None)  # as if it were not installed
    choice = choose("linear", avx2, weight=traits)
    assert choice.name == "portable"
    assert dict(choice.refused)["cpu-fp32"] == "numba is not installed"
    assert choose("linear", replace(avx2, dtype=torch.float16), weight=traits).name == "portable"
    served = replace(
        avx2, dtype=torch.float16, cpu_activations="int8"
    )  # what the default becomes without numba
    assert choose("linear", served, weight=traits).name == "dequant-fp16"
    assert choose("linear", replace(exact, cpu_kernels="torch"), weight=traits).name == "torch"


def test_an_engine_over_it_gives_the_reference_s_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_transformer("llama", vocab_size=300, eos_token_id=0).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    options = QuantizeOptions(str(tmp_path / "model"), str(tmp_path / "out"), "rtn", bits=3, group_size=32)
    quantize(options, lambda *_: None, lambda _: None)
    rng = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 300, (3 + 9 * i,), generator=rng).tolist() for i in range(6)]

    def generate(**options: Any) -> tuple[list[list[int]], list[str]]:
        lines: list[str] = []
        config = EngineConfig(str(tmp_path / "out"), "cpu", "float32", num_threads=1, **options)
        engine, _ = build_engine(config, lambda phase, done, total, line: lines.append(line))
        params = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
        return [output.token_ids for output in engine.generate(prompts, params)], lines

    expected, _ = generate(cpu_kernels="torch")
    forced, lines = generate(cpu_kernels="portable")
    assert forced == expected
    assert any(line.startswith("portable: ") and "3-bit" in line for line in lines)
    monkeypatch.setattr("nybble.engine.model.loader.cpu_features", lambda: frozenset({"sse4_2"}))
    chosen, lines = generate(max_num_batched_tokens=64)
    assert chosen == expected
    assert any(line.startswith("portable: ") and "the CPU lacks" in line for line in lines)


@pytest.mark.parametrize(("dtype", "exponent"), [(torch.float32, 0), (torch.bfloat16, -22)])
def test_scales_that_fp16_would_change_are_served_exactly(dtype: torch.dtype, exponent: int) -> None:
    generator = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 16, (48, 128), generator=generator, dtype=torch.uint8)
    scales = ((1 + torch.rand(48, 4, generator=generator)) * 2.0**exponent).to(dtype)
    weight = PackedWeight(codes, QuantSpec(4, 32, True), scales)
    target = Target("cpu", torch.float32, cpu_features(), "auto", "fp32")
    kernel = resolve("linear", target, weight=WeightTraits.of(weight))
    x = torch.randn(5, 128, generator=generator)
    exact = x.double() @ weight.dequantize(torch.float32).double().T
    error = (kernel.repack(weight, target)(x).double() - exact).norm() / exact.norm()
    assert float(error) < 1e-6
