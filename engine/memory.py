"""How much memory the KV cache takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from .config import EngineConfig
from .errors import ConfigError
from .records import KVSpec

FREE_SHARE = 0.5  # of what is free after the weights: other processes and activations live there too


@dataclass(frozen=True, slots=True)
class KVPlan:
    """``num_blocks`` of ``config.block_size`` tokens for each KV group; ``bytes`` in all, touched lazily.

    ``max_concurrency``: how many requests of the full length fit at once.
    """

    num_blocks: int
    bytes: int
    bytes_per_block: int
    max_concurrency: float

    def line(self) -> str:
        """For the log."""
        return (
            f"KV cache: {gib(self.bytes)} in {self.num_blocks} blocks, room for {self.max_concurrency:.1f} "
            "requests of the full length"
        )


def request_bytes(specs: Sequence[KVSpec], block_size: int, num_tokens: int) -> int:
    """Bytes of the KV blocks of one request of ``num_tokens``."""
    return -(-num_tokens // block_size) * _bytes_per_block(specs, block_size)


def plan_kv_cache(
    specs: Sequence[KVSpec], config: EngineConfig, max_model_len: int, free_bytes: int
) -> KVPlan:
    """Blocks for ``max_num_seqs`` requests of ``max_model_len``, at most half of ``free_bytes``.

    ``config.kv_cache_memory`` overrides both. ``free_bytes``: what is free once the weights are loaded.
    ConfigError names the largest ``max_model_len`` that fits where not even one request does.
    """
    per_block = _bytes_per_block(specs, config.block_size)
    per_request = -(-max_model_len // config.block_size)
    if config.kv_cache_memory is None:
        budget = int(free_bytes * FREE_SHARE)
        num_blocks = min(budget // per_block, config.max_num_seqs * per_request)
        limit = f"half of the {gib(free_bytes)} free after the weights"
    else:
        budget = config.kv_cache_memory
        num_blocks = budget // per_block
        limit = "--kv-cache-memory"
        if budget > free_bytes:
            raise ConfigError(
                f"--kv-cache-memory {gib(budget)} is more than the {gib(free_bytes)} ({free_bytes} bytes) "
                "free after the weights; lower it"
            )
    if num_blocks < per_request:
        largest = num_blocks * config.block_size
        remedy = f"use --max-model-len {largest} or less, or " if largest >= 2 else ""
        remedy += "free memory, or " if config.kv_cache_memory is None else ""
        raise ConfigError(
            f"--max-model-len {max_model_len}: one request of that length needs "
            f"{gib(per_request * per_block)} of KV cache, but {limit} allows {gib(budget)}; "
            f"{remedy}raise --kv-cache-memory"
        )
    return KVPlan(num_blocks, num_blocks * per_block, per_block, num_blocks / per_request)


def resolve_max_model_len(config: EngineConfig, model_limit: int) -> int:
    """``config.max_model_len``, by default and at most the model's own limit."""
    if config.max_model_len is None:
        return model_limit
    if config.max_model_len > model_limit:
        raise ConfigError(
            f"--max-model-len {config.max_model_len}: the model has {model_limit} positions "
            f"(max_position_embeddings with its rope scaling); use {model_limit} or less"
        )
    return config.max_model_len


def gib(num_bytes: int) -> str:
    """For people: "1.50 GiB", "12.3 MiB", "1.0 KiB"."""
    if num_bytes >= 1 << 30:
        return f"{num_bytes / (1 << 30):.2f} GiB"
    return f"{num_bytes / (1 << 20):.1f} MiB" if num_bytes >= 1 << 17 else f"{num_bytes / (1 << 10):.1f} KiB"


def _bytes_per_block(specs: Sequence[KVSpec], block_size: int) -> int:
    return sum(spec.bytes_per_token for spec in specs) * block_size
