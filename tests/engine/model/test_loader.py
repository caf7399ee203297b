"""Loading: strict about tensors, exact about weights, sparing with memory, honest about kernels."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nybble.engine.config import EngineConfig
from nybble.engine.errors import CheckpointError, ConfigError, UnsupportedModelError
from nybble.engine.formats.safetensors_files import SafetensorsFiles
from nybble.engine.model.decoder import Decoder, causal_attend
from nybble.engine.model.layers import Linear
from nybble.engine.model.loader import LoadedModel, load_model
from nybble.engine.model_files import ModelFiles
from nybble.engine.quantize.grid import round_nearest
from nybble.kernels.dispatch import Ops
from nybble.kernels.layout import PackedWeight, QuantSpec
from safetensors.torch import save_file
from torch import Tensor

from ...helpers.checkpoints import CONFIG, LINEARS, dense_tensors, write_checkpoint
from ..formats import gptq_by_hand as by_hand


def load(
    folder: Path, dtype: str = "float32", progress: Any = lambda *_: None, **options: Any
) -> LoadedModel:
    config = EngineConfig(str(folder), "cpu", dtype, **options)  # type: ignore[arg-type]
    return load_model(ModelFiles(folder), config, progress)


def logits(folder: Path, dtype: str = "float32") -> Tensor:
    loaded = load(folder, dtype)
    decoder = Decoder(
        loaded.config, loaded.weights, Ops.resolve(loaded.target), loaded.target.activation_dtype
    )
    with torch.inference_mode():
        hidden = decoder(torch.arange(20), torch.arange(20), causal_attend(loaded.config, decoder.ops, [20]))
        return decoder.logits(hidden)


def quantized(config: dict[str, Any], overrides: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], ...]:
    """(a GPTQ checkpoint's tensors, those of the dense checkpoint with the same weights), by hand."""
    stored, dense = dense_tensors(), dense_tensors()
    for layer in range(2):
        for name, shape in LINEARS.items():
            module = f"model.layers.{layer}.{name}"
            its = config | overrides.get(name, {})
            if its.get("dense"):
                continue
            rng = np.random.default_rng(zlib.crc32(module.encode()))
            made = by_hand.make_module(
                rng, its["bits"], shape, its["group_size"], its["sym"], its["desc_act"]
            )
            del stored[f"{module}.weight"]
            for kind, value in by_hand.store(made, config["checkpoint_format"]).items():
                stored[f"{module}.{kind}"] = torch.from_numpy(np.ascontiguousarray(value))
            dense[f"{module}.weight"] = torch.from_numpy(made.weights())
    return stored, dense


GPTQ: dict[str, Any] = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}


@pytest.mark.parametrize(
    ("change", "overrides", "packed"),
    [
        ({}, {}, 1),
        ({"sym": False, "checkpoint_format": "gptq_v2", "bits": 3, "group_size": -1}, {}, 1),
        ({}, {"self_attn.k_proj": {"bits": 8}}, 3),
        ({}, {"self_attn.v_proj": {"group_size": 64}}, 2),
        ({}, {"self_attn.k_proj": {"sym": False}}, 1),
        ({}, {"self_attn.q_proj": {"dense": True}}, 2),
        ({"desc_act": True}, {}, 3),  # each part has its own random order of inputs
        ({"desc_act": True}, {"self_attn.q_proj": {"desc_act": False}}, 3),
    ],
)
def test_a_gptq_checkpoint_is_the_dense_one_with_its_weights(
    tmp_path: Path, change: dict[str, Any], overrides: dict[str, dict[str, Any]], packed: int
) -> None:
    config = GPTQ | change
    stored, dense = quantized(config, overrides)
    dynamic = {
        ("-:" if its.get("dense") else "") + f".*\\.{name}$": {k: v for k, v in its.items() if k != "dense"}
        for name, its in overrides.items()
    }
    gptq = write_checkpoint(tmp_path / "gptq", stored, config | {"dynamic": dynamic})
    plain = write_checkpoint(tmp_path / "dense", dense)
    # With an order of inputs of its own, a weight sums in that order: the last bits of fp32 differ.
    assert torch.allclose(logits(gptq), logits(plain), rtol=1e-4, atol=1e-4)
    qkv = load(gptq).weights["model.layers.0.self_attn.qkv_proj"]
    assert isinstance(qkv, Linear)
    assert len(qkv.parts) == packed


