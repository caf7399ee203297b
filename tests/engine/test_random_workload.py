"""A seeded random load: whatever happens, every request ends once, the books are right, tokens are too."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from nybble.engine.engine import Engine
from nybble.engine.errors import RequestError
from nybble.engine.records import EngineRequest, SamplingParams, SequenceOutput

from .fakes import FAULTY_SEED, VOCAB, FakeExecutor, essence, make_engine, oracle

MAX_MODEL_LEN = 64


@dataclass
class Client:
    """What the other side of the engine sees of its requests."""

    requests: dict[int, EngineRequest] = field(default_factory=dict)
    parts: dict[int, list[SequenceOutput]] = field(default_factory=dict)
    living: list[int] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    refused: int = 0

    def receive(self, output: SequenceOutput) -> None:
        assert output.request_id in self.living, "an output after the ending"
        assert output.token_ids or output.finish_reason is not None
        self.parts[output.request_id].append(output)
        if output.finish_reason is not None:
            self.living.remove(output.request_id)

    def whole(self, request_id: int) -> SequenceOutput:
        """The parts of one request as one output."""
        parts = self.parts[request_id]
        logprobs = [entry for part in parts for entry in part.logprobs or []]
        wants = self.requests[request_id].params.logprobs is not None
        prompt = [part.prompt_logprobs for part in parts if part.prompt_logprobs is not None]
        assert len(prompt) <= 1, "log-probabilities of the prompt are sent once"
        return SequenceOutput(
            request_id,
            [token for part in parts for token in part.token_ids],
            logprobs if wants else None,
            prompt[0] if prompt else None,
            parts[-1].finish_reason,
            parts[-1].stop_token_id,
            parts[-1].error,
        )


def random_requests(rng: random.Random, count: int) -> Iterator[EngineRequest]:
    prefixes = [[rng.randrange(2, VOCAB) for _ in range(rng.randrange(8, 40))] for _ in range(5)]
    for request_id in range(count):
        prompt = list(rng.choice(prefixes)[: rng.randrange(41)]) if rng.random() < 0.6 else []
        prompt += [rng.randrange(2, VOCAB) for _ in range(rng.randrange(0 if prompt else 1, 16))]
        if rng.random() < 0.01:
            prompt = prompt + [2] * MAX_MODEL_LEN
        wants_prompt = rng.random() < 0.15
        params = SamplingParams(
            max_tokens=0 if rng.random() < 0.06 else rng.randrange(1, 40),
            temperature=0.0,
            min_tokens=rng.choice((0, 0, 0, 5)),
            ignore_eos=rng.random() < 0.8,
            stop_token_ids=tuple(rng.randrange(VOCAB) for _ in range(rng.choice((0, 0, 0, 1)))),
            seed=FAULTY_SEED if rng.random() < 0.05 else rng.choice((None, 1, 2)),
            logprobs=rng.choice((None, None, 1)),
            prompt_logprobs=1 if wants_prompt else None,
        )
        yield EngineRequest(request_id, prompt, params, cache_salt=rng.choice(("", "", "tenant")))


def run_workload(engine: Engine, count: int, seed: int) -> Client:
    """Arrivals in bursts, aborts at any moment, until nothing is left."""
    rng = random.Random(seed)
    client = Client()
    requests = random_requests(rng, count)
    arriving = True
    while arriving or engine.has_work:
        for _ in range(rng.choice((0, 0, 1, 1, 2, 6)) if len(client.living) < 30 else 0):
            request = next(requests, None)
            if request is None:
                arriving = False
                break
            try:
                engine.add(request)
            except RequestError:
                assert len(request.prompt_token_ids) >= MAX_MODEL_LEN
                client.refused += 1
                continue
            client.requests[request.request_id] = request
            client.parts[request.request_id] = []
            client.living.append(request.request_id)
        if client.living and rng.random() < 0.04:
            victim = client.living.pop(rng.randrange(len(client.living)))
            engine.abort(victim)
            engine.abort(victim)
            client.aborted.append(victim)
        if engine.has_work:
            for output in engine.step():
                client.receive(output)
        engine.check()
    return client


def small_engine(lag: int, caching: bool, groups: int = 1) -> tuple[Engine, FakeExecutor]:
    return make_engine(
        num_blocks=16,
        max_model_len=MAX_MODEL_LEN,
        groups=groups,
        lag=lag,
        enable_prefix_caching=caching,
        max_num_batched_tokens=40,
    )


@pytest.mark.parametrize(
    ("count", "lag", "caching", "groups"),
    [(2000, 1, True, 1), (500, 1, False, 2), (500, 0, True, 2), (500, 0, False, 1)],
)
def test_random_requests(count: int, lag: int, caching: bool, groups: int) -> None:
    engine, executor = small_engine(lag, caching, groups)
    client = run_workload(engine, count, seed=lag * 2 + caching)
    assert not client.living
    assert len(client.requests) + client.refused == count
    reasons = dict.fromkeys(("stop", "length", "error"), 0)
    for request_id, request in client.requests.items():
        if request_id in client.aborted:
            continue
        whole = client.whole(request_id)
        expected = oracle(request.prompt_token_ids, request.params, MAX_MODEL_LEN, groups)
        if whole.finish_reason == "error":  # it may have met its error before its prompt was sent
            expected.prompt_logprobs = whole.prompt_logprobs
        assert essence(whole) == essence(expected)
        assert whole.finish_reason is not None
        reasons[whole.finish_reason] += 1
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    # The load must have met everything it is to try.
    assert min(reasons.values()) > count // 100
    assert client.refused > 0
    assert len(client.aborted) > count // 40
    assert stats.num_preemptions > count // 30
    assert (stats.prefix_cache_hits > count // 4) == caching
    assert any(
        work.start > 0 and len(work.token_ids) > 1 for plan in executor.plans for work in plan.scheduled
    )


@pytest.mark.parametrize("lag", [0, 1])
def test_two_runs_give_equal_traces(lag: int) -> None:
    runs = []
    for _ in range(2):
        engine, executor = small_engine(lag, caching=True)
        client = run_workload(engine, 200, seed=5)
        runs.append(
            (executor.plans, {key: client.whole(key) for key in client.requests if client.parts[key]})
        )
    assert runs[0] == runs[1]
