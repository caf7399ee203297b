"""GWQ (Shao et al., arXiv 2411.00850): weights with the largest gradients stay exact, the base rounds the
rest.

One backward pass at the original weights; no curvature. Whether the paper's 1 % is of each linear or of the
model is not known to us; ours is of each linear, so that no kernel gets all of them.
"""

from dataclasses import dataclass

from torch import Tensor

from ..model.config import ModelConfig
from .methods import get_base
from .options import QuantizeOptions
from .outliers import largest
from .pipeline import Recipe, Rerun
from .requant import integral_bytes
from .results import Stage
from .sensitivity import integrate
from .store import Store
from .work import Work


@dataclass(frozen=True, slots=True)
class GWQ:
    """share: of each linear's weights. num_sequences: how much of the calibration gradients are taken of."""

    base: Recipe
    share: float = 0.01
    num_sequences: int = 16

    @property
    def statistics(self) -> str:
        """See Method."""
        return f"gradients of all weights; {self.base.statistics}"

    def settings(self) -> dict[str, object]:
        """See Method."""
        return {
            "gradient_share": 100 * self.share,
            "gradient_samples": self.num_sequences,
            **self.base.settings(),
        }

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """Both at once: the accumulators live while the base rounds."""
        return self.base.peak_bytes(config, num_tokens) + integral_bytes(config, num_tokens)

    def run(self, work: Work) -> Stage:
        """See Method. The base's first pass is for its edits: gradients are of the weights that it rounds."""
        first = self.base.run(work)
        with Store.for_bytes(work.folder, 4 * work.num_weights) as store:
            found = integrate(work, first, store, [(0.0, 1.0)], self.num_sequences)

            def exclude(name: str) -> Tensor | None:
                gradient = found.gradients.get(name)
                return None if gradient is None else largest(gradient, self.share)

            return self.base.run(work, Rerun("outliers", exclude, first))


def method(options: QuantizeOptions) -> GWQ:
    """--method gwq."""
    share = 0.01 if options.outlier_percent is None else options.outlier_percent / 100
    return GWQ(get_base(options), share, options.gradient_samples)
