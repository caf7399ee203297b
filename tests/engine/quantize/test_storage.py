"""What the format of a checkpoint asks of the codes."""

from pathlib import Path
from typing import Any

import pytest
from nybble.engine.formats.registry import get_format
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "yaqa"])
@pytest.mark.parametrize("mse", [0.0, 2.4])
def test_v1_has_no_zero_point_of_0(method: str, mse: float, make_model: Any, tmp_path: Path) -> None:
    """Else readers would disagree about it, and the run fail after all its work."""
    folder, _ = make_model("llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj"
    tensors[f"{name}.weight"][5, 32:64] = tensors[f"{name}.weight"][5, 32:64].abs() + 0.1
    tensors["lm_head.weight"][7].abs_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    options = {"symmetric": False, "lm_head_bits": 8, "method": method, "mse": mse, "bits": 2}
    found = {}
    for version in ("gptq", "gptq_v2"):
        lines: list[str] = []
        out = tmp_path / version
        given = {
            "group_size": 32,
            "num_samples": 12,
            "seq_len": 32,
            "report": False,
            **options,
            "checkpoint_format": version,
        }
        quantize(QuantizeOptions(str(folder), str(out), **given), lambda *_: None, lines.append)
        assert any("has no zero point of 0" in line for line in lines) == (version == "gptq")
        stored, files = get_format(ModelFiles(out).quantize_config), load_file(out / "model.safetensors")
        found[version] = [stored.read(files, module) for module in (name, "lm_head")]
    for first, second in zip(found["gptq"], found["gptq_v2"], strict=True):
        assert first.zeros is not None
        assert second.zeros is not None
        assert int(first.zeros.min()) == 1
        assert int(second.zeros.min()) == 0, "else this proves nothing"