def test_quantize_config_json_serves_as_well_and_lm_head_may_be_quantized(tmp_path: Path) -> None:
    stored, dense = quantized(GPTQ, {})
    made = by_hand.make_module(np.random.default_rng(5), 4, (80, 64), 32, True, False)
    del stored["lm_head.weight"]
    for kind, value in by_hand.store(made, "gptq").items():
        stored[f"lm_head.{kind}"] = torch.from_numpy(np.ascontiguousarray(value))
    dense["lm_head.weight"] = torch.from_numpy(made.weights())
    folder = write_checkpoint(tmp_path / "gptq", stored)
    (folder / "quantize_config.json").write_text(json.dumps(GPTQ | {"lm_head": True}))
    expected = logits(write_checkpoint(tmp_path / "dense", dense))
    assert torch.allclose(logits(folder), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_auto_computes_fp32_in_fp32_and_halves_in_fp16(tmp_path: Path, stored: torch.dtype) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors(stored))
    loaded = load(folder, "auto")
    expected = torch.float32 if stored == torch.float32 else torch.float16
    assert loaded.target.dtype == expected
    assert torch.allclose(logits(folder, "auto"), logits(folder), atol=0.02)
    assert load(folder, "bfloat16").target.dtype == torch.bfloat16


def test_a_tensor_that_fp16_would_overflow_is_computed_in_fp32(tmp_path: Path) -> None:
    tensors = dense_tensors()
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"] * 1e6
    folder = write_checkpoint(tmp_path, tensors)
    report = load(folder, "float16", cpu_kernels="torch").report
    torch_ones = [layer.slot for layer in report.layers if layer.kernel == "torch"]
    assert torch_ones == ["model.layers.1.mlp.down_proj"]
    assert any("overflow" in line and "down_proj" in line for line in report.lines())
    assert torch.allclose(logits(folder, "float16"), logits(folder), rtol=0.02, atol=0.02)


def test_cuda_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folder = write_checkpoint(tmp_path, dense_tensors())
    with pytest.raises(ConfigError, match="--device cuda"):
        load_model(ModelFiles(folder), EngineConfig(str(folder), "cuda"), lambda *_: None)


