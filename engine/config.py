"""Engine configuration: frozen, validated once, errors name option, value and remedy."""

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
CpuKernels = Literal["auto", "amx", "vnni", "avx2", "torch", "portable"]
CpuActivations = Literal["int8", "bf16", "fp32"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything an engine needs to know. ``model`` is a resolved local folder."""

    model: str
    device: Device = "auto"
    dtype: DType = "auto"
    max_model_len: int | None = None  # None: the model's own
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 16
    kv_cache_memory: int | None = None  # bytes; None: see engine/memory.py
    memory_bytes: int | None = None  # what the engine may use in all; None: what is free
    num_threads: int | None = None  # None: physical cores within the cgroup's quota
    enable_prefix_caching: bool = True
    lag: int = 0  # steps planned ahead of the one that runs: 0 or 1 (a CPU has nothing to overlap)
    seed: int = 0
    cpu_kernels: CpuKernels = "auto"  # compiled for the CPU's best instruction set, or this one; or without
    lm_head_bits: int | None = None  # 8 or 4: round a dense output head, in groups of 32; else as stored
    cpu_activations: CpuActivations | None = None  # what low-bit weights meet in compiled kernels
    generation_config: Literal["auto", "none"] = "auto"

    def __post_init__(self) -> None:
        _at_least("--max-num-seqs", self.max_num_seqs, 1)
        _at_least("--max-num-batched-tokens", self.max_num_batched_tokens, 1)
        if self.max_model_len is not None:
            _at_least("--max-model-len", self.max_model_len, 2)
        if self.num_threads is not None:
            _at_least("--num-threads", self.num_threads, 1)
        if self.kv_cache_memory is not None:
            _at_least("--kv-cache-memory", self.kv_cache_memory, 1)
        if self.block_size not in (8, 16, 32, 64, 128):
            raise ConfigError(f"--block-size {self.block_size}: use 8, 16, 32, 64 or 128")
        if self.lm_head_bits not in (None, 4, 8):
            raise ConfigError(f"--lm-head-bits {self.lm_head_bits}: use 4 or 8, or leave it out")
        if self.lag not in (0, 1):
            raise ConfigError(f"--lag {self.lag}: use 0 or 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {self.max_num_batched_tokens} is below --max-num-seqs "
                f"{self.max_num_seqs}: every running request needs one token a step; raise the first or "
                f"lower the second"
            )

    @property
    def low_bit_activations(self) -> CpuActivations:
        """``cpu_activations``, by default int8, but fp32 (exact) where ``--dtype float32`` is asked for."""
        if self.cpu_activations is not None:
            return self.cpu_activations
        return "fp32" if self.dtype == "float32" else "int8"


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{option} {value}: must be at least {least}")
