"""What each token adds to a text, in bytes: the decoder of a ``tokenizer.json`` taken apart.

`tokenizers` decodes whole sequences. Its decoders for language models work token by token, except at the
beginning of the text, so a sequence's text is the concatenation of its tokens' bytes. The one difference:
where byte-fallback tokens (``<0xE4>``) do not form UTF-8, `tokenizers` replaces the whole run of them,
also the characters in it that are whole (and may have been sent already); we replace only the bad bytes.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

from .errors import UnsupportedModelError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenPieces(dict[int, bytes]):
    """Token id to the bytes it adds inside a text, computed at the first look; b"" if there is no such id."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Raises UnsupportedModelError for a decoder that does not work token by token."""
        super().__init__()
        steps = _steps(backend)
        kinds = {step["type"] for step in steps}
        self._id_to_token = backend.id_to_token
        self._byte_level = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._joiner = "" if steps else " "  # without a decoder, tokens are words
        self._replace = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
        self._strip = next((s["content"] for s in steps if s["type"] == "Strip"), self._joiner).encode()
        self._drop = ""  # Metaspace drops all its markers in the first token
        for step in steps:
            if step["type"] == "Metaspace":
                self._replace.append((step["replacement"], " "))
                self._drop = "" if step["prepend_scheme"] == "never" else step["replacement"]

    def __missing__(self, token_id: int) -> bytes:
        token = self._token(token_id)
        piece = self[token_id] = b"" if token is None else self._piece(token)
        return piece

    def first(self, token_id: int) -> bytes:
        """The bytes of the token where it is the first in its text that adds any."""
        piece = self[token_id]
        if self._drop:
            return (self._token(token_id) or "").replace(self._drop, "").encode()
        return piece.removeprefix(self._strip)

    def join(self, token_ids: Iterable[int]) -> str:
        """The text of a sequence."""
        pieces: list[bytes] = []
        first = True
        for token_id in token_ids:
            piece = self[token_id]
            if piece:
                pieces.append(self.first(token_id) if first else piece)
                first = False
        return b"".join(pieces).decode("utf-8", "replace")

    def _token(self, token_id: int) -> str | None:
        return self._id_to_token(token_id) if 0 <= token_id < 1 << 32 else None

    def _piece(self, token: str) -> bytes:
        if self._byte_level is not None:
            try:
                return bytes([self._byte_level[char] for char in token])
            except KeyError:  # an added token: spelt as it is
                return token.encode()
        for old, new in self._replace:
            token = token.replace(old, new)
        if self._byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return (self._joiner + token).encode()


def _steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps, checked to be ones that this module knows how to take apart."""
    if backend.decoder is None:
        return []
    described = json.loads(backend.decoder.__getstate__())
    steps: list[dict[str, Any]] = described.get("decoders", [described])
    kinds = [step["type"] for step in steps]
    if kinds not in (["ByteLevel"], ["ByteLevel", "Fuse"], ["Metaspace"]):
        fused = False
        for step in steps:
            kind = step["type"]
            known = (
                (kind == "Replace" and "String" in step["pattern"] and not fused)
                or (kind == "ByteFallback" and not fused)
                or (kind == "Strip" and fused and step["start"] == 1 and step["stop"] == 0)
                or kind == "Fuse"
            )
            if not known:
                raise UnsupportedModelError(
                    f"tokenizer.json: the decoder {'+'.join(kinds)} is not supported (step {kind}); "
                    "supported are ByteLevel, Metaspace, and Replace, ByteFallback, Fuse, Strip in this order"
                )
            fused = fused or kind == "Fuse"
    return steps


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}
