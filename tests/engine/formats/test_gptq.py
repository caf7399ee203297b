"""The GPTQ family against a decoder written by hand from its specification, and against GPTQModel."""

import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nybble.engine.errors import CheckpointError, UnsupportedModelError
from nybble.engine.formats.gptq import GPTQFormat
from nybble.engine.formats.packing import pack, unpack
from nybble.engine.formats.registry import get_format
from nybble.kernels.layout import PackedWeight, QuantSpec
from torch import Tensor

from . import gptq_by_hand as by_hand

SHARED = Path(__file__).resolve().parents[3] / "../shared/data"
NAME = "model.layers.0.mlp.down_proj"
SHAPE = (32, 352)  # a group of 128 does not divide the inputs: the last one has 96

CELLS = list(
    itertools.product((2, 3, 4, 8), (True, False), (False, True), (32, 128, -1), ("gptq", "gptq_v2"))
)


def config(
    bits: int, symmetric: bool, actorder: bool, group: int, version: str, **more: Any
) -> dict[str, Any]:
    return {
        "bits": bits,
        "sym": symmetric,
        "desc_act": actorder,
        "group_size": group,
        "checkpoint_format": version,
        "quant_method": "gptq",
        **more,
    }


def named(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {
        f"{NAME}.{name}": torch.from_numpy(np.ascontiguousarray(value)) for name, value in tensors.items()
    }


def module_of(cell: tuple[int, bool, bool, int, str]) -> Any:
    bits, symmetric, actorder, group, _ = cell
    rng = np.random.default_rng(zlib.crc32(repr(cell).encode()))
    return by_hand.make_module(rng, bits, SHAPE, group, symmetric, actorder)


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_reads_what_the_specification_says_bit_for_bit(cell: tuple[int, bool, bool, int, str]) -> None:
    module = module_of(cell)
    stored = by_hand.store(module, cell[-1])
    found = get_format(config(*cell)).read(named(stored), NAME)
    assert np.array_equal(found.dequantize().numpy(), module.weights())
    assert np.array_equal(found.dequantize().numpy(), by_hand.load(stored, cell[0], cell[-1]).weights())
    assert (found.g_idx is not None) == (cell[2] and cell[3] != -1)
    assert (found.zeros is None) == cell[1]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_writes_what_the_specification_says(cell: tuple[int, bool, bool, int, str]) -> None:
    bits, _, _, _, version = cell
    module = module_of(cell)
    if version == "gptq":
        module.zeros = np.maximum(module.zeros, 1)  # 0 is refused there
    checkpoint_format = get_format(config(*cell))
    written = checkpoint_format.write(
        NAME, checkpoint_format.read(named(by_hand.store(module, version)), NAME)
    )
    expected = checkpoint_format.tensors(NAME, *SHAPE, bias=False)
    for name, value in named(by_hand.store(module, version)).items():
        assert torch.equal(written[name], value), name
        assert tuple(written[name].shape) == expected[name].shape
    plain = {name.rpartition(".")[2]: value.numpy() for name, value in written.items()}
    assert np.array_equal(by_hand.load(plain, bits, version).weights(), module.weights())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("actorder", [False, True])
def test_version_1_and_2_hold_the_same_weights(bits: int, actorder: bool) -> None:
    first, second = (get_format(config(bits, False, actorder, 32, v)) for v in ("gptq", "gptq_v2"))
    module = module_of((bits, False, actorder, 32, "both"))
    module.zeros = np.maximum(module.zeros, 1)
    weight = first.read(named(by_hand.store(module, "gptq")), NAME)
    there = second.write(NAME, weight)
    back = first.write(NAME, second.read(there, NAME))
    assert torch.equal(second.read(there, NAME).dequantize(), weight.dequantize())
    assert all(torch.equal(back[name], value) for name, value in first.write(NAME, weight).items())
    assert not torch.equal(there[f"{NAME}.qzeros"], back[f"{NAME}.qzeros"])


def test_three_bits_are_one_stream_of_96_bits() -> None:
    values = np.random.default_rng(0).integers(0, 8, 32)
    v = [int(x) for x in values]
    words = [
        sum(v[j] << (3 * j) for j in range(10)) | (v[10] & 3) << 30,
        v[10] >> 2 | sum(v[11 + j] << (3 * j + 1) for j in range(10)) | (v[21] & 1) << 31,
        v[21] >> 1 | sum(v[22 + j] << (3 * j + 2) for j in range(10)),
    ]
    packed = torch.tensor([by_hand.signed(words)], dtype=torch.int32)
    codes = torch.from_numpy(values.astype(np.uint8))[None]
    assert torch.equal(pack(codes, 3), packed)
    assert torch.equal(unpack(packed, 3, 32), codes)


@pytest.mark.parametrize(
    ("bits", "version", "word"),
    [
        (4, "gptq", 0x77777777),
        (4, "gptq_v2", 0x88888888),
        (8, "gptq", 0x7F7F7F7F),
        (8, "gptq_v2", 0x80808080),
        (2, "gptq", 0x55555555),
        (2, "gptq_v2", 0xAAAAAAAA),
    ],
)
def test_symmetric_zeros_are_the_known_words(bits: int, version: str, word: int) -> None:
    weight = PackedWeight(
        torch.zeros(32, 64, dtype=torch.uint8),
        QuantSpec(bits, 32, True),
        torch.ones(32, 2, dtype=torch.float16),
    )
    written = get_format(config(bits, True, False, 32, version)).write(NAME, weight)
    assert set(written[f"{NAME}.qzeros"].flatten().tolist()) == set(by_hand.signed([word]))


def test_a_missing_g_idx_is_trivial_unless_act_order_needs_it() -> None:
    cell = (4, True, False, 128, "gptq")
    module = module_of(cell)
    tensors = named(by_hand.store(module, "gptq"))
    del tensors[f"{NAME}.g_idx"]
    assert np.array_equal(
        get_format(config(*cell)).read(tensors, NAME).dequantize().numpy(), module.weights()
    )
    needs = get_format(config(4, True, True, 128, "gptq")).tensors(NAME, *SHAPE, bias=False)
    assert needs[f"{NAME}.g_idx"].required
    assert not get_format(config(*cell)).tensors(NAME, *SHAPE, bias=False)[f"{NAME}.g_idx"].required


def test_act_order_with_a_trivial_g_idx_is_no_act_order() -> None:
    stored = by_hand.store(module_of((4, True, False, 128, "gptq")), "gptq")
    found = get_format(config(4, True, True, 128, "gptq")).read(named(stored), NAME)
    assert found.g_idx is None
    assert found.spec == QuantSpec(4, 128, True, "none")


@pytest.mark.parametrize("group", [-1, 3])
def test_g_idx_out_of_range_is_refused(group: int) -> None:
    stored = by_hand.store(module_of((4, True, False, 128, "gptq")), "gptq")
    stored["g_idx"] = np.where(np.arange(352) == 7, group, stored["g_idx"]).astype(np.int32)
    with pytest.raises(CheckpointError, match="g_idx"):
        get_format(config(4, True, True, 128, "gptq")).read(named(stored), NAME)


def test_bias_bf16_scales_and_the_zero_bias_of_old_files() -> None:
    tensors = named(by_hand.store(module_of((4, True, False, 32, "gptq")), "gptq"))
    tensors[f"{NAME}.scales"] = tensors[f"{NAME}.scales"].to(torch.bfloat16)
    checkpoint_format = get_format(config(4, True, False, 32, "gptq"))
    tensors[f"{NAME}.bias"] = torch.zeros(32, dtype=torch.float16)
    assert checkpoint_format.read(tensors, NAME).bias is None
    tensors[f"{NAME}.bias"] = bias = torch.arange(32, dtype=torch.float16)
    found = checkpoint_format.read(tensors, NAME)
    assert found.bias is not None
    assert torch.equal(found.bias, bias)
    assert found.scales is not None
    assert found.scales.dtype == torch.bfloat16
    rewritten = checkpoint_format.write(NAME, found)
    assert all(torch.equal(rewritten[name], value) for name, value in tensors.items())


def test_missing_keys_take_the_familys_defaults_and_old_keys_are_tolerated() -> None:
    old = {
        "bits": 4,
        "damp_percent": 0.01,
        "static_groups": False,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "is_marlin_format": False,
    }
    found = get_format(old)
    assert isinstance(found, GPTQFormat)
    assert (found.version, found.base) == ("gptq", QuantSpec(4, 128, True, "none"))


def test_dynamic_overrides_and_excludes_first_match_first() -> None:
    dynamic = {
        "-:.*\\.o_proj": {},
        "+:model\\.layers\\.0\\..*q_proj": {"bits": 8, "group_size": 32, "desc_act": True},
        ".*q_proj": {"bits": 2, "sym": False},
        "layers": {"bits": 8},  # matched at the start only: no module begins so
    }
    found = get_format(config(4, True, False, 128, "gptq", dynamic=dynamic))
    assert found.spec("model.layers.0.self_attn.o_proj") is None
    assert found.spec("model.layers.0.self_attn.q_proj") == QuantSpec(8, 32, True, "group")
    assert found.spec("model.layers.1.self_attn.q_proj") == QuantSpec(2, 128, False, "none")
    assert found.spec("model.layers.1.self_attn.k_proj") == QuantSpec(4, 128, True, "none")
    assert found.spec("lm_head") is None
    assert get_format(config(4, True, False, 128, "gptq", lm_head=True)).spec("lm_head") is not None
    assert set(found.tensors("model.layers.0.self_attn.o_proj", 64, 64, bias=False)) == {
        "model.layers.0.self_attn.o_proj.weight"
    }
    assert get_format(found.config_block()) == found


def test_modules_in_block_to_quantize_leaves_the_others_dense() -> None:
    block = config(
        4, True, False, 128, "gptq", modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]]
    )
    found = get_format(block)
    assert found.spec("model.layers.3.self_attn.q_proj") is not None
    assert found.spec("model.layers.3.self_attn.k_proj") is None
    assert get_format(found.config_block()) == found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"checkpoint_format": "marlin"}, "marlin"),
        ({"checkpoint_format": "gptq_p"}, "gptq_p"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"bits": 5}, "planar"),
        ({"bits": 16}, "bits 16"),
        ({"bits": True}, "bits True"),
        ({"bits": None}, "bits None"),
        ({"bits": "4"}, "bits '4'"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": -2}, "group_size -2"),
        ({"group_size": 1.5}, "group_size 1.5"),
        ({"sym": "yes"}, "sym 'yes'"),
        ({"desc_act": 1}, "desc_act '1'"),
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"is_marlin_format": True}, "is_marlin_format"),
        ({"rotation": "hadamard"}, "rotation"),
        ({"dynamic": {"(": {}}}, "regular expression"),
        ({"dynamic": ["x"]}, "dynamic"),
        ({"dynamic": {"x": {"bits": 7}}}, "bits 7"),
        ({"modules_in_block_to_quantize": "all"}, "modules_in_block_to_quantize"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError), match=says.replace("(", "\\(")):
        get_format(config(4, True, False, 128, "gptq") | change)


