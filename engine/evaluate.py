"""How well a model predicts text: negative log-likelihood, and the distance to another model.

Every document is scored by itself: its special tokens (or, where the tokenizer adds none, the end-of-sequence
token) in front, attention within it only. A document longer than the context is read in windows that
overlap by half, each token scored once, with at least half a context before it.

Scores are exact for the dtype asked for (torch's kernels), or, where a kernel option is given, what ``nybble
serve`` computes with it (``ServedScorer``), so that the cost of rounded activations can be read off.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from ..kernels.dispatch import Ops
from ..kernels.paged import PagedSequence
from .config import CpuActivations, CpuKernels, DType, EngineConfig
from .documents import read_text, split_documents
from .errors import ConfigError
from .hardware import default_threads
from .model.decoder import Decoder, causal_attend
from .model.loader import LoadedModel, load_model
from .model_files import ModelFiles, resolve_model
from .step_model import EagerModel, StepModel, kv_cache_dtype, tape_refusal
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
    cpu_kernels, cpu_activations: score as served with them; without ``against``, rounded activations are
    compared with exact ones.
    """

    model: str
    against: str | None = None
    text: str | None = None
    revision: str | None = None
    dtype: DType = "float32"
    max_len: int | None = None
    max_documents: int | None = None
    num_threads: int | None = None
    cpu_kernels: CpuKernels | None = None
    cpu_activations: CpuActivations | None = None

    def __post_init__(self) -> None:
        for option, given, kind in (
            ("--dtype", self.dtype, DType),
            ("--cpu-kernels", self.cpu_kernels, CpuKernels),
            ("--cpu-activations", self.cpu_activations, CpuActivations),
        ):
            if given is not None and given not in get_args(kind):
                raise ConfigError(f"{option} {given}: use {', '.join(get_args(kind))}")
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
    original_nll: float = 0.0
    kl: float = 0.0
    agreed: int = 0


