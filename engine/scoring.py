"""What a score is: windows of documents, and sums of what a model predicts in them.

Every document is scored by itself: its special tokens (or, where the tokenizer adds none to a text, the
end-of-sequence token) in front, attention within it only. A document longer than the context is read in
windows that overlap by half, each token scored once, with at least half a context before it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .documents import Document, Documents, Encoder
from .errors import ConfigError

BATCH_TOKENS = 2048
LOGIT_ROWS = 512  # rows of [rows, vocab] that are in memory at once


@dataclass(frozen=True, slots=True)
class Window:
    """token_ids: a piece of a document; the predictions of token_ids[first:] count, first >= 1."""

    token_ids: tuple[int, ...]
    first: int

    @property
    def num_scored(self) -> int:
        """Tokens whose predictions count."""
        return len(self.token_ids) - self.first


@dataclass(frozen=True, slots=True)
class Passage:
    """What is scored. num_bytes: UTF-8 bytes of the documents in it, None where the last one is cut.

    whole: whether it is all that the source holds.
    """

    windows: list[Window]
    num_bytes: int | None
    whole: bool

    @property
    def num_scored(self) -> int:
        """Tokens whose predictions count."""
        return sum(window.num_scored for window in self.windows)

    @property
    def highest_id(self) -> int:
        """Of all token ids."""
        return max(max(window.token_ids) for window in self.windows)


@dataclass(slots=True)
class Spread:
    """How much a mean over tokens would differ on other text: its standard error, in running sums.

    What neighbouring tokens cost is alike, so that windows are the sample, not tokens (single tokens gave
    less than half of it on the demo's text). With d_w the sum over a window's n_w tokens, of W windows and N
    tokens: sqrt(W / (W - 1) * sum (d_w - mean * n_w)^2) / N, the linearized one of a ratio of two sums
    (Cochran, Sampling Techniques, 1977, chapter 6). Windows are taken as independent; those of one long
    document are not quite, so that there it is somewhat too small.
    """

    num_windows: int = 0
    num_tokens: int = 0
    total: float = 0.0
    squares: float = 0.0  # sum of d_w^2
    products: float = 0.0  # of d_w * n_w
    sizes: float = 0.0  # of n_w^2
    _open: tuple[float, int] = (0.0, 0)  # of the window that has not ended

    def add(self, values: Tensor, ends: Tensor) -> None:
        """values: [T], of tokens in order. ends: [T] bool, whether a token is the last of its window."""
        start = 0
        for stop in (ends.nonzero().flatten() + 1).tolist():
            self._extend(values[start:stop])
            total, count = self._open
            self.num_windows += 1
            self.squares += total * total
            self.products += total * count
            self.sizes += count * count
            self._open = (0.0, 0)
            start = stop
        self._extend(values[start:])

    def _extend(self, values: Tensor) -> None:
        found = float(values.sum(dtype=torch.float64))
        self.total, self.num_tokens = self.total + found, self.num_tokens + len(values)
        self._open = (self._open[0] + found, self._open[1] + len(values))

    def standard_error(self) -> float | None:
        """Of the mean; None of a single window."""
        if self.num_windows < 2:
            return None
        mean = self.total / self.num_tokens
        left = self.squares - 2 * mean * self.products + mean * mean * self.sizes
        return math.sqrt(max(left, 0.0) * self.num_windows / (self.num_windows - 1)) / self.num_tokens

    def figures(self) -> dict[str, Any]:
        """For reports; JSON types."""
        return {"nll_increase": self.standard_error(), "windows": self.num_windows}


@dataclass(slots=True)
class Score:
    """Sums over scored tokens, in nats. kl: from the original's distribution; agreed: the same argmax.

    rise: of each token's NLL beside the original's.
    """

    num_tokens: int = 0
    nll: float = 0.0
    original_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0
    rise: Spread = field(default_factory=Spread)

    def add(self, logprobs: Tensor, targets: Tensor, ends: Tensor, original: Tensor | None) -> None:
        """Count predictions: logprobs [T, vocab], original: [T, vocab]; ends: see ``scored_rows``."""
        self.num_tokens += len(targets)
        nll = _nll(logprobs, targets)
        self.nll += float(nll.sum())
        if original is not None:
            original_nll = _nll(original, targets).to(nll.device)
            self.original_nll += float(original_nll.sum())
            reference = original.to(logprobs.device)
            divergence = torch.nn.functional.kl_div(logprobs, reference, reduction="none", log_target=True)
            self.kl += float(divergence.sum(dtype=torch.float64))
            self.agreed += int((logprobs.argmax(-1) == reference.argmax(-1)).sum())
            self.rise.add(nll - original_nll, ends)

    def refuse_not_finite(self, remedy: str = "use more bits, or another method") -> None:
        """ConfigError where a model's predictions are not numbers: the mean of such says nothing."""
        if math.isfinite(self.nll + self.kl):
            return
        raise ConfigError(
            f"the model's predictions are not finite; {remedy}"
            if math.isfinite(self.original_nll)
            else "the original's predictions are not finite; its weights, or fp32, overflow"
        )

    def figures(self, compared: bool) -> dict[str, Any]:
        """Per token; JSON types. ``compared``: to an original."""
        mean = self.nll / self.num_tokens
        found: dict[str, Any] = {
            "num_tokens": self.num_tokens,
            "nll_per_token": mean,
            "perplexity": perplexity(mean),
        }
        if compared:
            found["against_nll_per_token"] = self.original_nll / self.num_tokens
            found["kl_per_token"] = self.kl / self.num_tokens
            found["top1_agreement"] = self.agreed / self.num_tokens
            found["standard_error"] = self.rise.figures()
        return found


def perplexity(nll: float) -> float:
    """Of a mean negative log-likelihood in nats."""
    return math.exp(nll) if nll < 700 else math.inf


def _nll(logprobs: Tensor, targets: Tensor) -> Tensor:
    """[T] fp64: of each target."""
    return -logprobs.gather(1, targets[:, None].to(logprobs.device)).flatten().double()


def cut_windows(token_ids: list[int], max_len: int) -> list[Window]:
    """A document's windows: the first scores all but its first token, each later one its second half."""
    windows = [Window(tuple(token_ids[:max_len]), 1)]
    reached = max_len
    while reached < len(token_ids):
        stop = min(reached + max_len // 2, len(token_ids))
        start = stop - max_len
        windows.append(Window(tuple(token_ids[start:stop]), reached - start))
        reached = stop
    return [window for window in windows if window.num_scored > 0]


def read_windows(
    documents: Documents,
    encoder: Encoder,
    prefix: int | None,
    max_len: int,
    max_documents: int | None = None,
    max_tokens: int | None = None,
) -> Passage:
    """Windows of the documents in order, until ``max_tokens`` are scored (the last window is then cut).

    prefix: the id to put in front of a text where the tokenizer adds no special token. ConfigError.
    """
    windows: list[Window] = []
    left = math.inf if max_tokens is None else max_tokens
    num_bytes, items = 0, documents.items[:max_documents]
    for document in items:
        if left <= 0:
            return Passage(windows, num_bytes, False)
        for window in cut_windows(_token_ids(document, encoder, prefix), max_len):
            if window.num_scored > left:
                kept = window.token_ids[: window.first + int(left)]
                return Passage([*windows, Window(kept, window.first)] if left else windows, None, False)
            windows.append(window)
            left -= window.num_scored
        num_bytes += len(encoder.text(document).encode())
    return Passage(windows, num_bytes, len(items) == len(documents.items))


def _token_ids(document: Document, encoder: Encoder, prefix: int | None) -> list[int]:
    token_ids = encoder.ids(document)
    if prefix is not None and encoder.begins_bare(document, token_ids):
        return [prefix, *token_ids]
    return token_ids


def batches_of(windows: list[Window]) -> Iterator[list[Window]]:
    """Windows that go through a model together."""
    batch: list[Window] = []
    for window in windows:
        if batch and sum(len(w.token_ids) for w in batch) + len(window.token_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def scored_rows(batch: list[Window]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the batch whose predictions count, what they should predict, whether a window ends there."""
    rows: list[int] = []
    targets: list[int] = []
    ends: list[bool] = []
    start = 0
    for window in batch:
        rows += range(start + window.first - 1, start + len(window.token_ids) - 1)
        targets += window.token_ids[window.first :]
        ends += [False] * (window.num_scored - 1) + [True]
        start += len(window.token_ids)
    return torch.tensor(rows), torch.tensor(targets), torch.tensor(ends)