def test_shapes_the_family_cannot_express() -> None:
    found = GPTQFormat(QuantSpec(4, 128, True))
    assert found.expressible(64, 352, QuantSpec(4, 128, True)) is None
    assert "inputs" in str(found.expressible(64, 40, QuantSpec(4, 128, True)))
    assert "outputs" in str(found.expressible(12, 64, QuantSpec(4, 128, True)))
    assert found.expressible(12, 64, QuantSpec(8, 128, True)) is None
    assert "bits" in str(found.expressible(64, 64, QuantSpec(5, 128, True)))
    with pytest.raises(CheckpointError, match="32-bit words"):
        found.tensors(NAME, 12, 64, bias=False)


@pytest.mark.parametrize(
    ("weight_spec", "zeros", "change", "says"),
    [
        (QuantSpec(8, 32, True), None, {}, "configuration"),
        (QuantSpec(4, 64, True), None, {}, "configuration"),
        (QuantSpec(4, 32, False), 3, {"sym": True}, "asymmetric"),
        (QuantSpec(4, 32, False), 0, {"sym": False}, "gptq_v2"),
        (QuantSpec(4, 32, False), 2.5, {"sym": False}, "integers"),
    ],
)
def test_the_writer_refuses_what_the_file_cannot_say(
    weight_spec: QuantSpec, zeros: float | None, change: dict[str, Any], says: str
) -> None:
    groups = weight_spec.num_groups(64)
    weight = PackedWeight(
        torch.zeros(32, 64, dtype=torch.uint8),
        weight_spec,
        torch.ones(32, groups, dtype=torch.float16),
        None
        if zeros is None
        else torch.full((32, groups), zeros).to(torch.uint8 if zeros == int(zeros) else None),
    )
    with pytest.raises(ValueError, match=says):
        get_format(config(4, True, False, 32, "gptq") | change).write(NAME, weight)


