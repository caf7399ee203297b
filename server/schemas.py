"""The request bodies of the API: types and ranges. Strict: no value is converted or guessed."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from ..engine.errors import RequestError
from .unsupported import ABSENT_CHAT, ABSENT_COMPLETION, ABSENT_MESSAGE, drop_passing

# Limits that keep the validation of a hostile body short; what they cut off could not be served anyway.
MAX_PROMPTS = 1024  # prompts x n of one request
MAX_PROMPT_IDS = 1 << 20
MAX_MESSAGES = 1 << 14
MAX_BIASES = 1 << 18
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 1024
_INT32 = 2**31 - 1

_ID_LIST = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT_LIST = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS}
_ID_LISTS = {"type": "array", "items": _ID_LIST, "minItems": 1, "maxItems": MAX_PROMPTS}
_PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, _TEXT_LIST, _ID_LIST, _ID_LISTS]}
_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_STOP_SCHEMA = {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": MAX_STOPS}]}
_BIAS_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": "^[0-9]{1,10}$"},
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
}

Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


def _prompts(value: object) -> object:
    """Every form of ``prompt`` as a list of prompts, each a string or a list of ids. No ids are copied."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
    if not value:
        raise ValueError("must not be empty")
    if type(value[0]) is int:
        value = [value]
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"must be at most {MAX_PROMPTS} prompts")
    for index, prompt in enumerate(value):
        if type(prompt) is not type(value[0]) or not isinstance(prompt, (str, list)):
            raise ValueError("must be all strings, all token ids, or all lists of token ids")
        if isinstance(prompt, list):
            _check_ids(prompt, f"prompt {index}")
    return value


def _check_ids(ids: list[Any], name: str) -> None:
    if not ids:
        raise ValueError(f"{name} has no tokens")
    if len(ids) > MAX_PROMPT_IDS:
        raise ValueError(f"{name} has {len(ids)} tokens, which no context holds")
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id <= _INT32:
            raise ValueError(f"{name} must hold token ids: integers from 0 to the vocabulary's last")


def _ids(value: object) -> object:
    if not isinstance(value, list) or len(value) > MAX_STOP_IDS:
        raise ValueError(f"must be a list of at most {MAX_STOP_IDS} token ids")
    if value:
        _check_ids(value, "the list")
    return value


def _token_list(value: object) -> object:
    if not isinstance(value, list):
        raise ValueError("must be a list of token ids")
    if value:
        _check_ids(value, "the list")
    return value


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ValueError(f"must be a string or a list of at most {MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= MAX_STOP_CHARS:
            raise ValueError(f"a stop must be a string of 1 to {MAX_STOP_CHARS} characters")
    return stops


def _biases(value: object) -> object:
    if not isinstance(value, dict):
        raise ValueError("must be an object from token id to bias")
    if len(value) > MAX_BIASES:
        raise ValueError(f"must have at most {MAX_BIASES} entries")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10):
            raise ValueError(f"{key!r:.40} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


class Strict(BaseModel):
    """A JSON object. Unknown fields are refused by name; null is as good as absent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: object) -> object:
        if isinstance(value, dict):
            return {name: item for name, item in value.items() if item is not None}
        return value


class Body(Strict):
    """A request's body."""

    model: str | None = Field(None, max_length=1024)


class StreamOptions(Strict):
    """``stream_options``."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # OpenAI's padding against side channels; never sent here


class GenerationBody(Body):
    """What completions and chat have in common. None: the default, which generation_config may give."""

    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=_INT32)  # -1 and 0: off
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases), WithJsonSchema(_BIAS_SCHEMA)] = Field(
        default_factory=dict
    )
    min_tokens: int = Field(0, ge=0, le=_INT32)
    max_tokens: int | None = Field(None, ge=0, le=_INT32)
    n: int = Field(1, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[str], BeforeValidator(_stops), WithJsonSchema(_STOP_SCHEMA)] = Field(
        default_factory=list
    )
    stop_token_ids: Annotated[list[int], BeforeValidator(_ids)] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    cache_salt: str = Field("", max_length=256)
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=20)
    add_special_tokens: bool = True


class TextPart(Strict):
    """A part of a message's content. Other kinds than text are refused by their type."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A chat message. Fields of tools may be present but empty, as clients echo earlier answers."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=256)
    reasoning_content: str | None = None


class TemplateBody(Body):
    """What turns messages into a prompt."""

    messages: list[Message] = Field(min_length=1)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class ChatBody(GenerationBody, TemplateBody):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=1, le=_INT32)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    add_special_tokens: bool = False
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None


class TokenizePromptBody(Body):
    """POST /tokenize with a text."""

    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatBody(TemplateBody):
    """POST /tokenize with messages."""

    add_special_tokens: bool = False
    return_token_strs: bool = False


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Annotated[list[int], BeforeValidator(_token_list)]


def completion_body(fields: dict[str, Any]) -> CompletionBody:
    """Validate. Errors: RequestError, pydantic.ValidationError."""
    return CompletionBody.model_validate(drop_passing(_without_best_of(fields), ABSENT_COMPLETION))


def chat_body(fields: dict[str, Any]) -> ChatBody:
    """Validate. Errors: RequestError, pydantic.ValidationError."""
    fields = _without_best_of(fields)
    if fields.get("tool_choice") == "none":
        fields = {name: value for name, value in fields.items() if name != "tools"}
    return ChatBody.model_validate(_with_plain_messages(drop_passing(fields, ABSENT_CHAT)))


def tokenize_body(fields: dict[str, Any]) -> TokenizePromptBody | TokenizeChatBody:
    """Validate; ``messages`` make it a chat. Errors: RequestError, pydantic.ValidationError."""
    kept = drop_passing(fields, {})
    if "messages" in kept:
        return TokenizeChatBody.model_validate(_with_plain_messages(kept))
    return TokenizePromptBody.model_validate(kept)


def detokenize_body(fields: dict[str, Any]) -> DetokenizeBody:
    """Validate. Errors: RequestError, pydantic.ValidationError."""
    return DetokenizeBody.model_validate(drop_passing(fields, {}))


def _without_best_of(fields: dict[str, Any]) -> dict[str, Any]:
    """The best of n out of n are all n."""
    best_of = fields.get("best_of")
    if type(best_of) is int and best_of == fields.get("n", 1):
        return {name: value for name, value in fields.items() if name != "best_of"}
    return fields


def _with_plain_messages(fields: dict[str, Any]) -> dict[str, Any]:
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return fields
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"'messages' has more than {MAX_MESSAGES} entries; send fewer", param="messages")
    plain = [
        drop_passing(message, ABSENT_MESSAGE, f"messages.{index}.") if isinstance(message, dict) else message
        for index, message in enumerate(messages)
    ]
    return {**fields, "messages": plain}
