"""Every format through the engine: greedy tokens are those of transformers over the weights as float64."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LINEARS
from format_models import (
    greedy,
    greedy_of_transformers,
    prune,
    random_weight,
    transformers_model,
    write_model,
)
from nybble.engine.check import check_model
from nybble.engine.config import EngineConfig
from nybble.engine.errors import CheckpointError
from nybble.engine.formats.awq import AWQFormat
from nybble.engine.formats.compressed_tensors import CompressedTensorsFormat, Group
from nybble.engine.formats.gptq import GPTQFormat
from nybble.engine.formats.overlay import OverlayFormat
from nybble.engine.model.loader import LoadedModel, load_model
from nybble.engine.model_files import ModelFiles
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay

INT4 = QuantSpec(4, 32, True)
ASYM = QuantSpec(4, 32, False)
MADE = Callable[[str, tuple[int, int], int], PackedWeight]


def packed(spec: QuantSpec, **more: Any) -> CompressedTensorsFormat:
    return CompressedTensorsFormat((Group(("Linear",), spec),), ("lm_head",), **more)


def of(spec: QuantSpec) -> MADE:
    return lambda _, shape, seed: random_weight(shape, spec, seed)


def pruned(_: str, shape: tuple[int, int], seed: int) -> PackedWeight:
    weight = random_weight(shape, INT4, seed)
    return PackedWeight(prune(weight.values, 8, seed), INT4, weight.scales)


def pruned_floats(_: str, shape: tuple[int, int], seed: int) -> PackedWeight:
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
    return PackedWeight(prune(dense, 0, seed).half())


def overlaid(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
    weight = pruned(module, shape, seed)
    generator = torch.Generator().manual_seed(seed)
    residuals = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.05)
    return PackedWeight(weight.values, INT4, weight.scales, outliers=SparseOverlay.of(residuals))


def overlaid_asym(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
    return replace(random_weight(shape, ASYM, seed), outliers=overlaid(module, shape, seed).outliers)


def entries(make: MADE) -> dict[str, int]:
    found = {}
    for layer in range(2):
        for number, (name, shape) in enumerate(LINEARS.items()):
            outliers = make(name, shape, 10 * layer + number).outliers
            assert outliers is not None
            found[f"model.layers.{layer}.{name}"] = len(outliers.cols)
    return found


ORDERED = QuantSpec(4, 32, False, "group")
CELLS: dict[str, tuple[Any, MADE]] = {
    "gptq 2:4": (GPTQFormat(INT4, meta={"sparsity": "2:4"}), pruned),
    "gptq 2:4 with residuals": (
        OverlayFormat(GPTQFormat(INT4, meta={"sparsity": "2:4"}), entries(overlaid)),
        overlaid,
    ),
    "awq": (AWQFormat(ASYM), of(ASYM)),
    "awq with residuals": (OverlayFormat(AWQFormat(ASYM), entries(overlaid_asym)), overlaid_asym),
    "packed int4": (packed(INT4), of(INT4)),
    "packed int4 asymmetric": (packed(QuantSpec(4, 16, False)), of(QuantSpec(4, 16, False))),
    "packed int4 in order": (packed(ORDERED), of(ORDERED)),
    "packed int8 by channel": (packed(QuantSpec(8, -1, True)), of(QuantSpec(8, -1, True))),
    "packed int2": (packed(QuantSpec(2, 32, False)), of(QuantSpec(2, 32, False))),
    "packed int4 2:4": (packed(INT4, sparsity="2:4"), pruned),
    "bitmask": (CompressedTensorsFormat((), ("lm_head",), ("Linear",)), pruned_floats),
}


def load(folder: Path, **options: Any) -> LoadedModel:
    return load_model(ModelFiles(folder), EngineConfig(str(folder), "cpu", **options), lambda *_: None)


@pytest.mark.parametrize("cell", CELLS)
def test_greedy_tokens_are_those_of_the_materialised_model(cell: str, tmp_path: Path) -> None:
    stored, make = CELLS[cell]
    plain = write_model(tmp_path / "model", stored, make)
    expected = greedy_of_transformers(transformers_model(plain))
    assert len({token for tokens in expected for token in tokens}) > 4  # not one word over and over
    assert greedy(tmp_path / "model", cpu_kernels="torch") == expected
    assert greedy(tmp_path / "model", cpu_kernels="auto") == expected


@pytest.mark.parametrize("cell", CELLS)
def test_check_says_what_loading_does(cell: str, tmp_path: Path) -> None:
    stored, make = CELLS[cell]
    write_model(tmp_path / "model", stored, make, torch.float16)
    for activations in ("int8", "fp32"):
        options: dict[str, Any] = {"cpu_activations": activations, "max_model_len": 32}
        report = check_model(tmp_path / "model", EngineConfig(str(tmp_path / "model"), "cpu", **options))
        loaded = load(tmp_path / "model", **options).report
        assert report.problems == []
        assert loaded.notes == ()
        assert [line for line in report.kernels if "order" not in line] == [
            line for line in loaded.lines() if "order" not in line
        ]
        # Residuals are counted as stored, and parts whose inputs have orders of their own as if they fused.
        if "residuals" not in cell and "order" not in cell:
            assert report.weight_bytes == loaded.weight_bytes


@pytest.mark.parametrize("cell", [cell for cell in CELLS if "2:4" in cell])
def test_int4_with_zeros_takes_their_kernel(cell: str, tmp_path: Path) -> None:
    stored, make = CELLS[cell]
    write_model(tmp_path / "model", stored, make, torch.float16)
    loaded = load(tmp_path / "model", cpu_activations="int8")
    kernels = {layer.kernel for layer in loaded.report.layers if layer.spec is not None}
    if not any(layer.kernel.startswith("cpu-") for layer in loaded.report.layers):
        pytest.skip("this CPU has no compiled kernels")
    assert kernels == {"cpu-int8-24"}


def test_a_module_that_is_not_what_the_checkpoint_says_is_named_and_served(tmp_path: Path) -> None:
    liar = "model.layers.1.self_attn.k_proj"

    def make(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
        weight = pruned(module, shape, seed)
        if module == liar:
            weight.values[21, 40:43] = 3
        return weight

    stored = GPTQFormat(INT4, meta={"sparsity": "2:4"})
    plain = write_model(tmp_path / "model", stored, make)
    lines: list[str] = []
    config = EngineConfig(str(tmp_path / "model"), "cpu", "float16", cpu_activations="int8")
    report = load_model(ModelFiles(tmp_path / "model"), config, lambda *call: lines.append(call[3])).report
    (warning,) = report.notes
    assert warning.startswith(f"warning: {liar}: the checkpoint says 2:4, but row 21 has ")
    assert "weights in inputs 40 to 43; model.layers.1.self_attn.qkv_proj is served without" in warning
    assert warning in lines
    sparse = {layer.slot for layer in report.layers if layer.kernel == "cpu-int8-24"}
    assert "model.layers.1.self_attn.qkv_proj" not in sparse
    assert greedy(tmp_path / "model", cpu_kernels="auto") == greedy_of_transformers(transformers_model(plain))


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    """The words of a row hold more codes than its inputs, so that only ``weight_shape`` tells."""

    def make(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
        short = module == "model.layers.0.mlp.up_proj"
        return random_weight((shape[0], shape[1] - 3) if short else shape, QuantSpec(4, -1, True), seed)

    write_model(tmp_path / "model", packed(QuantSpec(4, -1, True)), make)
    with pytest.raises(CheckpointError, match=r"0\.mlp\.up_proj: expected \[96, 64\], found \[96, 61\]"):
        load(tmp_path / "model")
