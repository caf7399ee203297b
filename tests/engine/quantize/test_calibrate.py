"""Calibration text to sequences."""

import hashlib
from pathlib import Path

import pytest
from nybble.engine.documents import Document, Encoder
from nybble.engine.errors import ConfigError
from nybble.engine.quantize.calibrate import load_calibration
from nybble.engine.tokenizer import Tokenizer
from tiny_tokenizer import write_tokenizer


@pytest.fixture
def encoder(tmp_path: Path) -> Encoder:
    folder = write_tokenizer(tmp_path / "tokenizer")
    return Encoder(folder, Tokenizer.from_folder(folder))


def test_documents_are_kept_apart_and_cut(encoder: Encoder, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    documents = ["the cat sang", "the dog and the cat went to the sea in the rain", "rain"]
    text.write_text(" <|endoftext|>\n".join([*documents, "", " \n"]))
    found = load_calibration(text, encoder, 100, 8, 0)
    for document in documents:
        ids = encoder.ids(Document(document, ""))
        assert ids[0] == 1  # the tokenizer's own <s>, once per document
        for start in range(0, len(ids), 8):
            piece = tuple(ids[start : start + 8])
            assert (piece in found.sequences) == (len(piece) > 1)
    assert found.num_tokens == sum(map(len, found.sequences))
    assert found.name == "text.txt"
    assert found.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()


def test_the_seed_decides_which_documents(encoder: Encoder) -> None:
    first, again, other = (load_calibration(None, encoder, 5, 16, seed) for seed in (1, 1, 2))
    assert first.sequences == again.sequences
    assert first.sequences != other.sequences
    assert len(first.sequences) == 5
    assert max(map(len, first.sequences)) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no text"),
        (b" <|endoftext|> \n<|endoftext|>", "holds no text"),
        (b"good \xff bad", r"not UTF-8 \(byte 5\)"),
        (None, "cannot be read"),
    ],
)
def test_bad_text_names_the_option(
    content: bytes | None, message: str, encoder: Encoder, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"--calibration .*text.txt.*{message}"):
        load_calibration(path, encoder, 10, 16, 0)
