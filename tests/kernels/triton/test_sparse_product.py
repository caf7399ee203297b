"""Which product many tokens take with 2:4, and what cuSPARSELt is given (a stand-in that checks it)."""

from typing import Any

import pytest
import torch
from nybble.kernels.dispatch import Target, choose
from nybble.kernels.layout import PackedWeight, QuantSpec
from nybble.kernels.triton.launch import Machine

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("a GPU is here: kernels are compiled, not interpreted", allow_module_level=True)
import triton_interpreter  # noqa: E402
from nybble.kernels.triton import low_bit  # noqa: E402
from nybble.kernels.triton.linear import sparse_24  # noqa: E402

CUDA = triton_interpreter.InterpretedTarget("cpu", torch.float16)


@pytest.fixture
def cusparselt(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """As torch's operators check and compute; the shapes that were multiplied."""
    multiplied = []

    def compress(matrix: torch.Tensor) -> torch.Tensor:
        assert matrix.is_contiguous()
        assert matrix.shape[0] % 16 == matrix.shape[1] % 16 == 0
        kept = (matrix.view(-1, 4) != 0).sum(1)
        assert int(kept.max()) <= 2
        return matrix.clone()

    def multiply(a: torch.Tensor, b: torch.Tensor, *, transpose_result: bool) -> torch.Tensor:
        assert transpose_result
        assert b.shape[1] % 8 == 0
        multiplied.append((*a.shape, b.shape[1]))
        return (a.float() @ b.float()).to(a.dtype).t().contiguous()

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    return multiplied


def use(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    found = Machine("here", architecture, 8)
    monkeypatch.setattr(Machine, "of", staticmethod(lambda device: found))


@pytest.mark.parametrize(
    ("target", "architecture", "reason"),
    [
        (Target("cpu", torch.float16), "sm_90", "runs on a GPU, not on cpu"),
        (Target("cuda", torch.float32), "sm_90", "takes float16 or bfloat16, not float32"),
        (Target("cuda", torch.bfloat16), "gfx942", "is NVIDIA's"),
        (Target("cuda", torch.bfloat16), "sm_90", "has no cuSPARSELt that works here"),
    ],
)
def test_it_says_why_it_is_not_taken(
    target: Target, architecture: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, architecture)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    choice = choose("sparse_product", target)
    assert choice.name == "sparse_product"
    (name, why), *_ = choice.refused
    assert name == "cusparselt"
    assert reason in why


def weight(halves: bool) -> PackedWeight:
    rng = torch.Generator().manual_seed(3)
    kept = (torch.rand(72, 50, 4, generator=rng).argsort(-1) < 2).flatten(1)
    bias = torch.randn(72, generator=rng)
    if halves:
        return PackedWeight((torch.randn(72, 200, generator=rng) * kept).half(), bias=bias)
    codes = torch.where(kept, torch.randint(0, 16, (72, 200), generator=rng), 8).to(torch.uint8)
    scales = (torch.rand(72, 2, generator=rng) * 0.02 + 0.01).half()
    return PackedWeight(codes, QuantSpec(4, 128, True), scales, bias=bias)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize(("tokens", "products"), [(2048, []), (2049, [(128, 256, 2064)])])
def test_many_tokens_take_it(
    halves: bool,
    tokens: int,
    products: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    cusparselt: list[tuple[int, ...]],
) -> None:
    """Rows and tokens padded to what it takes, and cut off again."""
    use(monkeypatch, "sm_90")
    w = weight(halves)
    linear = sparse_24.repack(w, CUDA)
    assert isinstance(linear, low_bit.Sparse24Linear)
    x = torch.randn(tokens, 200, generator=torch.Generator().manual_seed(4)).half()
    out = linear(x)
    assert w.bias is not None
    exact = x.double() @ w.dequantize(torch.float64).T + w.bias.double()
    assert out.is_contiguous()
    assert float((out - exact).norm() / exact.norm()) < 1e-3
    assert cusparselt == products


def test_without_it_the_product_is_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "sm_90")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    w = weight(halves=True)
    x = torch.randn(2049, 200).half()
    assert w.bias is not None
    exact = x.double() @ w.dequantize(torch.float64).T + w.bias.double()
    assert float((sparse_24.repack(w, CUDA)(x) - exact).norm() / exact.norm()) < 1e-3
