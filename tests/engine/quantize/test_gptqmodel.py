"""GPTQModel loads what we write, and rounds as we do: the oracle of checkpoints and of numerics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.documents import Encoder
from nybble.engine.evaluate import EvaluateOptions, evaluate
from nybble.engine.formats.registry import get_format
from nybble.engine.formats.safetensors_files import SafetensorsFiles
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.calibrate import load_calibration
from nybble.engine.quantize.gptq import GPTQ
from nybble.engine.quantize.hessian import HessianMean
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from nybble.engine.quantize.pipeline import ToRound
from nybble.engine.tokenizer import Tokenizer
from nybble.kernels.layout import QuantSpec
from tiny_models import load_decoder, our_logits
from torch import Tensor, nn


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("llama", {"symmetric": False, "group_size": 128}),
        ("llama", {"actorder": "group", "bits": 3}),
        ("llama", {"method": "rtn", "bits": 2, "group_size": -1, "symmetric": False}),
        ("qwen2", {"bits": 8}),
        ("llama", {"intermediate_size": 80}),
    ],
)
def test_loads_in_gptqmodel(
    model_type: str, options: dict[str, Any], make_model: Any, tmp_path: Path
) -> None:
    library = pytest.importorskip(
        "gptqmodel", reason="GPTQModel is not installed (optional oracle)", exc_type=ImportError
    )
    fields = {"hidden_size": 128, "intermediate_size": options.pop("intermediate_size", 352)}
    folder, _ = make_model(model_type, **fields)
    out = tmp_path / "out"
    given = QuantizeOptions(
        str(folder), str(out), **{"group_size": 32, "num_samples": 8, "report": False, **options}
    )
    summary = quantize(given, lambda *_: None, lambda _: None)
    theirs = library.GPTQModel.load(
        str(out), device="cpu", backend=library.BACKEND.TORCH, dtype=torch.float16
    )
    stored = get_format(ModelFiles(out).quantize_config)
    with SafetensorsFiles(out) as files:
        for module in (entry["name"] for entry in summary["modules"]):
            ours = stored.read({n: files.get(n) for n in files if n.startswith(f"{module}.")}, module)
            weight = theirs.model.get_submodule(module).dequantize_weight().T
            assert torch.equal(weight.to(torch.float16), ours.dequantize(torch.float16))
    for module in summary["dense"]:
        assert isinstance(theirs.model.get_submodule(module), torch.nn.Linear)
    ids = torch.arange(5, 40)
    with torch.inference_mode():
        logits = theirs.model(ids[None]).logits[0].float()
    reference = our_logits(load_decoder(out), ids)
    difference = float((logits - reference).square().mean().sqrt())
    assert difference < 0.1 * float(reference.square().mean().sqrt())  # theirs is all fp16, and random


def layer(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """A weight [rows, cols] and inputs [512, cols], correlated and of unequal size, as activations are."""
    generator = torch.Generator().manual_seed(rows + cols)
    mixing = torch.randn(cols // 4, cols, generator=generator)
    hidden = torch.randn(512, cols // 4, generator=generator) @ mixing / cols**0.5
    noise = torch.randn(512, cols, generator=generator)
    inputs = (hidden + 0.3 * noise) * torch.rand(cols, generator=generator).mul(3).exp() / 5
    return torch.randn(rows, cols, generator=generator) * 0.02, inputs


def theirs(library: Any, weight: Tensor, inputs: Tensor, settings: dict[str, Any]) -> Tensor:
    from gptqmodel.quantization.gptq import GPTQ as Oracle

    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data.copy_(weight)
    task = Oracle(linear, library.QuantizeConfig(damp_percent=0.01, offload_to_disk=False, **settings))
    task.quantizer.configure(perchannel=True)
    task.expected_nsamples = float(len(inputs))
    task.add_batch(inputs[None], linear(inputs)[None])
    found: Tensor = task.quantize()[0]
    return found


def energy(difference: Tensor, inputs: Tensor) -> float:
    return float((inputs.double() @ difference.double().T).square().sum())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("group_size", "symmetric", "order", "mse"),
    [
        (128, True, "none", 0.0),
        (128, False, "none", 0.0),
        (-1, True, "none", 0.0),
        (128, True, "group", 0.0),
        (128, False, "group static", 0.0),
        (128, True, "gar", 0.0),
        (128, True, "none", 2.4),
        (32, True, "none", 0.0),
        (32, False, "gar", 0.0),
    ],
)
def test_the_same_weights_as_gptqmodel(
    bits: int, group_size: int, symmetric: bool, order: str, mse: float
) -> None:
    library = pytest.importorskip(
        "gptqmodel", reason="GPTQModel is not installed (optional oracle)", exc_type=ImportError
    )
    weight, inputs = layer(96, 384)
    settings = {"bits": bits, "group_size": group_size, "sym": symmetric, "mse": mse}
    settings |= {"desc_act": "group" in order, "act_group_aware": order == "gar"}
    expected = theirs(library, weight, inputs, {**settings, "static_groups": "static" in order})
    hessian = HessianMean(384)
    hessian.add(inputs)
    free = "group" if order == "group" else "none"
    spec = QuantSpec(bits, group_size, symmetric, free)  # type: ignore[arg-type]
    rounder = GPTQ(0.01, mse, order.split()[0], "static" in order)  # type: ignore[arg-type]
    packed = rounder.round(ToRound("", weight, spec), rounder.prepare(hessian.value, spec))
    found = packed.dequantize()
    assert energy(found - weight, inputs) == pytest.approx(energy(expected - weight, inputs), rel=0.1)
    if group_size != 32 and bits < 8:  # at 8 bits one tie changes all that follow
        assert packed.scales is not None
        step = packed.scales.float()[:, packed.group_of_inputs()]
        same = ((found - expected).abs() < 0.5 * step).float().mean()
        assert same > 0.9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [3, 4])
def test_a_whole_model_costs_what_gptqmodels_costs(
    bits: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo model, the same sequences and settings: the same divergence, within noise."""
    library = pytest.importorskip(
        "gptqmodel", reason="GPTQModel is not installed (optional oracle)", exc_type=ImportError
    )
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # it asks for two where it starts one per two cores
    folder = root / "engine/demo/bf16"
    encoder = Encoder(folder, Tokenizer.from_folder(folder))
    sequences = load_calibration(None, encoder, 32, 512, 0).sequences
    settings = {"bits": bits, "group_size": 64, "sym": True, "desc_act": False, "act_group_aware": False}
    config = library.QuantizeConfig(damp_percent=0.01, offload_to_disk=False, **settings)
    model = library.GPTQModel.load(str(folder), config, device="cpu", dtype=torch.float32)
    examples = [{"input_ids": list(ids), "attention_mask": [1] * len(ids)} for ids in sequences]
    model.quantize(examples, batch_size=1, backend=library.BACKEND.TORCH)
    model.save(str(tmp_path / "theirs"))
    asked = {"bits": bits, "group_size": 64, "num_samples": 32, "seq_len": 512, "report": False}
    given = QuantizeOptions(str(folder), str(tmp_path / "ours"), **asked)  # type: ignore[arg-type]
    quantize(given, lambda *_: None, lambda _: None)
    ours, theirs = (
        evaluate(
            EvaluateOptions(str(tmp_path / name), against=str(folder), max_documents=40),
            lambda *_: None,
            lambda _: None,
        )
        for name in ("ours", "theirs")
    )
    assert ours["kl_per_token"] == pytest.approx(theirs["kl_per_token"], rel=0.1)
    assert ours["nll_per_token"] == pytest.approx(theirs["nll_per_token"], abs=0.02)
