"""Calibration text as token sequences, each document by itself."""

import random
from dataclasses import dataclass
from pathlib import Path

from ..documents import Encoder, read_documents
from ..errors import ConfigError

SHIPPED_TEXT = Path(__file__).parent / "calibration.txt"


@dataclass(frozen=True, slots=True)
class Calibration:
    """Sequences to run the model on. ``name`` and ``sha256`` are of the text they come from."""

    sequences: tuple[tuple[int, ...], ...]
    name: str
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


def load_calibration(
    source: str | Path | None, encoder: Encoder, num_samples: int, seq_len: int, seed: int
) -> Calibration:
    """Up to ``num_samples`` sequences of at most ``seq_len`` tokens of ``source`` (None: our text).

    Documents (see ``read_documents``) are shuffled by ``seed``, get the tokenizer's own special tokens
    (chats: the template's), and are cut into pieces; attention never crosses from one to another. Raises
    ConfigError where no two tokens are found.
    """
    found = read_documents(source or SHIPPED_TEXT, "--calibration")
    documents = list(found.items)
    random.Random(seed).shuffle(documents)
    sequences: list[tuple[int, ...]] = []
    for document in documents:
        if len(sequences) >= num_samples:
            break
        ids = encoder.ids(document)
        pieces = [tuple(ids[start : start + seq_len]) for start in range(0, len(ids), seq_len)]
        sequences.extend(piece for piece in pieces if len(piece) > 1)
    if not sequences:
        raise ConfigError(
            f"--calibration {source or SHIPPED_TEXT.name}: holds no text; give some thousand words"
        )
    return Calibration(tuple(sequences[:num_samples]), found.name, found.sha256)
