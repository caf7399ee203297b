"""Token ids to text, piece by piece: never half a character, never part of a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

from .tokenizer import Tokenizer


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
    """The output text of one sequence. The joined texts of all deltas are ``decode`` of all tokens, cut at the
    first stop string: the one that ends first, of those the longest."""

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
        raise NotImplementedError

    def push(self, token_ids: Sequence[int]) -> Delta:
        """Add tokens. After a stop nothing counts any more."""
        raise NotImplementedError

    def finish(self) -> Delta:
        """Flush what was held back; U+FFFD for a character that never became whole."""
        raise NotImplementedError
