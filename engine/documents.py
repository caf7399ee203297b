"""Documents for calibration and scoring: plain text, JSON lines of texts or of chats, here or on the hub."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chat_template import ChatTemplate, from_openai
from .errors import ConfigError, RequestError
from .tokenizer import Tokenizer

SEPARATOR = "<|endoftext|>"
MAX_TEXT_BYTES = 1 << 30
_LINES = (".jsonl", ".ndjson")
_HUB = re.compile(r"hf:([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?/(.+)")


@dataclass(frozen=True, slots=True)
class Document:
    """One document: a text, or the messages of a chat. place: where it stands, for errors."""

    content: str | Sequence[dict[str, Any]]
    place: str


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of one source, in its order. name, sha256: of the source, without its folder."""

    items: list[Document]
    name: str
    sha256: str


class Encoder:
    """Documents to token ids, as the model in ``folder`` reads them."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    def text(self, document: Document) -> str:
        """What the model is shown: the text, or the chat through the model's template. ConfigError."""
        if isinstance(document.content, str):
            return document.content
        if self._template is None:
            self._template = ChatTemplate.from_folder(self._folder, self._tokenizer.special_tokens)
        if self._template is None:
            raise ConfigError(
                f"{document.place}: is a chat, but the model has no chat template; give texts, or put "
                f"chat_template.jinja into {self._folder}"
            )
        try:
            messages = from_openai(document.content)
            return self._template.render(messages, add_generation_prompt=False)
        except RequestError as error:
            raise ConfigError(f"{document.place}: {error.message}") from error

    def ids(self, document: Document) -> list[int]:
        """Its token ids: a text's with the tokenizer's special tokens, a chat's with its template's."""
        plain = isinstance(document.content, str)
        return self._tokenizer.encode(self.text(document), add_special_tokens=plain)

    def begins_bare(self, document: Document, token_ids: list[int]) -> bool:
        """Whether it is a text to which the tokenizer adds no token in front."""
        if not isinstance(document.content, str):
            return False
        return token_ids[:1] == self._tokenizer.encode(document.content, add_special_tokens=False)[:1]


def read_documents(source: str | Path, option: str) -> Documents:
    """The documents of a file, or of ``hf:owner/name[@revision]/path`` on the hub; ``option`` named it.

    Files that end in .jsonl hold an object a line, with "text" or "messages" (OpenAI's form); others are
    UTF-8 text, in which ``<|endoftext|>`` separates documents. Empty documents are left out. ConfigError
    says which line is wrong.
    """
    name, path = str(source), Path(source).expanduser()
    if name.startswith("hf:"):
        path = _from_hub(name, option)
    else:
        name = path.name
    data = _read(path, name if name.startswith("hf:") else str(path), option)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{option} {source}: not UTF-8 (byte {error.start}); give text, or JSON lines"
        ) from error
    where = f"{option} {source}"
    items = list(_lines(text, where) if path.suffix.lower() in _LINES else _parts(text, where))
    return Documents(items, name, hashlib.sha256(data).hexdigest())


def _read(path: Path, shown: str, option: str) -> bytes:
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise ConfigError(f"{option} {shown}: larger than {MAX_TEXT_BYTES >> 30} GiB; give a part of it")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{option} {shown}: cannot be read ({error.strerror}); give a text file, or JSON lines"
        ) from error


def _parts(text: str, where: str) -> Iterator[Document]:
    for part in text.split(SEPARATOR):
        if stripped := part.strip():
            yield Document(stripped, where)


def _lines(text: str, where: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{where}, line {number}"
            content = _content(line, place)
            if not isinstance(content, str) or content.strip():
                yield Document(content, place)


def _content(line: str, place: str) -> str | list[dict[str, Any]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not JSON ({error}); each line must be an object") from error
    if not isinstance(row, dict):
        raise ConfigError(f"{place}: a JSON {type(row).__name__}; each line must be an object")
    if "messages" in row:
        messages = row["messages"]
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise ConfigError(f'{place}: "messages" must be a list of objects with "role" and "content"')
        for message in messages:
            if not isinstance(message.get("role"), str):
                raise ConfigError(f'{place}: a message has no "role"; use system, user or assistant')
        return messages
    text = row.get("text")
    if not isinstance(text, str):
        found = ", ".join(map(str, list(row)[:8])) or "none"
        raise ConfigError(f'{place}: has neither "text" (a string) nor "messages" (its keys: {found:.200})')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place}: the text holds a lone surrogate, so it is not Unicode") from error
    return text


def _from_hub(source: str, option: str) -> Path:
    """Download a data set's file into the hub's cache, or find it there where HF_HUB_OFFLINE is set."""
    match = _HUB.fullmatch(source)
    if match is None:
        raise ConfigError(f"{option} {source}: use hf:owner/name/path/in/the/repository.jsonl")
    # Imported here: local files are read without this library's import time.
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    owner_name, revision, path = match.groups()
    try:
        found = hf_hub_download(owner_name, path, repo_type="dataset", revision=revision)
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConfigError(
            f"{option} {source}: not in the local hub cache, and the hub is offline (HF_HUB_OFFLINE, or no "
            "network); give a local file, or download it once with the network on"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError, HFValidationError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ConfigError(f"{option} {source}: not on the hub ({reason}); check the spelling") from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise ConfigError(f"{option} {source}: could not be downloaded ({reason}); try again") from error
    return Path(found)
