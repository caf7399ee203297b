"""POST /v1/completions: from its body to a job, and from pieces to its answers."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any
from uuid import uuid4

from ..engine.detokenizer import Detokenizer
from ..engine.errors import RequestError
from .errors import ContextLengthError
from .generate import Job, Piece, Prompt, TextOptions, Usage
from .models import ServedModel
from .openai_logprobs import completion_logprobs, token_names
from .sampling import DEFAULT_COMPLETION_TOKENS, check_token_ids, for_sequence, output_limit, sampling_params
from .schemas import MAX_PROMPTS, CompletionBody, GenerationBody, StreamOptions
from .sse import event

_CHARS_PER_TOKEN = 256  # more than any vocabulary's longest token: what is longer still cannot fit


async def completion_job(body: CompletionBody, model: ServedModel) -> Job:
    """Resolve a valid body. Errors: RequestError; EngineError if the engine is not ready."""
    params = sampling_params(body, model, body.logprobs)
    if body.echo and body.logprobs is not None:
        params = replace(params, prompt_logprobs=body.logprobs)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError(
            "'max_tokens' 0 makes sense only with echo; ask for at least 1", param="max_tokens"
        )
    check_fan_out(len(body.prompt), body.n)
    prompts = [await _prompt(prompt, body, model) for prompt in body.prompt]
    default = int(model.sampling_defaults.get("max_tokens", DEFAULT_COMPLETION_TOKENS))
    limits = [output_limit(body.max_tokens, default, len(prompt.token_ids), model) for prompt in prompts]
    return Job(
        model=model,
        prompts=prompts,
        params=[for_sequence(params, max(limit, 1), copy) for limit in limits for copy in range(body.n)],
        options=text_options(body, continues_prompt=True),
        cache_salt=body.cache_salt,
        prompt_only=body.max_tokens == 0,
    )


def check_fan_out(num_prompts: int, n: int) -> None:
    """Errors: RequestError where one request would be too many sequences."""
    if num_prompts * n > MAX_PROMPTS:
        raise RequestError(
            f"{num_prompts} prompts x n {n} exceed {MAX_PROMPTS} sequences; split the request",
            param="prompt" if num_prompts > MAX_PROMPTS else "n",
        )


def text_options(body: GenerationBody, continues_prompt: bool) -> TextOptions:
    """How the output becomes text."""
    return TextOptions(
        stop=tuple(dict.fromkeys(body.stop)),
        include_stop_str_in_output=body.include_stop_str_in_output,
        skip_special_tokens=body.skip_special_tokens,
        continues_prompt=continues_prompt,
    )


async def encode(text: str, add_special_tokens: bool, model: ServedModel, param: str) -> list[int]:
    """Token ids of a prompt's text. Errors: RequestError where there are none, or hopelessly many."""
    if len(text) > _CHARS_PER_TOKEN * model.max_model_len:
        raise ContextLengthError(
            f"the prompt has {len(text)} characters, which cannot fit in the model's context of "
            f"{model.max_model_len} tokens; shorten it",
            param=param,
        )
    token_ids = await model.tokenizer.encode_async(text, add_special_tokens)
    if not token_ids:
        raise RequestError("the prompt is empty: it has no tokens", param=param)
    check_token_ids(token_ids, model.info.vocab_size, param)
    return token_ids


async def _prompt(prompt: str | list[int], body: CompletionBody, model: ServedModel) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(await encode(prompt, body.add_special_tokens, model, "prompt"), prompt)
    check_token_ids(prompt, model.info.vocab_size, "prompt")
    return Prompt(prompt)


def usage_block(usage: Usage) -> dict[str, Any]:
    """OpenAI's ``usage``."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class CompletionWriter:
    """Pieces as completion objects."""

    def __init__(self, job: Job, body: CompletionBody) -> None:
        self.request_id = f"cmpl-{uuid4().hex}"
        self._job = job
        self._body = body
        self._options = body.stream_options or StreamOptions()
        self._name = token_names(job.model.tokenizer, body.return_tokens_as_token_ids)
        self._echo = lru_cache(maxsize=None)(self._echo_of)
        self._head = {
            "id": self.request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": job.model.name,
        }
        # A piece that is text alone, which most are, is put together from these without building a tree.
        head = json.dumps(self._head, separators=(",", ":"))[:-1]
        plain = (
            body.logprobs is None and not body.return_token_ids and not self._options.continuous_usage_stats
        )
        self._prefix = f'data: {head},"choices":[{{"index":' if plain else None
        usage = ',"usage":null' if self._options.include_usage else ""
        self._suffix = f',"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'

    def events(self, pieces: list[Piece], usage: Callable[[], Usage]) -> bytes:
        """One event per piece."""
        return b"".join([self._event(piece, usage) for piece in pieces])

    def _event(self, piece: Piece, usage: Callable[[], Usage]) -> bytes:
        if self._prefix is not None and piece.finish_reason is None and not (piece.first and self._body.echo):
            if not piece.text:
                return b""
            return f'{self._prefix}{piece.index},"text":{json.dumps(piece.text)}{self._suffix}'.encode()
        content = {**self._head, "choices": [self._choice(piece)]}
        if self._options.include_usage:
            content["usage"] = usage_block(usage()) if self._options.continuous_usage_stats else None
        return event(content)

    def last_event(self, usage: Usage) -> bytes:
        """The usage, where it was asked for."""
        if not self._options.include_usage:
            return b""
        return event({**self._head, "choices": [], "usage": usage_block(usage)})

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> dict[str, Any]:
        """The completion object."""
        choices: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            part = self._choice(piece)
            choice = choices.setdefault(piece.index, part)
            if choice is part:
                continue
            choice["text"] += part["text"]
            for key, values in (part["logprobs"] or {}).items():
                choice["logprobs"][key] += values
            if self._body.return_token_ids:
                choice["token_ids"] += part["token_ids"]
            choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part["stop_reason"]
        return {
            **self._head,
            "choices": [choices[index] for index in sorted(choices)],
            "usage": usage_block(usage),
        }

    def _choice(self, piece: Piece) -> dict[str, Any]:
        text = self._echo(piece.index) + piece.text if piece.first and self._body.echo else piece.text
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": text,
            "logprobs": None if self._body.logprobs is None else self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
            if piece.first:
                choice["prompt_token_ids"] = self._job.prompt_of(piece.index).token_ids
        return choice

    def _echo_of(self, index: int) -> str:
        prompt = self._job.prompt_of(index)
        if prompt.text is not None:
            return prompt.text
        return self._job.model.tokenizer.decode(prompt.token_ids, self._body.skip_special_tokens)

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        ids, entries, offsets = piece.token_ids, list(piece.logprobs or ()), piece.offsets
        if self._body.echo:
            shift = len(self._echo(piece.index))
            offsets = [offset + shift for offset in offsets]
        found = completion_logprobs(ids, entries, offsets, self._name)
        if piece.prompt_logprobs is None:
            return found
        prompt_ids = self._job.prompt_of(piece.index).token_ids
        detokenizer = Detokenizer(
            self._job.model.tokenizer, skip_special_tokens=self._body.skip_special_tokens
        )
        start = completion_logprobs(
            prompt_ids, piece.prompt_logprobs, detokenizer.push(prompt_ids).offsets, self._name
        )
        return {key: values + found[key] for key, values in start.items()}
