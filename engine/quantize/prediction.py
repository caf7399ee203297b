"""What the post-quantization integral says that quantizing costs, beside what it does cost, on one text."""

from dataclasses import replace
from typing import Any

from ..hardware import available_memory
from ..model.config import ModelConfig
from ..scoring import Window
from . import gradients
from .calibrate import Calibration
from .gradients import GradientModel, Towards
from .results import Stage
from .sensitivity import ModuleScore, integrate, nodes
from .store import Store, held_bytes
from .work import Work

INTERVALS = 4
MAX_TOKENS = 1024  # of text: with 4 intervals and 100 M parameters a minute or two of two cores
SEQUENCE_TOKENS = 512
MAX_PARAMS = 100_000_000  # of a model for which nobody asked

Prediction = dict[str, Any]


def predict(work: Work, stage: Stage, windows: list[Window]) -> tuple[Prediction, dict[str, ModuleScore]]:
    """From the weights of ``work`` to those of ``stage``, the output head aside; and the modules' shares.

    {"computed": True, "tokens", "intervals", "predicted", "measured"}: changes of the mean loss, nats.
    """
    sequences = tuple(_pieces(windows))
    held_out = replace(work, calibration=Calibration(sequences, "", ""))
    model = GradientModel(held_out)
    measured = model.loss(Towards(stage, 1.0)) - model.loss(Towards(stage, 0.0))
    with Store.for_bytes(work.folder, 4 * work.num_weights) as store:
        found = integrate(held_out, stage, store, nodes(INTERVALS), len(sequences)).modules()
    return {
        "computed": True,
        "tokens": model.num_predicted,
        "intervals": INTERVALS,
        "predicted": sum(score.signed for score in found.values()),
        "measured": measured,
    }, found


def refusal(asked: bool | None, method: str, num_params: int, needed: int) -> str | None:
    """Why it is not computed, or None. asked: None: as the model's size says."""
    if asked is False:
        return "not asked for (--no-predict)"
    if asked is None and num_params > MAX_PARAMS and method != "requant":
        return (
            f"gradients of a model above {MAX_PARAMS // 1_000_000} M parameters only when asked (--predict)"
        )
    free = available_memory()
    if needed > free:
        return f"gradients need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None


def peak_bytes(config: ModelConfig) -> int:
    """A bound of what ``predict`` holds at once."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    weights = config.num_layers * hidden * (2 * heads + 2 * kv_heads + 3 * ffn)
    return gradients.peak_bytes(config, MAX_TOKENS) + held_bytes(4 * weights)


def _pieces(windows: list[Window]) -> list[tuple[int, ...]]:
    found, left = [], MAX_TOKENS
    for window in windows:
        piece = window.token_ids[: min(SEQUENCE_TOKENS, left)]
        if window.first == 1 and len(piece) > 1:  # later windows repeat half of the one before
            found.append(piece)
            left -= len(piece)
    return found
