"""Log-probabilities as OpenAI's two APIs show them."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

from ..engine.records import TokenLogprobs
from ..engine.tokenizer import Tokenizer

_FLOOR = -9999.0  # stands for minus infinity, which JSON lacks

TokenName = Callable[[int], str]


def token_names(tokenizer: Tokenizer, as_ids: bool = False) -> TokenName:
    """How a token is called: its text, or "bytes:\\xe2\\x80" (OpenAI's form) where that is no whole text.

    Special tokens have their own spelling. ``as_ids``: "token_id:7", which no two tokens share.
    """
    if as_ids:
        return lambda token_id: f"token_id:{token_id}"

    @lru_cache(maxsize=4096)
    def name(token_id: int) -> str:
        data = tokenizer.token_bytes(token_id)
        if not data or token_id in tokenizer.special_ids:
            return tokenizer.token(token_id) or ""
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    return name


def completion_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    offsets: Iterable[int],
    name: TokenName,
) -> dict[str, Any]:
    """The ``logprobs`` of a completion's choice. An entry is None for the prompt's first token.

    Where two tokens share a name, the more likely one keeps its place in ``top_logprobs``, so that the
    maximum there is the true one; the chosen token's own name is always in it.
    """
    return {
        "tokens": [name(token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else max(entry.logprob, _FLOOR) for entry in entries],
        "top_logprobs": [None if entry is None else _top(entry, name) for entry in entries],
        "text_offset": list(offsets),
    }


def _top(entry: TokenLogprobs, name: TokenName) -> dict[str, float]:
    top: dict[str, float] = {}
    for token_id, logprob in zip(entry.top_ids, entry.top_logprobs, strict=True):
        top.setdefault(name(token_id), max(logprob, _FLOOR))
    top.setdefault(name(entry.token_id), max(entry.logprob, _FLOOR))
    return top


def chat_logprobs(
    entries: Sequence[TokenLogprobs], num_top: int, name: TokenName, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """The ``logprobs.content`` of a chat choice."""

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": name(token_id), "logprob": max(logprob, _FLOOR), "bytes": list(data)}

    return [
        {
            **described(entry.token_id, entry.logprob),
            "top_logprobs": [
                described(token_id, logprob)
                for token_id, logprob in zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)
            ],
        }
        for entry in entries
    ]
