"""The requant overlay: what its files hold, that it is the sum, that plain GPTQ readers see none of it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.build import build_engine
from nybble.engine.check import check_model
from nybble.engine.config import EngineConfig
from nybble.engine.errors import CheckpointError, UnsupportedModelError
from nybble.engine.formats.overlay import FILE, OverlayFormat, is_extra
from nybble.engine.formats.registry import format_of, get_format
from nybble.engine.model.loader import load_model
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.writer import CheckpointWriter
from nybble.engine.records import SamplingParams
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...helpers.checkpoints import CONFIG, LINEARS, dense_tensors, write_checkpoint

GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}
NAME = "model.layers.1.mlp.down_proj"
Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


def weight_of(out: int, count: int, seed: int, density: float = 0.05) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (out, count), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(out, count // 32, generator=generator) * 0.05 + 0.01).half()
    chosen = torch.rand(out, count, generator=generator) < density
    residuals = torch.randn(out, count, generator=generator) * 0.5 * chosen
    residuals[0] = 0  # an empty row
    residuals[1, ::2] = 1  # and a heavy one
    return PackedWeight(codes, QuantSpec(4, 32, True), scales, outliers=SparseOverlay.of(residuals))


def write_overlaid(folder: Path, **settings: Any) -> tuple[Path, dict[str, Tensor]]:
    """A model whose linears have residuals, k_proj none; also the same model with its weights as floats."""
    base = get_format(GPTQ)
    tensors = dense_tensors()
    weights = {}
    for layer in range(2):
        for number, (name, (out, count)) in enumerate(LINEARS.items()):
            weight = weight_of(out, count, 10 * layer + number)
            module = f"model.layers.{layer}.{name}"
            weights[module] = (
                weight if "k_proj" not in name else PackedWeight(weight.values, weight.spec, weight.scales)
            )
    entries = {n: len(w.outliers.cols) for n, w in weights.items() if w.outliers is not None}
    stored = OverlayFormat(base, entries, settings)
    dense = {name.removesuffix(".weight"): value for name, value in tensors.items()}
    for name, weight in weights.items():
        dense[name] = weight.dequantize(torch.float64).float()
    names = [*tensors, *(f"{name}.sparse_rowptr_or_so" for name in weights)] * 4
    with CheckpointWriter(folder, names, overwrite=False) as writer:
        for name, value in tensors.items():
            module = name.removesuffix(".weight")
            for key, part in (
                stored.write(module, weights[module]) if module in weights else {name: value}
            ).items():
                writer.add(key, part, beside=FILE if is_extra(key) else None)
        writer.add_json("config.json", CONFIG | stored.config_entries())
        writer.commit()
    return folder, {f"{name}.weight": value for name, value in dense.items()}


def load(folder: Path, **options: Any) -> Any:
    config = EngineConfig(str(folder), "cpu", "float32", **options)
    return load_model(ModelFiles(folder), config, lambda *_: None)


def greedy(folder: Path, **options: Any) -> list[list[int]]:
    config = EngineConfig(str(folder), "cpu", "float32", max_model_len=64, num_threads=1, seed=0, **options)
    engine, _ = build_engine(config, lambda *_: None)
    prompts = [[5, 9, 33, 4], [60], list(range(3, 40))]
    found = engine.generate(prompts, SamplingParams(max_tokens=24, temperature=0, ignore_eos=True))
    return [list(output.token_ids) for output in found]


def test_files_hold_the_schema(tmp_path: Path) -> None:
    folder, _ = write_overlaid(tmp_path / "model", r_o=0.01)
    block = json.loads((folder / "config.json").read_text())["requant"]
    assert (block["version"], block["values"], block["r_o"]) == (1, "residual", 0.01)
    extra = load_file(folder / FILE)
    weight = weight_of(64, 96, 16)
    assert weight.outliers is not None
    assert block["modules"][NAME] == len(weight.outliers.cols)
    assert not any("k_proj" in name for name in (*extra, *block["modules"]))
    rowptr, cols, values = (extra[f"{NAME}.sparse_{kind}"] for kind in ("rowptr", "cols", "vals"))
    assert (rowptr.dtype, cols.dtype, values.dtype) == (torch.int32, torch.int16, torch.float16)
    found = torch.zeros(64, 96)
    for row in range(64):
        for at in range(int(rowptr[row]), int(rowptr[row + 1])):
            found[row, int(cols[at]) & 0xFFFF] = float(values[at])
    base = PackedWeight(weight.values, weight.spec, weight.scales).dequantize()
    assert torch.equal(base + found, weight.dequantize())
    assert int(rowptr[1]) == 0
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert not any(is_extra(name) for name in index["weight_map"])
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in load_file(folder / "model.safetensors").values()
    )


def test_wide_inputs_take_32_bits(tmp_path: Path) -> None:
    codes = torch.full((1, 70016), 8, dtype=torch.uint8)
    residuals = torch.zeros(1, 70016)
    residuals[0, 70001] = 1.5
    residuals[0, 40000] = 2.5
    spec = QuantSpec(4, 32, True)
    weight = PackedWeight(codes, spec, torch.ones(1, 2188).half(), outliers=SparseOverlay.of(residuals))
    stored = OverlayFormat(get_format(GPTQ), {NAME: 2})
    wanted = stored.tensors(NAME, 8, 70016, bias=False)
    assert wanted[f"{NAME}.sparse_cols"].dtypes == ("I32",)
    assert stored.tensors(NAME, 8, 65536, bias=False)[f"{NAME}.sparse_cols"].dtypes == ("I16", "U16")
    overlay = OverlayFormat(_Holding(weight), {NAME: 2})  # type: ignore[arg-type]
    written = overlay.write(NAME, weight)
    assert written[f"{NAME}.sparse_cols"].tolist() == [40000, 70001]
    assert torch.equal(overlay.read(written, NAME).dequantize(), residuals)


def test_no_residuals_are_no_overlay() -> None:
    """Of a checkpoint that says so: what it loads as fits kernels that take none."""
    codes = torch.full((8, 64), 8, dtype=torch.uint8)
    weight = PackedWeight(codes, QuantSpec(4, 32, True), torch.ones(8, 2).half())
    overlay = OverlayFormat(_Holding(weight), {NAME: 0})  # type: ignore[arg-type]
    written = overlay.write(NAME, replace(weight, outliers=SparseOverlay.empty(8)))
    assert len(written) == 3
    assert overlay.read(written, NAME).outliers is None


class _Holding:
    """A base that keeps its weight in memory."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = PackedWeight(weight.values, weight.spec, weight.scales)

    def write(self, module: str, weight: PackedWeight) -> dict[str, Tensor]:
        assert weight.outliers is None
        return {}

    def read(self, tensors: dict[str, Tensor], module: str) -> PackedWeight:
        return self.weight


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_greedy_tokens_are_those_of_the_sum(tmp_path: Path, kernels: Any) -> None:
    folder, dense = write_overlaid(tmp_path / "model")
    plain = write_checkpoint(tmp_path / "dense", dense)
    options = {"cpu_kernels": kernels, "cpu_activations": "fp32"}
    expected = greedy(plain, cpu_kernels="torch")
    assert greedy(folder, **options) == expected
    (folder / "config.json").write_text(
        json.dumps(
            {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "requant"}
        )
    )
    (folder / FILE).unlink()
    assert greedy(folder, **options) != expected  # the residuals mattered, and the base loads without them


