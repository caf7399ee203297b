"""Chat messages to a prompt: the model's Jinja template in a sandbox, as transformers renders it.

Templates come from the model's folder or from ``--chat-template``, never from a request. They are still not
trusted: no access to Python's internals, no change of their input, limits on CPU time and on the size of
what they make.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from .chat_sandbox import Limits, Sandbox
from .errors import ConfigError, RequestError
from .model_files import ModelFiles

MAX_TEMPLATE_BYTES = 1 << 20

_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_MARK = "CONTINUE-THIS-MESSAGE-HERE "


class ChatTemplate:
    """A model's chat templates (one, or several by name). Safe to use from several threads."""

    def __init__(
        self, sources: Mapping[str, str], special_tokens: Mapping[str, str], limits: Limits | None = None
    ) -> None:
        """``sources``: name to Jinja text; "default" is used unless "tool_use" exists and tools are given.

        Raises ConfigError if one is not valid Jinja.
        """
        self._sandbox = Sandbox(limits or Limits())
        self._special_tokens = dict(special_tokens)
        self._sources = dict(sources)
        self._templates = {name: self._compile(name, source) for name, source in sources.items()}

    @classmethod
    def from_folder(
        cls, folder: Path, special_tokens: Mapping[str, str], chat_template: str | None = None
    ) -> "ChatTemplate | None":
        """The templates of a model's folder, or the one that ``--chat-template`` gives (name, path or Jinja).

        ``special_tokens``: ``Tokenizer.special_tokens``. None: the model has no template.
        Raises ConfigError if it cannot be read or is not valid Jinja.
        """
        sources = find_templates(folder)
        if chat_template is not None:
            sources = {"default": _chosen(chat_template, sources)}
        return cls(sources, special_tokens) if sources else None

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

        ``template_kwargs`` become the template's variables. ``continue_final_message``: end inside the last
        message. Raises RequestError with the template's own message where it refuses, fails, or exceeds its
        limits.
        """
        if not messages:
            raise RequestError("messages is empty; give at least one", param="messages")
        extra = dict(template_kwargs or {})
        if taken := _OWN_VARIABLES & extra.keys():
            raise RequestError(
                f"chat_template_kwargs: {min(taken)!r} is set by the request itself; leave it out",
                param="chat_template_kwargs",
            )
        name = self._name(tools)
        chat = [_prepared(message) for message in messages]
        final = ""
        if continue_final_message:
            final = _mark_final(chat, add_generation_prompt)
        text = self._sandbox.render(
            self._templates[name],
            {
                **self._special_tokens,
                **extra,
                "messages": chat,
                "tools": None if tools is None else list(tools),
                "documents": None if documents is None else list(documents),
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut_at_mark(text, final) if continue_final_message else text

    def _name(self, tools: Sequence[Mapping[str, Any]] | None) -> str:
        if tools is not None and "tool_use" in self._templates:
            return "tool_use"
        if "default" not in self._templates:
            raise RequestError(
                "the model has several chat templates and no default one; start the server with "
                f"--chat-template and one of {', '.join(sorted(self._templates))}"
            )
        return "default"

    def _compile(self, name: str, source: str) -> jinja2.Template:
        try:
            return self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"chat template {name!r}, line {error.lineno}: {error.message}; "
                "correct it or use --chat-template FILE"
            ) from error


def find_templates(folder: Path) -> dict[str, str]:
    """Name to source: chat_template.jinja, additional_chat_templates/*.jinja, or tokenizer_config.json's."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (single := folder / "chat_template.jinja").exists():
        files["default"] = single
    if files:
        return {name: _read(path) for name, path in files.items()}
    declared = ModelFiles(folder).tokenizer_config.get("chat_template")
    if declared is None:
        return {}
    if isinstance(declared, str):
        return {"default": declared}
    entries = declared if isinstance(declared, list) else [declared]
    sources = {entry.get("name"): entry.get("template") for entry in entries if isinstance(entry, dict)}
    if len(sources) != len(entries) or not all(
        isinstance(text, str) for pair in sources.items() for text in pair
    ):
        raise ConfigError(
            f"{folder / 'tokenizer_config.json'}: chat_template is neither a string nor a list of objects "
            "with name and template; use --chat-template FILE"
        )
    return {str(name): str(source) for name, source in sources.items()}


def from_openai(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's wire form to the one that templates read.

    Text parts become one string (joined by line feeds), the arguments of tool calls the object that their
    JSON describes. Raises RequestError for other parts and for arguments that are no JSON object.
    """
    return [_message_from_openai(index, dict(message)) for index, message in enumerate(messages)]


def _message_from_openai(index: int, message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = "\n".join(
            _part_text(part, f"messages.{index}.content.{position}") for position, part in enumerate(content)
        )
    if message.get("tool_calls"):
        message["tool_calls"] = [
            _parsed_call(call, f"messages.{index}.tool_calls.{position}")
            for position, call in enumerate(message["tool_calls"])
        ]
    return message


def _part_text(part: Any, param: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get(kind) if isinstance(part, Mapping) and kind in ("text", "refusal") else None
    if not isinstance(text, str):
        raise RequestError(f"{param}: a part of type {kind!r}; this model reads text only", param=param)
    return text


def _parsed_call(call: Mapping[str, Any], param: str) -> dict[str, Any]:
    parsed = dict(call)
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{param}.function.arguments: not JSON", param=param) from error
        if not isinstance(function["arguments"], dict):
            raise RequestError(f"{param}.function.arguments: not a JSON object", param=param)
    parsed["function"] = function
    return parsed


def _chosen(choice: str, sources: Mapping[str, str]) -> str:
    if choice in sources:
        return sources[choice]
    if any(char in choice for char in "{}\n"):
        return choice
    if Path(choice).is_file():
        return _read(Path(choice))
    names = f" ({', '.join(sorted(sources))})" if sources else ""
    raise ConfigError(
        f"--chat-template {choice!r}: no such file, nor a template of the model{names}, nor Jinja text"
    )


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TEMPLATE_BYTES + 1)
        if len(data) > MAX_TEMPLATE_BYTES:
            raise ConfigError(f"chat template {path}: larger than {MAX_TEMPLATE_BYTES >> 20} MiB")
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"chat template {path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"chat template {path}: not UTF-8") from error


def _prepared(message: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers does first: keys that are None go, reasoning is known by all its names."""
    prepared = {key: value for key, value in message.items() if value is not None}
    reasoning = next((prepared[key] for key in _REASONING if key in prepared), None)
    if reasoning is not None:
        prepared = {"thinking": reasoning, **prepared, "reasoning_content": reasoning}
    return prepared


def _mark_final(chat: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """Put a mark behind the last message's content; returns that content."""
    if add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other; set one of them to false",
            param="continue_final_message",
        )
    content = chat[-1].get("content")
    if not isinstance(content, str):
        raise RequestError(
            "continue_final_message: the last message has no text to continue", param="continue_final_message"
        )
    chat[-1] = {**chat[-1], "content": content + _CONTINUE_MARK}
    return content


def _cut_at_mark(text: str, final: str) -> str:
    position = text.rfind(_CONTINUE_MARK.strip())
    if position < 0 or final.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template does not show the last message as it is",
            param="continue_final_message",
        )
    if text.startswith(_CONTINUE_MARK, position):
        return text[:position]
    return text[:position].rstrip()  # the template trims, so it would have trimmed the content too
