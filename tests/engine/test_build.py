"""A configuration becomes an engine that answers, or an error before memory and time are spent."""

from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine import build as build_module
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.errors import CheckpointError, ConfigError
from nybble.engine.hardware import process_memory
from nybble.engine.records import EngineRequest, SamplingParams

from ..helpers.checkpoints import dense_tensors, write_checkpoint


def build(folder: Path, progress: Any = lambda *_: None, **options: Any) -> Any:
    return build_engine(EngineConfig(str(folder), "cpu", **{"num_threads": 1, **options}), progress)


def generate(engine: Any, length: int) -> list[int]:
    engine.add(
        EngineRequest(1, [5, 6, 7], SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True))
    )
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens += output.token_ids
    return tokens


def test_an_engine_that_answers_and_knows_what_it_is(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors(torch.bfloat16), eos_token_id=[2, 3])
    calls: list[tuple[str, int, int, str]] = []
    engine, info = build(folder, lambda *call: calls.append(call), max_num_seqs=2, dtype="float32")
    assert len(generate(engine, 30)) == 30
    assert (info.architecture, info.device, info.dtype) == ("LlamaForCausalLM", "cpu", "float32")
    assert (info.quant_method, info.bits, info.vocab_size) == ("none", 32, 80)
    assert (info.max_model_len, info.eos_token_ids, info.num_threads) == (128, [2, 3], 1)
    assert info.num_kv_blocks == 2 * 128 // 16
    assert info.kv_bytes == info.num_kv_blocks * 16 * (2 * 2 * 32 * 4)
    phases = ["check", "weights", "kernels", "kv_cache", "warm_up"]  # kernels: where they are compiled
    assert [phase for phase in phases if phase in info.startup_seconds] == [*info.startup_seconds]
    assert len(info.startup_seconds) >= 4
    assert sum(info.startup_seconds.values()) == pytest.approx(info.load_seconds)
    told = dict.fromkeys(call[0] for call in calls if call[0] != "kernels")  # told once
    assert list(told) == ["weights", "kv cache", "warm-up"]
    assert torch.get_num_threads() == 1
    _, halves = build(folder)
    assert (halves.dtype, halves.bits) == ("float16", 16)


@pytest.mark.parametrize(("num_threads", "counted"), [(2, False), (2, True), (1, False)])
def test_a_kernel_that_does_not_count_waits_is_told(
    num_threads: int, counted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where threads could fall back to one: as a tape, with several."""
    monkeypatch.setattr(build_module, "waits_are_counted", lambda: counted)
    monkeypatch.setattr(build_module, "tape_refusal", lambda *_: None)
    monkeypatch.setattr(build_module, "import_module", lambda *_: None)
    lines: list[str] = []
    folder = write_checkpoint(tmp_path, dense_tensors(torch.bfloat16))
    build(folder, lambda *call: lines.append(call[3]), num_threads=num_threads)
    assert any("schedstat" in line for line in lines) == (num_threads > 1 and not counted)


def test_the_warm_up_leaves_no_trace(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors())
    engine, _ = build(folder)
    stats = engine.stats()
    assert (stats.step, stats.prompt_tokens, stats.kv_usage, stats.prefix_cache_queries) == (0, 0, 0.0, 0)
    assert engine._executor.num_sequences == 0
    first = generate(engine, 12)
    assert generate(build(folder)[0], 12) == first


@pytest.mark.parametrize("block_size", [8, 128])
@pytest.mark.parametrize("max_model_len", [2, 3, 128])
def test_the_smallest_lengths_and_every_block_size_warm_up(
    tmp_path: Path, block_size: int, max_model_len: int
) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors())
    _, info = build(folder, max_model_len=max_model_len, block_size=block_size)
    assert info.max_model_len == max_model_len


def test_an_output_that_is_not_finite_is_found_when_loading(tmp_path: Path) -> None:
    tensors = dense_tensors()
    tensors["model.norm.weight"] = torch.full((64,), 3e38)
    tensors["lm_head.weight"] = torch.full((80, 64), 3e4)
    with pytest.raises(ConfigError, match=r"--dtype float32: the model's output is not finite"):
        build(write_checkpoint(tmp_path, tensors))


def test_weights_that_do_not_fit_are_refused_before_they_are_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors())
    read: list[str] = []
    with pytest.raises(ConfigError, match="the weights need"):
        build(folder, lambda phase, *_: read.append(phase), memory_bytes=process_memory() // 2)
    assert read == []


def test_memory_bytes_caps_the_kv_cache(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors())
    spare = 64 << 20
    _, info = build(folder, max_num_seqs=2048, memory_bytes=process_memory() + spare)
    assert 0 < info.kv_bytes <= spare // 2


def test_options_that_cannot_work(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, dense_tensors())
    with pytest.raises(ConfigError, match="--max-model-len 129"):
        build(folder, max_model_len=129)
    with pytest.raises(ConfigError, match=r"--max-model-len 128.*--kv-cache-memory"):
        build(folder, kv_cache_memory=4096)
    tensors = dense_tensors()
    del tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensor model\.norm\.weight"):
        build(write_checkpoint(tmp_path / "broken", tensors))
