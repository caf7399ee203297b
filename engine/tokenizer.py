"""Text to token ids and back, with `tokenizers` alone: no transformers in this process."""

from collections.abc import Sequence
from pathlib import Path


class Tokenizer:
    """A model's tokenizer. Immutable once loaded; safe to use from several threads."""

    bos_token: str | None
    eos_token: str | None
    special_tokens: dict[str, str]  # bos_token, eos_token, ... -> text, as chat templates read them
    special_ids: frozenset[int]  # ids that skip_special_tokens leaves out

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read ``tokenizer.json`` (and ``tokenizer_config.json``) of a model's folder.

        Raises ConfigError where there is none or it cannot be read.
        """
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """One more than the highest id that this tokenizer knows."""
        raise NotImplementedError

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of ``text``. Special-token strings in it become those tokens. Raises RequestError on a lone surrogate."""
        raise NotImplementedError

    async def encode_async(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The same; long text is encoded in a thread without the GIL, so the event loop goes on."""
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; ids that do not exist give nothing."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 bytes that the token adds inside a text; maybe half a character. OpenAI's ``bytes``."""
        raise NotImplementedError

    def token_text(self, token_id: int) -> str:
        """``token_bytes`` as text, for logprobs; U+FFFD where it is not whole characters."""
        raise NotImplementedError

    def token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of the token; None if there is no such id."""
        raise NotImplementedError
