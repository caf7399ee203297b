"""The linear as it is called: what comes in, what is left behind. Kinds of weights: test_triton_matrix.py."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("a GPU is here: kernels are compiled, not interpreted", allow_module_level=True)
import triton_interpreter  # noqa: E402
from nybble.kernels.triton import launch, low_bit, packing, packing24  # noqa: E402

SM_90 = launch.Machine("interpreted", "sm_90", 9)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with triton_interpreter.poisoned_memory():
        yield


def weight(outliers: bool = False, rows: int = 72, cols: int = 640) -> PackedWeight:
    rng = torch.Generator().manual_seed(5)
    made = PackedWeight(
        torch.randint(0, 16, (rows, cols), generator=rng, dtype=torch.uint8),
        QuantSpec(4, 128, True),
        (torch.rand(rows, cols // 128, generator=rng) * 0.02 + 0.01).half(),
        bias=torch.randn(rows, generator=rng),
    )
    if outliers:
        chosen = torch.rand(rows, cols, generator=rng) < 0.02
        made = replace(made, outliers=SparseOverlay.of(torch.randn(rows, cols, generator=rng) * chosen))
    return made


def linear(w: PackedWeight, machine: launch.Machine = SM_90) -> low_bit.LowBitLinear:
    return low_bit.LowBitLinear(packing.pack(w, "cpu", torch.float16), machine)


def exact(w: PackedWeight, x: torch.Tensor) -> torch.Tensor:
    assert w.bias is not None
    return x.double() @ w.dequantize(torch.float64).T + w.bias.double()


def error(w: PackedWeight, x: torch.Tensor, out: torch.Tensor) -> float:
    expected = exact(w, x)
    return float((out.double() - expected).norm() / expected.norm())


def x_of(tokens: int, cols: int = 640) -> torch.Tensor:
    return torch.randn(tokens, cols, generator=torch.Generator().manual_seed(tokens)).half()


@pytest.mark.parametrize("tokens", [3, 40])
def test_programs_in_any_order_give_the_same_bits_and_free_locks(tokens: int) -> None:
    built, x = linear(weight(outliers=True)), x_of(tokens)
    results = []
    for seed in range(3):
        triton_interpreter.shuffle(seed)
        results.append(built(x))
        assert not built._locks.any()
    assert all(torch.equal(results[0], other) for other in results)
    assert error(weight(outliers=True), x, results[0]) < 5e-4


def test_k_is_split_in_these_tests() -> None:
    """Else nothing above was tested."""
    picked = launch.choose(SM_90, 4, (128, 640), 3)
    assert picked.splits(SM_90, 128 // picked.BN, 5) > 1


def test_rows_in_strides_and_at_odd_addresses_are_taken() -> None:
    built, x = linear(weight()), x_of(6)
    expected = built(x)
    wide = torch.cat([x, x], 1)
    assert torch.equal(built(wide[:, 640:]), expected)
    shifted = torch.zeros(6 * 640 + 1, dtype=torch.float16)
    shifted[1:] = x.flatten()
    assert torch.equal(built(shifted[1:].view(6, 640)), expected)


def test_no_tokens_no_launch() -> None:
    before = triton_interpreter.accesses()["store"]
    assert linear(weight())(x_of(0)).shape == (0, 72)
    assert triton_interpreter.accesses()["store"] == before


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("machine", [SM_90, launch.Machine("interpreted", "gfx942", 9)])
def test_the_dense_matrix_is_the_weight_rounded_once(outliers: bool, machine: launch.Machine) -> None:
    w = weight(outliers)
    dense = linear(w, machine).dense(torch.float16)[: w.out_features]
    without = replace(w, outliers=None).dequantize(torch.float64).half()
    if w.outliers is not None:
        residual = torch.zeros(w.values.shape)
        w.outliers.add_to(residual)
        without = (without.float() + residual).half()
    assert torch.equal(dense, without)


def test_many_tokens_with_an_overlay_take_the_dense_product() -> None:
    w = weight(outliers=True)
    x = x_of(70)
    assert error(w, x, linear(w)(x)) < 5e-4


def test_a_rule_may_ask_for_the_dense_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_bit, "choose", lambda *_: launch.Launch("dense"))
    w, x = weight(), x_of(4)
    assert error(w, x, linear(w)(x)) < 5e-4


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("tokens", [1, 20, 70])
def test_compressed_weights_give_the_same_bits_in_any_order(halves: bool, tokens: int) -> None:
    rng = torch.Generator().manual_seed(6)
    kept = (torch.rand(72, 160, 4, generator=rng).argsort(-1) < 2).flatten(1)
    w = weight()
    if halves:
        w = PackedWeight((torch.randn(72, 640, generator=rng) * kept).half(), bias=w.bias)
    else:
        w = replace(w, values=torch.where(kept, w.values, 8).to(torch.uint8))
    built = low_bit.Sparse24Linear(packing24.pack24(w, "cpu", torch.float16), SM_90)
    results = []
    for seed in range(2):
        triton_interpreter.shuffle(seed)
        results.append(built(x_of(tokens)))
        assert not built._locks.any()
    assert torch.equal(*results)
    assert error(w, x_of(tokens), results[0]) < 5e-4
    assert torch.equal(built.dense(torch.float16)[: w.out_features], w.dequantize(torch.float64).half())


def test_bytes_are_counted() -> None:
    built = linear(weight())
    assert built.nbytes == 128 * 640 // 2 + 128 * 5 * 2 + 72 * 4