def test_check_counts_the_residuals(tmp_path: Path) -> None:
    folder, _ = write_overlaid(tmp_path / "model")
    report = check_model(folder, EngineConfig(str(folder), "cpu", "float32", max_model_len=32))
    assert report.problems == []
    stored = sum(tensor.nbytes for tensor in load_file(folder / FILE).values())
    assert report.file_bytes == stored + sum(
        tensor.nbytes for tensor in load_file(folder / "model.safetensors").values()
    )
    assert 0 < load(folder, cpu_kernels="torch").report.weight_bytes < report.weight_bytes + stored * 100


def without(suffix: str) -> Change:
    return lambda tensors, _: tensors.__delitem__(f"{NAME}.{suffix}")


def put(suffix: str, value: Callable[[Tensor], Tensor]) -> Change:
    name = f"{NAME}.{suffix}"
    return lambda tensors, _: tensors.__setitem__(name, value(tensors[name]))


def say(**change: Any) -> Change:
    return lambda _, config: config["requant"].update(change)


def at(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


BAD: list[tuple[Change, type[Exception], str]] = [
    (without("sparse_cols"), CheckpointError, rf"missing tensor {NAME}.sparse_cols \(expected I16/U16 \["),
    (
        put("sparse_vals", lambda t: t[:-1]),
        CheckpointError,
        r"sparse_vals in requant.safetensors: expected F16/BF16",
    ),
    (put("sparse_vals", lambda t: t.float()), CheckpointError, r"sparse_vals .* found F32"),
    (
        put("sparse_rowptr", at(0, 1)),
        CheckpointError,
        r"sparse_rowptr: expected to ascend from 0 to \d+, found 1 to",
    ),
    (put("sparse_rowptr", at(20, 10**6)), CheckpointError, r"sparse_rowptr: .* descending at output"),
    (put("sparse_cols", at(3, 96)), CheckpointError, r"sparse_cols: inputs 0 to 96, but there are 96"),
    (put("sparse_cols", at(3, -1)), CheckpointError, r"sparse_cols: inputs 0 to 65535, but there are 96"),
    (
        put("sparse_cols", at(3, 4)),
        CheckpointError,
        r"expected to ascend within a row, found 4 before 4 in row 1",
    ),
    (put("sparse_vals", at(3, float("nan"))), CheckpointError, r"sparse_vals holds NaN"),
    (put("sparse_vals", lambda t: t.bfloat16() * 1e6), CheckpointError, r"overflow fp16"),
    (say(version=2), UnsupportedModelError, "found version 2"),
    (say(values="absolute"), UnsupportedModelError, "values 'absolute'"),
    (say(modules=[NAME]), CheckpointError, "modules must map names"),
    (say(modules={NAME: "3"}), CheckpointError, "modules must map names"),
    (say(modules={"lm_head": 3}), CheckpointError, "'lm_head', which is not quantized"),
    (say(modules={}), CheckpointError, r"unexpected tensor .*sparse_"),
    (lambda _, config: config.pop("requant"), CheckpointError, r"has no 'requant' block.*delete"),
    (lambda _, config: config.update(requant=3), CheckpointError, "expected an object, found 3"),
    (lambda _, config: config.pop("quantization_config"), CheckpointError, "need a quantization_config"),
]


@pytest.mark.parametrize(("change", "error", "says"), BAD, ids=[says[:40] for *_, says in BAD])
def test_malformed_overlays_are_named(
    tmp_path: Path, change: Change, error: type[Exception], says: str
) -> None:
    folder, _ = write_overlaid(tmp_path / "model")
    tensors, config = load_file(folder / FILE), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(error) as found:
        load(folder)
    assert re.search(says, found.value.message), found.value.message  # type: ignore[attr-defined]
    assert "\n" not in str(found.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    folder, _ = write_overlaid(tmp_path / "model")
    (folder / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"requant.safetensors: cannot be read"):
        load(folder)
    assert any(FILE in problem for problem in check_model(folder).problems)


def test_kinds_are_for_people(tmp_path: Path) -> None:
    folder, _ = write_overlaid(tmp_path / "model")
    before = load(folder, cpu_kernels="torch")
    tensors = load_file(folder / FILE)
    tensors[f"{NAME}.sparse_kind"] = torch.zeros(len(tensors[f"{NAME}.sparse_vals"]), dtype=torch.uint8)
    tensors[f"{NAME}.sparse_cols"] = tensors[f"{NAME}.sparse_cols"].view(torch.uint16)
    save_file(tensors, folder / FILE)
    after = load(folder, cpu_kernels="torch")
    one, other = (model.weights[NAME].parts[0].weight for model in (before, after))
    assert torch.equal(one, other)


def test_residuals_do_not_vanish_in_a_plain_format(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has residuals"):
        get_format(GPTQ).write(NAME, weight_of(64, 96, 0))
    folder, _ = write_overlaid(tmp_path / "model")
    assert isinstance(format_of(ModelFiles(folder)), OverlayFormat)
