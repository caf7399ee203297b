"""Two models over the same text, block beside block: what one predicts, and how far it is from the other.

A chunk of the text goes through one block of each model at a time, so that in memory are two [tokens, H],
one block, and at the end both heads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .scoring import BATCH_TOKENS, LOGIT_ROWS, Score, Window, batches_of, scored_rows

CHUNK_BYTES = 256 << 20  # of hidden states, both models'

Layer = Callable[[Tensor, Sequence[int]], Tensor]
Progress = Callable[[str, int, int], None]


class Blocks(Protocol):
    """A model that is computed block by block (``engine.model.streamed``)."""

    @property
    def num_layers(self) -> int:
        """Decoder blocks."""

    @property
    def hidden_size(self) -> int:
        """H."""

    def embedding(self) -> Callable[[Tensor], Tensor]:
        """Token ids [T] -> [T, H]."""

    def layer(self, index: int, /) -> Layer:
        """A block: ([T, H], lengths of the sequences, sum T) -> [T, H]."""

    def head(self) -> Callable[[Tensor], Tensor]:
        """[T, H] -> log-probabilities [T, vocab]."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """layer_errors: of each block's output, mean over scored tokens of |difference|^2 / |original|^2."""

    score: Score
    layer_errors: list[float]


class _Sums:
    """Over the tokens of all chunks."""

    def __init__(self, num_layers: int) -> None:
        self.score = Score()
        self.errors = [0.0] * num_layers

    def add_error(self, layer: int, hidden: Tensor, other: Tensor) -> None:
        """[T, H] of scored tokens."""
        scale = hidden.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        relative = (hidden - other).square().sum(-1) / scale
        self.errors[layer] += float(relative.sum(dtype=torch.float64))


def compare(original: Blocks, other: Blocks, windows: list[Window], progress: Progress) -> Comparison:
    """Score ``other`` on ``windows`` against ``original``: of the same number of blocks and vocabulary.

    ConfigError where predictions are not finite.
    """
    chunks = list(_chunks(windows, original.hidden_size))
    sums = _Sums(original.num_layers)
    total = len(chunks) * original.num_layers
    with torch.inference_mode():
        for number, chunk in enumerate(chunks):
            for layer in _through(original, other, chunk, sums):
                progress("report", number * original.num_layers + layer, total)
    progress("report", total, total)
    sums.score.refuse_not_finite()
    return Comparison(sums.score, [error / sums.score.num_tokens for error in sums.errors])


def _through(original: Blocks, other: Blocks, chunk: list[list[Window]], sums: _Sums) -> Iterator[int]:
    lengths = [[len(window.token_ids) for window in batch] for batch in chunk]
    rows = [scored_rows(batch) for batch in chunk]
    states = [_embedded(model, chunk) for model in (original, other)]
    for index in range(original.num_layers):
        yield index
        for model, hidden in zip((original, other), states, strict=True):
            layer = model.layer(index)
            for number, length in enumerate(lengths):
                hidden[number] = layer(hidden[number], length)
            del layer
        for (scored, _, _), ours, theirs in zip(rows, *states, strict=True):
            sums.add_error(index, ours[scored], theirs[scored])
    heads = original.head(), other.head()
    for (scored, targets, ends), ours, theirs in zip(rows, *states, strict=True):
        for part in torch.split(torch.arange(len(scored)), LOGIT_ROWS):
            reference, found = (
                head(hidden[scored[part]]) for head, hidden in zip(heads, (ours, theirs), strict=True)
            )
            sums.score.add(found, targets[part], ends[part], reference)


def _embedded(model: Blocks, chunk: list[list[Window]]) -> list[Tensor]:
    embed = model.embedding()
    return [embed(torch.tensor([i for window in batch for i in window.token_ids])) for batch in chunk]


def _chunks(windows: list[Window], hidden_size: int) -> Iterator[list[list[Window]]]:
    """Batches that go through a block before the next one is read."""
    chunk: list[list[Window]] = []
    used = 0
    for batch in batches_of(windows):
        size = 8 * hidden_size * sum(len(window.token_ids) for window in batch)
        if chunk and used + size > CHUNK_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(batch)
        used += size
    if chunk:
        yield chunk


def held_bytes(num_tokens: int, hidden_size: int, longest: int) -> int:
    """A bound of what hidden states take, both models', for ``num_tokens`` in windows of ``longest``."""
    batch = max(BATCH_TOKENS, longest)
    return 8 * hidden_size * max(min(num_tokens, CHUNK_BYTES // (8 * hidden_size)), min(num_tokens, batch))