def test_a_real_checkpoints_configuration_and_names() -> None:
    folder = SHARED / "fixtures/gptq_qwen_vl_chat_int4_index"
    if not folder.is_dir():
        pytest.skip("../shared/data is not there")
    block = json.loads((folder / "quantize_config.json").read_text())
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    found = get_format(block)
    modules = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    assert len(modules) > 100
    for module in modules:
        stored = {name for name in names if name.rpartition(".")[0] == module}
        assert stored == set(found.tensors(module, 4096, 4096, bias=True))


def _torch_linear() -> Any:
    """GPTQModel's reference linear and its v1 conversion; skips where it does not import."""
    pytest.importorskip(
        "gptqmodel", reason="GPTQModel is not installed (optional oracle)", exc_type=ImportError
    )
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    return TorchLinear, convert_gptq_v1_to_v2_format_module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_agrees_with_gptqmodel(cell: tuple[int, bool, bool, int, str]) -> None:
    torch_linear, to_v2 = _torch_linear()
    bits, symmetric, actorder, group, version = cell
    tensors = named(by_hand.store(module_of(cell), version))
    linear = torch_linear(bits, group, symmetric, actorder, SHAPE[1], SHAPE[0], bias=False)
    linear.load_state_dict({name.rpartition(".")[2]: value for name, value in tensors.items()}, strict=True)
    linear.eval()
    if version == "gptq":
        to_v2(linear, bits, torch.int32)
    found = get_format(config(*cell)).read(tensors, NAME)
    theirs = linear.dequantize_weight().T  # fp16: scale * (code - zero) rounded once
    assert torch.equal(found.dequantize(torch.float16), theirs.to(torch.float16))
