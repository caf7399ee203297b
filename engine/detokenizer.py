"""Token ids to text, piece by piece: never half a character, never part of a stop string."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from .tokenizer import Tokenizer

_LONGEST_CHARACTER = 4  # bytes of UTF-8


@dataclass(frozen=True, slots=True)
class Delta:
    """What one push made of its tokens.

    text: safe to send now. num_tokens: how many of the pushed tokens count (those after a stop do not).
    offsets: for each counted token, where its text begins, in characters of the whole output text.
    stopped: the stop string that ended the text, else None.
    """

    text: str
    num_tokens: int
    offsets: list[int]
    stopped: str | None = None


class Detokenizer:
    """The output text of one sequence. The joined texts of all deltas are ``Tokenizer.decode`` of all tokens,
    cut at the first stop string: the one that ends first, of several that end there the longest."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        include_stop_str_in_output: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """``prompt_token_ids``: give them where the text continues the prompt (completions), so that a
        sentencepiece model's leading space is kept; leave them out where it starts anew (chat)."""
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_Matcher(string) for string in stop if string]
        self._include_stop = include_stop_str_in_output
        self._length = 0  # characters decoded
        self._held = ""  # decoded, not given out
        self._stopped: str | None = None
        self._first = True  # no token has added anything yet
        self._continue(prompt_token_ids)

    def _continue(self, prompt_token_ids: Sequence[int]) -> None:
        """Begin as after the prompt: inside a text, maybe inside a character."""
        tail: list[bytes] = []
        for token_id in reversed(prompt_token_ids):
            piece = b"" if token_id in self._skipped else self._tokenizer.token_bytes(token_id)
            if piece:
                tail.append(piece)
                if len(tail) == _LONGEST_CHARACTER:
                    break
        if tail:
            self._first = False
            self._utf8.decode(b"".join(reversed(tail)))

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Add tokens. After a stop nothing counts any more."""
        texts: list[str] = []
        offsets: list[int] = []
        for token_id in token_ids:
            if self._stopped is not None:
                break
            offsets.append(self._length)
            if token_id in self._skipped:
                continue
            piece = self._tokenizer.token_bytes(token_id, first=self._first)
            self._first = self._first and not self._tokenizer.token_bytes(token_id)
            texts.append(self._accept(self._utf8.decode(piece)))
        return Delta("".join(texts), len(offsets), offsets, self._stopped)

    def finish(self) -> Delta:
        """Flush what was held back; U+FFFD for a character that never became whole."""
        text = ""
        if self._stopped is None:
            text = self._accept(self._utf8.decode(b"", final=True)) + self._held
            self._held = ""
        return Delta(text, 0, [], self._stopped)

    def _accept(self, text: str) -> str:
        """Take decoded text, return what may go out."""
        self._length += len(text)
        if not self._matchers:
            return text
        unmatched = len(self._held)
        self._held += text
        for position in range(unmatched, len(self._held)):
            char = self._held[position]
            ended = [matcher for matcher in self._matchers if matcher.advance(char)]
            if ended:
                return self._stop(max(ended, key=lambda matcher: len(matcher.string)).string, position + 1)
        keep = max(matcher.matched for matcher in self._matchers)
        safe = len(self._held) - keep
        out, self._held = self._held[:safe], self._held[safe:]
        return out

    def _stop(self, string: str, end: int) -> str:
        self._stopped = string
        out = self._held[: end if self._include_stop else end - len(string)]
        self._held = ""
        return out


class _Matcher:
    """How much of one stop string the text's end is (Knuth, Morris, Pratt: O(1) amortised per character)."""

    def __init__(self, string: str) -> None:
        self.string = string
        self.matched = 0
        self._borders = [0] * len(string)  # longest proper border of string[: i + 1]
        border = 0
        for index in range(1, len(string)):
            while border and string[index] != string[border]:
                border = self._borders[border - 1]
            border += string[index] == string[border]
            self._borders[index] = border

    def advance(self, char: str) -> bool:
        """Add a character; whether the text now ends with the string."""
        while self.matched and self.string[self.matched] != char:
            self.matched = self._borders[self.matched - 1]
        self.matched += self.string[self.matched] == char
        return self.matched == len(self.string)