class ScoringModel(Protocol):
    """A loaded model that predicts windows."""

    vocab_size: int
    device: str

    def hidden(self, windows: list[Window]) -> Tensor:
        """[T, H] of the windows' tokens, one window after another; valid until the next call."""

    def logprobs(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, vocab] fp32."""


class Scorer:
    """One model, loaded, on causal attention."""

    def __init__(self, folder: Path, dtype: DType, progress: Progress) -> None:
        def report(phase: str, done: int, total: int, line: str) -> None:
            progress(phase, done, total)

        # torch's kernels: exact for whatever dtype is asked for, and quick for whole documents.
        config = EngineConfig(str(folder), dtype=dtype, cpu_kernels="torch")
        loaded = load_model(ModelFiles(folder), config, report)
        self.config = loaded.config
        self.vocab_size = loaded.config.vocab_size
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


class ServedScorer:
    """One model as it is served: its step model, a paged KV cache, ``config``'s kernels."""

    def __init__(self, config: EngineConfig, progress: Progress, log: Log) -> None:
        """``config.max_model_len``: the longest window's tokens."""

        def report(phase: str, done: int, total: int, line: str) -> None:
            progress(phase, done, total)
            if line:
                log(line)

        loaded = load_model(ModelFiles(Path(config.model)), config, report)
        if config.cpu_activations not in (None, "fp32"):
            _check_rounded(loaded, config.low_bit_activations)
        self.vocab_size = loaded.config.vocab_size
        self.device = loaded.target.device
        self.kernel = loaded.report.main_kernel
        self._block_size = config.block_size
        self._model, self._num_groups = _step_model(loaded, config, log)

    def hidden(self, windows: list[Window]) -> Tensor:
        """See ScoringModel."""
        sequences: list[PagedSequence] = []
        first = block = 0
        for window in windows:
            count = len(window.token_ids)
            table = tuple(range(block, block + -(-count // self._block_size)))
            sequences.append(PagedSequence(first, count, 0, table))
            first, block = first + count, block + len(table)
        token_ids = [i for window in windows for i in window.token_ids]
        return self._model.forward(token_ids, [sequences] * self._num_groups)

    def logprobs(self, hidden: Tensor) -> Tensor:
        """See ScoringModel."""
        return self._model.logits(hidden).log_softmax(-1)


def _check_rounded(loaded: LoadedModel, activations: CpuActivations) -> None:
    """ConfigError where a score would not be that of ``activations``."""
    low_bit = [layer for layer in loaded.report.layers if layer.spec is not None]
    if not low_bit:
        raise ConfigError(f"--cpu-activations {activations}: MODEL has no low-bit weights; leave it out")
    for layer in low_bit:
        if not layer.kernel.startswith(f"cpu-{activations}"):
            reason = dict(layer.refused)[f"cpu-{activations}"]
            found = f"{layer.slot} would be computed by {layer.kernel} ({reason})"
            raise ConfigError(f"--cpu-activations {activations}: {found}")


def _step_model(loaded: LoadedModel, config: EngineConfig, log: Log) -> tuple[StepModel, int]:
    """What ``build`` would serve, with pages for one batch of windows; and its number of KV groups."""
    kernels = [layer.kernel for layer in loaded.report.layers]
    reason = tape_refusal(kernels, config.block_size, loaded.config.head_dim)
    target = loaded.target
    specs = loaded.config.kv_specs(kv_cache_dtype(target, compiled=reason is None))
    num_blocks = config.max_num_batched_tokens // 2  # a window of two tokens takes a block
    if reason is None:
        tape = import_module(".tape_model", __package__)  # it imports numba
        threads = config.num_threads or default_threads()
        return tape.build_tape_model(loaded, specs, num_blocks, config, threads), len(specs)
    log(f"steps run op by op, not as a tape: {reason}")
    decoder = Decoder(loaded.config, loaded.weights, Ops.resolve(target), target.activation_dtype)
    return EagerModel(decoder, specs, num_blocks, config.block_size), len(specs)


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


def score_windows(
    windows: list[Window], model: ScoringModel, original: ScoringModel | None, progress: Progress
) -> Score:
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
                score.nll += _nll(logprobs, targets[part])
                if original is not None and reference is not None:
                    others = original.logprobs(reference[part])
                    score.original_nll += _nll(others, targets[part])
                    _compare(score, logprobs, others.to(logprobs.device))
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


def _nll(logprobs: Tensor, targets: Tensor) -> float:
    return -float(logprobs.gather(1, targets[:, None].to(logprobs.device)).sum(dtype=torch.float64))


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
    served = _served_config(options, folder, max(len(window.token_ids) for window in windows))
    scores = {"model": str(folder), "text": source.name, "dtype": options.dtype}
    model: ScoringModel
    if served is None:
        model = Scorer(folder, options.dtype, progress)
    else:
        model = ServedScorer(served, progress, log)
        scores["kernel"] = model.kernel
    original: ScoringModel | None = None
    if other is not None:
        original = Scorer(other, options.dtype if served is None else "float32", progress)
        scores["against"] = str(options.against)
        if original.vocab_size != model.vocab_size:
            raise ConfigError(
                f"--against {options.against}: has {original.vocab_size} tokens, MODEL has "
                f"{model.vocab_size}; compare models of one vocabulary"
            )
    elif served is not None and served.low_bit_activations != "fp32":
        exact = replace(served, dtype="float32", cpu_activations="fp32")
        original = ServedScorer(exact, progress, lambda _: None)
        scores["against"] = "itself in fp32"
    highest = max(max(window.token_ids) for window in windows)
    if highest >= model.vocab_size:
        raise ConfigError(
            f"MODEL {folder}: its tokenizer gives id {highest}, but it has {model.vocab_size} tokens"
        )
    log(f"{sum(w.num_scored for w in windows)} tokens, {num_bytes} bytes of {source.name}")
    score = score_windows(windows, model, original, progress)
    return scores | figures(score, num_bytes, original is not None)


def _served_config(options: EvaluateOptions, folder: Path, longest: int) -> EngineConfig | None:
    """The engine that a kernel option asks for; None: no such option. ``longest``: a window's tokens."""
    if options.cpu_kernels is None and options.cpu_activations is None:
        return None
    tokens = max(BATCH_TOKENS, longest)
    return EngineConfig(
        str(folder),
        "cpu",
        options.dtype,
        max_model_len=longest,
        max_num_seqs=1,  # unused: whole windows are computed at once
        max_num_batched_tokens=tokens,
        num_threads=options.num_threads,
        cpu_kernels=options.cpu_kernels or "auto",
        cpu_activations=options.cpu_activations,
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
        found["against_nll_per_token"] = score.original_nll / score.num_tokens
        found["kl_per_token"] = score.kl / score.num_tokens
        found["top1_agreement"] = score.agreed / score.num_tokens
    return found
