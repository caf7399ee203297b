"""Parameters of OpenAI's and vLLM's APIs that this server lacks: refused by name where they would matter."""

from collections.abc import Mapping
from typing import Any

from ..engine.errors import RequestError

MAX_FIELDS = 256  # of one object; more are no request but an attack on the validation

# Nothing in the answer depends on them, whatever they hold.
INERT = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",  # a hint for speed
        "parallel_tool_calls",  # nothing without tools
        "priority",  # order of service only; ours is first come, first served
        "request_id",
        "include_reasoning",
        "spaces_between_special_tokens",  # of slow tokenizers, which are not used here
    }
)

# name: (values that ask for nothing, what to do instead)
Absent = Mapping[str, tuple[tuple[Any, ...], str]]

_COMMON: Absent = {
    "best_of": ((1,), "use n"),
    "use_beam_search": ((False,), "only sampling is supported"),
    "length_penalty": ((1, 1.0), "it belongs to beam search"),
    "early_stopping": ((False,), "it belongs to beam search"),
    "allowed_token_ids": ((), "use logit_bias"),
    "bad_words": ((), "use logit_bias"),
    "prompt_logprobs": ((), "use echo with logprobs on /v1/completions"),
    "prompt_embeds": ((), "send text or token ids"),
    "truncate_prompt_tokens": ((), "shorten the prompt before sending it"),
    "response_format": (({"type": "text"},), "only text is supported"),
    "structured_outputs": ((), "only free text is supported"),
    "guided_json": ((), "only free text is supported"),
    "guided_regex": ((), "only free text is supported"),
    "guided_choice": ((), "only free text is supported"),
    "guided_grammar": ((), "only free text is supported"),
    "logits_processors": ((), "use logit_bias"),
    "kv_transfer_params": ((), "leave it out"),
    "vllm_xargs": ((), "leave it out"),
    "thinking_token_budget": ((), "use max_tokens"),
    "repetition_detection": ((), "use repetition_penalty"),
    "modalities": ((["text"],), "only text is supported"),
}
ABSENT_COMPLETION: Absent = {**_COMMON, "suffix": ((), "this server continues text, it does not fill gaps")}
ABSENT_CHAT: Absent = {
    **_COMMON,
    "echo": ((False,), "use /v1/completions"),
    "tools": ((), "tools are not supported yet; leave them out, or send tool_choice 'none'"),
    "functions": ((), "tools are not supported yet"),
    "function_call": (("none", "auto"), "tools are not supported yet"),
    "tool_choice": (("none", "auto"), "tools are not supported yet"),
    "audio": ((), "only text is supported"),
    "moderation": ((), "this server does not moderate"),
    "verbosity": (("medium",), "say it in the messages"),
    "web_search_options": ((), "this server does not search"),
    "chat_template": ((), "the server's operator chooses it with --chat-template"),
    "documents": ((), "put them into the messages"),
    "media_io_kwargs": ((), "only text is supported"),
    "mm_processor_kwargs": ((), "only text is supported"),
}
ABSENT_MESSAGE: Absent = {
    "refusal": ((), "leave it out"),
    "annotations": ((), "leave them out"),
    "audio": ((), "only text is supported"),
    "function_call": ((), "tools are not supported yet"),
    "tool_calls": ((), "tools are not supported yet"),
}


def drop_passing(fields: Mapping[str, Any], absent: Absent, where: str = "") -> dict[str, Any]:
    """``fields`` without nulls, inert ones and absent ones that ask for nothing.

    Errors: RequestError that names an absent one whose value would change the result.
    """
    if len(fields) > MAX_FIELDS:
        raise RequestError(
            f"'{where}*' has more than {MAX_FIELDS} fields; see /openapi.json", param=where or None
        )
    kept: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None or (not where and name in INERT):
            continue
        if name not in absent:
            kept[name] = value
            continue
        passing, remedy = absent[name]
        if not asks_for_something(value, passing):
            continue
        raise RequestError(f"'{where}{name}' is not supported with this value: {remedy}", param=where + name)
    return kept


def asks_for_something(value: object, passing: tuple[Any, ...]) -> bool:
    """Whether an absent parameter's value is neither empty nor one of its defaults."""
    if isinstance(value, (str, list, dict)) and not value:
        return False
    return not any(type(value) is type(default) and value == default for default in passing)
