"""Text to token ids and back, with `tokenizers` alone: no transformers in this process.

What AutoTokenizer of transformers 5 does with a ``tokenizer.json``: the file decides about normalization,
splitting and which special tokens frame a text (``add_bos_token`` in tokenizer_config.json is not read);
special tokens that only the configuration names are added to the vocabulary.
"""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from .errors import CheckpointError, RequestError
from .model_files import MAX_TOKENIZER_BYTES, Json, ModelFiles, read_json
from .slow_tokenizer import load_slow_tokenizer
from .token_pieces import TokenPieces

# For the process's environment, before the first text is encoded: no thread pool of `tokenizers`' own.
POOL_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
_THREAD_ABOVE = 4096  # characters; shorter text encodes in less time than a thread takes to answer


class Tokenizer:
    """A model's tokenizer. Immutable once loaded; safe to use from several threads.

    special_tokens: "bos_token", "eos_token", ... to their text, as chat templates read them.
    special_ids: the ids that ``skip_special_tokens`` leaves out.
    vocab_size: one more than the highest id (a model's embedding may have more rows).
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Json | None = None) -> None:
        """``config``: tokenizer_config.json. Raises UnsupportedModelError for a decoder we do not know."""
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = _add_special_tokens(backend, config or {})
        self.special_ids = frozenset(
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        )
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._backend = backend
        self._pieces = TokenPieces(backend)

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read ``tokenizer.json`` and ``tokenizer_config.json`` of a model's folder.

        Raises ConfigError where there is none, or it cannot be used.
        """
        config = dict(ModelFiles(folder).tokenizer_config)
        legacy = folder / "special_tokens_map.json"
        if "added_tokens_decoder" not in config and legacy.exists():
            config |= read_json(legacy)
        path = folder / "tokenizer.json"
        if not path.exists():
            return cls(*load_slow_tokenizer(folder, config))
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # `tokenizers` raises the base class itself
            raise CheckpointError(f"{path}: not a tokenizer ({str(error)[:200]})") from error
        return cls(backend, config)

    @property
    def bos_token(self) -> str | None:
        """Text of the beginning-of-sequence token."""
        return self.special_tokens.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the end-of-sequence token."""
        return self.special_tokens.get("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``; special-token strings in it become those tokens.

        Raises RequestError on text that is not Unicode (a lone surrogate).
        """
        # encode_batch lets other threads run, encode does not; _fast leaves out offsets.
        try:
            encoded = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise RequestError("the text holds a lone surrogate, so it is not Unicode; remove it") from error
        ids: list[int] = encoded[0].ids
        return ids

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The same without stalling the event loop: long text is encoded in a thread."""
        if len(text) <= _THREAD_ABOVE:
            return self.encode(text, add_special_tokens)
        return await asyncio.to_thread(self.encode, text, add_special_tokens)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; ids that do not exist give nothing."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return self._pieces.join(token_id for token_id in token_ids if token_id not in skipped)

    def token_bytes(self, token_id: int, first: bool = False) -> bytes:
        """UTF-8 bytes that the token adds to a text, maybe half a character; b"" if there is no such id.

        ``first``: at the very beginning of a text, where some decoders drop a space.
        """
        return self._pieces.first(token_id) if first else self._pieces[token_id]

    def token_text(self, token_id: int) -> str:
        """``token_bytes`` as text, for log-probabilities; U+FFFD where it is not whole characters."""
        return self._pieces[token_id].decode("utf-8", "replace")

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of the token; None if there is no such id."""
        return self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_id(self, token: str) -> int | None:
        """Id of the token that the vocabulary spells so."""
        return self._backend.token_to_id(token)


def _add_special_tokens(backend: tokenizers.Tokenizer, config: Json) -> dict[str, str]:
    """Make known what only the configuration names; returns the named special tokens' texts."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder")
    for _, entry in sorted((declared or {}).items(), key=lambda item: int(item[0])):
        token = _added_token(entry, special=bool(entry.get("special", False)))
        if token.content not in known:
            backend.add_tokens([token])
            known[token.content] = token
    named: dict[str, str] = {}
    for name in _NAMED:
        if config.get(name) is not None:
            named[name] = _added_token(config[name]).content
    for entry in [*(config[name] for name in named), *_extra_tokens(config)]:
        token = _added_token(entry)
        present = known.get(token.content)
        if present is None or not present.special:
            if present is not None:
                present.special = True
                token = present
            backend.add_special_tokens([token])
            known[token.content] = token
    return named


def _extra_tokens(config: Json) -> Iterator[Any]:
    for name in _EXTRA:
        extra = config.get(name) or []
        yield from extra.values() if isinstance(extra, dict) else extra


def _added_token(entry: Any, special: bool = True) -> tokenizers.AddedToken:
    if isinstance(entry, str):
        return tokenizers.AddedToken(entry, special=special, normalized=False)
    if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
        raise CheckpointError(f"tokenizer_config.json: {entry!r} is not a token (a string, or an object)")
    flags = {
        key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry
    }
    return tokenizers.AddedToken(entry["content"], special=special, **flags)
