"""The KV cache's size: what is asked for, at most half of what is free, and errors that name a way out."""

import re

import pytest
from nybble.engine.config import EngineConfig
from nybble.engine.errors import ConfigError
from nybble.engine.memory import plan_kv_cache, request_bytes, resolve_max_model_len
from nybble.engine.records import KVSpec

SPECS = (KVSpec((0, 2), 2, 64, None, "float32"), KVSpec((1,), 2, 64, 128, "float16"))
PER_TOKEN = 2 * (2 * 2 * 64 * 4) + 2 * (1 * 2 * 64 * 2)
BLOCK = 16 * PER_TOKEN


def config(**changes: int | None) -> EngineConfig:
    return EngineConfig("m", **({"max_num_seqs": 4} | changes))  # type: ignore[arg-type]


def test_what_all_requests_need_if_it_fits() -> None:
    plan = plan_kv_cache(SPECS, config(), 100, 1 << 40)
    assert plan.num_blocks == 4 * 7
    assert plan.bytes == 4 * 7 * BLOCK
    assert plan.bytes == 4 * request_bytes(SPECS, 16, 100)
    assert plan.max_concurrency == 4.0


def test_at_most_half_of_what_is_free() -> None:
    plan = plan_kv_cache(SPECS, config(), 100, 20 * BLOCK)
    assert plan.num_blocks == 10
    assert "10 blocks, room for 1.4 requests" in plan.line()


def test_the_option_overrides_both() -> None:
    assert plan_kv_cache(SPECS, config(kv_cache_memory=90 * BLOCK), 100, 100 * BLOCK).num_blocks == 90
    assert plan_kv_cache(SPECS, config(kv_cache_memory=8 * BLOCK), 100, 100 * BLOCK).num_blocks == 8
    with pytest.raises(ConfigError, match="--kv-cache-memory"):
        plan_kv_cache(SPECS, config(kv_cache_memory=101 * BLOCK), 100, 100 * BLOCK)


@pytest.mark.parametrize("changes", [{}, {"kv_cache_memory": 5 * BLOCK + 1}])
def test_the_error_names_the_largest_length_that_works(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 100") as error:
        plan_kv_cache(SPECS, config(**changes), 100, 10 * BLOCK + 3)
    largest = re.search(r"use --max-model-len (\d+)", error.value.message)
    assert largest is not None
    length = int(largest.group(1))
    assert plan_kv_cache(SPECS, config(**changes), length, 10 * BLOCK + 3).num_blocks == 5
    with pytest.raises(ConfigError):
        plan_kv_cache(SPECS, config(**changes), length + 1, 10 * BLOCK + 3)


def test_not_even_one_block() -> None:
    with pytest.raises(ConfigError, match="free memory"):
        plan_kv_cache(SPECS, config(), 100, BLOCK)


def test_the_models_own_length_is_default_and_limit() -> None:
    assert resolve_max_model_len(config(), 2048) == 2048
    assert resolve_max_model_len(config(max_model_len=64), 2048) == 64
    with pytest.raises(ConfigError, match=r"--max-model-len 2049.*use 2048"):
        resolve_max_model_len(config(max_model_len=2049), 2048)
