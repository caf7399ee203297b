"""pack-quantized and sparse-24-bitmask against decoders written by hand from their specifications."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from nybble.engine.errors import CheckpointError, UnsupportedModelError
from nybble.engine.formats.compressed_tensors import CompressedTensorsFormat, Group
from nybble.engine.formats.registry import get_format
from nybble.kernels.layout import PackedWeight, QuantSpec
from torch import Tensor

NAME = "model.layers.0.mlp.down_proj"


def config(bits: int = 4, group: int = 32, symmetric: bool = True, **weights: Any) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    stated = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": stated, "input_activations": None}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


def words(values: NDArray[np.int64], bits: int) -> NDArray[np.int32]:
    """Each row of signed numbers as one stream of bits, offset, padded to whole words."""
    found = []
    for row in values:
        stream = sum((int(value) + 2 ** (bits - 1)) << (bits * j) for j, value in enumerate(row))
        count = -(-len(row) * bits // 32)
        found.append([(stream >> (32 * word)) & 0xFFFFFFFF for word in range(count)])
    return np.array(found, np.uint32).view(np.int32)


def module(
    bits: int, shape: tuple[int, int], group: int, symmetric: bool, actorder: bool
) -> tuple[dict[str, Tensor], NDArray[np.float32]]:
    """The stored tensors and the weights [N, K]."""
    rng = np.random.default_rng(bits + sum(shape) + group)
    outputs, inputs = shape
    size = inputs if group == -1 else group
    g_idx = (np.arange(inputs) // size).astype(np.int32)
    g_idx = rng.permutation(g_idx) if actorder else g_idx
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, shape)
    zeros = np.zeros((outputs, inputs // size), np.int64)
    zeros = zeros if symmetric else rng.integers(-half, half, zeros.shape)
    scales = rng.uniform(0.001, 0.1, zeros.shape).astype(np.float16)
    weights = scales.astype(np.float32)[:, g_idx] * (codes - zeros[:, g_idx])
    stored = {
        "weight_packed": words(codes, bits),
        "weight_scale": scales,
        "weight_shape": np.array(shape),
    }
    if not symmetric:
        stored["weight_zero_point"] = np.ascontiguousarray(words(zeros.T, bits).T)
    if actorder:
        stored["weight_g_idx"] = g_idx
    return {f"{NAME}.{name}": torch.from_numpy(value) for name, value in stored.items()}, weights


@pytest.mark.parametrize("actorder", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("shape", "group"), [((16, 64), 32), ((30, 96), 32), ((13, 42), -1), ((24, 36), 12)])
def test_reads_and_writes_what_the_specification_says(
    bits: int, shape: tuple[int, int], group: int, symmetric: bool, actorder: bool
) -> None:
    stored, weights = module(bits, shape, group, symmetric, actorder)
    checkpoint_format = get_format(config(bits, group, symmetric, actorder="group" if actorder else None))
    found = checkpoint_format.read(stored, NAME)
    assert np.array_equal(found.dequantize().numpy(), weights)
    assert (found.zeros is None) == symmetric
    assert (found.g_idx is not None) == (actorder and group != -1)
    written = checkpoint_format.write(NAME, found)
    expected = checkpoint_format.tensors(NAME, *shape, bias=False)
    assert written.keys() == stored.keys()
    assert {name for name, tensor in expected.items() if tensor.required} == stored.keys()
    for name, value in stored.items():
        assert torch.equal(written[name], value), name
        assert tuple(value.shape) == expected[name].shape


def test_unset_orders_and_the_stored_zeros_of_symmetric_weights() -> None:
    stored, weights = module(4, (16, 64), 32, True, False)
    stored[f"{NAME}.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    stored[f"{NAME}.weight_zero_point"] = torch.zeros(16, 2, dtype=torch.int8)
    found = get_format(config(actorder="group")).read(stored, NAME)
    assert found.g_idx is None
    assert np.array_equal(found.dequantize().numpy(), weights)
    stored[f"{NAME}.weight_zero_point"][3, 1] = 1
    with pytest.raises(CheckpointError, match="weight_zero_point: not zero"):
        get_format(config()).read(stored, NAME)


def test_the_most_specific_target_decides() -> None:
    block = config(4, 128)
    weights = {"num_bits": 8, "symmetric": False, "strategy": "channel"}
    block["config_groups"]["group_1"] = {
        "targets": ["re:.*k_proj$", "re:.*layers.1\\..*"],
        "weights": weights,
    }
    block["config_groups"]["group_2"] = {
        "targets": ["model.layers.1.self_attn.k_proj"],
        "weights": {
            "num_bits": 2,
            "symmetric": True,
            "strategy": "group",
            "group_size": 16,
            "actorder": "static",
        },
    }
    block["ignore"] = ["lm_head", "re:.*o_proj"]
    found = get_format(block)
    assert found.default_spec == found.spec("model.layers.0.self_attn.q_proj") == QuantSpec(4, 128, True)
    assert found.spec("model.layers.0.self_attn.k_proj") == QuantSpec(8, -1, False)
    assert found.spec("model.layers.1.self_attn.q_proj") == QuantSpec(8, -1, False)
    assert found.spec("model.layers.1.self_attn.k_proj") == QuantSpec(2, 16, True)
    assert found.spec("model.layers.0.self_attn.o_proj") is None
    assert found.spec("lm_head") is None
    assert get_format(found.config_entries()["quantization_config"]) == found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "int-quantized"}, "'int-quantized'"),
        ({"format": "marlin-24"}, "'marlin-24'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ({"transform_config": {"config_groups": {}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "'sparse-bitmask'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "on top of quantized"),
        ({"config_groups": [1]}, "expected an object"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "expected an object with targets"),
        ({"ignore": "lm_head"}, "expected a list of names"),
        ({"ignore": ["re:("]}, "no regular expression"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict[str, Any], says: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=says):
        get_format(config() | change)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_bits": 3}, "num_bits 3"),
        ({"num_bits": None}, "num_bits None"),
        ({"type": "float"}, "type 'float'"),
        ({"strategy": "tensor", "group_size": None}, "strategy 'tensor'"),
        ({"strategy": "block", "group_size": None}, "strategy 'block'"),
        ({"strategy": None, "group_size": None}, "strategy"),
        ({"dynamic": True}, "dynamic"),
        ({"actorder": "rows"}, "actorder 'rows'"),
        ({"group_size": -3}, "group_size -3"),
        ({"symmetric": 1}, "symmetric '1'"),
    ],
)
def test_weights_that_cannot_be_read_are_named(change: dict[str, Any], says: str) -> None:
    block = config()
    block["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises((UnsupportedModelError, CheckpointError), match=says):
        get_format(block)


def test_quantized_activations_are_refused() -> None:
    block = config(8)
    block["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    with pytest.raises(UnsupportedModelError, match="group_0: input_activations"):
        get_format(block)


@pytest.mark.parametrize(
    ("tensor", "value", "says"),
    [
        (
            "weight_shape",
            torch.tensor([16, 65]),
            r"weight_shape: \[16, 65\], but weight_packed \[16, 8\] holds 16 rows",
        ),
        ("weight_shape", torch.tensor([15, 64]), "weight_shape"),
        (
            "weight_g_idx",
            torch.arange(64, dtype=torch.int32),
            "weight_g_idx: groups 0 to 63, but there are 2",
        ),
    ],
)
def test_tensors_that_disagree_are_named(tensor: str, value: Tensor, says: str) -> None:
    stored, _ = module(4, (16, 64), 32, False, True)
    with pytest.raises(CheckpointError, match=says):
        get_format(config(symmetric=False, actorder="group")).read(stored | {f"{NAME}.{tensor}": value}, NAME)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(CheckpointError, match="96 inputs are not whole groups of 64; list it"):
        get_format(config(4, 64)).tensors(NAME, 64, 96, bias=False)


def test_writing_refuses_what_it_cannot_hold() -> None:
    scales = torch.ones(16, 2, dtype=torch.float16)
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    stored = get_format(config())
    for weight, says in [
        (PackedWeight(torch.zeros(16, 64)), "dense"),
        (PackedWeight(codes, QuantSpec(8, 32, True), scales), "num_bits=8"),
        (PackedWeight(codes, QuantSpec(4, 32, False), scales, scales.byte()), "says symmetric"),
        (
            PackedWeight(codes, QuantSpec(4, 32, True), scales, g_idx=torch.arange(64).flip(0) // 32),
            "no actorder",
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            stored.write(NAME, weight)


BITMASK = {
    "quant_method": "compressed-tensors",
    "sparsity_config": {
        "format": "sparse-24-bitmask",
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": ["lm_head"],
    },
}


def sparse(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """2:4, some quads with one weight or none."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(shape, generator=generator)
    order = torch.rand(shape[0], shape[1] // 4, 4, generator=generator).argsort(2)
    kept = torch.rand(shape[0], shape[1] // 4, 1, generator=generator).mul(3).int()
    return (dense * (order < kept).view(shape)).to(dtype)


def decode(stored: dict[str, Tensor]) -> NDArray[np.float32]:
    """Value by value."""
    values = stored[f"{NAME}.compressed"].float().numpy()
    bitmask = stored[f"{NAME}.bitmask"].numpy()
    rows, cols = (int(size) for size in stored[f"{NAME}.shape"].flatten())
    found = np.zeros((rows, cols), np.float32)
    for row in range(rows):
        taken = 0
        for col in range(cols):
            if bitmask[row, col // 8] >> (col % 8) & 1:
                found[row, col] = values[row, taken]
                taken += 1
        assert taken == cols // 2
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(16, 64), (7, 12), (5, 20)])
def test_bitmasks_hold_two_of_four(shape: tuple[int, int], dtype: torch.dtype) -> None:
    dense = sparse(shape, dtype)
    checkpoint_format = get_format(BITMASK)
    written = checkpoint_format.write(NAME, PackedWeight(dense))
    assert np.array_equal(decode(written), dense.float().numpy())
    expected = checkpoint_format.tensors(NAME, *shape, bias=False)
    assert {name: tuple(value.shape) for name, value in written.items()} == {
        n: e.shape for n, e in expected.items()
    }
    found = checkpoint_format.read(written, NAME)
    assert found.spec is None
    assert torch.equal(found.values, dense)
    assert found.values.dtype == dtype
    assert checkpoint_format.spec(NAME) is checkpoint_format.default_spec is None
    assert set(checkpoint_format.tensors("lm_head", *shape, bias=False)) == {"lm_head.weight"}
    assert get_format(checkpoint_format.config_entries()["quantization_config"]) == checkpoint_format


def test_malformed_bitmasks_are_named() -> None:
    checkpoint_format = get_format(BITMASK)
    stored = checkpoint_format.write(NAME, PackedWeight(sparse((8, 16), torch.float16)))
    bitmask = stored[f"{NAME}.bitmask"].clone()
    bitmask[2, 1] = 0b00110111
    with pytest.raises(CheckpointError, match=r"bitmask: row 2, inputs 8 to 11: expected 2 kept, found 3"):
        checkpoint_format.read(stored | {f"{NAME}.bitmask": bitmask}, NAME)
    with pytest.raises(CheckpointError, match=r"shape: \[8, 20\], but compressed holds \[8, 16\]"):
        checkpoint_format.read(stored | {f"{NAME}.shape": torch.tensor([[8], [20]])}, NAME)
    dense = sparse((8, 16), torch.float16)
    dense[5, 4:7] = 1
    with pytest.raises(ValueError, match="row 5 has 3 weights in inputs 4 to 7"):
        checkpoint_format.write(NAME, PackedWeight(dense))
    with pytest.raises(CheckpointError, match="18 inputs are not whole fours"):
        checkpoint_format.tensors(NAME, 8, 18, bias=False)


def test_what_is_said_of_zeros() -> None:
    said = {"sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"]}}
    assert get_format(config() | said).sparsity == "2:4"
    assert get_format(config()).sparsity is None
    assert get_format(BITMASK).sparsity == "2:4"
    written = CompressedTensorsFormat((Group(("Linear",), QuantSpec(4, 32, True)),), ("lm_head",), (), "2:4")
    assert get_format(written.config_entries()["quantization_config"]) == written


