"""Models that predict windows of text: exact with torch's kernels, or as they are served."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.dispatch import Ops
from ..kernels.paged import PagedSequence
from .config import CpuActivations, DType, EngineConfig
from .errors import ConfigError
from .hardware import default_threads
from .model.decoder import Decoder, causal_attend
from .model.loader import LoadedModel, load_model
from .model.served_head import head_rounder
from .model_files import ModelFiles
from .scoring import LOGIT_ROWS, Score, Window, batches_of, scored_rows
from .step_model import EagerModel, StepModel, kv_cache_dtype, tape_refusal

Progress = Callable[[str, int, int], None]
Log = Callable[[str], None]


class ScoringModel(Protocol):
    """A loaded model that predicts windows."""

    vocab_size: int
    device: str

    def read(self, windows: list[Window]) -> None:
        """Compute the windows' tokens: a row each, one window after another."""

    def logprobs(self, rows: Tensor) -> Tensor:
        """[R] of what was read last -> [R, vocab] fp32."""


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
        self._hidden = torch.empty(0, loaded.config.hidden_size)

    def read(self, windows: list[Window]) -> None:
        """See ScoringModel."""
        lengths = [len(window.token_ids) for window in windows]
        token_ids = torch.tensor([i for w in windows for i in w.token_ids], device=self.device)
        positions = torch.cat([torch.arange(length, device=self.device) for length in lengths])
        self._hidden = self._decoder(token_ids, positions, causal_attend(self.config, self._ops, lengths))

    def logprobs(self, rows: Tensor) -> Tensor:
        """See ScoringModel."""
        return self._decoder.logits(self._hidden[rows.to(self.device)]).log_softmax(-1)


class ServedScorer:
    """One model as it is served: its step model, a paged KV cache, ``config``'s kernels."""

    def __init__(self, config: EngineConfig, progress: Progress, log: Log) -> None:
        """``config.max_model_len``: the longest window's tokens."""

        def report(phase: str, done: int, total: int, line: str) -> None:
            progress(phase, done, total)
            if line:
                log(line)

        files = ModelFiles(Path(config.model))
        loaded = load_model(files, config, report, round_head=head_rounder(config))
        if config.cpu_activations not in (None, "fp32"):
            _check_rounded(loaded, config.low_bit_activations)
        self.vocab_size = loaded.config.vocab_size
        self.device = loaded.target.device
        self.kernel = loaded.report.main_kernel
        self._block_size = config.block_size
        self._model, self._num_groups = _step_model(loaded, config, log)

    def read(self, windows: list[Window]) -> None:
        """See ScoringModel."""
        sequences: list[PagedSequence] = []
        first = block = 0
        for window in windows:
            count = len(window.token_ids)
            table = tuple(range(block, block + -(-count // self._block_size)))
            sequences.append(PagedSequence(first, count, 0, table))
            first, block = first + count, block + len(table)
        token_ids = [i for window in windows for i in window.token_ids]
        self._model.forward(token_ids, [sequences] * self._num_groups)

    def logprobs(self, rows: Tensor) -> Tensor:
        """See ScoringModel."""
        return self._model.logits(rows.tolist()).values.log_softmax(-1)


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


def score_windows(
    windows: list[Window], model: ScoringModel, original: ScoringModel | None, progress: Progress
) -> Score:
    """Score ``model`` on ``windows``, against ``original`` where there is one.

    ConfigError where predictions are not finite.
    """
    score = Score()
    total = sum(window.num_scored for window in windows)
    with torch.inference_mode():
        for batch in batches_of(windows):
            rows, targets, ends = scored_rows(batch)
            model.read(batch)
            if original is not None:
                original.read(batch)
            for start in range(0, len(rows), LOGIT_ROWS):
                part = slice(start, start + LOGIT_ROWS)
                others = None if original is None else original.logprobs(rows[part])
                score.add(model.logprobs(rows[part]), targets[part], ends[part], others)
            progress("score", score.num_tokens, total)
    score.refuse_not_finite("use more bits, another method, or --dtype float32")
    return score
