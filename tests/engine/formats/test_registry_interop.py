"""What we write, loaded by GPTQModel, transformers and compressed-tensors; and what they write, loaded by us.

Optional: a test is skipped where its library is not installed (``pip install nybble[interop]`` brings them).
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from format_models import prune, random_weight, transformers_model, write_model
from nybble.engine.formats.awq import AWQFormat
from nybble.engine.formats.compressed_tensors import CompressedTensorsFormat, Group
from nybble.engine.formats.gptq import GPTQFormat
from nybble.engine.formats.overlay import OverlayFormat
from nybble.kernels.layout import PackedWeight, QuantSpec, SparseOverlay
from safetensors.torch import load_file
from tiny_models import load_decoder, our_logits, tiny_transformer
from tiny_tokenizer import write_tokenizer
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = torch.arange(3, 40)
INT4, ASYM, ORDERED = QuantSpec(4, 32, True), QuantSpec(4, 32, False), QuantSpec(4, 32, True, "group")


def library(name: str) -> Any:
    return pytest.importorskip(
        name, reason=f"{name} is not installed (optional oracle)", exc_type=ImportError
    )


def difference(theirs: Tensor, ours: Tensor) -> float:
    """Root mean square, relative."""
    return float((theirs.float() - ours).square().mean().sqrt() / ours.square().mean().sqrt())


def logits_of(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(IDS[None]).logits[0]
    return found


def packed(spec: QuantSpec, **more: Any) -> CompressedTensorsFormat:
    return CompressedTensorsFormat((Group(("Linear",), spec),), ("lm_head",), **more)


def overlaid(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
    residuals = torch.zeros(shape)
    residuals[0, :: 1 + seed % 7] = 0.5
    weight = random_weight(shape, INT4, seed)
    return PackedWeight(weight.values, INT4, weight.scales, outliers=SparseOverlay.of(residuals))


def pruned(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
    weight = random_weight(shape, INT4, seed)
    return PackedWeight(prune(weight.values, 8, seed), INT4, weight.scales)


def write_overlaid(folder: Path) -> dict[str, Tensor]:
    """Returns the tensors of the model without its residuals."""
    entries: dict[str, int] = {}

    def make(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
        weight = overlaid(module, shape, seed)
        assert weight.outliers is not None
        entries[module] = len(weight.outliers.cols)
        return weight

    write_model(folder, OverlayFormat(GPTQFormat(INT4), entries), make, torch.float16)
    write_tokenizer(folder)
    base = folder.with_name("base")
    return write_model(base, GPTQFormat(INT4), lambda _, shape, seed: random_weight(shape, INT4, seed))


@pytest.mark.parametrize("cell", ["awq", "awq symmetric", "awq with dense", "gptq 2:4", "gptq in order"])
def test_gptqmodel_loads_what_we_write(cell: str, tmp_path: Path) -> None:
    gptqmodel = library("gptqmodel")
    stored: Any = {
        "awq": AWQFormat(ASYM),
        "awq symmetric": AWQFormat(ASYM),
        "awq with dense": AWQFormat(ASYM, ("model.layers.0.mlp.down_proj",)),
        "gptq 2:4": GPTQFormat(INT4, meta={"sparsity": "2:4"}),
        "gptq in order": GPTQFormat(ORDERED),
    }[cell]
    spec = {"awq": ASYM, "awq with dense": ASYM, "gptq in order": ORDERED}.get(cell, INT4)

    def make(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
        if stored.spec(module) is None:
            return PackedWeight(random_weight(shape, ASYM, seed).dequantize(torch.float16))
        return pruned(module, shape, seed) if "2:4" in cell else random_weight(shape, spec, seed)

    plain = write_model(tmp_path / "model", stored, make, torch.float16)
    write_tokenizer(tmp_path / "model")
    theirs = gptqmodel.GPTQModel.load(
        str(tmp_path / "model"), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16
    )
    expected = logits_of(transformers_model(plain, torch.float32))
    assert difference(logits_of(theirs.model), expected) < 0.02  # theirs computes in fp16
    assert difference(our_logits(load_decoder(tmp_path / "model"), IDS), expected) < 1e-5


def test_gptqmodel_loads_the_model_below_an_overlay(tmp_path: Path) -> None:
    gptqmodel = library("gptqmodel")
    base = write_overlaid(tmp_path / "model")
    theirs = gptqmodel.GPTQModel.load(
        str(tmp_path / "model"), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16
    )
    expected = logits_of(transformers_model(base, torch.float32))
    assert difference(logits_of(theirs.model), expected) < 0.02
    assert difference(our_logits(load_decoder(tmp_path / "model"), IDS), expected) > 0.1  # ours adds them


def test_transformers_loads_the_model_below_an_overlay(tmp_path: Path) -> None:
    library("gptqmodel")
    library("optimum")
    from transformers import AutoModelForCausalLM

    base = write_overlaid(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16, device_map="cpu")
    expected = logits_of(transformers_model(base, torch.float32))
    assert difference(logits_of(theirs), expected) < 0.02


PACKED = {
    "int4": packed(INT4),
    "int4 asymmetric": packed(ASYM),
    "int4 2:4": packed(INT4, sparsity="2:4"),
    "int8 by channel": packed(QuantSpec(8, -1, True)),
    "int8 asymmetric": packed(QuantSpec(8, 32, False)),
    "int2": packed(QuantSpec(2, 32, True)),
}


def write_packed(cell: str, folder: Path) -> dict[str, Tensor]:
    spec = PACKED[cell].groups[0].spec
    make = pruned if "2:4" in cell else lambda _, shape, seed: random_weight(shape, spec, seed)
    return write_model(folder, PACKED[cell], make)


# transformers 5.24 over compressed-tensors 0.20 makes room for zero points that are not packed, though the
# latter packs them: it loads no asymmetric checkpoint, whoever wrote it.
@pytest.mark.parametrize("cell", [cell for cell in PACKED if "asymmetric" not in cell])
def test_transformers_loads_packed_weights(cell: str, tmp_path: Path) -> None:
    library("compressed_tensors")
    from transformers import AutoModelForCausalLM

    plain = write_packed(cell, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = logits_of(transformers_model(plain, torch.float32))
    # Theirs multiplies in the dtype of the scales, fp16: 2**-11 of each weight.
    assert difference(logits_of(theirs), expected) < 2e-3
    assert difference(our_logits(load_decoder(tmp_path / "model"), IDS), expected) < 1e-5


def test_an_old_transformers_loads_bitmasks(tmp_path: Path) -> None:
    library("compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask")
    library("accelerate")
    from transformers import AutoModelForCausalLM

    def make(module: str, shape: tuple[int, int], seed: int) -> PackedWeight:
        dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
        return PackedWeight(prune(dense, 0, seed))

    stored = CompressedTensorsFormat((), ("lm_head",), ("Linear",))
    plain = write_model(tmp_path / "model", stored, make)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    expected = logits_of(transformers_model(plain, torch.float32))
    assert difference(logits_of(theirs), expected) < 1e-5
    assert difference(our_logits(load_decoder(tmp_path / "model"), IDS), expected) < 1e-5


@pytest.mark.parametrize("cell", PACKED)
def test_compressed_tensors_unpacks_what_we_write(cell: str, tmp_path: Path) -> None:
    library("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    plain = write_packed(cell, tmp_path / "model")
    stored = load_file(tmp_path / "model/model.safetensors")
    block = json.loads((tmp_path / "model/config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**block["config_groups"]["group_0"])
    modules = {name.rpartition(".")[0] for name in stored if name.endswith("weight_packed")}
    assert len(modules) == 14
    for module in modules:
        own = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == module}
        own["weight_scale"] = own["weight_scale"].float()  # what they multiply in
        found = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
        assert torch.equal(found, plain[f"{module}.weight"])


@pytest.mark.parametrize(
    "weights",
    [
        {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32},
        {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16},
        {"num_bits": 8, "symmetric": True, "strategy": "channel"},
        {"num_bits": 8, "symmetric": False, "strategy": "channel"},
        {"num_bits": 2, "symmetric": True, "strategy": "group", "group_size": 32},
    ],
    ids=str,
)
def test_we_load_what_compressed_tensors_writes(weights: dict[str, Any], tmp_path: Path) -> None:
    library("compressed_tensors")
    from checkpoints import dense_tensors
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = transformers_model(dense_tensors(), torch.float32)
    block = {"targets": ["Linear"], "weights": weights}
    config = QuantizationConfig(config_groups={"group_0": block}, ignore=["lm_head"], format="pack-quantized")
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            _fit(module, weights)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "model")
    compressor.update_config(tmp_path / "model")
    compressor.decompress_model(model)
    ours = our_logits(load_decoder(tmp_path / "model"), IDS)
    assert difference(logits_of(model), ours) < 1e-5


def _fit(module: Any, weights: dict[str, Any]) -> None:
    """Scales and zero points from the range of each group."""
    rows = module.weight.detach()
    groups = rows.view(len(rows), -1, weights.get("group_size") or rows.shape[1])
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    levels = 2 ** weights["num_bits"]
    if weights["symmetric"]:
        module.weight_scale.data = torch.maximum(high, -low) * 2 / levels
        return
    scale = (high - low) / (levels - 1)
    module.weight_scale.data = scale
    module.weight_zero_point.data = (-low / scale).round().sub(levels // 2).to(module.weight_zero_point.dtype)


@pytest.mark.parametrize(
    "options", [{"sym": True}, {"sym": True, "desc_act": True}, {"method": "awq"}], ids=str
)
def test_we_load_what_gptqmodel_writes(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it takes one, and then asks for two
    gptqmodel = library("gptqmodel")
    folder = tmp_path / "original"
    tiny_transformer("llama", vocab_size=300, hidden_size=128, intermediate_size=256).save_pretrained(folder)
    write_tokenizer(folder)
    kind = (
        gptqmodel.quantization.config.AWQConfig if options.pop("method", None) else gptqmodel.QuantizeConfig
    )
    config = kind(bits=4, group_size=32, **options)
    model = gptqmodel.GPTQModel.load(str(folder), config, device="cpu", backend=gptqmodel.BACKEND.TORCH)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 290, (64,), generator=generator).tolist() for _ in range(16)]
    model.quantize([{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in texts], batch_size=1)
    model.save(str(tmp_path / "theirs"))
    theirs = gptqmodel.GPTQModel.load(
        str(tmp_path / "theirs"), device="cpu", backend=gptqmodel.BACKEND.TORCH, dtype=torch.float16
    )
    ours = our_logits(load_decoder(tmp_path / "theirs"), IDS)
    assert difference(logits_of(theirs.model), ours) < 0.02
