"""The quality report: what a changed model predicts beside its original, and what it takes. JSON types only.

    {"version": 1, "model": side, "original": side, "text": {...}, "nll_increase", "kl", "top1_agreement",
     "standard_error": {"nll_increase", "windows"}, "layers": [...], "modules": [...]}

with a side {"name", "format", "bytes", "bits_per_weight", "nll", "perplexity"}. nll, nll_increase and kl are
nats per token; kl is from the original's distribution. The standard error is over windows of text (see
``scoring.Spread``), None where there is one. ``nybble quantize`` adds "prediction", "run" (what made it, its
options, time, memory) and, where it was given one, "gate".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from .documents import Documents
from .scoring import Passage, Score, perplexity

VERSION = 1


class Stored(Protocol):
    """A model as it is stored (``engine.model.streamed``)."""

    @property
    def num_params(self) -> int:
        """Parameters of the model when dense."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as stored."""

    @property
    def num_layers(self) -> int:
        """Decoder blocks."""

    @property
    def quant_method(self) -> str:
        """The format's name."""

    def weights(self, index: int, /) -> dict[str, Tensor]:
        """The weights [out, in] fp32 of a block's linears, by module."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of both models. bits_per_weight: every byte of every tensor, over all parameters."""

    name: str
    format: str
    num_bytes: int
    bits_per_weight: float

    @staticmethod
    def of(name: str, model: Stored) -> "Side":
        """Reads headers only."""
        return Side(name, model.quant_method, model.num_bytes, 8 * model.num_bytes / model.num_params)

    def figures(self, nll: float) -> dict[str, Any]:
        """For the report."""
        return {
            "name": self.name,
            "format": self.format,
            "bytes": self.num_bytes,
            "bits_per_weight": self.bits_per_weight,
            "nll": nll,
            "perplexity": found if (found := perplexity(nll)) < math.inf else None,  # JSON has no infinity
        }


def quality_report(
    score: Score, sides: tuple[Side, Side], text: dict[str, Any], layer_errors: Sequence[float]
) -> dict[str, Any]:
    """sides: the model's, the original's. layer_errors: see ``compare.Comparison``; empty where unknown."""
    nll, original_nll = score.nll / score.num_tokens, score.original_nll / score.num_tokens
    return {
        "version": VERSION,
        "model": sides[0].figures(nll),
        "original": sides[1].figures(original_nll),
        "text": text,
        "nll_increase": nll - original_nll,
        "standard_error": score.rise.figures(),
        "kl": score.kl / score.num_tokens,
        "top1_agreement": score.agreed / score.num_tokens,
        "layers": [{"layer": index, "output_error": error} for index, error in enumerate(layer_errors)],
    }


def describe_text(documents: Documents, passage: Passage, context: int) -> dict[str, Any]:
    """What was scored. whole: all that the source holds; else its first documents."""
    return {
        "name": documents.name,
        "sha256": documents.sha256,
        "tokens": passage.num_scored,
        "bytes": passage.num_bytes,
        "context": context,
        "whole": passage.whole,
    }


def weight_errors(model: Stored, original: Stored) -> dict[str, float]:
    """||W - Q||^2 / ||W||^2 of each linear, as stored: scales that a transform moved count too."""
    found: dict[str, float] = {}
    for index in range(original.num_layers):
        others = model.weights(index)
        for name, weight in original.weights(index).items():
            scale = float(weight.square().sum()) or 1.0
            found[name] = float((weight - others[name]).square().sum()) / scale
    return found
