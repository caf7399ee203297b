"""The quality report of a quantization: what is stored beside its original, on held-out text.

Measured before the checkpoint moves to its place, block by block: a block of one of them is in memory.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..compare import compare, held_bytes
from ..documents import Documents, Encoder, read_documents
from ..errors import ConfigError
from ..hardware import available_memory
from ..model.config import ModelConfig
from ..model.streamed import StreamedModel
from ..quality import Side, describe_text, quality_report
from ..scoring import BATCH_TOKENS, LOGIT_ROWS, Passage, read_windows
from ..tokenizer import Tokenizer
from .options import QuantizeOptions
from .prediction import peak_bytes as prediction_bytes
from .prediction import predict, refusal
from .results import Stage
from .source import Source
from .work import Work

TEXT = Path(__file__).parent / "evaluation.txt"
CONTEXT = 2048  # tokens, or the model's
WHOLE_BELOW = 100_000_000  # parameters: the whole text is scored
MAX_TOKENS = 1 << 16  # of a larger model, where --eval-tokens does not say

Report = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What is scored, in windows of ``context`` tokens."""

    documents: Documents
    passage: Passage
    context: int


def read_held_out(options: QuantizeOptions, source: Source) -> HeldOut:
    """Read and cut before the work begins, so that a mistake is told at once. ConfigError."""
    documents = read_documents(options.eval_text or TEXT, "--eval-text")
    encoder = Encoder(source.model.folder, Tokenizer.from_folder(source.model.folder))
    max_tokens = options.eval_tokens
    if max_tokens is None and num_params(source) > WHOLE_BELOW:
        max_tokens = MAX_TOKENS
    context = min(CONTEXT, source.model.max_model_len())
    prefix = next(iter(source.model.eos_token_ids()), None)
    passage = read_windows(documents, encoder, prefix, context, max_tokens=max_tokens)
    if not passage.windows:
        raise ConfigError(
            f"--eval-text {documents.name}: holds no text that could be scored; give some thousand words"
        )
    if passage.highest_id >= source.config.vocab_size:
        raise ConfigError(
            f"MODEL {source.model.folder}: its tokenizer gives id {passage.highest_id}, but the vocabulary "
            f"has {source.config.vocab_size}; the tokenizer belongs to another model"
        )
    held = HeldOut(documents, passage, context)
    needed, free = peak_bytes(source.config, passage), available_memory()
    if needed > free:
        raise ConfigError(
            f"--report: needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; use --no-report"
        )
    return held


def measure(options: QuantizeOptions, work: Work, stage: Stage, held: HeldOut, made: Path) -> Report:
    """The report (``engine.quality``), with "prediction", of the checkpoint in the folder ``made``."""
    original = work.source.model.folder
    with StreamedModel(original) as before, StreamedModel(made) as after:
        found = compare(before, after, held.passage.windows, work.progress)
        sides = Side.of(Path(options.out).name, after), Side.of(original.name, before)
    text = describe_text(held.documents, held.passage, held.context)
    report = quality_report(found.score, sides, text, found.layer_errors)
    needed = prediction_bytes(work.source.config)
    reason = refusal(options.predict, options.method, num_params(work.source), needed)
    if reason is not None:
        work.log(f"no predicted loss change: {reason}")
        return report | {"prediction": {"computed": False, "reason": reason}}
    prediction, scores = predict(work, stage, held.passage.windows)
    shares = {name: {"predicted": score.signed, "mass": score.mass} for name, score in scores.items()}
    return report | {"prediction": prediction, "shares": shares}


def with_modules(report: Report, modules: list[dict[str, Any]]) -> Report:
    """The report with what is known of each module."""
    shares = report.get("shares", {})
    shown = {key: value for key, value in report.items() if key != "shares"}
    return shown | {"modules": [module | shares.get(module["name"], {}) for module in modules]}


def main_figures(report: Report) -> dict[str, Any]:
    """For the checkpoint's provenance: no time, so that the same run gives the same bytes."""
    return {
        "nll": report["model"]["nll"],
        "original_nll": report["original"]["nll"],
        **{key: report[key] for key in ("nll_increase", "kl", "top1_agreement", "text")},
        "bits_per_weight": report["model"]["bits_per_weight"],
    }


def verdict(report: Report, max_nll_increase: float) -> dict[str, Any]:
    """The gate: how much the NLL may rise, how much it did, and whether that is allowed."""
    rise = report["nll_increase"]
    return {
        "max_nll_increase": max_nll_increase,
        "nll_increase": rise,
        "passed": rise <= max_nll_increase,
    }


def num_params(source: Source) -> int:
    """Parameters of the original."""
    return sum(math.prod(info.shape) for info in source.files.tensors.values())


def peak_bytes(config: ModelConfig, passage: Passage) -> int:
    """A bound of what the comparison holds at once; all in fp32.

    Both models' hidden states; a batch on its way through a block; that block, one of its linears twice; then
    both heads, rows of logits six times. The embedding as it is stored.
    """
    hidden, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tokens = sum(len(window.token_ids) for window in passage.windows)
    longest = max(len(window.token_ids) for window in passage.windows)
    batch = min(tokens, max(BATCH_TOKENS, longest))
    passing = 4 * batch * (6 * hidden + 3 * heads + 3 * kv_heads + 5 * ffn)
    block = 4 * (hidden * (2 * heads + 2 * kv_heads + 3 * ffn) + 3 * hidden * max(hidden, ffn, heads))
    head = 4 * vocab * (2 * hidden + 6 * min(batch, LOGIT_ROWS))
    return held_bytes(tokens, hidden, longest) + max(block + passing, head)
