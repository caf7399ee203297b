"""AWQ's gemm layout against a decoder written by hand from its specification."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nybble.engine.errors import CheckpointError, UnsupportedModelError
from nybble.engine.formats.awq import AWQFormat
from nybble.engine.formats.registry import get_format
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from torch import Tensor

NAME = "model.layers.0.mlp.down_proj"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each nibble of a word, lowest first


def config(group: int = 32, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": group,
        "zero_point": True,
        **more,
    }


def words(codes: NDArray[np.int64]) -> NDArray[np.int32]:
    """[R, N] -> [R, N/8], nibble by nibble."""
    found = np.zeros((codes.shape[0], codes.shape[1] // 8), np.int64)
    for row in range(codes.shape[0]):
        for word in range(codes.shape[1] // 8):
            for nibble in range(8):
                found[row, word] |= codes[row, 8 * word + ORDER[nibble]] << (4 * nibble)
    return found.astype(np.uint32).view(np.int32)


def module(
    outputs: int, inputs: int, group: int, symmetric: bool = False
) -> tuple[dict[str, Tensor], NDArray[np.float32]]:
    """The stored tensors and the weights [N, K]."""
    rng = np.random.default_rng(outputs + inputs + group)
    size = inputs if group == -1 else group
    groups = inputs // size
    codes = rng.integers(0, 16, (inputs, outputs))
    zeros = np.full((groups, outputs), 8) if symmetric else rng.integers(0, 16, (groups, outputs))
    scales = rng.uniform(0.001, 0.1, (groups, outputs)).astype(np.float16)
    weights = np.empty((outputs, inputs), np.float32)
    for k in range(inputs):
        weights[:, k] = scales[k // size].astype(np.float32) * (codes[k] - zeros[k // size])
    stored = {"qweight": words(codes), "qzeros": words(zeros), "scales": scales}
    return {f"{NAME}.{name}": torch.from_numpy(value) for name, value in stored.items()}, weights


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("shape", "group"), [((8, 32), 32), ((40, 96), 32), ((64, 256), 128), ((16, 96), -1)]
)
def test_reads_and_writes_what_the_specification_says(
    shape: tuple[int, int], group: int, symmetric: bool
) -> None:
    stored, weights = module(*shape, group, symmetric)
    checkpoint_format = get_format(config(group))
    found = checkpoint_format.read(stored, NAME)
    assert np.array_equal(found.dequantize().numpy(), weights)
    assert found.spec == QuantSpec(4, group, symmetric)
    assert (found.zeros is None) == symmetric
    written = checkpoint_format.write(NAME, found)
    expected = checkpoint_format.tensors(NAME, *shape, bias=False)
    assert written.keys() == expected.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(written[name], value), name
        assert tuple(value.shape) == expected[name].shape


def test_a_known_word() -> None:
    codes = torch.arange(8, dtype=torch.uint8)[:, None].repeat(1, 32)
    weight = PackedWeight(codes, QuantSpec(4, 32, True), torch.ones(8, 1, dtype=torch.float16))
    written = get_format(config()).write(NAME, weight)
    assert set(written[f"{NAME}.qweight"].flatten().tolist()) == {0x75316420}
    assert written[f"{NAME}.qzeros"].tolist() == [[0x88888888 - 2**32]]


def test_bias_and_bf16_scales() -> None:
    stored, weights = module(16, 64, 32)
    checkpoint_format = get_format(config())
    bias = torch.arange(16, dtype=torch.float16)
    stored[f"{NAME}.scales"] = stored[f"{NAME}.scales"].to(torch.bfloat16)
    found = checkpoint_format.read(stored | {f"{NAME}.bias": bias}, NAME)
    assert found.bias is bias
    assert np.allclose(found.dequantize().numpy(), weights, rtol=2**-8, atol=0)
    assert f"{NAME}.bias" in checkpoint_format.tensors(NAME, 16, 64, bias=True)
    assert torch.equal(checkpoint_format.write(NAME, found)[f"{NAME}.bias"], bias)


def test_old_keys_and_modules_that_stay_dense() -> None:
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM", "zero_point": True}
    found = get_format(old | {"modules_to_not_convert": ["o_proj", "layers.1.mlp"]})
    assert isinstance(found, AWQFormat)
    assert found.spec("model.layers.0.self_attn.q_proj") == QuantSpec(4, 64, False)
    for dense in ("lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.up_proj"):
        assert found.spec(dense) is None
    again = get_format(found.config_entries()["quantization_config"])
    for module in ("layers.0.self_attn.q_proj", "layers.0.self_attn.o_proj", "layers.1.mlp.up_proj"):
        assert again.spec(f"model.{module}") == found.spec(f"model.{module}")
    named = AWQFormat(QuantSpec(4, 64, False), excluded=("model.*up_proj",))
    assert named.spec("model.layers.0.mlp.up_proj") is None
    assert get_format(named.config_entries()["quantization_config"]) == named
    with_head = get_format(config(lm_head=True))
    assert with_head.spec("lm_head") is not None
    assert get_format(with_head.config_entries()["quantization_config"]) == with_head


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"version": "gemv"}, UnsupportedModelError, "'gemv'"),
        ({"version": "gemv_fast"}, UnsupportedModelError, "'gemv_fast'"),
        ({"version": "marlin"}, UnsupportedModelError, "'marlin'"),
        ({"bits": 8}, UnsupportedModelError, "bits 8"),
        ({"bits": None}, UnsupportedModelError, "bits None"),
        ({"bits": "4"}, UnsupportedModelError, "bits 4"),
        ({"backend": "llm-awq"}, UnsupportedModelError, "llm-awq"),
        ({"desc_act": True}, UnsupportedModelError, "desc_act"),
        ({"group_size": 0}, CheckpointError, "group_size 0"),
        ({"zero_point": "yes"}, CheckpointError, "zero_point 'yes'"),
        ({"dynamic": {"+:.*q_proj": {"bits": 8}}}, UnsupportedModelError, "all alike or dense"),
        ({"dynamic": {"-:(": {}}}, CheckpointError, "regular expression"),
        ({"modules_to_not_convert": "gate"}, CheckpointError, "expected a list of names"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        get_format(config() | change)


def test_shapes_that_do_not_fit() -> None:
    checkpoint_format = get_format(config(64))
    with pytest.raises(
        CheckpointError, match=r"down_proj: 96 inputs are not whole groups of 64.*not_convert"
    ):
        checkpoint_format.tensors(NAME, 64, 96, bias=False)
    with pytest.raises(CheckpointError, match="12 outputs of 4 bits"):
        checkpoint_format.tensors(NAME, 12, 64, bias=False)


def weight(**change: Any) -> PackedWeight:
    fields = {
        "values": torch.zeros(16, 64, dtype=torch.uint8),
        "spec": QuantSpec(4, 32, False),
        "scales": torch.ones(16, 2, dtype=torch.float16),
        "zeros": torch.zeros(16, 2, dtype=torch.uint8),
    }
    return PackedWeight(**(fields | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"values": torch.zeros(16, 64), "spec": None, "scales": None, "zeros": None}, "dense"),
        ({"spec": QuantSpec(8, 32, False)}, "num_bits=8"),
        ({"g_idx": torch.arange(64).flip(0) // 32}, "no order of inputs"),
        ({"zeros": torch.full((16, 2), 0.5)}, "not whole"),
        ({"scales": torch.full((16, 2), 1 / 3)}, "not fp16"),
        ({"outliers": SparseOverlay.empty(16)}, "residuals"),
    ],
)
def test_what_cannot_be_written_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        get_format(config()).write(NAME, weight(**change))
