"""What the kernel takes, and why it refuses."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nybble.kernels.dispatch import Target, WeightTraits, choose
from nybble.kernels.layout import PackedWeight, QuantSpec
from nybble.kernels.triton import linear
from nybble.kernels.triton.launch import Machine

TRAITS = WeightTraits(64, 128, QuantSpec(4, 128, True), torch.uint8, 1.0)
CUDA = Target("cuda", torch.float16)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: Machine("H200", "sm_90", 132)))


def test_the_weight_is_taken() -> None:
    assert linear.low_bit.refuses(CUDA, weight=TRAITS) is None
    assert choose("linear", CUDA, weight=TRAITS).name == "triton-low-bit"


@pytest.mark.parametrize(
    ("target", "traits", "reason"),
    [
        (Target("cpu"), TRAITS, "runs on a GPU, not on cpu"),
        (CUDA, replace(TRAITS, spec=None), "quantized weights only"),
        (CUDA, replace(TRAITS, spec=QuantSpec(5, 128, True)), "2, 3, 4 or 8 bits, not 5"),
        (CUDA, replace(TRAITS, whole_zeros=False), "whole numbers"),
        (replace(CUDA, dtype=torch.float32), TRAITS, "asked for float32"),
        (CUDA, replace(TRAITS, max_abs=1e5), "fp16 would overflow"),
    ],
)
def test_refusals_say_why(target: Target, traits: WeightTraits, reason: str) -> None:
    found = linear.low_bit.refuses(target, weight=traits)
    assert found is not None and reason in found


SPARSE = replace(TRAITS, is_24=True)


def test_weights_with_sparsity_are_taken_compressed() -> None:
    assert choose("linear", CUDA, weight=SPARSE).name == "triton-24"
    halves = replace(SPARSE, spec=None, dtype=torch.float16)
    assert choose("linear", CUDA, weight=halves).name == "triton-24"
    assert choose("linear", CUDA, weight=replace(SPARSE, has_outliers=True)).name == "triton-low-bit"
    reason = linear.sparse_24.refuses(CUDA, weight=TRAITS)
    assert reason is not None and "2:4 sparsity only" in reason


def test_an_amd_gpu_takes_sparse_codes_as_dense_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: Machine("MI300X", "gfx942", 304)))
    choice = choose("linear", CUDA, weight=SPARSE)
    assert choice.name == "triton-low-bit"
    assert ("triton-24", "has no launches for MI300X: needs mma.sp") in choice.refused


@pytest.mark.parametrize("columns", [64, 62])
def test_floats_that_keep_two_of_four_are_seen(columns: int) -> None:
    rng = torch.Generator().manual_seed(0)
    kept = torch.rand(40, 16, 4, generator=rng).argsort(-1).flatten(1)[:, :columns] < 2
    values = torch.randn(40, columns, generator=rng) * kept
    assert WeightTraits.of(PackedWeight(values)).is_24
    values[37, 4:7] = 1.0
    assert not WeightTraits.of(PackedWeight(values)).is_24


def test_an_old_gpu_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: Machine("Tesla T4", "sm_75", 40)))
    assert linear.low_bit.refuses(CUDA, weight=TRAITS) == "has no launches for Tesla T4 (sm_75)"


def test_a_cpu_has_nothing_to_compile_ahead() -> None:
    assert linear.warm([object()], Target("cpu"), 8192, 2) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_missing_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert linear.low_bit.refuses(CUDA, weight=TRAITS) == "torch sees no GPU"
    assert choose("linear", CUDA, weight=TRAITS).name == "torch"


@pytest.mark.parametrize(
    ("bits", "zero", "whole"),
    [
        (4, 3.0, True),
        (4, 0.5, False),
        (4, -1.0, False),
        (4, float("nan"), False),
        *((bits, 2.0**bits, True) for bits in (2, 3, 4)),  # of checkpoints that store a zero point minus one
        *((bits, 2.0**bits + 1, False) for bits in (2, 3, 4)),
        (8, 255.0, True),
        (8, 256.0, False),
    ],
)
def test_zero_points_that_no_kernel_holds_are_refused(bits: int, zero: float, whole: bool) -> None:
    codes = torch.zeros(64, 128, dtype=torch.uint8)
    weight = PackedWeight(codes, QuantSpec(bits, 128, False), torch.ones(64, 1), torch.full((64, 1), zero))
    traits = WeightTraits.of(weight)
    assert traits.whole_zeros is whole
    assert choose("linear", CUDA, weight=traits).name == ("triton-low-bit" if whole else "torch")


@pytest.mark.parametrize("stated", [False, True])
def test_compiled_kernels_are_kept_by_tritons_version(
    stated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if stated:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    with triton.knobs.cache.scope():
        found = linear.keep_compiled(tmp_path)
        assert found == tmp_path / ("mine" if stated else f"triton-{triton.__version__}")
        assert linear.keep_compiled(tmp_path) == found == Path(triton.knobs.cache.dir)
