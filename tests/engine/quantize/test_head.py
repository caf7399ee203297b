"""The output head stays as it is unless asked for, and either is said."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.check import check_model
from nybble.engine.config import EngineConfig
from nybble.engine.errors import ConfigError
from nybble.engine.formats.registry import format_of, get_format
from nybble.engine.formats.safetensors_files import SafetensorsFiles
from nybble.engine.model.loader import load_model
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.job import quantize
from nybble.engine.quantize.options import QuantizeOptions
from safetensors.torch import load_file
from tiny_models import load_decoder, our_logits, transformers_logits


def run(folder: Path, out: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    given = {"method": "rtn", "group_size": 32, "report": False, **options}
    summary = quantize(QuantizeOptions(str(folder), str(out), **given), lambda *_: None, lines.append)
    return summary, lines


@pytest.mark.parametrize(
    "options",
    [
        {"lm_head_bits": 8},
        {"lm_head_bits": 4},
        {"lm_head_bits": 8, "checkpoint_format": "compressed-tensors"},
        {"lm_head_bits": 4, "checkpoint_format": "awq", "symmetric": False},
        {"lm_head_bits": 8, "method": "gptq", "actorder": "group", "num_samples": 4},
    ],
    ids=str,
)
def test_a_rounded_head_is_stored_served_and_said(
    options: dict[str, Any], make_model: Any, tmp_path: Path
) -> None:
    folder, model = make_model("llama", hidden_size=64)
    model.config.vocab_size = 304
    model.resize_token_embeddings(304)  # 300 outputs of 4 bits fill no words
    model.save_pretrained(folder)
    summary, lines = run(folder, tmp_path / "out", **options)
    assert f"output head: rounded to nearest with {options['lm_head_bits']} bits (--lm-head-bits)" in lines
    assert summary["modules"][-1]["name"] == "lm_head"
    assert 0 < summary["modules"][-1]["weight_error"] < 0.02
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    stored = format_of(ModelFiles(tmp_path / "out"))
    spec = stored.spec("lm_head")
    assert spec is not None
    assert (spec.num_bits, spec.actorder) == (options["lm_head_bits"], "none")
    with SafetensorsFiles(tmp_path / "out") as files:
        for name in (module["name"] for module in summary["modules"]):
            tensors = {n: files.get(n) for n in files if n.startswith(f"{name}.")}
            model.get_submodule(name).weight.data.copy_(stored.read(tensors, name).dequantize())
    ids = torch.arange(5, 60)
    ours = our_logits(load_decoder(tmp_path / "out"), ids)
    torch.testing.assert_close(ours, transformers_logits(model, ids), rtol=1e-3, atol=2e-3)


def test_a_head_that_stays_is_said_too(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    _, lines = run(folder, tmp_path / "out")
    assert "output head: stays as it is (F32, 0.1 MB)" in lines
    assert torch.equal(
        load_file(tmp_path / "out/model.safetensors")["lm_head.weight"],
        load_file(folder / "model.safetensors")["lm_head.weight"],
    )
    block = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert get_format(block).spec("lm_head") is None


def test_a_head_that_is_the_embedding(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama", tie_word_embeddings=True)
    _, lines = run(folder, tmp_path / "out")
    assert any("stays as it is, which is the embedding" in line for line in lines)
    with pytest.raises(ConfigError, match=r"--lm-head-bits 8: .* is its embedding"):
        run(folder, tmp_path / "second", lm_head_bits=8)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lm_head_bits": 5}, "--lm-head-bits 5: use 2, 3, 4 or 8"),
        ({"lm_head_bits": 4}, "--lm-head-bits 4: 300 outputs of 4 bits"),
        ({"lm_head_bits": 8, "checkpoint_format": "awq"}, "--lm-head-bits 8: 8 bits: the format has 4"),
        ({"lm_head_bits": 8, "method": "sparse24", "bits": 16}, "nothing is rounded"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    options: dict[str, Any], says: str, make_model: Any, tmp_path: Path
) -> None:
    folder, _ = make_model("llama")
    with pytest.raises(ConfigError, match=says):
        run(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_rounded_head_beside_2_4_is_not_held_to_it(make_model: Any, tmp_path: Path) -> None:
    folder, _ = make_model("llama")
    run(folder, tmp_path / "out", method="sparse24", prune="magnitude", lm_head_bits=8)
    stored = format_of(ModelFiles(tmp_path / "out"))
    assert stored.sparsity == "2:4"
    assert stored.spec("lm_head") is not None
    config = EngineConfig(str(tmp_path / "out"), "cpu", "float32")
    loaded = load_model(ModelFiles(tmp_path / "out"), config, lambda *_: None)
    assert loaded.report.notes == ()
    assert check_model(tmp_path / "out", config).kernels == loaded.report.lines()
