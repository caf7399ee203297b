"""The engine against the plain recomputation, over every way a step can be cut; requests' whole lives."""

import itertools
import random
from collections.abc import Callable

import pytest
from nybble.engine.engine import Engine
from nybble.engine.errors import RequestError
from nybble.engine.records import EngineRequest, SamplingParams, SequenceOutput

from .fakes import EOS, FAULT, FAULTY_SEED, VOCAB, FakeExecutor, essence, make_engine, oracle


def make_prompts(seed: int, count: int, longest: int) -> list[list[int]]:
    """Prompts that share beginnings of all lengths."""
    rng = random.Random(seed)
    shared = [rng.randrange(2, VOCAB) for _ in range(longest)]
    return [
        shared[: rng.randrange(longest // 2)]
        + [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, longest // 2))]
        for _ in range(count)
    ]


def drain(engine: Engine) -> list[SequenceOutput]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
        engine.check()
    assert engine.stats().kv_usage == 0
    return outputs


@pytest.mark.parametrize(
    ("lag", "caching", "num_blocks", "budget"),
    list(itertools.product((0, 1), (False, True), (9, 64), (8, 13, 256))),
)
def test_equals_oracle(lag: int, caching: bool, num_blocks: int, budget: int) -> None:
    engine, executor = make_engine(
        num_blocks=num_blocks, lag=lag, enable_prefix_caching=caching, max_num_batched_tokens=budget
    )
    prompts = make_prompts(1, 30, 30)
    params = SamplingParams(max_tokens=24, logprobs=0)
    for output, prompt in zip(engine.generate(prompts, params), prompts, strict=True):
        assert essence(output) == essence(oracle(prompt, params, 64))
    engine.check()
    stats = engine.stats()
    assert stats.kv_usage == 0
    assert (stats.num_preemptions > 0) == (num_blocks == 9)
    assert (stats.prefix_cache_hits > 0) == caching
    assert stats.prompt_tokens == sum(map(len, prompts))
    chunked = any(not work.samples for plan in executor.plans for work in plan.scheduled)
    assert chunked == (budget < 256)


@pytest.mark.parametrize(("lag", "groups"), [(0, 1), (1, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("burst", [(1, 2), (0, 1, 3), (4,)])
def test_steps_that_find_any_number_of_tokens(lag: int, groups: int, burst: tuple[int, ...]) -> None:
    engine, _ = make_engine(
        num_blocks=14, groups=groups, lag=lag, burst=burst, max_num_batched_tokens=32, max_num_seqs=6
    )
    prompts = make_prompts(2, 30, 30)
    params = [
        SamplingParams(max_tokens=1 + index, logprobs=0, ignore_eos=index % 2 == 0) for index in range(30)
    ]
    for request_id, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        engine.add(EngineRequest(request_id, prompt, own))
    tokens: list[list[int]] = [[] for _ in prompts]
    for output in drain(engine):
        tokens[output.request_id] += output.token_ids
    for prompt, own, found in zip(prompts, params, tokens, strict=True):
        assert found == oracle(prompt, own, 64, groups).token_ids


@pytest.mark.parametrize("lag", [0, 1])
def test_two_groups_under_pressure(lag: int) -> None:
    engine, _ = make_engine(num_blocks=10, groups=2, lag=lag, max_num_batched_tokens=16)
    prompts = make_prompts(3, 30, 40)
    params = SamplingParams(max_tokens=20, prompt_logprobs=None)
    for output, prompt in zip(engine.generate(prompts, params), prompts, strict=True):
        assert essence(output) == essence(oracle(prompt, params, 64, 2))
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.prefix_cache_hits > 0
    assert stats.prefix_cache_queries == stats.prompt_tokens  # what is computed again is not asked again


@pytest.mark.parametrize("lag", [0, 1])
def test_prompt_logprobs_survive_preemption_and_cache(lag: int) -> None:
    engine, _ = make_engine(num_blocks=10, lag=lag, max_num_batched_tokens=11)
    prompts = make_prompts(4, 30, 40)
    params = [
        SamplingParams(max_tokens=index % 4 * 9, ignore_eos=True, prompt_logprobs=0 if index % 3 else None)
        for index in range(30)
    ]
    outputs = engine.generate(prompts, params)
    for output, prompt, own in zip(outputs, prompts, params, strict=True):
        assert essence(output) == essence(oracle(prompt, own, 64))
        assert own.prompt_logprobs is None or output.num_cached_tokens == 0
    assert engine.stats().num_preemptions > 0
    assert any(output.num_cached_tokens for output in outputs)


@pytest.mark.parametrize("lag", [0, 1])
def test_one_sequences_error_is_its_own(lag: int) -> None:
    engine, _ = make_engine(lag=lag)
    prompts = make_prompts(5, 40, 20)
    params = [
        SamplingParams(max_tokens=30, seed=FAULTY_SEED if index % 2 else None)
        for index in range(len(prompts))
    ]
    outputs = engine.generate(prompts, params)
    for output, prompt, own in zip(outputs, prompts, params, strict=True):
        assert essence(output) == essence(oracle(prompt, own, 64))
    assert {output.error for output in outputs if output.finish_reason == "error"} == {FAULT}
    assert engine.stats().kv_usage == 0


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("steps", range(6))
def test_abort_at_any_stage(lag: int, steps: int) -> None:
    """Two are living, one of them aborted after 0, 1, 2... steps: waiting, in its prompt, decoding."""
    engine, _ = make_engine(lag=lag, max_num_batched_tokens=16, max_num_seqs=4)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompts = make_prompts(6, 2, 60)
    for request_id, prompt in enumerate(prompts):
        engine.add(EngineRequest(request_id, prompt, params))
    outputs = [output for _ in range(steps) for output in engine.step()]
    for unknown in (7, 0, 0):
        engine.abort(unknown)
        engine.check()
    late = drain(engine)
    assert 0 not in {output.request_id for output in late}
    tokens = [token for output in outputs + late if output.request_id == 1 for token in output.token_ids]
    assert tokens == oracle(prompts[1], params, 64).token_ids
    engine.add(EngineRequest(0, prompts[0], params))  # the id may be used again
    tokens = [token for output in drain(engine) for token in output.token_ids]
    assert tokens == oracle(prompts[0], params, 64).token_ids


def test_id_used_again_while_its_old_step_is_in_flight() -> None:
    engine, _ = make_engine(lag=1)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    engine.add(EngineRequest(0, [5, 6, 7], params))
    engine.step()
    engine.step()
    engine.abort(0)
    engine.add(EngineRequest(0, [8, 9], params))
    assert [t for output in drain(engine) for t in output.token_ids] == oracle([8, 9], params, 64).token_ids


def test_abort_of_all_leaves_only_the_step_in_flight() -> None:
    engine, _ = make_engine(lag=1)
    engine.add(EngineRequest(0, [5, 6, 7], SamplingParams(max_tokens=5)))
    engine.step()
    engine.abort(0)
    engine.check()
    assert engine.has_work
    assert engine.stats().kv_usage > 0  # the step in flight still writes
    assert engine.step() == []
    assert not engine.has_work
    assert engine.stats().kv_usage == 0


@pytest.mark.parametrize("lag", [0, 1])
def test_max_tokens_zero(lag: int) -> None:
    engine, executor = make_engine(lag=lag, max_model_len=16)
    prompt = list(range(2, 18))
    for request_id, (tokens, wanted) in enumerate([(prompt, None), (prompt, 0), (prompt[:1], 0)]):
        engine.add(EngineRequest(request_id, tokens, SamplingParams(max_tokens=0, prompt_logprobs=wanted)))
    assert engine.has_work
    outputs = {output.request_id: output for output in drain(engine)}
    assert outputs[0] == SequenceOutput(0, [], finish_reason="length")
    assert essence(outputs[1]) == essence(oracle(prompt, SamplingParams(0, prompt_logprobs=0), 16))
    assert outputs[2] == SequenceOutput(2, [], prompt_logprobs=[None], finish_reason="length")
    assert sum(plan.num_tokens for plan in executor.plans) == 15
    engine.add(EngineRequest(3, prompt, SamplingParams(max_tokens=0)))
    engine.abort(3)
    assert drain(engine) == []


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param", "says"),
    [
        ([], 5, "prompt", "no tokens"),
        ([5] * 64, 1, "prompt", "at most 63 fit in --max-model-len 64"),
        ([5] * 65, 0, "prompt", "at most 64 fit"),
        ([5, VOCAB], 1, "prompt", f"below {VOCAB}"),
        ([5, -1], 1, "prompt", "unknown token id"),
        ([5], -1, "max_tokens", "at least 0"),
        ([5] * 50, 1, "prompt", "the KV cache holds 48 tokens"),
        ([5] * 20, 30, "max_tokens", "lower max_tokens"),
    ],
)
def test_refusals(prompt: list[int], max_tokens: int, param: str, says: str) -> None:
    engine, _ = make_engine(num_blocks=6)
    engine.add(EngineRequest(0, [5, 6], SamplingParams(max_tokens=3, ignore_eos=True)))
    engine.step()
    with pytest.raises(RequestError, match=says) as caught:
        engine.add(EngineRequest(1, prompt, SamplingParams(max_tokens=max_tokens)))
    assert caught.value.param == param
    assert "\n" not in caught.value.message
    assert {output.request_id for output in drain(engine)} == {0}


def test_what_just_fits_runs() -> None:
    engine, _ = make_engine(num_blocks=6)
    for prompt, max_tokens in (([5] * 48, 1), ([5] * 20, 29)):
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        assert engine.generate([prompt], params)[0].token_ids == oracle(prompt, params, 64).token_ids
    engine, _ = make_engine(num_blocks=8)
    assert len(engine.generate([[5] * 60], SamplingParams(99, ignore_eos=True))[0].token_ids) == 4


def test_generate_refuses_as_a_whole() -> None:
    engine, _ = make_engine()
    with pytest.raises(RequestError):
        engine.generate([[5], []], SamplingParams(max_tokens=2))
    assert not engine.has_work


def test_outputs_carry_cache_hits_and_queue_time() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    prompt = list(range(2, 22))
    for request_id in range(2):
        engine.add(EngineRequest(request_id, prompt, params))
    outputs = drain(engine)
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 16, 16, 16]
    queued = [output.queued_seconds for output in outputs]
    assert 0 < queued[0] < queued[3]
    assert queued[1:3] == queued[4:] == [0, 0]
    stats = engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (40, 16)
    assert (stats.prompt_tokens, stats.generation_tokens, stats.step) == (40, 6, 6)


@pytest.mark.parametrize("fails", ["execute", "result"])
@pytest.mark.parametrize("lag", [0, 1])
def test_what_the_executor_raises_comes_out(lag: int, fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, executor = make_engine(lag=lag)

    def broken(*_: object) -> None:
        raise MemoryError("the device is gone")

    monkeypatch.setattr(executor, {"execute": "execute", "result": "finish"}[fails], broken)
    engine.add(EngineRequest(0, [5, 6], SamplingParams(max_tokens=3)))
    with pytest.raises(MemoryError, match="device is gone"):
        drain(engine)


def test_lag_one_starts_a_step_before_it_waits_for_the_last() -> None:
    engine, executor = make_engine(lag=1)
    log: list[str] = []
    execute, finish = executor.execute, executor.finish

    def logged(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(plan: object) -> object:
            log.append(f"{name} {plan.step}")  # type: ignore[attr-defined]
            return call(plan)

        return wrapped

    executor.execute = logged("start", execute)  # type: ignore[method-assign, assignment]
    executor.finish = logged("end", finish)  # type: ignore[method-assign, assignment]
    engine.generate([[5, 6]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert log == ["start 0", "start 1", "end 0", "start 2", "end 1", "end 2"]


def test_eos_of_the_model_and_of_the_request() -> None:
    """Some context samples each of the ids; with each rule it ends where the oracle says."""
    engine, _ = make_engine()
    prompts = make_prompts(8, 20, 20)
    rules = [
        SamplingParams(max_tokens=40),
        SamplingParams(max_tokens=40, ignore_eos=True),
        SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=(3, 4, 5, 6, 7)),
        SamplingParams(max_tokens=40, min_tokens=30, stop_token_ids=(3, 4, 5, 6, 7)),
    ]
    stops: list[set[int | None]] = []
    for params in rules:
        outputs = engine.generate(prompts, params)
        for output, prompt in zip(outputs, prompts, strict=True):
            assert essence(output) == essence(oracle(prompt, params, 64))
        stops.append({output.stop_token_id for output in outputs})
    assert stops[0] - {None} == set(EOS)
    assert stops[1] == {None}
    assert stops[2] - {None} <= {3, 4, 5, 6, 7}
    assert len(stops[2]) > 2


def test_fake_memory_tells_stale_blocks() -> None:
    """The fakes are worth something: a wrong table changes what is sampled."""
    engine, executor = make_engine()
    prompt = list(range(2, 40))
    engine.add(EngineRequest(0, prompt, SamplingParams(max_tokens=9, ignore_eos=True)))
    engine.step()
    table = engine._scheduler._running[0].block_tables[0]
    executor.memory[0][table[0] * executor.block_size] = 1
    tokens = [token for output in drain(engine) for token in output.token_ids]
    assert tokens != oracle(prompt, SamplingParams(9, ignore_eos=True), 64).token_ids[1:]
    assert isinstance(executor, FakeExecutor)
