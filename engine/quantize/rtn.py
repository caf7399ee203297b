"""Round to nearest: no statistics, one block in memory. The baseline that every other method must beat."""

from dataclasses import dataclass

from torch import Tensor

from ...kernels.layout import PackedWeight, QuantSpec
from ..model.config import ModelConfig
from .grid import round_nearest
from .options import QuantizeOptions
from .pipeline import Recipe, ToRound
from .rounding import matrix_bytes
from .transforms import get_transform
from .work import Work


@dataclass(frozen=True, slots=True)
class RTN:
    """mse: exponent of the search for the range, 0 takes the whole range."""

    mse: float = 0.0
    statistics = ""
    needs_inputs = False
    rows_independent = True

    def settings(self) -> dict[str, object]:
        """See Rounder."""
        return {"mse": self.mse}

    def peak_bytes(self, config: ModelConfig, num_tokens: int) -> int:
        """Eight of the widest slot's weight, for rounding, errors and packing."""
        return matrix_bytes(config, squares=0, weights=8)

    def begin(self, work: Work) -> None:
        """Nothing."""

    def prepare(self, hessian: Tensor | None, spec: QuantSpec) -> None:
        """Nothing."""

    def round(self, module: ToRound, stats: None) -> PackedWeight:
        """See Rounder."""
        return round_nearest(module.weight, module.spec, self.mse, module.exclude)


def recipe(options: QuantizeOptions) -> Recipe:
    """--method rtn. Raises ConfigError for an option that rounding to nearest has no use for."""
    options.refuse_actorder("it rounds every weight by itself")
    return Recipe(RTN(options.mse), get_transform(options))
