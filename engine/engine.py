"""The engine: requests in, tokens out, one step at a time. Synchronous, in whatever process calls it."""

import time
from collections import deque
from collections.abc import Sequence as Seq

from .block_manager import BlockManager
from .config import EngineConfig
from .errors import RequestError
from .plan import Executor, Handle, StepPlan
from .records import EngineRequest, EngineStats, KVSpec, SamplingParams, SequenceOutput
from .scheduler import Scheduler
from .sequence import Sequence


class Engine:
    """Schedules requests on an executor. Every request that ``add`` accepts gets exactly one ending.

    ``config.lag`` steps are planned ahead of the one that is waited for. What the executor raises comes
    out of ``step``; the engine is then not to be used any more.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        kv_specs: Seq[KVSpec],
        num_blocks: int,
        max_model_len: int,
        eos_token_ids: Seq[int],
        vocab_size: int | None = None,
    ) -> None:
        """``num_blocks`` of ``config.block_size`` tokens for each of ``kv_specs``.

        ``vocab_size``: prompts with ids outside of it are refused (None: the caller has looked).
        """
        blocks = BlockManager(kv_specs, num_blocks, config.block_size, config.enable_prefix_caching)
        self.max_model_len = max_model_len
        self._scheduler = Scheduler(blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self._blocks = blocks
        self._executor = executor
        self._lag = config.lag
        self._eos_token_ids = tuple(eos_token_ids)
        self._vocab_size = vocab_size
        self._sequences: dict[int, Sequence] = {}  # by request id
        self._in_flight: deque[tuple[StepPlan, Handle]] = deque()
        self._immediate: list[SequenceOutput] = []  # endings of requests that need no step
        self._next_seq_id = 0
        self._num_steps = 0
        self._step_seconds = 0.0
        self._num_batched_tokens = 0

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError, and nothing changes, if it can never run."""
        assert request.request_id not in self._sequences, "request ids of living requests are unique"
        self._validate(request)
        params = request.params
        if params.max_tokens == 0 and (params.prompt_logprobs is None or len(request.prompt_token_ids) == 1):
            ending = SequenceOutput(request.request_id, [], finish_reason="length")
            if params.prompt_logprobs is not None:
                ending.prompt_logprobs = [None]
            self._immediate.append(ending)
            return
        seq = Sequence(self._next_seq_id, request, self.max_model_len, self._eos_token_ids, time.monotonic())
        self._next_seq_id += 1
        self._sequences[request.request_id] = seq
        self._scheduler.add(seq)

    def _validate(self, request: EngineRequest) -> None:
        prompt = request.prompt_token_ids
        new_tokens = request.params.max_tokens
        if not prompt:
            raise RequestError("prompt has no tokens: send at least one", param="prompt")
        if min(prompt) < 0 or (self._vocab_size is not None and max(prompt) >= self._vocab_size):
            limit = "" if self._vocab_size is None else f" and below {self._vocab_size}"
            raise RequestError(f"prompt holds an unknown token id: ids are at least 0{limit}", param="prompt")
        if new_tokens < 0:
            raise RequestError(f"max_tokens {new_tokens}: must be at least 0", param="max_tokens")
        room = self.max_model_len - min(new_tokens, 1)
        if len(prompt) > room:
            raise RequestError(
                f"prompt of {len(prompt)} tokens: at most {room} fit in --max-model-len {self.max_model_len} "
                f"with max_tokens {new_tokens}; shorten the prompt",
                param="prompt",
            )
        # Room for the whole life of the request: then the oldest sequence can always go on by preempting.
        stored = max(len(prompt), min(len(prompt) + new_tokens, self.max_model_len) - 1)
        capacity = self._blocks.num_blocks * self._blocks.block_size
        if stored > capacity:
            raise RequestError(
                f"prompt of {len(prompt)} tokens with max_tokens {new_tokens}: the KV cache holds {capacity} "
                f"tokens; shorten the prompt, lower max_tokens or raise --kv-cache-memory",
                param="max_tokens" if len(prompt) <= capacity else "prompt",
            )

    def abort(self, request_id: int) -> None:
        """End a request at any stage, with no further output. Unknown (or ended) ids are ignored."""
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            self._scheduler.remove(seq)
        else:
            self._immediate = [output for output in self._immediate if output.request_id != request_id]

    @property
    def has_work(self) -> bool:
        """Whether ``step`` has anything to do: also to wait for a step whose sequences have all ended."""
        return bool(self._sequences or self._in_flight or self._immediate)

    def step(self) -> list[SequenceOutput]:
        """Start one step and book the oldest one not booked yet (with lag 1: maybe none)."""
        began = time.perf_counter()
        outputs, self._immediate = self._immediate, []
        plan = self._scheduler.schedule()
        if plan.scheduled:
            self._in_flight.append((plan, self._executor.execute(plan)))
        assert self._in_flight or not self._sequences, "sequences live and nothing runs"
        self._num_batched_tokens = 0
        if len(self._in_flight) > self._lag or (self._in_flight and not plan.scheduled):
            plan, handle = self._in_flight.popleft()
            found = self._scheduler.update(plan, handle.result())
            for output in found:
                if output.finish_reason is not None:
                    del self._sequences[output.request_id]
            outputs += found
            self._num_steps += 1
            self._num_batched_tokens = plan.num_tokens
        self._step_seconds = time.perf_counter() - began
        return outputs

    def generate(
        self, prompts: Seq[list[int]], params: SamplingParams | Seq[SamplingParams]
    ) -> list[SequenceOutput]:
        """Run these prompts to their ends, on an engine with no other work; one output per prompt.

        Raises RequestError for a prompt that cannot run, after aborting the others.
        """
        assert not self.has_work
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        try:
            for index, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
                self.add(EngineRequest(index, prompt, own))
        except RequestError:
            for index in range(len(prompts)):
                self.abort(index)
            raise
        whole: dict[int, SequenceOutput] = {}
        while self.has_work:
            for output in self.step():
                known = whole.setdefault(output.request_id, output)
                if known is not output:
                    _extend(known, output)
        return [whole[index] for index in range(len(prompts))]

    def stats(self) -> EngineStats:
        """A snapshot after the last step."""
        blocks, scheduler = self._blocks, self._scheduler
        return EngineStats(
            step=self._num_steps,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_preemptions=scheduler.num_preemptions,
            kv_usage=1 - blocks.num_free / blocks.num_blocks,
            num_kv_blocks=blocks.num_blocks,
            prefix_cache_queries=blocks.prefix_cache_queries,
            prefix_cache_hits=blocks.prefix_cache_hits,
            prompt_tokens=scheduler.num_prompt_tokens,
            generation_tokens=scheduler.num_generation_tokens,
            step_seconds=self._step_seconds,
            num_batched_tokens=self._num_batched_tokens,
        )

    def check(self) -> None:
        """Assert every invariant of the engine, its scheduler and its block manager."""
        assert len(self._in_flight) <= self._lag
        assert len(self._sequences) == self._scheduler.num_running + self._scheduler.num_waiting
        assert all(seq.request.request_id == key for key, seq in self._sequences.items())
        self._scheduler.check()


def _extend(whole: SequenceOutput, part: SequenceOutput) -> None:
    """Append what a later step added."""
    whole.token_ids += part.token_ids
    if part.logprobs is not None:
        whole.logprobs = (whole.logprobs or []) + part.logprobs
    whole.prompt_logprobs = whole.prompt_logprobs or part.prompt_logprobs
    whole.finish_reason = part.finish_reason
    whole.stop_token_id = part.stop_token_id
    whole.error = part.error
