"""POST /v1/chat/completions: from messages to a job, and from pieces to its answers."""

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from ..engine.chat_template import from_openai
from ..engine.errors import RequestError
from .completions import check_fan_out, encode, text_options, usage_block
from .generate import Job, Piece, Prompt, Usage
from .models import ServedModel
from .openai_logprobs import chat_logprobs, token_names
from .sampling import for_sequence, output_limit, sampling_params
from .schemas import ChatBody, StreamOptions, TemplateBody
from .sse import event


async def chat_job(body: ChatBody, model: ServedModel) -> Job:
    """Resolve a valid body. Errors: RequestError; EngineError if the engine is not ready."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("'top_logprobs' needs logprobs: true", param="top_logprobs")
    params = sampling_params(body, model, body.top_logprobs if body.logprobs else None)
    check_fan_out(1, body.n)
    requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if requested == 0:
        raise RequestError("'max_tokens' must be at least 1", param="max_tokens")
    extra = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    text = await render(body, model, extra)
    prompt = Prompt(await encode(text, body.add_special_tokens, model, "messages"), text)
    default = model.sampling_defaults.get("max_tokens")
    limit = output_limit(requested, None if default is None else int(default), len(prompt.token_ids), model)
    return Job(
        model=model,
        prompts=[prompt],
        params=[for_sequence(params, limit, copy) for copy in range(body.n)],
        options=text_options(body, continues_prompt=body.continue_final_message),
        cache_salt=body.cache_salt,
    )


async def render(body: TemplateBody, model: ServedModel, extra: dict[str, Any] | None = None) -> str:
    """The prompt's text. Errors: RequestError."""
    template = model.chat_template
    if template is None:
        raise RequestError(
            f"the model '{model.name}' has no chat template; use /v1/completions, or start the server with "
            "--chat-template",
            param="messages",
        )
    add_generation_prompt = body.add_generation_prompt
    if body.continue_final_message:
        if "add_generation_prompt" in body.model_fields_set and add_generation_prompt:
            raise RequestError(
                "'continue_final_message' and 'add_generation_prompt' exclude each other; set only one",
                param="continue_final_message",
            )
        add_generation_prompt = False
    messages = from_openai([message.model_dump(exclude_unset=True) for message in body.messages])
    try:
        return await asyncio.to_thread(
            template.render,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=body.continue_final_message,
            template_kwargs={**(extra or {}), **body.chat_template_kwargs},
        )
    except RequestError as error:
        raise RequestError(error.message, param=error.param or "messages") from error


class ChatWriter:
    """Pieces as chat completion objects and chunks."""

    def __init__(self, job: Job, body: ChatBody) -> None:
        self.request_id = f"chatcmpl-{uuid4().hex}"
        self._job = job
        self._body = body
        self._options = body.stream_options or StreamOptions()
        self._name = token_names(job.model.tokenizer, body.return_tokens_as_token_ids)
        self._created = int(time.time())
        # A piece that is text alone, which most are, is put together from these without building a tree.
        head = json.dumps(self._head("chat.completion.chunk"), separators=(",", ":"))[:-1]
        plain = not (body.logprobs or body.return_token_ids or self._options.continuous_usage_stats)
        self._prefix = f'data: {head},"choices":[{{"index":' if plain else None
        usage = ',"usage":null' if self._options.include_usage else ""
        self._suffix = f'}},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.request_id,
            "object": kind,
            "created": self._created,
            "model": self._job.model.name,
        }

    def events(self, pieces: list[Piece], usage: Callable[[], Usage]) -> bytes:
        """One event per piece; a choice's first one has its role."""
        return b"".join([self._event(piece, usage) for piece in pieces])

    def _event(self, piece: Piece, usage: Callable[[], Usage]) -> bytes:
        if self._prefix is not None and piece.finish_reason is None and not piece.first:
            if not piece.text:
                return b""
            text = json.dumps(piece.text)
            return f'{self._prefix}{piece.index},"delta":{{"content":{text}{self._suffix}'.encode()
        delta: dict[str, Any] = {"role": "assistant", "content": piece.text} if piece.first else {}
        if piece.text:
            delta["content"] = piece.text
        choice = {"index": piece.index, "delta": delta, **self._rest(piece)}
        content = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._options.include_usage:
            content["usage"] = usage_block(usage()) if self._options.continuous_usage_stats else None
        if self._body.return_token_ids and piece.first:
            content["prompt_token_ids"] = self._job.prompt_of(piece.index).token_ids
        return event(content)

    def last_event(self, usage: Usage) -> bytes:
        """The usage, where it was asked for."""
        if not self._options.include_usage:
            return b""
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage_block(usage)})

    def whole(self, pieces: Iterable[Piece], usage: Usage) -> dict[str, Any]:
        """The chat completion object."""
        choices: dict[int, dict[str, Any]] = {}
        for piece in pieces:
            part = self._rest(piece)
            choice = choices.get(piece.index)
            if choice is None:
                message = {"role": "assistant", "content": piece.text, "refusal": None}
                choices[piece.index] = {"index": piece.index, "message": message, **part}
                continue
            choice["message"]["content"] += piece.text
            if self._body.logprobs:
                choice["logprobs"]["content"] += part["logprobs"]["content"]
            if self._body.return_token_ids:
                choice["token_ids"] += part["token_ids"]
            choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part["stop_reason"]
        content = self._head("chat.completion")
        content["choices"] = [choices[index] for index in sorted(choices)]
        content["usage"] = usage_block(usage)
        if self._body.return_token_ids:
            content["prompt_token_ids"] = self._job.prompts[0].token_ids
        return content

    def _rest(self, piece: Piece) -> dict[str, Any]:
        logprobs: dict[str, Any] | None = None
        if self._body.logprobs:
            tokenizer = self._job.model.tokenizer
            found = chat_logprobs(piece.logprobs or (), self._body.top_logprobs, self._name, tokenizer)
            logprobs = {"content": found, "refusal": None}
        rest: dict[str, Any] = {
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            rest["token_ids"] = list(piece.token_ids)
        return rest
