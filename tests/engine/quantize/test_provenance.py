"""A checkpoint says where it comes from."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.quantize import calibrate
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from safetensors.torch import load_file, save_file


def run(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    given = {"group_size": 32, "num_samples": 4, "seq_len": 32, "report": False, **options}
    quantize(QuantizeOptions(str(folder), str(out), **given), lambda *_: None, lambda _: None)
    block: dict[str, Any] = json.loads((out / "config.json").read_text())["provenance"]
    return block


@pytest.mark.parametrize("stored", ["gptq", "compressed-tensors"])
def test_what_it_says(stored: Any, make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    block = run(folder, tmp_path / "out", bits=8, damping=0.02, checkpoint_format=stored)
    assert block["tool"].startswith("nybble ")
    assert (block["method"], block["quality"]) == ("gptq", None)
    assert (block["options"]["bits"], block["options"]["damping"]) == (8, 0.02)
    text = calibrate.SHIPPED_TEXT.read_bytes()
    assert block["calibration"]["sha256"] == hashlib.sha256(text).hexdigest()
    assert block["calibration"]["sequences"] == 4
    assert block["versions"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(block)


def test_how_many_sequences_were_differentiated(make_model: Any, tmp_path: Path) -> None:
    """100 are asked for by default; the calibration has 4."""
    folder, _ = make_model("llama")
    for method, more, key in (
        ("gwq", {}, "gradient_samples"),
        ("requant", {"pqi_intervals": 1}, "pqi_samples"),
    ):
        out = tmp_path / method
        block = run(folder, out, method=method, base="rtn", **more)
        assert block["settings"][key] == 4
        meta = json.loads((out / "quantize_config.json").read_text())["meta"]
        assert meta[key] == 4


def test_the_originals_fingerprint_is_its_weights(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    first = run(folder, tmp_path / "first", method="rtn")
    again = run(folder, tmp_path / "again", method="rtn")
    assert first == again
    assert (tmp_path / "first/config.json").read_bytes() == (tmp_path / "again/config.json").read_bytes()
    assert first["calibration"] is None
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, folder / "model.safetensors")
    changed = run(folder, tmp_path / "changed", method="rtn")
    assert changed["model"]["name"] == first["model"]["name"] == "original"
    assert changed["model"]["tensors_sha256"] != first["model"]["tensors_sha256"]
