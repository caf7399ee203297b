"""A seeded random load: whatever happens, every request ends once, the books are right, tokens are too."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nybble.engine.build import build_engine
from nybble.engine.config import EngineConfig
from nybble.engine.engine import Engine
from nybble.engine.errors import RequestError
from nybble.engine.hardware import cpu_features
from nybble.engine.records import EngineRequest, SamplingParams, SequenceOutput
from nybble.engine.tape_model import TapeModel
from nybble.kernels.cpu.numba_linear import instruction_set
from nybble.kernels.dispatch import Target
from tiny_models import save_low_bit, tiny_transformer

from .fakes import EOS, FAULTY_SEED, VOCAB, FakeExecutor, essence, make_engine, oracle

MAX_MODEL_LEN = 64
RequestMaker = Callable[[random.Random, int], Iterator[EngineRequest]]


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


def run_workload(engine: Engine, count: int, seed: int, make: RequestMaker = random_requests) -> Client:
    """Arrivals in bursts, aborts at any moment, until nothing is left."""
    rng = random.Random(seed)
    client = Client()
    requests = make(rng, count)
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


FEATURES = cpu_features()
ISAS = [
    isa
    for isa in ("avx2", "vnni", "amx")
    if instruction_set(Target(cpu_features=FEATURES, cpu_kernels=isa)) == isa
]
BROKEN = 90  # a token whose embedding overflows
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in 4 bit."""
    model = tiny_transformer("llama", eos_token_id=list(EOS))
    with torch.no_grad():
        model.model.embed_tokens.weight[BROKEN] = 3e38
    return save_low_bit(model, tmp_path_factory.mktemp("model"))


def model_requests(rng: random.Random, count: int) -> Iterator[EngineRequest]:
    """The same load for a real model: some requests sample, by a seed; some break it."""
    for request in random_requests(rng, count):
        prompt, params = request.prompt_token_ids, request.params
        if params.seed == FAULTY_SEED and len(prompt) < MAX_MODEL_LEN - 1:
            prompt.insert(rng.randrange(len(prompt) + 1), BROKEN)
        temperature = rng.choice((0.0, 0.0, 0.7))
        # Every third is plain when greedy: its tokens are told by the kernels.
        logprobs = 2 if request.request_id % 3 else None
        params = replace(params, temperature=temperature, seed=request.request_id, logprobs=logprobs)
        yield replace(request, params=params)


def real_engine(folder: Path, **options: Any) -> Engine:
    config = EngineConfig(str(folder), "cpu", max_model_len=MAX_MODEL_LEN, **options)
    return build_engine(config, lambda *_: None)[0]


@pytest.mark.skipif(not ISAS, reason="the CPU has neither AVX2 nor AVX-512 VNNI")
@pytest.mark.parametrize(
    ("options", "lag", "caching"),
    [
        *(({"cpu_kernels": isa, "dtype": "bfloat16"}, index % 2, True) for index, isa in enumerate(ISAS)),
        ({"dtype": "float32"}, 1, True),
        ({"dtype": "float32"}, 0, False),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_random_requests_over_the_tape(
    options: dict[str, Any], lag: int, caching: bool, checkpoint: Path
) -> None:
    """The bits of a roomy engine on two threads; with float32, the tokens of the eager decoder too."""
    count = 1000
    itemsize = 4 if options["dtype"] == "float32" else 2
    small = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 40,
        "kv_cache_memory": 6 * 16 * 3 * 2 * 2 * 16 * itemsize,  # 6 blocks; a request may need 4
        "enable_prefix_caching": caching,
        "lag": lag,
    }
    engine = real_engine(checkpoint, num_threads=1, **small, **options)
    assert isinstance(engine._executor._model, TapeModel)  # type: ignore[attr-defined]
    client = run_workload(engine, count, seed=lag * 2 + caching, make=model_requests)
    assert not client.living
    ended = {key: client.whole(key) for key in client.requests if key not in client.aborted}
    requests = [client.requests[key] for key in ended]
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_usage) == (0, 0, 0)
    reasons = [whole.finish_reason for whole in ended.values()]
    assert min(reasons.count(reason) for reason in ("stop", "length", "error")) > count // 100
    assert len(client.aborted) > count // 40
    assert stats.num_preemptions > count // 30
    assert (stats.prefix_cache_hits > count // 10) == caching

    roomy = real_engine(checkpoint, num_threads=2, enable_prefix_caching=False, **options)
    for found, expected in zip(ended.values(), generate(roomy, requests), strict=True):
        if found.finish_reason == "error":  # it may have met its error before its prompt was sent
            expected.prompt_logprobs = found.prompt_logprobs
        if found.logprobs is not None:
            expected.logprobs = expected.logprobs or []
        assert essence(found) == essence(expected)
    if options["dtype"] == "float32":
        eager = real_engine(checkpoint, num_threads=1, cpu_kernels="torch", **options)
        told = [replace(r, params=replace(r.params, logprobs=2)) for r in requests]
        check_tokens(list(ended.values()), generate(eager, told), told)


def generate(engine: Engine, requests: list[EngineRequest]) -> list[SequenceOutput]:
    return engine.generate([r.prompt_token_ids for r in requests], [r.params for r in requests])


def check_tokens(
    found: list[SequenceOutput], expected: list[SequenceOutput], requests: list[EngineRequest]
) -> None:
    """Equal tokens and endings; greedy ones may part at a near tie, sampled ones where a draw is as near."""
    parted = 0
    for got, wanted, request in zip(found, expected, requests, strict=True):
        if (got.token_ids, got.finish_reason) == (wanted.token_ids, wanted.finish_reason):
            continue
        if "error" in (
            got.finish_reason,
            wanted.finish_reason,
        ):  # what overflows depends on the order of sums
            assert BROKEN in request.prompt_token_ids + got.token_ids + wanted.token_ids
            continue
        parted += 1
        if request.params.temperature == 0:
            place = next(
                i for i, (a, b) in enumerate(zip(got.token_ids, wanted.token_ids, strict=False)) if a != b
            )
            assert wanted.logprobs is not None
            first, second = wanted.logprobs[place].top_logprobs[:2]
            assert first - second < NEAR_TIE
    print(f"{parted} of {len(found)} requests part from the eager decoder's")
    assert parted <= len(found) // 100
