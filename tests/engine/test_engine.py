"""The engine against the plain recomputation, over every way a step can be cut."""

import itertools
import random

import pytest
from nybble.engine.records import SamplingParams

from .fakes import VOCAB, essence, make_engine, oracle


def prompts(seed: int, count: int, longest: int) -> list[list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(2, VOCAB) for _ in range(longest)]
    return [
        shared[: rng.randrange(longest // 2)]
        + [rng.randrange(2, VOCAB) for _ in range(rng.randrange(1, longest // 2))]
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("lag", "caching", "num_blocks", "budget"),
    list(itertools.product((0, 1), (False, True), (9, 64), (8, 13, 256))),
)
def test_equals_oracle(lag: int, caching: bool, num_blocks: int, budget: int) -> None:
    engine, _ = make_engine(
        num_blocks=num_blocks, lag=lag, enable_prefix_caching=caching, max_num_batched_tokens=budget
    )
    work = prompts(1, 30, 30)
    params = SamplingParams(max_tokens=24, logprobs=0)
    for output, prompt in zip(engine.generate(work, params), work, strict=True):
        assert essence(output) == essence(oracle(prompt, params, 64))
    engine.check()
    assert engine.stats().kv_usage == 0
    assert (engine.stats().num_preemptions > 0) == (num_blocks == 9)
    assert (engine.stats().prefix_cache_hits > 0) == caching