def old_release(module: str) -> Any:
    return pytest.importorskip(
        f"compressed_tensors.compressors.{module}",
        reason="compressed-tensors 0.14, the last release with this, is not installed (optional oracle)",
        exc_type=ImportError,
    )


@pytest.mark.parametrize("shape", [(16, 64), (7, 12), (5, 20)])
def test_bitmasks_are_those_of_the_library(shape: tuple[int, int]) -> None:
    library = old_release("sparse_compressors.sparse_24_bitmask")
    dense = sparse(shape, torch.float16)
    theirs = library.Sparse24BitMaskTensor.from_dense(dense).dict(f"{NAME}.weight")
    checkpoint_format = get_format(BITMASK)
    expected = checkpoint_format.tensors(NAME, *shape, bias=False)
    assert {name: tuple(value.shape) for name, value in theirs.items()} == {
        name: tensor.shape for name, tensor in expected.items()
    }
    assert torch.equal(checkpoint_format.read(theirs, NAME).values, dense)
    ours = checkpoint_format.write(NAME, PackedWeight(dense))
    data = {name.rpartition(".")[2]: value for name, value in ours.items()}
    assert torch.equal(library.Sparse24BitMaskTensor.from_compressed_data(**data).decompress(), dense)


def test_the_library_unpacks_our_orders_of_inputs() -> None:
    library = old_release("quantized_compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationArgs

    stored, weights = module(4, (16, 64), 32, False, True)
    checkpoint_format = get_format(config(symmetric=False, actorder="group"))
    written = checkpoint_format.write(NAME, checkpoint_format.read(stored, NAME))
    data = {name.rpartition(".")[2]: value for name, value in written.items()}
    data["weight_scale"] = data["weight_scale"].float()
    args = QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=32, actorder="group")
    found = library.PackedQuantizationCompressor().decompress_weight(data, args)
    assert np.array_equal(found.numpy(), weights)
