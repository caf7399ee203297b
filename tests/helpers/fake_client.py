"""An EngineClient without an engine: it answers from a script, in the server's own event loop."""

import asyncio
import itertools
from collections.abc import Callable

from nybble.engine.errors import EngineDeadError, EngineError
from nybble.engine.records import EngineStats, ModelInfo, SamplingParams, SequenceOutput, TokenLogprobs

VOCAB = 512
# (prompt, params) -> the output's tokens, one list per message of the engine; None is its end of sequence
Script = Callable[[list[int], SamplingParams], list[list[int]]]


def continue_prompt(prompt: list[int], params: SamplingParams) -> list[list[int]]:
    """The prompt's own tokens, over and over, one a step."""
    return [[prompt[index % len(prompt)]] for index in range(params.max_tokens)]


def made_up_logprobs(token_id: int, count: int) -> TokenLogprobs:
    """Log-probabilities in which the chosen token is the second likely one, if ``count`` allows."""
    ids = [(token_id + 1 - rank) % VOCAB for rank in range(count)]
    logprobs = [-0.5 - rank for rank in range(count)]
    return TokenLogprobs(token_id, -1.5, ids, logprobs)


class FakeStream:
    """What EngineStream promises."""

    def __init__(self, client: "FakeClient", request_id: int, outputs: list[SequenceOutput]) -> None:
        self.request_id = request_id
        self.aborted = False
        self._client = client
        self._outputs = outputs

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> SequenceOutput:
        while True:
            if self.aborted or not self._outputs:
                self._client.streams.pop(self.request_id, None)
                raise StopAsyncIteration
            if self._client.dead is not None:
                self._client.streams.pop(self.request_id, None)
                raise self._client.dead
            if self._client.budget is None:
                await asyncio.sleep(self._client.step_seconds)
                break
            if self._client.budget > 0:
                self._client.budget -= 1
                break
            await asyncio.sleep(0.002)
        if self.aborted:
            return await self.__anext__()
        output = self._outputs.pop(0)
        self._client.note_step(output)
        if output.finish_reason is not None:
            self._client.streams.pop(self.request_id, None)
        return output

    def abort(self) -> None:
        if self.request_id in self._client.streams and not self.aborted:
            self.aborted = True
            self._client.aborted.append(self.request_id)
            self._client.streams.pop(self.request_id)

    async def aclose(self) -> None:
        self.abort()


class FakeClient:
    """What EngineClient promises, and levers to pull. ``submitted``: every request that came.

    budget: messages that may still be sent (None: no limit); streams wait when it is 0.
    """

    def __init__(self, script: Script = continue_prompt, max_model_len: int = 256) -> None:
        self.script = script
        self.ready = asyncio.Event()
        self.ready.set()
        self.gave_up = asyncio.Event()
        self.failure: Exception | None = None
        self.stats: EngineStats | None = None
        self.progress = None
        self.restarts = 0
        self.dead: EngineDeadError | None = None
        self.budget: int | None = None
        self.step_seconds = 0.0
        self.stalled_seconds = 0.0
        self.error: SequenceOutput | None = None  # what ends each request instead of its script
        self.streams: dict[int, FakeStream] = {}
        self.aborted: list[int] = []
        self.submitted: list[tuple[list[int], SamplingParams, str]] = []
        self.on_stats: Callable[[EngineStats], None] = lambda stats: None
        self._ids = itertools.count(1)
        self._steps = itertools.count(1)
        self.info: ModelInfo | None = model_info(max_model_len)

    def submit(self, prompt_token_ids: list[int], params: SamplingParams, cache_salt: str = "") -> FakeStream:
        if not self.ready.is_set():
            raise EngineError("the engine is restarting; try again soon")
        self.submitted.append((prompt_token_ids, params, cache_salt))
        outputs = _outputs(next(self._ids), prompt_token_ids, params, self.script(prompt_token_ids, params))
        if self.error is not None:
            outputs[-1].finish_reason = "error"
            outputs[-1].error, outputs[-1].refused = self.error.error, self.error.refused
        stream = FakeStream(self, outputs[0].request_id, outputs)
        self.streams[stream.request_id] = stream
        return stream

    def note_step(self, output: SequenceOutput) -> None:
        self.stats = EngineStats(
            step=next(self._steps),
            num_running=len(self.streams),
            num_waiting=0,
            num_preemptions=0,
            kv_usage=0.25,
            num_kv_blocks=64,
            prefix_cache_queries=10,
            prefix_cache_hits=4,
            prompt_tokens=0,
            generation_tokens=0,
            num_batched_tokens=max(len(output.token_ids), 1),
        )
        self.on_stats(self.stats)

    @property
    def outstanding(self) -> int:
        return len(self.streams)

    @property
    def pid(self) -> None:
        return None

    def seconds_since_progress(self) -> float:
        return self.stalled_seconds

    async def stop(self, timeout: float = 5.0) -> None:
        self.dead = EngineDeadError("the server is shutting down")


def model_info(max_model_len: int = 256) -> ModelInfo:
    return ModelInfo(
        architecture="Fake",
        dtype="float32",
        device="cpu",
        quant_method="gptq",
        bits=4,
        group_size=64,
        kernel="fake-w4",
        vocab_size=VOCAB,
        max_model_len=max_model_len,
        eos_token_ids=[0],
        weight_bytes=0,
        kv_bytes=0,
        num_kv_blocks=64,
        block_size=16,
        num_threads=1,
        load_seconds=0.0,
        startup_seconds={"weights": 0.5},
    )


def _outputs(
    request_id: int, prompt: list[int], params: SamplingParams, script: list[list[int]]
) -> list[SequenceOutput]:
    """The script as the engine would send it: cut at max_tokens, the reason on the last one."""
    outputs: list[SequenceOutput] = []
    count = 0
    for tokens in script or [[]]:
        tokens = tokens[: params.max_tokens - count]
        count += len(tokens)
        logprobs = None
        if params.logprobs is not None:
            logprobs = [made_up_logprobs(token, params.logprobs) for token in tokens]
        outputs.append(SequenceOutput(request_id, list(tokens), logprobs))
        if count == params.max_tokens:
            break
    last = outputs[-1]
    last.finish_reason = "length" if count == params.max_tokens else "stop"
    last.stop_token_id = None if count == params.max_tokens else 0
    if params.prompt_logprobs is not None:
        known = [made_up_logprobs(token, params.prompt_logprobs) for token in prompt[1:]]
        outputs[0].prompt_logprobs = [None, *known]
    outputs[0].queued_seconds = 0.001
    return outputs
