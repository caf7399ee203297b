"""GPTQModel loads what we write, and finds the same weights in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.formats.registry import get_format
from nybble.engine.formats.safetensors_files import SafetensorsFiles
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from tiny_models import load_decoder, our_logits


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
    given = QuantizeOptions(str(folder), str(out), **{"group_size": 32, "num_samples": 8, **options})
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
