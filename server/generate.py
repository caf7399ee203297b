"""One HTTP request's sequences in the engine, as one stream of pieces: the only path, streaming or not."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from ..engine.client import EngineStream
from ..engine.detokenizer import Detokenizer
from ..engine.errors import EngineError, NybbleError, RequestError
from ..engine.records import SamplingParams, SequenceOutput, TokenLogprobs
from .limits import Permit
from .metrics import RequestRecord
from .models import ServedModel


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt. ``text``: what the client wrote, None where it sent token ids."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How tokens become text."""

    stop: Sequence[str] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    continues_prompt: bool = True  # completions: the text goes on where the prompt ends


@dataclass(frozen=True, slots=True)
class Job:
    """A request that is valid and resolved: one entry of ``params`` per sequence, n for each prompt in turn.

    prompt_only: the prompt's log-probabilities are wanted (max_tokens 0); the one token that the engine
    samples is dropped.
    """

    model: ServedModel
    prompts: list[Prompt]
    params: list[SamplingParams]
    options: TextOptions
    cache_salt: str = ""
    prompt_only: bool = False

    @property
    def copies(self) -> int:
        """n."""
        return len(self.params) // len(self.prompts)

    def prompt_of(self, index: int) -> Prompt:
        """The prompt of sequence ``index``."""
        return self.prompts[index // self.copies]


@dataclass(slots=True)
class Piece:
    """What one message of the engine added to one choice.

    offsets: where each token's text begins in the output text. ``finish_reason`` is set on a choice's last
    piece: "stop" or "length"; stop_reason is then the stop string or id that ended it, if one did.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    offsets: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    first: bool = False
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Choice:
    """One sequence: the engine's stream and the text it becomes."""

    def __init__(self, job: Job, index: int, stream: EngineStream) -> None:
        options, prompt = job.options, job.prompt_of(index)
        self.index = index
        self.stream = stream
        self.num_prompt_tokens = len(prompt.token_ids)
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finished = False
        self._prompt_only = job.prompt_only
        self._stop_token_ids = job.params[index].stop_token_ids
        self._fresh = True
        self._detokenizer = Detokenizer(
            job.model.tokenizer,
            prompt_token_ids=prompt.token_ids if options.continues_prompt else (),
            stop=options.stop,
            include_stop_str_in_output=options.include_stop_str_in_output,
            skip_special_tokens=options.skip_special_tokens,
        )

    def take(self, output: SequenceOutput) -> Piece:
        """Turn an output into a piece; ends the stream where a stop string does. Errors: see Generation."""
        reason = output.finish_reason
        if reason not in (None, "stop", "length"):
            raise _failure(output)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        piece = Piece(self.index, "", [], prompt_logprobs=output.prompt_logprobs, first=self._fresh)
        self._fresh = False
        if self._prompt_only:
            piece.finish_reason = "length" if reason is not None else None
        else:
            self._add_tokens(piece, output)
        self.finished = piece.finish_reason is not None
        return piece

    def _add_tokens(self, piece: Piece, output: SequenceOutput) -> None:
        delta = self._detokenizer.push(output.token_ids)
        piece.text, piece.offsets = delta.text, delta.offsets
        piece.token_ids = output.token_ids[: delta.num_tokens]
        if output.logprobs is not None:
            piece.logprobs = output.logprobs[: delta.num_tokens]
        self.num_tokens += delta.num_tokens
        if delta.stopped is not None:
            self.stream.abort()
            piece.finish_reason, piece.stop_reason = "stop", delta.stopped
        elif output.finish_reason is not None:
            piece.text += self._detokenizer.finish().text
            piece.finish_reason = output.finish_reason
            # As vLLM has it: null for the model's own end of sequence, the id for one that the request named.
            if output.stop_token_id in self._stop_token_ids:
                piece.stop_reason = output.stop_token_id


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Generation:
    """The running sequences of one job. Iterate over it once: lists of pieces, each list one message to send.

    Errors while iterating: EngineError; RequestError if the engine refused it; NybbleError if it alone
    failed. Leaving the iteration, or ``abort``, stops what still runs.
    """

    def __init__(self, job: Job, permit: Permit, record: RequestRecord) -> None:
        """Submits every sequence. Errors: EngineError if the engine is not ready."""
        self.job = job
        self.aborted = False
        self._permit = permit
        self._record = record
        self._choices: list[Choice] = []
        try:
            for index, params in enumerate(job.params):
                prompt = job.prompt_of(index)
                stream = job.model.client.submit(prompt.token_ids, params, job.cache_salt)
                self._choices.append(Choice(job, index, stream))
        except BaseException:
            self.close()
            raise

    def usage(self) -> Usage:
        """Counts so far."""
        copies = self.job.copies
        return Usage(
            prompt_tokens=sum(len(prompt.token_ids) for prompt in self.job.prompts),
            completion_tokens=sum(choice.num_tokens for choice in self._choices),
            cached_tokens=sum(choice.num_cached_tokens for choice in self._choices[::copies]),
        )

    def abort(self) -> None:
        """The client is gone: stop every sequence; the iteration ends."""
        self.aborted = True
        for choice in self._choices:
            choice.stream.abort()

    def close(self) -> None:
        """Stop what still runs and give the room back."""
        for choice in self._choices:
            if not choice.finished:
                choice.stream.abort()
                self._record.sequence_ended("error" if not self.aborted else "abort", choice.num_tokens)
                choice.finished = True
        self._permit.close()

    async def pieces(self) -> AsyncGenerator[list[Piece], None]:
        """All pieces of all choices, in the order in which the engine makes them."""
        try:
            if len(self._choices) == 1:
                choice = self._choices[0]
                async for output in choice.stream:
                    yield [self._take(choice, output)]
            else:
                async with aclosing(self._merged()) as batches:
                    async for batch in batches:
                        yield [self._take(choice, output) for choice, output in batch]
            if not self.aborted and not all(choice.finished for choice in self._choices):
                raise EngineError("the engine ended the request; try again")
        finally:
            self.close()

    def _take(self, choice: Choice, output: SequenceOutput) -> Piece:
        piece = choice.take(output)
        if piece.first:
            self._permit.started(choice.index)
            counts = choice.index % self.job.copies == 0
            self._record.first_output(choice.num_prompt_tokens if counts else 0, output.queued_seconds)
        if piece.token_ids:
            self._record.tokens(choice.index, len(piece.token_ids))
        if piece.finish_reason is not None:
            self._permit.ended(choice.index)
            self._record.sequence_ended(piece.finish_reason, choice.num_tokens)
        return piece

    async def _merged(self) -> AsyncGenerator[list[tuple[Choice, SequenceOutput]], None]:
        """The outputs of several streams, several at a time where they came together."""
        # Bounded: a slow client makes the streams merge their outputs instead of filling this queue.
        queue: asyncio.Queue[tuple[Choice, SequenceOutput | EngineError | None]]
        queue = asyncio.Queue(len(self._choices))
        pumps = [asyncio.create_task(_pump(choice, queue)) for choice in self._choices]
        running = len(pumps)
        try:
            while running:
                items = [await queue.get()]
                while not queue.empty():
                    items.append(queue.get_nowait())
                batch: list[tuple[Choice, SequenceOutput]] = []
                for choice, item in items:
                    if isinstance(item, EngineError):
                        raise item
                    if item is None:
                        running -= 1
                    elif not choice.finished:
                        batch.append((choice, item))
                if batch:
                    yield batch
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


def _failure(output: SequenceOutput) -> NybbleError:
    if output.error is None:
        return EngineError("the engine ended the request; try again")
    # Not an EngineError where this request alone cannot go on (logits that are not finite): no use to retry.
    return RequestError(output.error) if output.refused else NybbleError(output.error)


async def _pump(
    choice: Choice, queue: "asyncio.Queue[tuple[Choice, SequenceOutput | EngineError | None]]"
) -> None:
    try:
        async for output in choice.stream:
            await queue.put((choice, output))
    except EngineError as error:
        await queue.put((choice, error))
    else:
        await queue.put((choice, None))
