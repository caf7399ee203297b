"""How well a model predicts text: negative log-likelihood, and the distance to another model.

Every document is scored by itself: its special tokens (or, where the tokenizer adds none, the end-of-sequence
token) in front, attention within it only. A document longer than the context is read in windows that
overlap by half, each token scored once, with at least half a context before it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import Ops
from .config import DType, EngineConfig
from .documents import read_text, split_documents
from .errors import ConfigError
from .model.decoder import Decoder, causal_attend
from .model.loader import load_model
from .model_files import ModelFiles, resolve_model
from .tokenizer import Tokenizer

SHIPPED_TEXT = Path(__file__).parent / "quantize" / "evaluation.txt"
BATCH_TOKENS = 2048
LOGIT_ROWS = 512  # rows of [rows, vocab] that are in memory at once

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """model, against: folders or hub ids. text None: a short one that comes with this package.

    max_len: tokens of context, None: the model's. max_documents: score only the first ones.
    """

    model: str
    against: str | None = None
    text: str | None = None
    revision: str | None = None
    dtype: DType = "float32"
    max_len: int | None = None
    max_documents: int | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError(f"--dtype {self.dtype}: use auto, float32, float16 or bfloat16")
        for option, value, least in (
            ("--max-len", self.max_len, 4),
            ("--max-documents", self.max_documents, 1),
            ("--num-threads", self.num_threads, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{option} {value}: must be at least {least}")


@dataclass(frozen=True, slots=True)
class Window:
    """token_ids: a piece of a document; the predictions of token_ids[first:] count, first >= 1."""

    token_ids: tuple[int, ...]
    first: int

    @property
    def num_scored(self) -> int:
        """Tokens whose predictions count."""
        return len(self.token_ids) - self.first


@dataclass(slots=True)
class Score:
    """Sums over scored tokens, in nats. kl: from the original's distribution; agreed: the same argmax."""

    num_tokens: int = 0
    nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0


