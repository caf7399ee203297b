"""Where texts come from: files, JSON lines, chats, a hub that is offline."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from nybble.engine.documents import SEPARATOR, Encoder, read_documents
from nybble.engine.errors import ConfigError
from nybble.engine.tokenizer import Tokenizer
from tiny_tokenizer import write_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
CHAT = [{"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sang"}]


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def encoder(folder: Path, template: str | None = TEMPLATE) -> Encoder:
    write_tokenizer(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Encoder(folder, Tokenizer.from_folder(folder))


def test_plain_text_is_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(f"\ufeffone {SEPARATOR}\n{SEPARATOR} two\nlines{SEPARATOR}", encoding="utf-8")
    found = read_documents(str(path), "--text")
    assert [document.content for document in found.items] == ["one", "two\nlines"]
    assert (found.name, found.sha256) == ("a.txt", hashlib.sha256(path.read_bytes()).hexdigest())


def test_json_lines_keep_texts_whole(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "a.JSONL", {"text": f" a {SEPARATOR} b", "id": 3}, "", {"text": " "}, {"text": "c\u2028d"}
    )
    found = read_documents(path, "--text")
    assert [document.content for document in found.items] == [f" a {SEPARATOR} b", "c\u2028d"]


def test_chats_go_through_the_models_template(tmp_path: Path) -> None:
    """Once: the tokenizer adds nothing to what the template says."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat?"}]}, CHAT[1]]
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": parts}, {"text": "rain"})
    chat, same, text = read_documents(path, "--text").items
    mine = encoder(tmp_path / "model")
    assert mine.text(chat) == mine.text(same) == "<user>the cat?</user><assistant>sang</assistant>"
    tokenizer = Tokenizer.from_folder(tmp_path / "model")
    assert mine.ids(chat) == tokenizer.encode(mine.text(chat), add_special_tokens=False)
    assert mine.ids(text) == [1, *tokenizer.encode("rain", add_special_tokens=False)]
    assert not mine.begins_bare(chat, mine.ids(chat))
    assert not mine.begins_bare(text, mine.ids(text))
    with pytest.raises(ConfigError, match=r"--text .*a.jsonl, line 1: is a chat, but the model has no chat"):
        encoder(tmp_path / "plain", None).ids(chat)
    refusing = encoder(tmp_path / "refusing", "{{ raise_exception('only twice') }}")
    with pytest.raises(ConfigError, match=r"line 2: .*only twice"):
        refusing.ids(same)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ([1], "line 2: a JSON list; each line must be an object"),
        ({"content": "x", "id": 1}, r'line 2: has neither "text" .* \(its keys: content, id\)'),
        ({"text": 3}, 'line 2: has neither "text"'),
        ('{"text": "\\ud800"}', "line 2: the text holds a lone surrogate"),
        ({"messages": []}, 'line 2: "messages" must be a list'),
        ({"messages": ["a"]}, 'line 2: "messages" must be a list'),
        ({"messages": [{"content": "a"}]}, 'line 2: a message has no "role"'),
    ],
)
def test_a_wrong_line_is_named(row: Any, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"text": "fine"}, row)
    with pytest.raises(ConfigError, match=f"--calibration {re.escape(str(path))}, {message}") as caught:
        read_documents(path, "--calibration")
    assert "\n" not in caught.value.message


def test_a_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the cache, as offline; nothing is asked of the network."""
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, path: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((repo, path, repo_type, revision))
        return str(write_lines(tmp_path / "blob.jsonl", {"text": "the cat"}))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = read_documents("hf:owner/name@v1.0/data/train/a.jsonl", "--calibration")
    assert asked == [("owner/name", "data/train/a.jsonl", "dataset", "v1.0")]
    assert [document.content for document in found.items] == ["the cat"]
    assert found.name == "hf:owner/name@v1.0/data/train/a.jsonl"
    read_documents("hf:owner/na.me/a.jsonl", "--calibration")
    assert asked[1] == ("owner/na.me", "a.jsonl", "dataset", None)


@pytest.mark.parametrize("source", ["hf:owner/name", "hf:name/a", "hf:/owner/name/a", "hf:"])
def test_no_address_of_the_hub(source: str) -> None:
    with pytest.raises(ConfigError, match=r"use hf:owner/name/path"):
        read_documents(source, "--calibration")


def test_the_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"--calibration hf:owner/name/a.jsonl: not in the local hub cache"):
        read_documents("hf:owner/name/a.jsonl", "--calibration")


def test_a_file_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nybble.engine.documents.MAX_TEXT_BYTES", 3)
    path = write_lines(tmp_path / "a.txt", "four")
    with pytest.raises(ConfigError, match=r"--text .*a.txt: larger than"):
        read_documents(path, "--text")
