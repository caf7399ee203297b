"""Chat messages to a prompt: the model's Jinja template in a sandbox, as transformers renders it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ChatTemplate:
    """A model's chat templates (one, or several by name). Safe to use from several threads."""

    @classmethod
    def from_folder(
        cls, folder: Path, special_tokens: Mapping[str, str], chat_template: str | None = None
    ) -> "ChatTemplate | None":
        """The templates of a model's folder, or the one that ``--chat-template`` names (a path, a name, or inline).

        ``special_tokens``: ``Tokenizer.special_tokens``. None: the model has no template.
        Raises ConfigError if it cannot be read or is not valid Jinja.
        """
        raise NotImplementedError

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text; encode it with ``add_special_tokens=False``. Run it in a thread.

        Raises RequestError with the template's own message where it refuses, fails, or exceeds its limits.
        """
        raise NotImplementedError


def from_openai(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's wire form to the one that templates read: text parts joined, tool-call arguments parsed."""
    raise NotImplementedError