class Scorer:
    """One model, loaded, on causal attention."""

    def __init__(self, folder: Path, dtype: DType, progress: Progress) -> None:
        def report(phase: str, done: int, total: int, line: str) -> None:
            progress(phase, done, total)

        # torch's kernels: exact for whatever dtype is asked for, and quick for whole documents.
        config = EngineConfig(str(folder), dtype=dtype, cpu_kernels="torch")
        loaded = load_model(ModelFiles(folder), config, report)
        self.config = loaded.config
        self.device = loaded.target.device
        self.weight_bytes = loaded.report.weight_bytes
        self._ops = Ops.resolve(loaded.target)
        self._decoder = Decoder(loaded.config, loaded.weights, self._ops, loaded.target.activation_dtype)

    def hidden(self, windows: list[Window]) -> Tensor:
        """[T, H] of the windows' tokens, one window after another."""
        lengths = [len(window.token_ids) for window in windows]
        token_ids = torch.tensor([i for w in windows for i in w.token_ids], device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        return self._decoder(token_ids, positions, causal_attend(self.config, self._ops, lengths))

    def logprobs(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, vocab] fp32."""
        return self._decoder.logits(hidden).log_softmax(-1)


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


def score_windows(windows: list[Window], model: Scorer, original: Scorer | None, progress: Progress) -> Score:
    """Score ``model`` on ``windows``, against ``original`` where there is one."""
    score = Score()
    total = sum(window.num_scored for window in windows)
    with torch.inference_mode():
        for batch in _batches(windows):
            rows, targets = _scored_rows(batch)
            hidden = model.hidden(batch)[rows.to(model.device)]
            reference = None if original is None else original.hidden(batch)[rows.to(original.device)]
            for start in range(0, len(rows), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                logprobs = model.logprobs(hidden[part])
                chosen = logprobs.gather(1, targets[part, None].to(model.device))
                score.nll -= float(chosen.sum(dtype=torch.float64))
                if original is not None and reference is not None:
                    _compare(score, logprobs, original.logprobs(reference[part]).to(logprobs.device))
            score.num_tokens += len(rows)
            progress("score", score.num_tokens, total)
    return score


def _batches(windows: list[Window]) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in windows:
        if batch and sum(len(w.token_ids) for w in batch) + len(window.token_ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _scored_rows(batch: list[Window]) -> tuple[Tensor, Tensor]:
    """Rows of the batch whose predictions count, and the tokens they should predict."""
    rows: list[int] = []
    targets: list[int] = []
    start = 0
    for window in batch:
        rows += range(start + window.first - 1, start + len(window.token_ids) - 1)
        targets += window.token_ids[window.first :]
        start += len(window.token_ids)
    return torch.tensor(rows), torch.tensor(targets)


def _compare(score: Score, logprobs: Tensor, reference: Tensor) -> None:
    divergence = torch.nn.functional.kl_div(logprobs, reference, reduction="none", log_target=True)
    score.kl += float(divergence.sum(dtype=torch.float64))
    score.agreed += int((logprobs.argmax(-1) == reference.argmax(-1)).sum())


def read_windows(
    text: str, tokenizer: Tokenizer, prefix: int | None, max_len: int, max_documents: int | None = None
) -> tuple[list[Window], int]:
    """Windows of all documents of ``text``, and the bytes of the text that they predict.

    prefix: the id to put in front of a document where the tokenizer adds no special token.
    """
    windows: list[Window] = []
    num_bytes = 0
    for document in split_documents(text)[:max_documents]:
        token_ids = tokenizer.encode(document)
        if token_ids[:1] == tokenizer.encode(document, add_special_tokens=False)[:1] and prefix is not None:
            token_ids = [prefix, *token_ids]
        windows += cut_windows(token_ids, max_len)
        num_bytes += len(document.encode())
    return windows, num_bytes


def evaluate(options: EvaluateOptions, progress: Progress, log: Log) -> dict[str, Any]:
    """Run it. Returns the figures, of JSON types only. Errors: ConfigError and its children."""
    folder = resolve_model(options.model, options.revision)
    other = None if options.against is None else resolve_model(options.against)
    files, tokenizer = ModelFiles(folder), Tokenizer.from_folder(folder)
    source = SHIPPED_TEXT if options.text is None else Path(options.text).expanduser()
    max_len = files.max_model_len()
    if options.max_len is not None:
        if options.max_len > max_len:
            raise ConfigError(f"--max-len {options.max_len}: the model's context is {max_len}")
        max_len = options.max_len
    prefix = next(iter(files.eos_token_ids()), None)
    text = read_text(source, "--text")
    windows, num_bytes = read_windows(text, tokenizer, prefix, max_len, options.max_documents)
    if not windows:
        raise ConfigError(f"--text {source}: holds no text that could be scored; give another file")
    model = Scorer(folder, options.dtype, progress)
    original = None
    if other is not None:
        original = Scorer(other, options.dtype, progress)
        if original.config.vocab_size != model.config.vocab_size:
            raise ConfigError(
                f"--against {options.against}: has {original.config.vocab_size} tokens, MODEL has "
                f"{model.config.vocab_size}; compare models of one vocabulary"
            )
    highest = max(max(window.token_ids) for window in windows)
    if highest >= model.config.vocab_size:
        raise ConfigError(
            f"MODEL {folder}: its tokenizer gives id {highest}, but it has {model.config.vocab_size} tokens"
        )
    log(f"{sum(w.num_scored for w in windows)} tokens, {num_bytes} bytes of {source.name}")
    score = score_windows(windows, model, original, progress)
    return {"model": str(folder), "text": source.name, "dtype": options.dtype} | figures(
        score, num_bytes, original is not None
    )


def figures(score: Score, num_bytes: int, compared: bool) -> dict[str, Any]:
    """Per-token and per-byte figures of ``score``."""
    mean = score.nll / score.num_tokens
    found: dict[str, Any] = {
        "num_tokens": score.num_tokens,
        "num_bytes": num_bytes,
        "nll_per_token": mean,
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "bits_per_byte": score.nll / math.log(2) / num_bytes,
    }
    if compared:
        found["kl_per_token"] = score.kl / score.num_tokens
        found["top1_agreement"] = score.agreed / score.num_tokens
    return found
