"""The tape of compiled kernels against the eager decoder: the same tokens, whatever the batch and the cut."""

from pathlib import Path
from typing import Any

import pytest
import torch
from numba.core import config
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.hardware import cpu_features
from nybble.engine.records import SamplingParams, SequenceOutput
from nybble.engine.tape_model import TapeModel, tell_of_compilation
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.dispatch import Target
from tiny_models import save_low_bit, tiny_transformer

ISA = instruction_set(Target(cpu_features=cpu_features(), cpu_kernels="auto"))
ISAS = [
    isa
    for isa in ("avx2", "vnni", "amx")
    if instruction_set(Target(cpu_features=cpu_features(), cpu_kernels=isa)) == isa
]
pytestmark = pytest.mark.skipif(ISA is None, reason="the CPU has neither AVX2 nor AVX-512 VNNI")
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 17, "head_dim": 48},
}


def generate(folder: Path, prompts: list[list[int]], **options: Any) -> list[SequenceOutput]:
    """40 greedy tokens for each prompt, with log-probabilities."""
    config = EngineConfig(str(folder), "cpu", **{"dtype": "float32", "num_threads": 1, **options})
    engine, _ = build_engine(config, lambda *_: None)
    return engine.generate(
        prompts, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=2)
    )


def prompts_of(count: int) -> list[list[int]]:
    rng = torch.Generator().manual_seed(3)
    return [torch.randint(0, 97, (3 + 7 * i % 60,), generator=rng).tolist() for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_eager_decoder(family: str, tmp_path: Path) -> None:
    tiny_transformer(family, **FAMILIES[family]).save_pretrained(tmp_path)
    prompts = prompts_of(6)
    expected = generate(tmp_path, prompts, cpu_kernels="torch")
    for options in (
        {},
        {"num_threads": 2, "max_num_batched_tokens": 16, "max_num_seqs": 4},  # prompts in chunks
        {"block_size": 32, "kv_cache_memory": 7 * 32 * 3 * 2 * 4 * 2 * 48},  # some wait or give way
    ):
        found = generate(tmp_path, prompts, **options)
        for wanted, got in zip(expected, found, strict=True):
            assert got.token_ids == wanted.token_ids, options
            assert got.logprobs is not None
            assert wanted.logprobs is not None
            for a, b in zip(wanted.logprobs, got.logprobs, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=2e-4)


@pytest.mark.parametrize(
    "activations",
    [
        "int8",
        "fp32",
        pytest.param(
            "bf16",
            marks=pytest.mark.skipif(
                "avx512_bf16" not in cpu_features() or ISA == "avx2", reason="the CPU lacks AVX512-BF16"
            ),
        ),
    ],
)
def test_a_request_gets_the_same_bits_alone_among_others_and_in_any_cut(
    activations: str, tmp_path: Path
) -> None:
    tiny_transformer("llama").save_pretrained(tmp_path)
    prompts = prompts_of(32)
    options = {"dtype": "float16", "cpu_activations": activations, "lm_head_bits": 8}
    together = generate(tmp_path, prompts, **options)
    cut = generate(tmp_path, prompts, max_num_batched_tokens=64, num_threads=2, **options)
    assert [o.logprobs for o in cut] == [o.logprobs for o in together]
    for index in (0, 7, 31):
        (alone,) = generate(tmp_path, [prompts[index]], enable_prefix_caching=False, **options)
        assert alone.logprobs == together[index].logprobs


@pytest.mark.parametrize("kernels", ISAS)
@pytest.mark.parametrize("options", [{}, {"bits": 3, "symmetric": False}], ids=["4bit", "3bit-asym"])
def test_low_bit_logits_are_the_same_bits_alone_among_32_and_in_any_cut(
    options: dict[str, Any], kernels: str, tmp_path: Path
) -> None:
    """Of every token of 32 prompts and of 12 that follow each, by their log-probabilities."""
    folder = save_low_bit(tiny_transformer("llama"), tmp_path, **options)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=3, prompt_logprobs=3)

    def scores(max_num_seqs: int, max_num_batched_tokens: int, num_threads: int = 1) -> list[Any]:
        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        config = EngineConfig(
            str(folder), "cpu", "bfloat16", num_threads=num_threads, cpu_kernels=kernels,
            enable_prefix_caching=False, **limits,
        )  # type: ignore[arg-type]  # fmt: skip
        engine, info = build_engine(config, lambda *_: None)
        assert info.kernel == "cpu-int8"
        return [(o.token_ids, o.logprobs, o.prompt_logprobs) for o in engine.generate(prompts_of(32), params)]

    together = scores(32, 2048)
    assert len(together) == 32
    assert scores(1, 2048) == together  # alone, prompts whole
    for cut in (1, 7, 24):  # alone, prompts in pieces
        assert scores(1, cut) == together
    for cut in (32, 33, 57):  # pieces beside others' tokens
        assert scores(32, cut, num_threads=2) == together


def test_a_broken_sequence_does_not_reach_others(tmp_path: Path) -> None:
    model = tiny_transformer("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[90] = 3e38
    model.save_pretrained(tmp_path)
    healthy = [[1, 2, 3], [7, 8, 9, 10]]
    expected = generate(tmp_path, healthy)
    found = generate(tmp_path, [healthy[0], [4, 90, 6], healthy[1]])
    assert found[1].error is not None
    assert [o.token_ids for o in (found[0], found[2])] == [o.token_ids for o in expected]


def test_it_is_a_tape_that_runs(tmp_path: Path) -> None:
    tiny_transformer("llama").save_pretrained(tmp_path)
    lines: list[str] = []
    config = EngineConfig(str(tmp_path), "cpu", num_threads=1)
    engine, info = build_engine(config, lambda phase, done, total, line: lines.append(line))
    assert isinstance(engine._executor._model, TapeModel)  # type: ignore[attr-defined]
    assert info.kernel == "cpu-dense"
    # Of the two only that of compiled kernels takes its time.
    assert list(info.startup_seconds) == ["check", "weights", "kernels", "kv_cache", "warm_up"]
    assert info.startup_seconds["kv_cache"] < info.startup_seconds["kernels"]
    eager, info = build_engine(
        EngineConfig(str(tmp_path), "cpu", block_size=8), lambda *call: lines.append(call[3])
    )
    assert not isinstance(eager._executor._model, TapeModel)  # type: ignore[attr-defined]
    assert any("--block-size 8" in line for line in lines)


def test_who_waits_for_the_first_compilation_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    used = config.CACHE_DIR
    lines: list[str] = []
    try:
        tell_of_compilation(lambda *call: lines.append(call[3]))
        assert len(lines) == 1
        assert lines[0].startswith("compiling kernels")
        Path(config.CACHE_DIR, "a kernel").touch()
        tell_of_compilation(lambda *call: lines.append(call[3]))
        assert len(lines) == 1
    finally:
        config.CACHE_DIR = used
