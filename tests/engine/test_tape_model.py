"""The tape of compiled kernels against the eager decoder: the same tokens, whatever the batch and the cut."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numba.core import config
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine
from nybble.engine.hardware import cpu_features
from nybble.engine.records import EngineRequest, SamplingParams, SequenceOutput
from nybble.engine.tape_model import TapeModel, tell_of_compilation
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.dispatch import Target
from nybble.kernels.paged import PagedSequence
from tape_models import low_bit_tape_model
from tiny_models import save_low_bit, tiny_transformer
from torch.overrides import TorchFunctionMode

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


ASKED = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, logprobs=2)
PLAIN = replace(ASKED, logprobs=None)


def generate(
    folder: Path, prompts: list[list[int]], params: Any = ASKED, **options: Any
) -> list[SequenceOutput]:
    """40 greedy tokens for each prompt, with log-probabilities."""
    return engine_of(folder, **options).generate(prompts, params)


def engine_of(folder: Path, **options: Any) -> Engine:
    config = EngineConfig(str(folder), "cpu", **{"dtype": "float32", "num_threads": 1, **options})
    return build_engine(config, lambda *_: None)[0]


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


@pytest.mark.parametrize("params", [ASKED, PLAIN], ids=["asked", "plain"])
def test_a_broken_sequence_does_not_reach_others(params: SamplingParams, tmp_path: Path) -> None:
    model = tiny_transformer("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[90] = 3e38
    model.save_pretrained(tmp_path)
    healthy = [[1, 2, 3], [7, 8, 9, 10]]
    expected = generate(tmp_path, healthy, params)
    found = generate(tmp_path, [healthy[0], [4, 90, 6], healthy[1]], params)
    assert found[1].error is not None
    assert [o.token_ids for o in (found[0], found[2])] == [o.token_ids for o in expected]


def test_plain_tokens_are_those_of_requests_that_ask_for_more(tmp_path: Path) -> None:
    """On both models, among each other, on any threads, and of more rows than the head takes at once."""
    tiny_transformer("llama").save_pretrained(tmp_path)
    prompts = prompts_of(80)
    expected = [output.token_ids for output in generate(tmp_path, prompts, cpu_kernels="torch")]
    mixed = [PLAIN if index % 3 else ASKED for index in range(80)]
    for params, options in (
        (PLAIN, {"cpu_kernels": "torch"}),
        (PLAIN, {"max_num_seqs": 80}),
        (mixed, {"max_num_seqs": 80, "num_threads": 2}),
        (mixed, {"max_num_seqs": 7, "num_threads": 4}),
    ):
        found = generate(tmp_path, prompts, params, **options)
        assert [output.token_ids for output in found] == expected, options


class NoTorch(TorchFunctionMode):
    """Fails at any call of torch's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"torch was called: {func}")


@pytest.mark.parametrize("streams", [3, 70])
def test_a_plain_decoding_step_calls_no_torch(streams: int, tmp_path: Path) -> None:
    """70: more than the head takes at once."""
    tiny_transformer("llama").save_pretrained(tmp_path)
    engine = engine_of(tmp_path, max_num_seqs=streams)
    for index, prompt in enumerate(prompts_of(streams)):
        engine.add(EngineRequest(index, prompt, PLAIN))
    while engine.stats().num_waiting:
        engine.step()
    with NoTorch():
        while engine.has_work:
            outputs = engine.step()
    assert [output.finish_reason for output in outputs] == ["length"] * len(outputs)
    engine.add(EngineRequest(streams, [1, 2], ASKED))
    with NoTorch(), pytest.raises(AssertionError, match="torch was called"):
        engine.step()


@pytest.mark.parametrize("params", [ASKED, PLAIN], ids=["asked", "plain"])
def test_logits_that_overflow_end_only_their_own_request(params: SamplingParams, tmp_path: Path) -> None:
    """One row of the head overflows, on a state that is finite, where an input of it is above 1.13."""
    model = tiny_transformer("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[96] = 0
        model.lm_head.weight[96, 58] = 3e38  # the engine's own first tokens do not meet it
    model.save_pretrained(tmp_path)
    prompts, params = prompts_of(24), replace(params, max_tokens=2)
    eager, tape = (generate(tmp_path, prompts, params, cpu_kernels=k) for k in ("torch", "auto"))
    reasons = [output.finish_reason for output in tape]
    assert min(reasons.count("error"), reasons.count("length")) > 2
    assert reasons == [output.finish_reason for output in eager]
    assert [output.token_ids for output in tape] == [output.token_ids for output in eager]
    for index in (reasons.index("error"), reasons.index("length")):
        (alone,) = generate(tmp_path, [prompts[index]], params)
        assert (alone.finish_reason, alone.token_ids) == (reasons[index], tape[index].token_ids)


def test_more_rows_than_the_head_takes_at_once() -> None:
    assert ISA is not None
    model = low_bit_tape_model(ISA, 2)
    model.forward([i % 97 for i in range(128)], [[PagedSequence(0, 128, 0, tuple(range(8)))]])
    rows = [*range(127, -1, -1), 5, 5]
    together = model.logits(rows)
    for place, row in enumerate(rows):
        one = model.logits([row])
        assert torch.equal(one.values[0], together.values[place])
        assert (one.finite[0], one.largest[0]) == (together.finite[place], together.largest[place])
    assert together.largest == together.values.argmax(-1).tolist()
    assert model.finite() == [True] * 128
    model.close()


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