@pytest.mark.parametrize(
    ("kernels", "missing", "reason"),
    [
        ("auto", {"avx512_bf16"}, r"the CPU lacks AVX512-BF16 \(avx512_bf16\); .* use int8 or fp32"),
        ("auto", {"avx512_vnni", "avx512_bf16"}, "the CPU lacks AVX512-BF16"),
        ("avx2", set(), "--cpu-kernels avx2 excludes"),
        ("torch", set(), "--cpu-kernels torch was asked for"),
    ],
)
def test_bf16_activations_without_what_they_need(
    kernels: str, missing: set[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}
    monkeypatch.setattr("nybble.engine.model.loader.cpu_features", lambda: frozenset(features - missing))
    folder = write_checkpoint(tmp_path, dense_tensors())
    with pytest.raises(ConfigError, match=f"--cpu-activations bf16: .*{reason}"):
        load(folder, cpu_kernels=kernels, cpu_activations="bf16")


def test_a_tied_head_is_the_embedding_and_its_stored_copy_is_ignored(tmp_path: Path) -> None:
    tensors = dense_tensors()
    untied = write_checkpoint(
        tmp_path / "a", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    )
    kept = write_checkpoint(tmp_path / "b", tensors, tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    tied = write_checkpoint(tmp_path / "c", tensors, tie_word_embeddings=True)
    assert torch.equal(logits(tied), logits(untied))
    assert torch.equal(logits(tied), logits(kept))
    weights = load(tied, cpu_kernels="torch").weights
    table, head = weights["model.embed_tokens"], weights["lm_head"]
    assert isinstance(head, Linear)
    assert isinstance(table, Tensor)
    assert head.parts[0].weight.data_ptr() == table.data_ptr()  # type: ignore[attr-defined]


def test_every_wrong_tensor_is_named(tmp_path: Path) -> None:
    tensors = dense_tensors()
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(64, 96)
    tensors["model.layers.1.self_attn.o_proj.weight"] = torch.zeros(64, 64, dtype=torch.int32)
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(16)  # known and ignored
    folder = write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    message = error.value.message
    assert "missing tensor model.norm.weight (expected F32/F16/BF16 [64])" in message
    assert (
        "up_proj.weight in model.safetensors: expected F32/F16/BF16 [96, 64], found F32 [64, 96]" in message
    )
    assert "layers.1.self_attn.o_proj.weight in model.safetensors: expected" in message
    assert "found I32 [64, 64]" in message
    assert "unexpected tensor model.layers.0.self_attn.o_proj.bias (F32 [64])" in message
    assert "inv_freq" not in message
    assert "\n" not in message


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"nothing": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"and [0-9]+ more") as error:
        load(folder)
    assert len(error.value.message) < 2000


def test_values_that_are_not_finite_are_found_with_their_tensor(tmp_path: Path) -> None:
    tensors = dense_tensors(torch.float16)
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 4] = float("nan")
    folder = write_checkpoint(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate_proj\.weight holds NaN"):
        load(folder)


def test_large_finite_values_are_no_error(tmp_path: Path) -> None:
    tensors = dense_tensors()
    tensors["model.embed_tokens.weight"] = torch.full((80, 64), 3e38)  # their sum overflows
    assert load(write_checkpoint(tmp_path, tensors)).report.weight_bytes > 0


def test_foreign_quantizations_and_models_are_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hqq", dense_tensors(), {"quant_method": "hqq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="'hqq'"):
        load(folder)
    folder = write_checkpoint(tmp_path / "arch", dense_tensors(), architectures=["MambaForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        load(folder)


def test_progress_counts_modules_and_ends_with_the_report(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors(torch.bfloat16))
    calls: list[tuple[str, int, int, str]] = []
    loaded = load(folder, "auto", lambda *call: calls.append(call))
    counts = [done for _, done, _, line in calls if not line]
    assert counts == sorted(counts)
    assert counts[-1] == calls[0][2] == len(loaded.weights)
    assert [line for *_, line in calls if line] == loaded.report.lines()
    assert len(loaded.report.lines()) == 1
    assert loaded.report.lines()[0].startswith(f"{loaded.report.main_kernel}: 9 x dense (")
    assert len(loaded.report.details()) == 9


def test_sharded_and_single_files_are_the_same_model(tmp_path: Path) -> None:
    tensors = dense_tensors()
    single = write_checkpoint(tmp_path / "one", tensors)
    several = tmp_path / "several"
    several.mkdir()
    (several / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {}
    for index, name in enumerate(sorted(tensors)):
        weight_map[name] = f"model-{index % 3}.safetensors"
    for shard in set(weight_map.values()):
        save_file({n: tensors[n] for n in tensors if weight_map[n] == shard}, several / shard)
    (several / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(single), logits(several))
    assert len(SafetensorsFiles(several).tensors) == len(tensors)


_MEASURE = """
import resource, sys
from pathlib import Path
from nybble.engine.config import EngineConfig
from nybble.engine.model.loader import load_model
from nybble.engine.model_files import ModelFiles

def anonymous():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024

import threading
load_model(ModelFiles(Path(sys.argv[2])), EngineConfig(sys.argv[2], "cpu", "float16"), lambda *_: None)
before, peak, stop = anonymous(), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(0.0005):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
config = EngineConfig(sys.argv[1], "cpu", "float16")
loaded = load_model(ModelFiles(Path(sys.argv[1])), config, lambda *_: None)
stop.set()
watcher.join()
print(max(peak, anonymous()) - before, loaded.report.weight_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_loading_holds_the_model_plus_one_module(tmp_path: Path) -> None:
    """24 equal layers: were all held in fp32 on the way, the peak would be three times the model."""
    hidden, layers = 512, 24
    tensors = {
        "model.embed_tokens.weight": torch.randn(64, hidden).half(),
        "model.norm.weight": torch.ones(hidden),
    }
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            tensors[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = torch.randn(hidden, hidden).half()
        for name in ("gate", "up", "down"):
            tensors[f"model.layers.{layer}.mlp.{name}_proj.weight"] = torch.randn(hidden, hidden).half()
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(hidden)
    shape = {
        "hidden_size": hidden,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": 64,
    }
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": True}
    big = write_checkpoint(tmp_path / "big", tensors, **shape, **heads)
    small = write_checkpoint(tmp_path / "small", dense_tensors(torch.float16))
    command = [sys.executable, "-c", _MEASURE, str(big), str(small)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    peak, weights = map(int, done.stdout.split())
    one_module = 3 * hidden * hidden * (2 + 2 + 4 + 4 + 2)  # qkv: read, fused, fp32, its copy, packed
    assert weights > 80 << 20
    assert peak < weights + 2 * one_module, (peak, weights, one_module)


def test_rounding_the_output_head_is_said(tmp_path: Path) -> None:
    def round_head(head: PackedWeight) -> PackedWeight:
        return round_nearest(head.dequantize(), QuantSpec(8, 32, symmetric=True))

    def notes(folder: Path) -> tuple[str, ...]:
        config = EngineConfig(str(folder), "cpu", "float32")
        loaded = load_model(ModelFiles(folder), config, lambda *_: None, round_head=round_head)
        assert loaded.report.lines()[: len(loaded.report.notes)] == list(loaded.report.notes)
        return loaded.report.notes

    stored, _ = quantized(GPTQ, {})
    folder = write_checkpoint(tmp_path / "a", stored, GPTQ)
    assert notes(folder) == (
        "output head: stored as float32, rounded to 8-bit group 32 sym (--lm-head-bits)",
    )
    made = by_hand.make_module(np.random.default_rng(0), 4, (80, 64), 32, True, False)
    del stored["lm_head.weight"]
    for kind, value in by_hand.store(made, "gptq").items():
        stored[f"lm_head.{kind}"] = torch.from_numpy(np.ascontiguousarray(value))
    folder = write_checkpoint(tmp_path / "b", stored, GPTQ | {"lm_head": True})
    assert notes(folder) == (
        "warning: --lm-head-bits has no effect: the output head is stored as 4-bit group 32 sym",
    )
