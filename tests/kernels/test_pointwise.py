"""Norms, rotary positions, gates and lookups: every implementation against float64 numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from nybble.kernels import pointwise, reference

T, HEADS, DIM = 5, 6, 16


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def wide(tensor: torch.Tensor) -> Any:
    return tensor.double().numpy()


def close(actual: torch.Tensor, expected: Any) -> None:
    np.testing.assert_allclose(wide(actual), expected, atol=2e-6, rtol=2e-6)


def norm(x: Any, weight: Any, eps: float) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@pytest.fixture(params=[reference, pointwise], ids=["reference", "pointwise"])
def ops(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("per_head", [False, True])
def test_rms_norm(ops: Any, eps: float, per_head: bool) -> None:
    x, weight = random(T, HEADS, DIM), random(HEADS, DIM) if per_head else random(DIM)
    close(ops.rms_norm(x, weight, eps), norm(wide(x), wide(weight), eps))


def test_rms_norm_of_a_part_of_a_wider_tensor(ops: Any) -> None:
    x, weight = random(T, HEADS, DIM), random(DIM)
    close(ops.rms_norm(x[:, 1:4], weight, 1e-6), norm(wide(x[:, 1:4]), wide(weight), 1e-6))


def test_add_rms_norm(ops: Any) -> None:
    x, residual, weight = random(T, DIM), random(T, DIM) + 1, random(DIM)
    before = x.clone(), residual.clone()
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    close(total, wide(x) + wide(residual))
    close(normed, norm(wide(x) + wide(residual), wide(weight), 1e-5))
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_rope_rotates_pairs_half_a_head_apart(ops: Any) -> None:
    x, angles = random(T, HEADS, DIM), random(T, DIM // 2)
    cos = torch.cat([angles.cos()] * 2, -1)[:, None]
    sin = torch.cat([-angles.sin(), angles.sin()], -1)[:, None]
    pairs = wide(x[..., : DIM // 2]) + 1j * wide(x[..., DIM // 2 :])
    turned = pairs * np.exp(1j * wide(angles))[:, None]
    close(ops.rope(x, cos, sin), np.concatenate([turned.real, turned.imag], -1))
    close(ops.rope(x[:, 1:3], cos, sin), np.concatenate([turned.real, turned.imag], -1)[:, 1:3])


def test_silu_and_mul() -> None:
    x = random(T, 2 * DIM)
    gate, up = np.split(wide(x), 2, -1)
    close(reference.silu_and_mul(x), gate / (1 + np.exp(-gate)) * up)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_embedding_converts_only_what_it_looks_up(stored: torch.dtype) -> None:
    table = random(11, DIM).to(stored)
    token_ids = torch.tensor([3, 0, 10, 3])
    found = reference.embedding(token_ids, table, torch.float32)
    assert found.dtype == torch.float32
    close(found, wide(table)[token_ids.numpy()])
