"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, each error repaid by later columns.

The objective is tr((W - Q) H (W - Q)^T) for the Hessian H = 2 E[x x^T] of a linear's inputs x.
"""

from dataclasses import dataclass

from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..model.config import ModelConfig
from .hessian import HessianFactor, Order, factorize
from .options import QuantizeOptions
from .pipeline import Recipe, ToRound
from .rounding import matrix_bytes
from .sweep import How, sweep
from .transforms import get_transform
from .work import Work


def round_gptq(
    weight: Tensor,
    factor: HessianFactor,
    spec: QuantSpec,
    mse: float = 0.0,
    exclude: Tensor | None = None,
) -> PackedWeight:
    """Quantize ``weight`` [rows, K] (not changed). With ``actorder`` "group" the result has a ``g_idx``.

    exclude: [rows, K] bool, weights kept apart: they neither widen a grid nor make an error; what the sweep
    made of them comes back exactly (to fp16), by ``outliers``. Raises ScaleOverflowError.
    """
    swept = sweep(weight, factor, spec, How(mse=mse, exclude=exclude))
    return swept.packed(spec)


@dataclass(frozen=True, slots=True)
class GPTQ:
    """damping: share of the Hessian's mean diagonal. mse: exponent of the search for ranges, 0: off.

    order: in which columns are rounded. static_groups: every group fitted before the first column is rounded,
    on the weights as they were.
    """

    damping: float = 0.01
    mse: float = 0.0
    order: Order = "none"
    static_groups: bool = False
    statistics = "one Hessian [K, K] in fp32 per distinct input, four in a decoder block, one at a time"
    needs_inputs = True
    rows_independent = True

    def settings(self) -> dict[str, object]:
        """See Rounder; GPTQModel's names where it has them."""
        return {
            "damp_percent": self.damping,
            "mse": self.mse,
            "static_groups": self.static_groups,
            "act_group_aware": self.order == "gar",
        }

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """Four [K, K] while factorizing, eight of the widest slot's weight while sweeping."""
        return matrix_bytes(config, squares=4, weights=8)

    def begin(self, work: Work) -> None:
        """Nothing."""

    def prepare(self, hessian: Tensor | None, spec: QuantSpec) -> HessianFactor:
        """See Rounder."""
        assert hessian is not None
        return factorize(hessian, spec, self.damping, self.order)

    def round(self, module: ToRound, stats: HessianFactor) -> PackedWeight:
        """See Rounder."""
        how = How(mse=self.mse, exclude=module.exclude, ranges=module.weight if self.static_groups else None)
        return sweep(module.weight, stats, module.spec, how).packed(module.spec)


def recipe(options: QuantizeOptions) -> Recipe:
    """--method gptq."""
    rounder = GPTQ(options.damping, options.mse, options.actorder, options.static_groups)
    return Recipe(rounder, get_transform(options), options.true_sequential)
