"""nybble check: from headers alone, all problems at once, and memory figures that loading confirms."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.build import build_engine
from nybble.engine.check import check_model
from nybble.engine.config import EngineConfig
from nybble.engine.formats.registry import get_format
from nybble.engine.model.loader import load_model
from nybble.engine.model_files import ModelFiles
from nybble.kernels.layout import PackedWeight, QuantSpec

from ..helpers.checkpoints import CONFIG, LINEARS, dense_tensors, write_checkpoint

GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}


def gptq_checkpoint(folder: Path, **change: Any) -> Path:
    config = GPTQ | change
    checkpoint_format = get_format(config)
    tensors = dense_tensors(torch.float16)
    for layer in range(2):
        for name, (out, count) in LINEARS.items():
            module = f"model.layers.{layer}.{name}"
            spec = checkpoint_format.spec(module)
            if spec is not None:
                groups = spec.num_groups(count)
                zeros = None if spec.symmetric else torch.full((out, groups), 3, dtype=torch.uint8)
                codes = torch.zeros(out, count, dtype=torch.uint8)
                weight = PackedWeight(codes, spec, torch.ones(out, groups).half() * 0.01, zeros)
                del tensors[f"{module}.weight"]
                tensors |= checkpoint_format.write(module, weight)
    return write_checkpoint(folder, tensors, config)


@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [("auto", "torch"), ("auto", "auto"), ("float32", "torch"), ("float32", "auto"), ("bfloat16", "torch")],
)
@pytest.mark.parametrize(
    "change",
    [None, {}, {"bits": 8, "sym": False, "checkpoint_format": "gptq_v2"}, {"dynamic": {"-:.*k_proj": {}}}],
)
def test_the_estimate_is_what_loading_takes(
    tmp_path: Path, change: dict[str, Any] | None, dtype: Any, kernels: Any
) -> None:
    folder = (
        write_checkpoint(tmp_path, dense_tensors(torch.bfloat16))
        if change is None
        else gptq_checkpoint(tmp_path, **change)
    )
    options: dict[str, Any] = {"dtype": dtype, "cpu_kernels": kernels, "num_threads": 1}
    config = EngineConfig(str(folder), "cpu", max_num_seqs=3, max_model_len=40, **options)
    report = check_model(folder, config)
    assert report.problems == []
    loaded = load_model(ModelFiles(folder), config, lambda *_: None)
    assert report.weight_bytes == loaded.report.weight_bytes
    assert report.kernels == loaded.report.lines()
    _, info = build_engine(config, lambda *_: None)
    assert (report.dtype, report.weight_bytes) == (info.dtype, info.weight_bytes)
    assert report.kv_bytes_one_request == 48 * report.kv_bytes_per_token
    assert report.kv_bytes_all_requests == 3 * report.kv_bytes_one_request
    assert report.kv_bytes_all_requests == report.kv_bytes_granted == info.kv_bytes
    assert report.num_parameters == sum(t.numel() for t in dense_tensors().values())


def test_no_tensor_data_is_read(tmp_path: Path) -> None:
    """A sparse file of 100 GB: reading its data, or mapping and touching it, would take minutes or fail."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 56, "vocab_size": 32000}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": True}
    names = {"model.embed_tokens.weight": (32000, 8192), "model.norm.weight": (8192,)}
    for layer in range(56):
        at = f"model.layers.{layer}"
        for name, out, count in [
            ("self_attn.q_proj", 8192, 8192),
            ("self_attn.k_proj", 1024, 8192),
            ("self_attn.v_proj", 1024, 8192),
            ("self_attn.o_proj", 8192, 8192),
            ("mlp.gate_proj", 28672, 8192),
            ("mlp.up_proj", 28672, 8192),
            ("mlp.down_proj", 8192, 28672),
        ]:
            names[f"{at}.{name}.weight"] = (out, count)
        names |= {f"{at}.{norm}.weight": (8192,) for norm in ("input_layernorm", "post_attention_layernorm")}
    header, end = {}, 0
    for name, dims in names.items():
        begin, end = end, end + 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | shape | heads))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert end > 95e9
    config = EngineConfig(str(tmp_path), "cpu", memory_bytes=1 << 30)
    report = check_model(tmp_path, config)
    assert report.file_bytes == end
    assert report.weight_bytes > 0.99 * end
    assert not report.loads
    assert len(report.problems) == 1
    assert "the weights need" in report.problems[0]
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 < 1 << 20


def test_all_problems_at_once(tmp_path: Path) -> None:
    tensors = dense_tensors()
    del tensors["model.norm.weight"]
    tensors |= {f"extra.{index}": torch.zeros(1) for index in range(30)}
    report = check_model(write_checkpoint(tmp_path, tensors), EngineConfig("m", max_model_len=4096))
    assert len(report.problems) == 32
    assert any("missing tensor model.norm.weight" in problem for problem in report.problems)
    assert any("--max-model-len 4096" in problem for problem in report.problems)
    assert json.loads(json.dumps(report.to_dict()))["loads"] is False
    assert report.lines()[0].endswith("will NOT load")
    assert sum(line.startswith("  problem: unexpected tensor extra.") for line in report.lines()) == 30


def test_missing_and_mistyped_tensors_are_no_crash(tmp_path: Path) -> None:
    tensors = dense_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64, dtype=torch.int64)
    report = check_model(write_checkpoint(tmp_path, tensors), EngineConfig("m", "cpu"))
    assert len(report.problems) == 2
    assert (report.weight_bytes, report.max_model_len) == (0, 128)


def test_config_format_and_files_can_all_be_wrong_together(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors(), {"quant_method": "hqq"}, model_type="mamba")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    report = check_model(folder)
    assert len(report.problems) == 3
    for word in ("mamba", "hqq", "truncated"):
        assert any(word in problem for problem in report.problems)


def test_every_broken_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"\x01")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = check_model(tmp_path).problems
    assert len(problems) == 2
    assert all(f"{name}.safetensors: truncated" in p for name, p in zip("ab", problems, strict=True))


def test_an_empty_folder(tmp_path: Path) -> None:
    problems = check_model(tmp_path).problems
    assert any("no config.json" in problem for problem in problems)
    assert any("put model.safetensors there" in problem for problem in problems)


def test_modules_that_stay_dense_are_named_with_the_reason(tmp_path: Path) -> None:
    folder = gptq_checkpoint(tmp_path, dynamic={"-:.*0\\.mlp\\.down_proj": {}})
    report = check_model(folder, EngineConfig(str(folder), "cpu"))
    assert report.loads
    assert [note for note in report.notes if "is dense" in note] == [
        "model.layers.0.mlp.down_proj is dense (the checkpoint excludes it)"
    ]
    assert get_format(GPTQ).expressible(96, 40, QuantSpec(4, 32, True)) is not None


def test_memory_for_not_even_one_request_names_what_would_fit(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors())
    weights = check_model(folder, EngineConfig(str(folder), "cpu")).weight_bytes
    report = check_model(folder, EngineConfig(str(folder), "cpu", memory_bytes=weights + 65536))
    assert len(report.problems) == 1
    assert "use --max-model-len 64 or less" in report.problems[0]
