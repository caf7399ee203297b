"""Calibration text as token sequences, each document by itself."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from ..documents import read_text, split_documents
from ..errors import ConfigError
from ..tokenizer import Tokenizer

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
    path: Path | None, tokenizer: Tokenizer, num_samples: int, seq_len: int, seed: int
) -> Calibration:
    """Up to ``num_samples`` sequences of at most ``seq_len`` tokens from the text in ``path`` (None: ours).

    Documents are shuffled by ``seed``, get the tokenizer's own special tokens, and are cut into pieces;
    attention never crosses from one to another. Raises ConfigError where no two tokens are found.
    """
    source = path or SHIPPED_TEXT
    text = read_text(source, "--calibration")
    documents = split_documents(text)
    random.Random(seed).shuffle(documents)
    sequences: list[tuple[int, ...]] = []
    for document in documents:
        if len(sequences) >= num_samples:
            break
        ids = tokenizer.encode(document)
        pieces = [tuple(ids[start : start + seq_len]) for start in range(0, len(ids), seq_len)]
        sequences.extend(piece for piece in pieces if len(piece) > 1)
    if not sequences:
        raise ConfigError(f"--calibration {source}: holds no text; give a file with some thousand words")
    return Calibration(tuple(sequences[:num_samples]), source.name, hashlib.sha256(text.encode()).hexdigest())
