"""Plain records that cross module and process borders. No torch, no msgspec: dataclasses only."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token of one sequence. Values are validated by the gateway.

    Order of effects on the fp32 logits (vLLM's): logit_bias, min_tokens (masks end-of-sequence and
    stop ids), repetition/presence/frequency penalties, temperature, min_p, top_k, top_p. Log-probabilities
    are of the raw logits, before all of these.
    """

    max_tokens: int
    temperature: float = 1.0  # 0: greedy (argmax, lowest id wins a tie)
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0  # output tokens only
    frequency_penalty: float = 0.0  # output tokens only
    repetition_penalty: float = 1.0  # prompt and output tokens
    logit_bias: dict[int, float] = field(default_factory=dict)
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()  # beside the model's end-of-sequence ids
    seed: int | None = None
    logprobs: int | None = None  # None: off; n: the chosen token's and the n most likely ones'
    prompt_logprobs: int | None = None  # the same for every prompt token but the first


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One sequence to generate. ``request_id`` is unique among the living ones."""

    request_id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str = ""  # requests share cached prefixes only with the same salt


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, of the raw logits) at one position.

    ``top_ids``/``top_logprobs`` are sorted, most likely first; ``logprob`` of a token that is among
    them is the very same float.
    """

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class SequenceOutput:
    """What one step added to one sequence. The output with ``finish_reason`` set is its last one."""

    request_id: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one per entry of token_ids
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # whole prompt, once; first entry None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None  # the end-of-sequence or stop id that ended it (not in token_ids)
    error: str | None = None  # with finish_reason "error"
    refused: bool = False  # with "error": never accepted, because the request is invalid (HTTP 400)
    num_cached_tokens: int = 0  # prompt tokens read from the prefix cache
    queued_seconds: float = 0.0  # from add to the first schedule; set on the first output


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot after a step. Counters are totals since the engine's start."""

    step: int
    num_running: int
    num_waiting: int
    num_preemptions: int
    kv_usage: float  # share of KV blocks held by living sequences, 0..1
    num_kv_blocks: int
    prefix_cache_queries: int  # tokens asked for
    prefix_cache_hits: int  # tokens found
    prompt_tokens: int  # prompt tokens of admitted requests (computed or cached)
    generation_tokens: int
    step_seconds: float = 0.0
    num_batched_tokens: int = 0


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The KV cache of one group of layers with the same shape."""

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    window: int | None  # sliding window in tokens; None: full attention
    dtype: str  # "float32" | "float16" | "bfloat16"

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token in all layers of this group."""
        size = 4 if self.dtype == "float32" else 2
        return 2 * len(self.layers) * self.num_kv_heads * self.head_dim * size


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a loaded model is; sent once by the engine when it is ready."""

    architecture: str
    dtype: str
    device: str
    quant_method: str  # "none" | "gptq" | ...
    bits: int  # 16 or 32 for dense
    group_size: int
    kernel: str  # the linear kernel most weights got
    vocab_size: int
    max_model_len: int
    eos_token_ids: list[int]
    weight_bytes: int
    kv_bytes: int
    num_kv_blocks: int
    block_size: int
    num_threads: int
    load_seconds: float
    startup_seconds: dict[str, float] = field(default_factory=dict)  # phase -> seconds
    cpu_features: str = ""
