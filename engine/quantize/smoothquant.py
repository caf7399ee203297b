"""SmoothQuant (Xiao et al., arXiv 2211.10438) for weights: s_j = max|x_j|^a / max|w_j|^(1 - a) per input j.

Made for int8 activations, where it moves their outliers into the weights; for weights alone AWQ is better.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .activations import InputStats
from .options import QuantizeOptions
from .results import Rescale, Specs
from .source import Block
from .transforms import seams

LEAST = 1e-5  # of either maximum: an input that is never used scales nothing


@dataclass(frozen=True, slots=True)
class SmoothQuant:
    """A Transform. alpha: how much of the activations' range goes to the weights."""

    alpha: float = 0.5
    statistics = "the largest magnitude of every linear's inputs"

    @classmethod
    def from_options(cls, options: QuantizeOptions) -> "SmoothQuant":
        """As asked for."""
        return cls(options.smooth_alpha)

    def settings(self) -> dict[str, object]:
        """See Transform."""
        return {"transform": "smoothquant", "smooth_alpha": self.alpha}

    def prepare(self, block: Block, stats: Mapping[str, InputStats], specs: Specs) -> tuple[Rescale, ...]:
        """See Transform."""
        found = []
        for seam in seams(block.layer.config, block.layer.index):
            largest = block.linears[seam.consumer].weight.abs().amax(0).clamp(min=LEAST)
            inputs = stats[seam.consumer].max_abs.clamp(min=LEAST)
            scales = seam.shared(inputs**self.alpha / largest ** (1 - self.alpha))
            found.append(seam.edit(scales, block))
        return tuple(found)
